"""Helpers for tests of the client: fake servers, proxies with faults, and a terminal."""

import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import requests
from conftest import GIVE_UP_S, ROOT, clean_environment


class Asked(BaseHTTPRequestHandler):
    """One request to a FarEnd, and the ways to answer it."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.body = b""

    @property
    def route(self) -> str:
        return urlsplit(self.path).path

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.path).query))

    def answer(
        self, status: int, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert isinstance(self.server, _Http)
        with suppress(ConnectionError):
            self.server.answer(self)

    do_GET = do_POST = do_DELETE = handle_any

    def log_message(self, *_: Any) -> None:
        pass


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    answer: Callable[[Asked], None]


class FarEnd:
    """An HTTP server in this process; a function of the test answers."""

    def __init__(self, answer: Callable[[Asked], None]) -> None:
        self._http = _Http(("127.0.0.1", 0), Asked)
        self._http.answer = answer
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def proxy_of(
    url: str, fault: Callable[[Asked, requests.Response], bool]
) -> Callable[[Asked], None]:
    """Returns a function for a FarEnd that works as a proxy of another server.

    Args:
        fault: called with each answer; True: it has sent one itself.
    """

    def forward(asked: Asked) -> None:
        headers = {
            name: value
            for name, value in asked.headers.items()
            if name not in ("Host", "Connection", "Accept-Encoding")
        }
        answer = requests.request(
            asked.command, url + asked.path, data=asked.body, headers=headers, timeout=GIVE_UP_S
        )
        if not fault(asked, answer):
            kind = {"Content-Type": answer.headers["Content-Type"]}
            asked.answer(answer.status_code, answer.content, kind)

    return forward


class FakeTask:
    """A far end with one task, whose status the test sets."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {
            "task_id": "abc123",
            "status": "waiting",
            "progress": 0.0,
            "steps_done": 0,
            "steps_total": 4,
            "images_done": 0,
            "params": {"prompt": "a lighthouse", "count": 1},
            "server": "busy",
            "version": 1,
            **fields,
        }
        self.picture = b""
        self.submitted = b""
        self.before_image: Callable[[], object] = lambda: None
        self.stopped = threading.Event()
        """After the present image."""
        self.deleted = threading.Event()
        self._changed = threading.Condition()

    def set(self, **fields: Any) -> None:
        with self._changed:
            self.fields = {**self.fields, **fields, "version": self.fields["version"] + 1}
            self._changed.notify_all()

    def answer(self, asked: Asked) -> None:
        match asked.route:
            case "/generate":
                self.submitted = asked.body
                forecast = dict.fromkeys(
                    ("expected_time_seconds", "wait_p90_s", "expected_start_at", "expected_end_at"),
                    40.0,
                )
                asked.answer(
                    200,
                    {
                        **self.fields,
                        **forecast,
                        "task_length": 2,
                        "confidence": "high",
                        "pos": 2,
                        "ignored_fields": [],
                    },
                )
            case "/status":
                since, wait_s = asked.query.get("since"), float(asked.query.get("wait", 0))
                with self._changed:
                    self._changed.wait_for(
                        lambda: self.fields["version"] != int(since or 0), wait_s
                    )
                asked.answer(200, self.fields)
            case "/image":
                self.before_image()
                asked.answer(200, self.picture, {"Content-Type": "image/png"})
            case "/delete":
                was = self.fields["status"]
                if was == "running" and "after_current" in asked.query:
                    self.stopped.set()
                else:
                    self.set(status="cancelled")
                    self.deleted.set()
                asked.answer(200, {"task_id": "abc123", "was": was, "message": ""})


def command(*arguments: str, environment: dict[str, str] | None = None, **options: Any) -> Any:
    """`python3 -m client`, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "client", *arguments],
        capture_output=True,
        timeout=GIVE_UP_S,
        check=False,
        **_place(environment, options),
    )


class Terminal:
    """`python3 -m client` on a pseudo terminal; it ends with the block."""

    def __init__(self, *arguments: str, environment: dict[str, str], **options: Any) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        # A child ignores Ctrl-C if we do, as programs in the background of a shell do.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "client", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            **_place({"TERM": "xterm-256color", **environment}, options),
        )
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        self._ours = ours
        self._shown = ""
        self._seen = 0
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        with self._more:
            return self._shown

    def expect(self, text: str) -> None:
        """Wait until this is shown, after what was expected before."""

        def found() -> bool:
            return self._ended or text in self._shown[self._seen :]

        with self._more:
            assert self._more.wait_for(found, GIVE_UP_S), self._shown
            assert text in self._shown[self._seen :], self._shown
            self._seen = self._shown.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        code = self.process.wait(GIVE_UP_S)
        self._reader.join(GIVE_UP_S)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.exit_code()
        os.close(self._ours)

    def _read(self) -> None:
        data = b""
        with suppress(OSError):  # the other side is closed
            while more := os.read(self._ours, 65536):
                data += more
                with self._more:
                    self._shown = data.decode(errors="replace")
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()


def _place(environment: dict[str, str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The environment of the command, without the settings of the user."""
    clean = {k: v for k, v in clean_environment().items() if k not in TERMINALS}
    return {"env": {**clean, "PYTHONPATH": str(ROOT), **(environment or {})}, **options}


TERMINALS = ("TMUX", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID")


class Time:
    """A clock that only sleep() advances."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
