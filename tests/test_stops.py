"""The server is stopped in any phase, or its worker thread dies."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forking
import pytest
import requests
from conftest import (
    GIVE_UP_S,
    ROOT,
    PlayedQueue,
    ServerProcess,
    StartServer,
    params_for,
    seen_by_all,
    until,
)
from crashing import OFFER, log_of, post, status_of
from fake_generator import FakeGenerator
from holding import DECODING, DENOISING, WITHIN, Hold
from PIL import Image

from api.generate_request import Limits
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from application import create_app
from generation.previews import Previews
from storage.task_store import TaskStore
from task import GenerationParams, Phase, Report, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker


def test_sigterm_in_any_phase_exits_0_and_the_tasks_are_done_after_the_next_start(
    start_server: StartServer, hold: Hold
) -> None:
    """A task is interrupted repeatedly. A graceful stop does not count as an attempt."""
    server = start_server("--model", "noise-flux1", environment=forking.NEW_PROCESS)
    assert server.get("/health").json()["status"] == "loading"
    first = server.submit(width=512, height=512, steps=20, seed=1)["task_id"]
    second = server.submit(seed=2)["task_id"]
    ends: dict[str, Callable[[dict[str, Any]], bool]] = {
        "loading": lambda status: status["status"] == "waiting",
        "text encoding": lambda status: status["status"] != "waiting",
        "the first step": lambda status: status["steps_done"] >= 1,
        "a later step": lambda status: status["steps_done"] >= 10,
        "decoding": lambda status: status.get("phase") == "decoding",
        "image encoding": lambda status: status.get("phase", "image_encoding") == "image_encoding",
        "idle": lambda status: status["status"] == "done",
    }
    held: dict[str, dict[str, Any]] = {  # how the next server holds the task
        "loading": {},
        "text encoding": {},
        "the first step": {"step": 10},
        "a later step": {"phase": DECODING},
    }
    for name, reached in ends.items():
        server.wait_for(first, reached)
        if name == "idle":
            server.wait_until_ended(second)
        assert server.stop(signal.SIGTERM) == 0, name
        assert "Traceback" not in log_of(server), name
        if name in held:
            hold.close(**held[name])
        else:
            hold.open()
        server = start_server("--model", "noise-flux1", hold=hold)
        if "step" in name or name == "loading":
            tasks = server.get("/queue").json()["tasks"]
            assert [task["task_id"] for task in tasks] == [first, second], name
    for task_id in (first, second):
        assert status_of(server, task_id)["status"] == "done"
        assert server.get("/image", task_id=task_id).status_code == 200


def test_a_step_that_takes_longer_is_left_and_its_task_runs_again_after_the_next_start(
    start_server: StartServer, hold: Hold
) -> None:
    """The step never ends, and the process does: not the end of the step is waited for."""
    hold.close(after=1, phase=WITHIN + DENOISING)
    server = start_server("--model", "noise-flux1", "--drain-s", "1", hold=hold)
    first = server.submit(seed=1, count=2)["task_id"]
    second = server.submit(seed=2)["task_id"]
    server.wait_for(first, lambda s: s["images_done"] == 1 and s["steps_done"] >= 1)
    for _ in range(2):  # as often as it takes: a stop is no attempt
        assert server.stop(signal.SIGTERM) == 0
        assert "the running step did not end in time" in log_of(server)
        assert "tasks that wait for the next start: 2" in log_of(server)
        assert "Traceback" not in log_of(server)
        hold.close(phase=WITHIN + DENOISING)
        server = start_server("--model", "noise-flux1", "--drain-s", "1", hold=hold)
        server.wait_for(first, lambda s: s["steps_done"] >= 1)
        assert status_of(server, first)["images_done"] == 1, "it is not drawn again"
    hold.open()
    for task_id, images in ((first, 2), (second, 1)):
        assert server.wait_until_ended(task_id)["images_done"] == images
        for index in range(images):
            assert server.get("/image", task_id=task_id, index=index).status_code == 200


def draining(start_server: StartServer, hold: Hold, drain_s: int) -> tuple[ServerProcess, str, str]:
    """A server that was asked to stop while it draws: with the running and the waiting task."""
    hold.close()
    server = start_server("--model", "noise-flux1", "--drain-s", str(drain_s), hold=hold)
    running = server.submit()["task_id"]
    waiting = server.submit()["task_id"]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    server.process.send_signal(signal.SIGTERM)
    return server, running, waiting


def test_a_drain_finishes_the_running_task_before_the_exit(
    start_server: StartServer, hold: Hold
) -> None:
    server, running, waiting = draining(start_server, hold, 600)
    until(lambda: server.get("/health").json()["status"] == "draining")
    hold.open()
    assert server.stop(signal.SIGTERM) == 0
    assert f"task {running} is done" in log_of(server)
    server = start_server("--model", "noise-flux1")
    assert status_of(server, running)["status"] == "done"
    assert server.wait_until_ended(waiting)["status"] == "done"
    assert f"task {running} is running" not in log_of(server)


def test_while_draining_a_submit_is_refused_and_health_says_so(
    start_server: StartServer, hold: Hold
) -> None:
    server, running, waiting = draining(start_server, hold, 3600)
    until(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json()["status"] == "draining"
    refused = post(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
    assert status_of(server, running)["status"] == "running"
    assert requests.delete(server.url + "/delete", params={"task_id": running}, timeout=60).ok, (
        "a cancel ends the drain"
    )
    assert server.process.wait(GIVE_UP_S) == 0
    hold.open()
    server = start_server("--model", "noise-flux1")
    assert status_of(server, running)["status"] == "cancelled"
    assert server.wait_until_ended(waiting)["status"] == "done"


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[PlayedQueue]:
    store = TaskStore(tmp_path / "data")
    yield PlayedQueue(OFFER, TimingModel(), store)
    store.close()


def test_a_worker_thread_that_dies_is_replaced_and_its_task_is_tried_once_more(
    queue: PlayedQueue, tmp_path: Path
) -> None:
    deaths = {"deadly once": 1, "deadly": 10, "harmless": 0}

    def draw(asked: GenerationParams, _: Report) -> Image.Image:
        deaths[asked.prompt] -= 1
        if deaths[asked.prompt] >= 0:
            raise SystemExit
        return Image.new("RGB", (16, 16))

    generator = FakeGenerator(draw)
    worker = Worker(queue.worker, generator, lambda error: pytest.fail(str(error)))
    ids = {name: queue.submit(params_for(name), priority=0)[0].task_id for name in deaths}
    worker.start()
    until(lambda: not queue.unfinished(1, 0)[1])
    submission = Submission(
        seen_by_all(queue), OFFER, Limits(), generator.refusal, places=WaitingPlaces(1)
    )
    app = create_app(
        queue,
        worker,
        generator,
        submission,
        places=WaitingPlaces(1),
        previews=Previews(on=False),
        data_dir=tmp_path,
        max_body_bytes=1000,
    )
    assert app.test_client().get("/health").get_json()["worker_restarts"] == 3
    assert worker.stop(GIVE_UP_S)
    assert queue.status(ids["deadly once"]).status is TaskStatus.DONE
    assert queue.status(ids["harmless"]).status is TaskStatus.DONE
    view = queue.status(ids["deadly"])
    assert (view.status, view.error_code) == (TaskStatus.FAILED, "ended_too_often")


def test_a_picture_that_comes_after_the_stop_is_left_without_an_error(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)

    def draw(_: GenerationParams, report: Report) -> Image.Image:
        report(Phase.DECODING, 4, 4)
        reached.set()
        go_on.wait(GIVE_UP_S)
        return Image.new("RGB", (16, 16))

    worker = Worker(queue.worker, FakeGenerator(draw), lambda error: pytest.fail(str(error)))
    task_id = queue.submit(params_for(), priority=0)[0].task_id
    before = threading.enumerate()  # workers of other tests
    worker.start()
    assert reached.wait(GIVE_UP_S)
    (thread,) = [one for one in threading.enumerate() if one.name == "worker" and one not in before]
    assert not worker.stop(0)
    queue.worker.release_all()
    go_on.set()
    thread.join(GIVE_UP_S)
    assert errors == []
    assert queue.status(task_id).status is TaskStatus.WAITING


HANGS = """
import sys, threading, server
server.STOP_LIMIT_S = 0.1
def hang_here(self):
    threading.Event().wait()
server.Server.stop = hang_here
sys.exit(server.main(sys.argv[1:]))
"""


def test_a_stop_that_hangs_ends_and_the_log_says_where(tmp_path: Path) -> None:
    arguments = ("--model", "noise-flux1", "--port", "0", "--data-dir", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, *arguments],
        cwd=ROOT,
        env=forking.clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        next(line for line in process.stderr if "http://" in line)
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
        assert process.wait(GIVE_UP_S) == 1
    assert "hang_here" in log
