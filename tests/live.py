"""Helpers for tests of waiting requests: a real server in this process whose generator makes a step
only when the test allows it, and clients with many connections."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, allow
from fake_generator import FakeGenerator
from PIL import Image

from api import http_loop
from generation.previews import Previews
from server import Server
from settings import Settings
from task import GenerationParams, Phase, Report
from timing.speeds import Product

PICTURE = Image.new("RGB", (64, 64), "teal")
SLOW_FLOP_PER_S = 1e10
"""Of this server's GPU: pictures of a tiny model take seconds, so that forecasts differ visibly."""


class SteppedServer:
    """Each call of step() lets a task make a step; end() lets all tasks end."""

    def __init__(self, data_dir: Path, *models: str, **settings: Any) -> None:
        self.data_dir = data_dir
        self._steps, self._ended = Semaphore(0), False
        chosen = {"port": 0, "data_dir": data_dir, **settings}
        read = Settings(**chosen)
        previews = Previews(on=read.previews)
        self.server = Server(
            read, allow(*models or ("noise-flux1",)), FakeGenerator(self._draw), previews
        )
        self.queue, self.worker_api = self.server.queue, self.server.worker_api
        self.worker_api.calibrate(lambda: {Product.BF16: SLOW_FLOP_PER_S})
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.server.start()

    def _draw(self, params: GenerationParams, report: Report) -> Image.Image:
        for step in range(params.steps + 1):
            if not self._ended:
                self._steps.acquire()
            report(Phase.DENOISING, step, params.steps)
        return PICTURE

    def step(self, steps: int = 1) -> None:
        self._steps.release(steps)

    def end(self) -> None:
        self._ended = True
        self._steps.release(1000)

    def submit(self, steps: int = 2, **fields: Any) -> str:
        body = {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": steps, **fields}
        answer = requests.post(self.url + "/generate", json=body, timeout=GIVE_UP_S)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["task_id"])

    def get(self, path: str, **params: Any) -> requests.Response:
        return requests.get(self.url + path, params=params, timeout=GIVE_UP_S)

    def status(self, task_id: str, **params: Any) -> dict[str, Any]:
        answer = self.get("/status", task_id=task_id, **params)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def running(self, steps: int = 2, **fields: Any) -> str:
        """Submits a task and waits until it is running."""
        task_id = self.submit(steps, **fields)
        status = self.status(task_id)
        while status["status"] == "waiting":
            status = self.status(task_id, wait=60, since=status["version"])
        return task_id

    def close(self) -> None:
        self.end()
        self.server.stop()


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    """Looks twenty times a second for connections that are slow or have ended."""
    monkeypatch.setattr(http_loop, "CHECK_S", 0.05)
    server = SteppedServer(tmp_path)
    yield server
    server.close()


class Connection:
    """One GET request whose answer is read later."""

    def __init__(self, server: SteppedServer, target: str, *headers: str) -> None:
        address = ("127.0.0.1", server.server.port)
        self.socket = socket.create_connection(address, timeout=GIVE_UP_S)
        lines = [f"GET {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self._file = self.socket.makefile("rb")

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, names in lower case."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        return status, headers

    def chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline() or b"0", 16):
            yield self._file.read(size)
            self._file.readline()

    def json(self) -> dict[str, Any]:
        """The JSON body of an answer with Content-Length."""
        status, headers = self.head()
        assert status == 200, status
        body: dict[str, Any] = json.loads(self._file.read(int(headers["content-length"])))
        return body

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class EventStream(Connection):
    """GET /events: iterating gives (kind, id, data)."""

    def __init__(self, server: SteppedServer, query: str = "", *headers: str) -> None:
        super().__init__(server, f"/events{query}", *headers)
        self.retry: str | None = None
        status, self.headers = self.head()
        assert status == 200, status
        self._lines = self._read_lines()

    def _read_lines(self) -> Iterator[str]:
        rest = b""
        for chunk in self.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode() for line in lines)

    def __iter__(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        fields: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line.startswith(":"):
                continue
            if name == "retry":
                self.retry = value
            elif line:
                fields[name] = value
            elif fields:
                yield fields["event"], int(fields["id"]), json.loads(fields["data"])
                fields = {}

    def until(self, kind: str) -> list[tuple[str, int, dict[str, Any]]]:
        """Returns the events up to the first one of this kind."""
        seen = []
        for event in self:
            seen.append(event)
            if event[0] == kind:
                return seen
        raise AssertionError(f"the stream ended without {kind}: {seen}")
