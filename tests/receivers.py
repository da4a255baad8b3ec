"""Receivers of callbacks on 127.0.0.1."""

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from conftest import GIVE_UP_S
from live import SteppedServer

from api import webhooks

KEY = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Receiver:
    """Answers with what is planned, then with 200; keeps what it got."""

    def __init__(self) -> None:
        self.calls: Queue[tuple[str, dict[str, str], bytes]] = Queue()
        self.planned: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.calls.put((self.path, dict(self.headers), body))
                receiver.go_on.wait(GIVE_UP_S)
                self.send_response(receiver.planned.pop(0) if receiver.planned else 200)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def handle(self) -> None:
                with suppress(ConnectionError, ssl.SSLError):  # who called has gone
                    super().handle()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/hook?chat=42"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def with_tls(self, context: ssl.SSLContext) -> str:
        """From now on; returns the address."""
        self._http.socket = context.wrap_socket(
            self._http.socket, server_side=True, do_handshake_on_connect=False
        )
        return self.url.replace("http://127.0.0.1", "https://localhost")

    def next(self) -> dict[str, Any]:
        """The body of the next call."""
        body: dict[str, Any] = json.loads(self.calls.get(timeout=GIVE_UP_S)[2])
        return body

    def close(self) -> None:
        self.go_on.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def calling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    """For a fixture: a server that calls receivers on this machine, again without a pause."""
    monkeypatch.setattr(webhooks, "RETRY_AFTER_S", (0.0, 0.0, 0.0, 0.0))
    server = SteppedServer(folder, callback_hosts=("127.0.0.1",), callback_key=KEY)
    yield server
    server.close()


def until_all_are_called(server: SteppedServer) -> None:
    pause = threading.Event()
    for _ in range(GIVE_UP_S * 100):
        if server.server._store.callbacks.next() is None:
            return
        pause.wait(0.01)
    raise AssertionError("a callback is still there")
