"""A server on a disk that the test makes fail: the real one over HTTP, in this process, with a
generator that draws noise: pictures of about a megabyte in no time."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, allow, until
from fake_generator import FakeGenerator
from PIL import Image

from server import Server
from settings import Settings
from task import GenerationParams, Report

OFFER = allow("noise-flux1")
SIDE = 640
"""Noise of this size is a PNG of about 1.2 MB."""

Mount = Callable[[str], Path]


def noise() -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), os.urandom(SIDE * SIDE * 3))


class Bench:
    """A server on a data dir, which draws as many pictures as it may."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self._may_draw = threading.Semaphore(0)
        self._stopped = False
        self.drawing = threading.Event()
        arguments = (
            "--model",
            "noise-flux1",
            "--port",
            "0",
            "--data-dir",
            str(data_dir),
            *arguments,
        )
        generator = FakeGenerator(self._draw)
        self.server = Server(Settings.read(arguments, {}), OFFER, generator)
        self.queue = self.server.queue
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.server.start()

    def _draw(self, params: GenerationParams, report: Report) -> Image.Image:
        self.drawing.set()
        assert self._may_draw.acquire(timeout=GIVE_UP_S)
        assert not self._stopped
        return noise()

    def draw(self, pictures: int = 1000) -> None:
        self._may_draw.release(pictures)

    def stop(self) -> None:
        if not self._stopped:
            self.server.stop()
        self._stopped = True  # a real one would have ended, and would draw no more
        self.draw()

    def post(self, **fields: Any) -> requests.Response:
        body = {"prompt": "noise", "width": 64, "height": 64, "format": "PNG", **fields}
        return requests.post(self.url + "/generate", json=body, timeout=GIVE_UP_S)

    def submit(self, **fields: Any) -> str:
        answer = self.post(**fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["task_id"])

    def get(self, path: str, **values: Any) -> requests.Response:
        return requests.get(self.url + path, params=values, timeout=GIVE_UP_S)

    def delete(self, task_id: str) -> requests.Response:
        return requests.delete(self.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)

    def status(self, task_id: str) -> dict[str, Any]:
        answer = self.get("/status", task_id=task_id)
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return status

    def is_gone(self, task_id: str) -> bool:
        return self.get("/status", task_id=task_id).status_code == 410

    def ended(self, task_id: str) -> dict[str, Any]:
        until(lambda: self.status(task_id)["status"] not in ("waiting", "running"))
        return self.status(task_id)

    def done(self) -> str:
        self.draw(1)
        task_id = self.submit()
        assert self.ended(task_id)["status"] == "done"
        self.drawing.clear()
        return task_id

    def assert_failed(self, reason: str) -> None:
        health = self.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert reason in health.json()["last_error"]

    def assert_refuses_tasks(self) -> None:
        answer = self.post()
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "storage_unavailable"), answer.text
        assert error["message"].startswith("The server cannot store anything now")

    def until_failed(self) -> None:
        until(lambda: self.get("/health").status_code == 503)

    def until_works(self) -> None:
        until(lambda: self.get("/health").status_code == 200)


Start = Callable[..., Bench]


def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts servers that end with the test, and before their disk does."""
    monkeypatch.setattr("checks.EVERY_S", 0.1)
    monkeypatch.setattr("workers.endings.RETRY_S", 0.1)
    monkeypatch.setattr("storage.database.BUSY_S", 0.2)
    started: list[Bench] = []

    def start(data_dir: Path, *arguments: str) -> Bench:
        for earlier in started:
            earlier.stop()
        started[:] = [Bench(data_dir, *arguments)]
        return started[0]

    yield start
    for bench in started:
        bench.stop()
