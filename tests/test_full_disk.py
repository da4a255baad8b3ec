"""Full and read-only disks, with real servers."""

import signal
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import requests
from conftest import StartServer, until
from crashing import log_of, post, refusal, status_of
from holding import Hold
from PIL import Image
from small_disk import fill_disk


def test_a_full_disk_is_reported_loses_nothing_and_is_recovered_from(
    start_server: StartServer, hold: Hold, mount: Callable[[str], Path]
) -> None:
    disk = mount("size=8m")
    server = start_server("--model", "noise-flux1", "--data-dir", str(disk / "data"), hold=hold)
    finished = server.submit(format="PNG")["task_id"]
    assert server.wait_until_ended(finished)["status"] == "done"
    image = server.get("/image", task_id=finished, delete="false").content
    hold.close()
    running = server.submit(width=1024, height=1024, format="PNG")["task_id"]
    waiting = server.submit()["task_id"]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    filler = fill_disk(disk)

    accepted = [finished, running, waiting]
    refused = 0
    while refused < 20:
        answer = post(server, prompt="a long prompt " * 500)
        if answer.status_code == 200:
            accepted.append(answer.json()["task_id"])
        else:
            refused += 1
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "storage_unavailable")
    hold.open()
    server.wait_for(running, lambda s: s.get("phase") == "image_encoding")
    for _ in range(5):
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "full" in health.json()["last_error"] or "No space" in health.json()["last_error"]
        answer = requests.delete(server.url + "/delete", params={"task_id": waiting}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert status_of(server, waiting)["status"] == "waiting"
        assert status_of(server, finished)["status"] == "done"
        image_now = server.get("/image", task_id=finished, delete="false").content
        assert image_now == image
        assert server.get("/queue").json()["length"] == len(accepted) - 1

    filler.unlink()
    until(lambda: server.get("/health").status_code == 200)
    for task_id in accepted:
        assert server.wait_until_ended(task_id)["status"] == "done"
        picture = Image.open(BytesIO(server.get("/image", task_id=task_id).content))
        picture.load()
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"
    assert server.get("/health").json()["worker_restarts"] == 0
    assert "Traceback" not in log_of(server)
    responses = server.get("/openapi.json").json()["paths"]["/delete"]["delete"]["responses"]
    assert "503" in responses


def test_while_there_is_no_room_for_a_finished_picture_health_is_503(
    start_server: StartServer, hold: Hold, mount: Callable[[str], Path]
) -> None:
    """The database still finds room, the picture does not: nothing can be finished."""
    disk = mount("size=8m")
    hold.close()
    server = start_server("--model", "noise-flux1", "--data-dir", str(disk / "data"), hold=hold)
    task_id = server.submit(width=1024, height=1024, format="PNG")["task_id"]
    server.wait_for(task_id, lambda s: s["steps_done"] >= 1)
    filler = fill_disk(disk, spare_bytes=300_000)
    hold.open()
    until(lambda: server.get("/health").status_code == 503)
    server.wait_for(task_id, lambda s: s.get("phase") == "image_encoding")
    for _ in range(5):
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "No space" in health.json()["last_error"]
    filler.unlink()
    assert server.wait_until_ended(task_id)["status"] == "done"
    until(lambda: server.get("/health").status_code == 200)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_and_a_start_on_a_full_disk_lose_nothing(
    start_server: StartServer, hold: Hold, mount: Callable[[str], Path], number: int
) -> None:
    disk = mount("size=8m")
    start = ("--model", "noise-flux1", "--data-dir", str(disk / "data"))
    hold.close()
    server = start_server(*start, hold=hold)
    running = server.submit(width=1024, height=1024, format="PNG")["task_id"]
    waiting = [server.submit()["task_id"] for _ in range(3)]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    filler = fill_disk(disk)
    until(lambda: server.get("/health").status_code == 503)
    assert server.stop(number) == (0 if number == signal.SIGTERM else -number)
    assert "Traceback" not in log_of(server)

    for _ in range(2):  # a start on the full disk is no attempt
        server = start_server(*start)
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "No space left on device" in health.json()["last_error"]
        assert server.get("/queue").json()["length"] == 4
        assert [status_of(server, id_)["status"] for id_ in (running, *waiting)] == ["waiting"] * 4
        assert server.stop() == 0
    server = start_server(*start)
    filler.unlink()
    for task_id in (running, *waiting):
        assert server.wait_until_ended(task_id)["status"] == "done"


def test_a_read_only_disk_is_refused_with_one_sentence(
    start_server: StartServer, mount: Callable[[str], Path]
) -> None:
    data_dir = mount("ro") / "data"
    server = start_server("--model", "noise-flux1", "--data-dir", str(data_dir), wait=False)
    assert f"The data dir {data_dir} cannot be used: " in refusal(server)
