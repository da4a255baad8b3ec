"""Whatever kind of request waits, and however many: threads are left for all others."""

import base64
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, until
from live import SteppedServer
from PIL import Image

from task import Task

THREADS = 8
PLACES = 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SteppedServer]:
    server = SteppedServer(tmp_path, threads=THREADS, sync_max_wait_s=0)
    yield server
    server.close()


def picture(side: int = 64) -> str:
    file = BytesIO()
    Image.effect_noise((side, side), 100).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def post(server: SteppedServer, path: str, **fields: Any) -> requests.Response:
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 2, **fields}
    return requests.post(server.url + path, json=body, timeout=GIVE_UP_S)


class Decoding:
    """The decoders are busy with the pictures of others."""

    def __init__(self, server: SteppedServer, task_id: str) -> None:
        self._server, self._turns = server, server.server._decoder._turns
        while self._turns.acquire(blocking=False):
            pass

    def ask(self) -> requests.Response:
        return post(self._server, "/estimate", init_image=picture())

    def end(self) -> None:
        self._turns.release(2)


class LargeBodies:
    """As many large bodies as may be in memory are there."""

    def __init__(self, server: SteppedServer, task_id: str) -> None:
        self._server, self._bodies = server, server.server._submission._large_bodies
        self._held = 0
        while self._bodies.acquire(blocking=False):
            self._held += 1

    def ask(self) -> requests.Response:
        return post(self._server, "/estimate", init_image=picture(800))

    def end(self) -> None:
        self._bodies.release(self._held)


class Zips:
    """The disk is slow to give the pictures of a task."""

    def __init__(self, server: SteppedServer, task_id: str) -> None:
        self._server, self._task_id = server, task_id
        self._go_on, queue = threading.Event(), server.queue
        queue.all_images_of = self._wait  # type: ignore[method-assign]

    def _wait(self, task: Task) -> Any:
        self._go_on.wait(GIVE_UP_S)
        return [b""], self._server.queue.status(self._task_id).params

    def ask(self) -> requests.Response:
        return self._server.get("/image", task_id=self._task_id, all="true")

    def end(self) -> None:
        self._go_on.set()


class Listening:
    """Requests that wait for a task which takes its time."""

    def __init__(self, ask: Callable[[SteppedServer, str], requests.Response]) -> None:
        self._ask = ask

    def __call__(self, server: SteppedServer, task_id: str) -> "Listening":
        self._server, self._task_id = server, task_id
        return self

    def ask(self) -> requests.Response:
        return self._ask(self._server, self._task_id)

    def end(self) -> None:
        self._server.end()


def stream(server: SteppedServer, task_id: str) -> requests.Response:
    return server.get("/events", task_id=task_id)


def long_poll(server: SteppedServer, task_id: str) -> requests.Response:
    return server.get("/status", task_id=task_id, wait=300)


def waiting_image(server: SteppedServer, task_id: str) -> requests.Response:
    return server.get("/image", task_id=task_id, wait=300)


def openai_call(server: SteppedServer, task_id: str) -> requests.Response:
    return post(server, "/v1/images/generations", size="64x64")


def a1111_call(server: SteppedServer, task_id: str) -> requests.Response:
    return post(server, "/sdapi/v1/txt2img")


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        (Decoding, 429),
        (LargeBodies, 429),
        (Zips, 429),
        (Listening(stream), 503),
        (Listening(long_poll), 200),  # answered as it stands
        (Listening(waiting_image), 409),  # the same
        (Listening(openai_call), 429),
        (Listening(a1111_call), 429),
    ],
    ids=[
        *("decoding", "large bodies", "zips", "streams", "long polls", "waiting images"),
        *("OpenAI calls", "AUTOMATIC1111 calls"),
    ],
)
def test_requests_that_wait_leave_threads_for_the_others(
    server: SteppedServer, kind: Any, refusal: int
) -> None:
    task_id = server.running()
    waiters = kind(server, task_id)
    assert server.server.places.places == PLACES
    with ThreadPoolExecutor(PLACES) as threads:
        waiting: list[Future[requests.Response]] = [
            threads.submit(waiters.ask) for _ in range(PLACES)
        ]
        until_taken(server, PLACES)
        refused = waiters.ask()
        assert refused.status_code == refusal, refused.text
        assert "Retry-After" in refused.headers or refusal in (200, 409)
        for _ in range(3):
            assert server.get("/health").status_code == 200
            assert server.status(task_id)["status"] == "running"
            assert server.submit()
        assert server.server.places.taken == PLACES
        waiters.end()
        for answer in waiting:
            assert answer.result().status_code < 429, answer.result().text
    until_taken(server, 0)


def test_changes_that_wait_for_the_disk_leave_threads_for_reading(server: SteppedServer) -> None:
    """Another process holds the lock of the database."""
    task_id = server.running()
    database = sqlite3.connect(server.data_dir / "tasks.sqlite3", timeout=GIVE_UP_S)
    with closing(database), ThreadPoolExecutor(THREADS) as threads:
        database.execute("BEGIN IMMEDIATE")
        waiting = [threads.submit(post, server, "/generate") for _ in range(THREADS)]
        until_taken(server, PLACES + PLACES // 2)
        assert server.get("/health").ok
        assert server.status(task_id)["status"] == "running"
        database.rollback()
        answers = {answer.result().status_code for answer in waiting}
    assert answers <= {200, 429, 503}
    assert 429 in answers
    until_taken(server, 0)


def until_taken(server: SteppedServer, places: int) -> None:
    until(lambda: server.server.places.taken == places)
