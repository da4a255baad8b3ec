"""Runs servers on one data dir, one after the other, and checks that they always answer."""

import atexit
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import requests
from conftest import ServerProcess
from report import Report

DEAF_AFTER_S = 60.0
GIVE_UP_S = 300.0
SMALL = (
    "--model",
    "noise-flux1",
    "--max-pixels",
    "65536",
    "--max-steps",
    "20",
    "--log-level",
    "info",
)


class Life:
    """The servers of one data dir. Threads may send requests while another one kills and starts."""

    def __init__(
        self,
        report: Report,
        data_dir: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.report = report
        self.data_dir = data_dir
        self.servers: list[ServerProcess] = []
        self._options = options
        self._environment = environment
        self._up = threading.Event()
        self.over = False

    def start(self) -> ServerProcess:
        server = ServerProcess(self.data_dir, *SMALL, *self._options, environment=self._environment)
        atexit.register(server.process.kill)  # whatever happens here
        self.servers.append(server)
        self._up.set()
        return server

    @property
    def server(self) -> ServerProcess:
        return self.servers[-1]

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def kill(self) -> None:
        self._up.clear()
        if self.server.process.poll() is not None:
            self.report.violation("violations", "it ended by itself: " + "".join(self.log[-20:]))
        self.server.stop(signal.SIGKILL)
        self.report.add("kills (SIGKILL)")

    def close(self) -> None:
        """Ends the server and looks through its log."""
        self.over = True
        self._up.set()
        for server in self.servers:
            code = server.stop(signal.SIGTERM)
            self.report.check(code in (0, -signal.SIGKILL), f"exit code {code}")
        text = "".join(self.log)
        for part in text.split("Traceback")[1:]:
            error = re.split(r"\n(?=\d{4}-)", part)[0]  # up to the next line of the log
            self.report.violation("tracebacks", error)

    @property
    def log(self) -> list[str]:
        return [line for server in self.servers for line in server.log]

    def get(
        self, path: str, *, timeout_s: float = DEAF_AFTER_S, **params: Any
    ) -> requests.Response:
        return requests.get(self.server.url + path, params=params, timeout=timeout_s)

    def ask(self, method: str, path: str, **request: Any) -> requests.Response:
        """Repeats a request until there is a complete answer, from the current server.

        Raises:
            TimeoutError: for GIVE_UP_S there was none.
        """
        deadline = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline and not self.over:
            self._up.wait(GIVE_UP_S)
            with suppress(requests.RequestException):
                answer = requests.request(
                    method, self.server.url + path, timeout=DEAF_AFTER_S, **request
                )
                if answer.status_code == 500:
                    self.report.violation("500s", f"{method} {path}: {answer.text}")
                return answer
            pause(0.02)
        raise TimeoutError(f"{method} {path}: no answer")

    def answers(self, why: str) -> bool:
        """Whether /health and /status answer; else it is unresponsive."""
        try:
            self.get("/health")
            self.get("/status", task_id="nobody")
        except requests.RequestException as error:
            self.report.violation("unresponsive", f"{why}: {type(error).__name__}")
            return False
        return True


class Watch:
    """Polls /health and /status on new connections, from the start to the end of a
    block: the server must never be unresponsive."""

    def __init__(self, life: Life, why: str) -> None:
        self.slowest_s = 0.0
        self._life, self._why = life, why
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(0.1):
            began = time.monotonic()
            if not self._life.answers(self._why):
                return
            self.slowest_s = max(self.slowest_s, (time.monotonic() - began) / 2)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(3 * DEAF_AFTER_S)


def check_drawn_once(report: Report, life: Life, task_ids: list[str]) -> set[str]:
    """After the last server has ended: no two requests got the same task, none was finished
    twice, and there are no others. Returns the tasks in the database."""
    for task_id, number in Counter(task_ids).items():
        if number > 1:
            report.violation("drawn twice", f"two requests got the task {task_id}")
    for task_id, number in Counter(re.findall(r"task (\w+) is done", "".join(life.log))).items():
        if number > 1:
            report.violation("drawn twice", f"task {task_id} was finished {number} times")
    with closing(sqlite3.connect(life.data_dir / "tasks.sqlite3")) as database:
        kept = {row[0] for row in database.execute("SELECT task_id FROM tasks")}
    if strays := kept - set(task_ids):
        report.violation("drawn twice", f"tasks that nobody knows of: {strays}")
    return kept


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def until(condition: Callable[[], Any], seconds: float = GIVE_UP_S) -> bool:
    """Polls; returns whether the condition became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(requests.RequestException):
            if condition():
                return True
        pause(0.05)
    return False


def raise_the_limit_of_open_files() -> int:
    """Raises the limit to the maximum; returns it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def is_root() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0
