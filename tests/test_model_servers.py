"""Servers whose models cannot be loaded, are freed, switched, downloaded or chosen badly."""

from pathlib import Path

import pytest
import requests
from conftest import RunServer, StartServer
from generate_calls import drawn, fetched, health_of, post, submit


def test_an_operators_key_is_asked_for_before_loading(start_server: StartServer) -> None:
    server = start_server("--models", "noise-flux1,noise-flux2", "--operator-key", "sésame")
    url = server.url + "/models/noise-flux2/load"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        refused = requests.post(url, headers=headers, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")
    key = {"Authorization": "Bearer sésame".encode()}
    assert requests.post(url, headers=key, timeout=60).status_code == 200
    server.wait_until_ended(submit(server, model="noise-flux2", prompt="x"))
    assert health_of(server).loaded_models == ["noise-flux2"]


def test_a_model_that_cannot_be_loaded_fails_only_its_tasks(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--models", "noise-flux1,dev,noise-flux2")
    lost, kept = (submit(server, model=name, prompt="x") for name in ("dev", "noise-flux2"))
    failed = server.wait_until_ended(lost)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "model_load_failed")
    message = failed["error"]["message"]
    assert "\n" not in message
    assert "dev" in message
    assert "cannot be downloaded" in message
    assert "huggingface.co/black-forest-labs/FLUX.1-dev" in message
    assert server.wait_until_ended(kept)["status"] == "done"
    health = server.get("/health")
    assert health.status_code == 200
    assert health.json()["last_error"].startswith("The weights of dev cannot be downloaded")
    assert drawn(server, model="noise-flux1", prompt="x")
    ordered = requests.post(server.url + "/models/dev/load", timeout=60)
    assert ordered.json() == {"model": "dev", "loaded": False}
    assert drawn(server, model="noise-flux1", prompt="x")
    assert server.stop() == 0


def test_models_are_freed_when_nothing_comes_and_loaded_again(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux2", "--unload-after-s", "1")
    first = drawn(server, prompt="x")
    weights_bytes = health_of(server).memory.active_bytes
    while health_of(server).loaded_models:  # ends, or the test run gives up on it
        pass
    health = health_of(server)
    assert health.status == "ready"
    assert health.memory.active_bytes < 0.5 * weights_bytes
    assert not server.get("/models/noise-flux2").json()["loaded"]
    answer = post(server, prompt="x").json()
    assert fetched(server, answer["task_id"]) == first
    load_s = server.get("/stats").json()["load_s"]
    assert answer["expected_time_seconds"] >= 0.5 * load_s
    assert answer["wait_p90_s"] >= answer["expected_time_seconds"]


def test_a_model_that_two_clients_do_not_share_is_switched_to_and_back(
    start_server: StartServer,
) -> None:
    server = start_server("--models", "noise-flux1,noise-flux2", "--affinity-s", "0")
    names = ["noise-flux1", "noise-flux2"] * 3
    tasks = [submit(server, model=name, prompt="x") for name in names]
    files = [fetched(server, task_id) for task_id in tasks]
    assert files[0] == files[2] == files[4] != files[1] == files[3] == files[5]
    assert health_of(server).loaded_models == ["noise-flux2"]
    assert "".join(server.log).count("makes room") >= 5


def test_a_download_without_a_network_ends_with_one_sentence(
    run_server: RunServer, tmp_path: Path
) -> None:
    ended = run_server(
        "--download", "dev", "--data-dir", str(tmp_path), HF_HUB_CACHE=str(tmp_path / "cache")
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("server.py: The weights of dev cannot be downloaded from huggingface.co")
    assert "Traceback" not in ended.stderr


def test_a_download_of_what_is_there_ends_well_and_of_what_is_not_known_is_refused(
    tmp_path: Path, run_server: RunServer, start_server: StartServer
) -> None:
    ended = run_server("--download", "noise-flux1", "--data-dir", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (
        0,
        "The weights of noise-flux1 are on this machine.\n",
    )
    code, log = start_server("--download", "devil", wait=False).refused()
    assert code == 2
    assert "there is no model 'devil'" in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "devil"), "argument --models: there is no model 'devil'"),
        (("--models", "x=/no/such@dev"), "argument --models: there is no folder /no/such"),
        (("--models", "noise-flux1", "--quantize-choices", "7"), "argument --quantize-choices"),
        (("--lora-dir", "/no/such"), "argument --lora-dir: there is no folder /no/such"),
    ],
)
def test_a_bad_choice_of_models_ends_the_start_with_one_line(
    arguments: tuple[str, ...], words: str, start_server: StartServer
) -> None:
    code, log = start_server(*arguments, wait=False).refused()
    assert code == 2
    assert words in log
    assert len(log.strip().splitlines()) == 1


def test_a_folder_without_weights_fails_the_tasks_that_name_it(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    server = start_server("--model", "noise-flux1", "--models", f"mine={tmp_path}/mine@z-image")
    listed = server.get("/models/mine").json()
    assert (listed["allowed"], listed["title"]) == (True, "mine, from z-image")
    failed = server.wait_until_ended(submit(server, model="mine", prompt="x"))
    assert failed["error"]["code"] == "model_load_failed"
    assert "mine" in failed["error"]["message"]
    assert drawn(server, model="noise-flux1", prompt="x")
