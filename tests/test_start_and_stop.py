"""Starting with the documented options, ending with Ctrl-C, and every way a start can fail."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forking
import pytest
from conftest import GIVE_UP_S, RunServer, ServerProcess, StartServer


def test_the_documented_command_serves_the_tiny_model_where_there_is_no_gpu(
    start_server: StartServer,
) -> None:
    is_mac = sys.platform == "darwin"
    server = start_server("--quantize", "8", model="tiny" if is_mac else None)
    assert server.get("/health").json()["model"] == "tiny"
    if not is_mac:
        assert any("no GPU" in line and "simple scenes" in line for line in server.log)
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"


def test_http_answers_before_the_model_is_loaded_and_says_loading(
    start_server: StartServer,
) -> None:
    options = ("--model", "noise-flux2", "--quantize", "4")
    server = start_server(*options, environment=forking.NEW_PROCESS)
    health = server.get("/health").json()
    accepted = server.submit()
    assert (health["status"], accepted["server"]) == ("loading", "loading")
    status = server.get("/status", task_id=accepted["task_id"]).json()
    assert (status["server"], status["status"]) == ("loading", "waiting")
    assert server.wait_until_ended(accepted["task_id"])["status"] == "done"
    assert server.get("/health").json()["quantize"] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_it_cleanly(start_server: StartServer, number: int) -> None:
    server = start_server("--model", "noise-flux1")
    server.wait_until_ended(server.submit()["task_id"])
    assert server.stop(number) == 0
    assert "Traceback" not in "".join(server.log)


def test_many_signals_at_once_end_it_like_one(start_server: StartServer) -> None:
    for _ in range(3):
        server = start_server("--model", "noise-flux1")
        for number in (signal.SIGINT, signal.SIGTERM) * 3:
            server.process.send_signal(number)
        assert server.stop() == 0
        assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("host", ["localhost", "*", "0.0.0.0"])
def test_a_host_with_several_addresses_is_served(start_server: StartServer, host: str) -> None:
    server = start_server("--model", "noise-flux1", "--host", host)
    port = server.url.rsplit(":", 1)[1]
    server.url = f"http://127.0.0.1:{port}"
    assert server.get("/health").status_code == 200


def test_ctrl_c_ends_it_in_the_middle_of_a_task(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    task_id = server.submit(width=2048, height=2048, steps=100)["task_id"]
    server.wait_for(task_id, lambda s: s["steps_done"] >= 1)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def test_options_come_from_the_environment_and_the_command_line_wins(
    run_server: RunServer,
) -> None:
    environment = {"MFLUX_SERVER_MODEL": "no-such-model", "MFLUX_SERVER_PORT": "0"}
    ended = run_server(**environment)
    assert ended.returncode == 2
    assert "there is no model 'no-such-model'" in ended.stderr
    ended = run_server("--model", "another", **environment)
    assert "there is no model 'another'" in ended.stderr
    ended = run_server(MFLUX_SERVER_PORT="http")
    assert ended.returncode == 2
    assert "MFLUX_SERVER_PORT: " in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "7"], "--quantize"),
        (["--port", "70000"], "--port"),
        (["--port", "http"], "a whole number from 0 to 65535"),
        (["--log-level", "loud"], "--log-level"),
        (["--nonsense"], "--nonsense"),
        (["--data-dir", ""], "--data-dir: must name a folder, and is empty"),
        (["--data-dir", "  "], "--data-dir: must name a folder, and is empty"),
        (["--model", "noise-flux1", "--path", "/somewhere"], "--path"),
    ],
)
def test_a_bad_option_is_refused_by_name(
    start_server: StartServer, arguments: list[str], said: str
) -> None:
    code, log = start_server(*arguments, wait=False).refused()
    assert code == 2
    assert said in log
    assert "Traceback" not in log


def test_a_port_in_use_ends_the_start_with_one_sentence(
    start_server: StartServer, server: ServerProcess
) -> None:
    port = server.url.rsplit(":", 1)[1]
    code, log = start_server("--model", "noise-flux1", "--port", port, wait=False).refused()
    assert code == 1
    assert log.splitlines()[-1] == (
        f"server.py: cannot listen on 127.0.0.1, port {port}: it is in use. "
        "Choose another one with --port, or stop what listens there."
    )
    assert "Traceback" not in log


def test_an_unavailable_host_ends_the_start_with_one_sentence(start_server: StartServer) -> None:
    code, log = start_server("--model", "noise-flux1", "--host", "999.1.1.1", wait=False).refused()
    assert code == 1
    assert "cannot listen on 999.1.1.1" in log
    assert "Traceback" not in log


def test_a_data_dir_that_cannot_be_made_is_one_clear_sentence(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    data_dir = str(tmp_path / "file" / "x")
    code, log = start_server("--model", "noise-flux1", "--data-dir", data_dir, wait=False).refused()
    assert code == 1
    assert "cannot be used" in log
    assert "Traceback" not in log


def test_a_repository_that_cannot_be_reached_is_one_clear_message(
    start_server: StartServer,
) -> None:
    """Up to the network: there is none here, and HF_HUB_OFFLINE makes sure of it."""
    server = start_server("--model", "schnell", wait=False)
    assert server.process.wait(GIVE_UP_S) == 1
    server.stop()
    log = "".join(server.log)
    assert "black-forest-labs/FLUX.1-schnell" in log
    assert "choose another model (--model)" in log
    assert "Traceback" not in log


@pytest.fixture
def start_with_hub(run_server: RunServer) -> Iterator[RunServer]:
    """Starts the server against a model hub on this machine that refuses everything."""
    refusal: dict[str, Any] = {"status": 404, "code": ""}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(refusal["status"])
            self.send_header("X-Error-Code", refusal["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()

    def start(status: int, code: str) -> subprocess.CompletedProcess[str]:
        refusal.update(status=status, code=code)
        return run_server(
            *("--model", "schnell", "--port", "0"),
            HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
            HF_HUB_OFFLINE="0",
            HF_HOME="/nonexistent",
        )

    yield start
    hub.shutdown()
    hub.server_close()


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "GatedRepo", "accept the licence at huggingface.co/black-forest-labs/FLUX.1-schnell"),
        (404, "RepoNotFound", "There is no repository black-forest-labs/FLUX.1-schnell"),
        (500, "", "check the connection"),
    ],
)
def test_a_refusal_of_the_hub_is_one_clear_message(
    start_with_hub: RunServer,
    status: int,
    code: str,
    advice: str,
) -> None:
    ended = start_with_hub(status, code)
    assert ended.returncode == 1
    assert advice in ended.stderr
    assert "--model" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_path_that_is_no_folder_is_one_clear_message(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "dev", "--path", str(tmp_path / "none"), wait=False)
    assert server.process.wait(GIVE_UP_S) == 1
    server.stop()
    log = "".join(server.log)
    assert f"cannot be read from {tmp_path / 'none'}" in log
    assert "Traceback" not in log


def test_without_mlx_one_sentence_says_what_to_install(
    run_server: RunServer, tmp_path: Path
) -> None:
    """A module that fails to import stands in for a machine without mlx."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('no mlx here')")
    ended = run_server(PYTHONPATH=str(tmp_path))
    assert ended.returncode == 1
    assert "pip install --no-deps -r requirements.txt" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
