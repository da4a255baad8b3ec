"""Requests whose answer waits: long-polls on /status and /image, and the places they take."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, StartServer, until
from live import Connection, SteppedServer
from PIL import Image

from api import long_poll
from api.waiting_places import RETRY_AFTER_S, WaitingPlaces
from errors import TooManyWaiting
from scheduler.events import EventKind, EventLog


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SteppedServer]:
    server = SteppedServer(tmp_path)
    yield server
    server.close()


def until_listening(server: SteppedServer, listeners: int) -> None:
    pause = threading.Event()
    for _ in range(GIVE_UP_S * 100):
        if server.queue.events.listeners == listeners:
            return
        pause.wait(0.01)
    raise AssertionError(f"{server.queue.events.listeners} listen, not {listeners}")


def test_a_waiting_status_answers_when_a_step_has_ended(server: SteppedServer) -> None:
    task_id = server.running(steps=3)
    before = server.status(task_id)
    waiting = Connection(server, f"/status?task_id={task_id}&wait=60")
    until_listening(server, 1)
    server.step(2)
    status = waiting.json()
    assert status["version"] > before["version"]
    server.step()
    while status["steps_done"] < 2:
        status = server.status(task_id, wait=60, since=status["version"])
    assert status["status"] == "running"


def test_a_waiting_status_misses_nothing_that_came_before_it_was_asked(
    server: SteppedServer,
) -> None:
    task_id = server.running()
    version = server.status(task_id)["version"]
    server.step()
    reported = server.status(task_id, wait=60, since=version)["version"]
    assert reported > version
    assert server.status(task_id, wait=300, since=version)["version"] >= reported


def test_a_waiting_status_answers_at_the_end_and_at_once_when_it_has_ended(
    server: SteppedServer,
) -> None:
    task_id = server.submit()
    server.end()
    status = server.status(task_id, wait=60)
    while status["status"] in ("waiting", "running"):
        status = server.status(task_id, wait=60, since=status["version"])
    assert status["status"] == "done"
    assert server.status(task_id, wait=300, since=status["version"] + 1000)["status"] == "done"


def test_a_waiting_status_answers_as_it_stands_when_time_is_up(server: SteppedServer) -> None:
    task_id = server.running()
    version = server.status(task_id)["version"]
    assert server.status(task_id, wait=1)["version"] == version


def test_a_waiting_status_answers_when_the_task_is_cancelled(server: SteppedServer) -> None:
    server.running()
    task_id = server.submit()
    waiting = Connection(server, f"/status?task_id={task_id}&wait=60")
    until_listening(server, 1)
    requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)
    assert waiting.json()["status"] == "cancelled"


def test_one_call_waits_for_the_picture(server: SteppedServer) -> None:
    task_id = server.running()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(server.get, "/image", task_id=task_id, wait=60)
        until_listening(server, 1)
        server.end()
        picture = Image.open(BytesIO(answer.result().content))
    assert picture.size == (64, 64)


def test_a_waiting_image_is_a_409_when_time_is_up_and_a_410_when_it_was_cancelled(
    server: SteppedServer,
) -> None:
    running, waiting = server.running(), server.submit()
    assert server.get("/image", task_id=running, wait=1).status_code == 409
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(server.get, "/image", task_id=waiting, wait=60)
        until_listening(server, 1)
        requests.post(server.url + "/delete", params={"task_id": waiting}, timeout=GIVE_UP_S)
        assert answer.result().status_code == 410


@pytest.mark.parametrize("query", ["wait=301", "wait=-1", "wait=x", "since=-1", "since=x"])
def test_a_wait_that_cannot_be_is_a_400_that_names_it(server: SteppedServer, query: str) -> None:
    task_id = server.submit()
    answer = requests.get(f"{server.url}/status?task_id={task_id}&{query}", timeout=GIVE_UP_S)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == query.split("=", maxsplit=1)[0]


def test_waiting_for_an_unknown_task_is_a_404_at_once(server: SteppedServer) -> None:
    assert server.get("/status", task_id="nothing", wait=300).status_code == 404
    assert server.get("/image", task_id="nothing", wait=300).status_code == 404


def test_without_a_free_place_the_answer_comes_at_once(tmp_path: Path) -> None:
    server = SteppedServer(tmp_path, threads=2)
    task_id = server.running()
    first = Connection(server, f"/status?task_id={task_id}&wait=300")
    until_listening(server, 1)
    status = server.status(task_id, wait=300)
    assert status["status"] == "running"
    assert server.get("/image", task_id=task_id, wait=300).status_code == 409
    server.end()
    assert first.json()["version"] > status["version"]
    server.close()


def test_disconnecting_frees_the_place_and_loses_no_picture(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_S", 0.05)
    task_id = server.running()
    for path in ("status", "image"):
        waiting = Connection(server, f"/{path}?task_id={task_id}&wait=300")
        until_listening(server, 1)
        waiting.close()
        while server.server.places.taken:
            pass
    server.end()
    assert server.get("/image", task_id=task_id, wait=60).status_code == 200


def test_the_stop_of_the_server_ends_what_waits(server: SteppedServer) -> None:
    server.running()
    task_id = server.submit()
    waiting = Connection(server, f"/status?task_id={task_id}&wait=300")
    until_listening(server, 1)
    server.close()
    assert waiting.json()["status"] == "waiting"


def test_a_version_from_before_a_restart_is_answered_at_once(start_server: StartServer) -> None:
    first = start_server("--model", "noise-flux1")
    done = first.submit()["task_id"]
    waiting = first.submit(width=2048, height=2048, steps=100)["task_id"]
    first.wait_until_ended(done)
    versions = {
        task_id: first.get("/status", task_id=task_id).json()["version"]
        for task_id in (done, waiting)
    }
    first.stop()
    second = start_server("--model", "noise-flux1")
    for task_id, version in versions.items():
        status = second.get("/status", task_id=task_id, wait=300, since=version).json()
        assert status["version"] > version
    requests.delete(second.url + "/delete", params={"task_id": waiting}, timeout=GIVE_UP_S)


def test_places_are_counted_and_given_back() -> None:
    places = WaitingPlaces(1)
    with places.place(), ThreadPoolExecutor(1) as another:
        with places.place():
            assert places.taken == 1, "a thread has one place, however often it takes it"
        refused = another.submit(places.place().__enter__).exception()
        assert isinstance(refused, TooManyWaiting)
        assert refused.retry_after_s == RETRY_AFTER_S
        assert places.taken == 1
    assert places.taken == 0


def test_a_listener_gets_the_events_of_its_tasks_alone() -> None:
    log = EventLog()
    start = log.last_id
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(log.wait, start, GIVE_UP_S, {"a"})
        both = threads.submit(log.wait, start, GIVE_UP_S, {"a", "b"})
        while log.listeners < 2:
            pass
        log.publish(EventKind.STEP, "b")
        assert [event.task_id for event in both.result()] == ["b"]
        assert log.listeners == 1
        log.publish(EventKind.DONE, "a")
        assert [event.kind for event in one.result()] == [EventKind.DONE]
    assert [event.kind for event in log.wait(start, 0)] == [EventKind.STEP, EventKind.DONE]


def test_versions_never_fall_and_events_that_are_kept_no_more_are_known_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scheduler.events.KEPT", 3)
    log = EventLog()
    start = log.last_id
    answer: dict[str, int] = {}
    for number in range(12):
        log.publish(EventKind.STEP, "abcdef"[number * number % 6])
        for task_id in "abcdefg":
            version = log.version(task_id)
            assert version >= answer.get(task_id, start)
            answer[task_id] = version
    assert not log.reaches_back(start)
    assert not log.reaches_back(log.last_id - 4)
    assert log.reaches_back(log.last_id - 3)
    assert not log.reaches_back(log.last_id + 1)
    assert len(log.wait(start, 0)) == 3


def test_events_that_come_in_one_go_wake_a_listener_once() -> None:
    log = EventLog(pause_s=0.2)
    after, rounds = log.last_id, 0
    seen: list[Any] = []

    def listen() -> None:
        nonlocal after, rounds
        while len(seen) < 100:
            found = log.wait(after, GIVE_UP_S)
            after, rounds = found[-1].id, rounds + 1
            seen.extend(found)

    thread = threading.Thread(target=listen)
    thread.start()
    while not log.listeners:
        pass
    for _ in range(100):
        log.publish(EventKind.STEP, "a")
    thread.join(GIVE_UP_S)
    assert [event.id for event in seen] == list(range(seen[0].id, seen[0].id + 100))
    assert rounds < 50


def test_threads_are_started_when_requests_find_the_others_busy(tmp_path: Path) -> None:
    server = SteppedServer(tmp_path, threads=4)
    threads = server.server._http._dispatcher.threads
    assert not threads
    task_id = server.running()
    waiting = [Connection(server, f"/status?task_id={task_id}&wait=60") for _ in range(2)]
    until(lambda: server.get("/health").status_code == 200 and len(threads) >= 3)
    server.end()
    for connection in waiting:
        assert connection.json()["task_id"] == task_id
        connection.close()
    assert len(threads) <= 4
    server.close()
