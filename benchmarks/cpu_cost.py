"""CPU time of requests and of the worker's calls, with 1,000 tasks waiting, and the memory of the
process.

How to read it: everything runs in this process, on one thread, through the whole application but
without a socket. CPU time leaves out what other processes take. The least time of many is the most
stable one on a machine that does other things, too.
"""

import io
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from common import (
    MAX_QUEUE,
    OFFER,
    RAM_DISK,
    Results,
    make_params,
    median,
    rss_mb,
    small_picture,
    temporary_folder,
)
from fake_generator import FakeGenerator
from flask import Flask
from werkzeug.test import run_wsgi_app

from application import create_app
from server import Server
from settings import Settings
from task import Encoded, Phase, Progress
from timing_model import Measured

BODY = json.dumps({"prompt": "A lake at dawn", "width": 1024, "height": 1024, "steps": 4}).encode()
MEASURED = Measured(0.5, [1.0] * 4, 0.5, 0.01)
R = TypeVar("R")


class Bench:
    """The server, without its threads."""

    def __init__(self, data_dir: Path, waiting: int) -> None:
        settings = Settings(port=0, data_dir=data_dir, max_queue=MAX_QUEUE)
        with patch("server.create_app", self._keep):
            served = Server(settings, OFFER, FakeGenerator(small_picture))
        self.queue, self.worker = served.queue, served.worker_api
        self.took_s: defaultdict[str, list[float]] = defaultdict(list)
        spec = self.worker.first_spec
        self.worker.load_started(spec)
        self.worker.load_finished(spec, None, [spec.key])
        self.ids = [self.queue.submit(make_params())[0].task_id for _ in range(waiting)]

    def round(self, number: int) -> None:
        self._timed("POST /generate", lambda: self._call("POST", "/generate", BODY))
        task_id = self.ids[-1 - number * 7919 % (len(self.ids) // 2)]
        self._timed("GET /status", lambda: self._call("GET", f"/status?task_id={task_id}"))
        if number % 10 == 0:
            self._timed("GET /queue", lambda: self._call("GET", "/queue"))
        self._timed("submit", lambda: self.queue.submit(make_params()))
        task = self._timed("claim", lambda: self.worker.claim(0))
        assert task
        name, attempt = task.task_id, task.attempt
        for step in range(5):
            progress = Progress(Phase.DENOISING, step, 4)
            self._timed("report", partial(self.worker.report, name, attempt, progress))
        encoded = Encoded(b"image", 0, ((0, MEASURED),))
        self._timed("finish", lambda: self.worker.finish(name, attempt, encoded))
        if other := self.worker.claim(0):  # as many tasks end as were submitted
            self.worker.finish(other.task_id, other.attempt, encoded)

    def _keep(self, *arguments: Any, **options: Any) -> Flask:
        self._application = create_app(*arguments, **options)
        return self._application

    def _timed(self, name: str, call: Callable[[], R]) -> R:
        start = time.process_time()
        answer = call()
        self.took_s[name].append(time.process_time() - start)
        return answer

    def _call(self, method: str, path: str, body: bytes = b"") -> None:
        path, _, query = path.partition("?")
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "4030",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "localhost:4030",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": "application/json" if body else "",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.url_scheme": "http",
        }
        _, status, _ = run_wsgi_app(self._application, environ, buffered=True)
        assert status.startswith("200"), status


def main() -> None:
    results = Results(__file__, __doc__)
    waiting, rounds = (100, 10) if results.quick else (1_000, 300)
    with temporary_folder(RAM_DISK) as folder:
        bench = Bench(folder, waiting)
        before_mb = rss_mb(os.getpid())
        for number in range(rounds):
            bench.round(number)
        rows = [
            (name, len(took_s), 1e6 * min(took_s), 1e6 * median(took_s))
            for name, took_s in bench.took_s.items()
        ]
    header = ("call", "calls", "least", "median")
    results.table(f"CPU time, microseconds, with {waiting:,} tasks waiting", header, rows)
    results.note(
        f"Memory (RSS): {before_mb:.0f} MB with {waiting:,} tasks waiting, "
        f"{rss_mb(os.getpid()):.0f} MB after {2 * rounds} tasks more, as many of which have ended."
    )
    results.save()


if __name__ == "__main__":
    main()
