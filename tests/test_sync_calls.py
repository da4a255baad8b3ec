"""Callers who wait for their picture: who leaves, who stays, who is sent away at once."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from conftest import (
    GIVE_UP_S,
    PlayedQueue,
    ServerProcess,
    StartServer,
    allow,
    seen_by_all,
)
from memory_stores import memory_store

from api.generate_request import Limits
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from compat.sync_calls import Call, SyncCalls
from errors import Gone, NoWorker, QueueFull, StorageUnavailable, TaskFailed, UnknownTask
from models.mflux_registry import read_catalog
from task import Task, TaskStatus
from timing_model import TimingModel

FIELDS = {"prompt": "x", "width": 64, "height": 64}


@pytest.fixture
def queue() -> PlayedQueue:
    return PlayedQueue(allow("noise-flux1"), TimingModel(), memory_store())


def calls_of(queue: PlayedQueue, places: int = 10, **options: Any) -> SyncCalls:
    waiting = WaitingPlaces(places)
    submission = Submission(
        seen_by_all(queue), queue.allowed, Limits(), lambda params: None, places=waiting
    )
    return SyncCalls(seen_by_all(queue), submission, read_catalog(), waiting, **options)


def start(calls: SyncCalls, hung_up: Callable[[], bool] = lambda: False, **how: Any) -> Call:
    return calls.start(calls.prepare(FIELDS), hung_up=hung_up, **how)


def test_a_call_ends_with_the_images_of_its_task(queue: PlayedQueue) -> None:
    with start(calls_of(queue)) as call:
        task = queue.claim()
        assert task
        queue.finish(task.task_id, [b"image"])
        assert call.result().images == [b"image"]
        call.fetched()
    assert queue.status(call.task_id).status is TaskStatus.DONE


def test_writes_after_the_answer_do_not_use_reserved_threads(
    queue: PlayedQueue, caplog: pytest.LogCaptureFixture
) -> None:
    with start(calls_of(queue, places=1)) as call:
        task = queue.claim()
        assert task
        queue.finish(task.task_id, [b"image"])
    with ThreadPoolExecutor(1) as other, ExitStack() as place:
        other.submit(place.enter_context, call._places.place()).result()
        call.fetched()
        assert "stays: Too many requests wait" in caplog.text
        other.submit(place.close).result()
    assert queue.image(call.task_id, 0)[0] == b"image"


def test_a_disconnecting_caller_cancels_its_waiting_task(queue: PlayedQueue) -> None:
    with pytest.raises(Gone, match="hung up"), start(calls_of(queue), lambda: True) as call:
        call.result()
    assert queue.status(call.task_id).status is TaskStatus.CANCELLED


def test_a_running_task_whose_caller_disconnects_is_stopped_at_its_next_step(
    queue: PlayedQueue,
) -> None:
    with start(calls_of(queue), lambda: True) as call:
        assert queue.claim()
        with pytest.raises(Gone):
            call.result()
    assert not queue.next_image(call.task_id, 0, 0)


def test_a_task_with_another_waiting_caller_continues(queue: PlayedQueue) -> None:
    calls = calls_of(queue)
    first, second = (start(calls, client_key="same") for _ in range(2))
    assert first.task_id == second.task_id
    first.close()
    first.close()  # which counts once
    assert queue.status(second.task_id).status is TaskStatus.WAITING
    second.close()
    assert queue.status(second.task_id).status is TaskStatus.CANCELLED


def test_a_caller_gets_a_new_task_while_the_last_caller_of_the_same_key_leaves(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a lock held while a task is submitted or cancelled."""
    calls = calls_of(queue)
    first = start(calls, client_key="same")
    submit, delete, submitted = queue.submit, queue.delete, Event()
    second: list[Future[Call]] = []

    def submit_it(*arguments: Any, **options: Any) -> tuple[Task, int]:
        answer = submit(*arguments, **options)
        assert not calls._lock.locked()
        submitted.set()
        return answer

    def delete_after_the_second_has_submitted(task_id: str, **options: Any) -> TaskStatus:
        second.append(thread.submit(start, calls, client_key="same"))
        assert submitted.wait(GIVE_UP_S)
        return delete(task_id, **options)

    with ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(queue, "submit", submit_it)
        monkeypatch.setattr(queue, "delete", delete_after_the_second_has_submitted)
        first.close()
        call = second[0].result(GIVE_UP_S)
    monkeypatch.undo()
    assert call.task_id != first.task_id
    assert queue.status(first.task_id).status is TaskStatus.CANCELLED
    assert queue.status(call.task_id).status is TaskStatus.WAITING
    call.close()


