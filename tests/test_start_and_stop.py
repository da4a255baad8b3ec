"""Starting with the documented options, ending with Ctrl-C, and every way a start can fail."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, ServerProcess

StartServer = Callable[..., ServerProcess]


def run_server(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A start that ends by itself."""
    return subprocess.run(
        [sys.executable, "server.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_documented_command_serves_the_tiny_model_where_there_is_no_gpu(
    start_server: StartServer,
) -> None:
    server = start_server(
        "--quantize", "8", *(["--model", "tiny"] if sys.platform == "darwin" else [])
    )
    assert server.get("/health").json()["model"] == "tiny"
    if sys.platform != "darwin":
        assert any("no GPU" in line and "abstract noise" in line for line in server.log)
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"


def test_http_answers_before_the_model_is_loaded_and_says_loading(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "tiny-flux2", "--quantize", "4")
    health = server.get("/health").json()
    accepted = server.submit()
    assert (health["status"], accepted["server"]) == ("loading", "loading")
    status = server.get("/status", task_id=accepted["task_id"]).json()
    assert (status["server"], status["status"]) == ("loading", "waiting")
    assert server.wait_until_ended(accepted["task_id"])["status"] == "done"
    assert server.get("/health").json()["quantize"] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_it_cleanly(start_server: StartServer, number: int) -> None:
    server = start_server("--model", "tiny")
    server.wait_until_ended(server.submit()["task_id"])
    assert server.stop(number) == 0
    assert "Traceback" not in "".join(server.log)


def test_ctrl_c_ends_it_in_the_middle_of_a_task(start_server: StartServer) -> None:
    server = start_server("--model", "tiny")
    task_id = server.submit(width=2048, height=2048, steps=100)["task_id"]
    server.wait_for(task_id, lambda s: s["steps_done"] >= 1)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def test_options_come_from_the_environment_and_the_command_line_wins() -> None:
    environment = {"MFLUX_SERVER_MODEL": "no-such-model", "MFLUX_SERVER_PORT": "0"}
    ended = run_server(environment=environment)
    assert ended.returncode == 1
    assert "There is no model 'no-such-model'" in ended.stderr
    ended = run_server("--model", "another", environment=environment)
    assert "There is no model 'another'" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "7"], "--quantize"),
        (["--port", "70000"], "--port"),
        (["--port", "http"], "a whole number from 0 to 65535"),
        (["--log-level", "loud"], "--log-level"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_bad_option_is_refused_by_name(arguments: list[str], said: str) -> None:
    ended = run_server(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_one_clear_sentence(server: ServerProcess, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    ended = run_server("--model", "tiny", "--port", port, "--data-dir", str(tmp_path))
    assert ended.returncode == 1
    assert f"cannot start: port {port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_data_dir_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run_server("--model", "tiny", "--port", "0", "--data-dir", str(tmp_path / "file" / "x"))
    assert ended.returncode == 1
    assert "cannot start" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_repository_that_cannot_be_reached_is_one_clear_message(
    start_server: StartServer,
) -> None:
    """Up to the network: there is none here, and HF_HUB_OFFLINE makes sure of it."""
    server = start_server("--model", "schnell", wait=False)
    assert server.process.wait(120) == 1
    server.stop()
    log = "".join(server.log)
    assert "black-forest-labs/FLUX.1-schnell" in log
    assert "choose another model (--model)" in log
    assert "Traceback" not in log


def test_a_path_that_is_no_folder_is_one_clear_message(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "dev", "--path", str(tmp_path / "none"), wait=False)
    assert server.process.wait(120) == 1
    server.stop()
    log = "".join(server.log)
    assert f"cannot be read from {tmp_path / 'none'}" in log
    assert "Traceback" not in log


def test_without_mlx_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    """A module that fails to import stands in for a machine without mlx."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('no mlx here')")
    ended = run_server(environment={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 1
    assert "pip install --no-deps -r requirements.txt" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