def test_a_key_whose_task_is_being_cancelled_is_submitted_again(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(queue)
    first = start(calls, client_key="same")
    submit = queue.submit

    def submit_before_the_first_leaves(*arguments: Any, **options: Any) -> tuple[Task, int]:
        answer = submit(*arguments, **options)
        first.close()
        return answer

    monkeypatch.setattr(queue, "submit", submit_before_the_first_leaves)
    second = start(calls, client_key="same")
    assert queue.status(first.task_id).status is TaskStatus.CANCELLED
    assert queue.status(second.task_id).status is TaskStatus.WAITING
    second.close()


def test_a_task_that_could_not_be_cancelled_is_joined_by_the_next_caller_of_its_key(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(task_id: str, **options: Any) -> TaskStatus:
        raise StorageUnavailable

    calls = calls_of(queue)
    first = start(calls, client_key="same")
    monkeypatch.setattr(queue, "delete", refuse)
    first.close()
    monkeypatch.undo()
    with start(calls, client_key="same") as second:
        assert second.task_id == first.task_id
    assert queue.status(first.task_id).status is TaskStatus.CANCELLED


def test_a_task_that_is_done_before_its_last_caller_cancels_it_is_that_of_the_next_caller(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(queue)
    first = start(calls, client_key="same")
    assert queue.claim()
    delete, submit = queue.delete, queue.submit
    submitted: list[str] = []

    def delete_after_it_is_done(task_id: str, **options: Any) -> TaskStatus:
        queue.finish(task_id, [b"image"])
        return delete(task_id, **options)

    def submit_once(*arguments: Any, **options: Any) -> tuple[Task, int]:
        assert not submitted, "it is submitted again and again"
        task, others = submit(*arguments, **options)
        submitted.append(task.task_id)
        return task, others

    monkeypatch.setattr(queue, "delete", delete_after_it_is_done)
    first.close()
    monkeypatch.setattr(queue, "submit", submit_once)
    with start(calls, client_key="same") as second:
        assert second.task_id == first.task_id
        assert second.result().images == [b"image"]


def test_a_key_whose_task_was_cancelled_or_failed_draws_again(queue: PlayedQueue) -> None:
    calls = calls_of(queue)
    with pytest.raises(Gone), start(calls, lambda: True, client_key="key") as hung_up:
        hung_up.result()
    with start(calls, client_key="key") as second:
        assert queue.claim()
        queue.fail(second.task_id, "task_failed", "out of paint")
        with pytest.raises(TaskFailed):
            second.result()
    with start(calls, client_key="key") as third:
        assert queue.claim()
        queue.finish(third.task_id, [b"image"])
        assert third.result().images == [b"image"]
    with start(calls, client_key="key") as fourth:
        assert fourth.result().images == [b"image"]
    assert len({hung_up.task_id, second.task_id, third.task_id}) == 3
    assert fourth.task_id == third.task_id


def test_a_failed_and_a_cancelled_task_are_distinguished(queue: PlayedQueue) -> None:
    calls = calls_of(queue)
    with start(calls) as call:
        assert queue.claim()
        queue.fail(call.task_id, "task_failed", "out of paint")
        with pytest.raises(TaskFailed, match="out of paint"):
            call.result()
    with start(calls) as call:
        queue.delete(call.task_id)
        with pytest.raises(Gone, match="cancelled"):
            call.result()
        queue.delete(call.task_id)  # and now its record
    with pytest.raises((Gone, UnknownTask)):
        queue.status(call.task_id)


def test_a_server_that_stops_keeps_the_task_for_its_next_start(queue: PlayedQueue) -> None:
    with start(calls_of(queue)) as call:
        queue.events.close()
        with pytest.raises(NoWorker, match="next start"):
            call.result()
    assert queue.status(call.task_id).status is TaskStatus.WAITING


def test_a_call_that_would_wait_too_long_gets_429_at_once(queue: PlayedQueue) -> None:
    with pytest.raises(QueueFull, match="and a call that waits may take") as caught:
        start(calls_of(queue, max_wait_s=1e-9))
    assert caught.value.retry_after_s >= 1
    assert queue.unfinished(10, 0) == ([], 0)
    start(calls_of(queue, max_wait_s=0)).close()


def test_without_a_free_place_a_call_is_refused_and_a_closed_one_gives_its_place_back(
    queue: PlayedQueue,
) -> None:
    calls = calls_of(queue, places=1)
    first = start(calls)
    with ThreadPoolExecutor(1) as thread, pytest.raises(QueueFull, match="Too many callers"):
        thread.submit(start, calls).result()
    first.close()
    start(calls).close()
    with pytest.raises(QueueFull):
        start(calls_of(queue, places=1, max_wait_s=1e-9))


ENDLESS = (
    "--model",
    "noise-flux1",
    "--clamp",
    "off",
    "--max-steps",
    "1000",
    "--sync-max-wait-s",
    "0",
)
"""Options of a server with which a task takes minutes, if nobody stops it."""
LONG = {"size": "1024x1024", "width": 1024, "height": 1024, "steps": 1000}


@contextmanager
def connected(
    server: ServerProcess, path: str, body: dict[str, Any], *headers: str
) -> Iterator[socket.socket]:
    """A caller who has asked for something and waits for the answer."""
    address, content = urlsplit(server.url), json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
    head = "\r\n".join([*lines, *headers, "", ""])
    with socket.create_connection((address.hostname, address.port or 0)) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def queued(server: ServerProcess, prompt: str) -> str:
    """The id of the task of this prompt, once it is in the queue."""
    while True:
        for task in server.get("/queue").json()["tasks"]:
            if task["params"]["prompt"] == prompt:
                return str(task["task_id"])


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_connection_that_closes_cancels_its_waiting_and_its_running_task(
    start_server: StartServer, path: str
) -> None:
    server = start_server(*ENDLESS)
    with connected(server, path, {"prompt": "runs", **LONG}):
        running = queued(server, "runs")
        server.wait_for(running, lambda status: status["status"] == "running")
        with connected(server, path, {"prompt": "waits", **LONG}):
            waiting = queued(server, "waits")
        assert server.wait_until_ended(waiting)["status"] == "cancelled"
        assert server.get("/status", task_id=running).json()["status"] == "running"
    assert server.wait_until_ended(running)["status"] == "cancelled"


def test_a_caller_that_lost_the_connection_can_call_again_with_the_same_key(
    start_server: StartServer,
) -> None:
    server = start_server(*ENDLESS)
    path, body = "/v1/images/generations", {"prompt": "mine", "size": "64x64", "steps": 1}
    endless = server.submit(width=1024, height=1024, steps=1000)["task_id"]
    with connected(server, path, body, "Idempotency-Key: k"):
        lost = queued(server, "mine")
    assert server.wait_until_ended(lost)["status"] == "cancelled"
    requests.delete(server.url + "/delete", params={"task_id": endless}, timeout=60)
    drawn = [
        requests.post(server.url + path, json=body, headers={"Idempotency-Key": "k"}, timeout=60)
        for _ in range(2)
    ]
    assert [answer.status_code for answer in drawn] == [200, 200]
    assert drawn[0].json()["data"] == drawn[1].json()["data"]


def test_a_stream_whose_reader_leaves_is_cancelled(start_server: StartServer) -> None:
    server = start_server(*ENDLESS)
    body = {"prompt": "streams", "stream": True, **LONG}
    with connected(server, "/v1/images/generations", body):
        task_id = queued(server, "streams")
    assert server.wait_until_ended(task_id)["status"] == "cancelled"


def test_blocked_callers_leave_threads_for_all_others(start_server: StartServer) -> None:
    server = start_server(*ENDLESS, "--threads", "4")
    body = {"prompt": "blocks", **LONG}
    path = "/v1/images/generations"
    with connected(server, path, body), connected(server, path, body):
        task_id = queued(server, "blocks")
        while server.get("/queue").json()["length"] < 2:
            pass
        refused = requests.post(server.url + path, json=body, timeout=60)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["Retry-After"] == "10"
        assert server.get("/status", task_id=task_id).status_code == 200
        assert server.submit()["task_id"]
        refused = requests.post(server.url + "/sdapi/v1/txt2img", json={"prompt": "x"}, timeout=60)
        assert refused.status_code == 429
        assert refused.json()["error"] == "queue_full"


def test_a_long_queue_is_answered_with_429_and_the_wait(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--sync-max-wait-s", "1")
    for _ in range(5):
        server.submit(width=1024, height=1024, steps=100)
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        answer = requests.post(server.url + path, json={"prompt": "x"}, timeout=60)
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert "This would be ready in about" in answer.text
    assert server.get("/queue").json()["length"] == 5
