"""A TCP proxy in front of a server: a test decides how much of an upload passes, and whether it is
answered."""

import socket
import threading
from contextlib import suppress
from typing import Self

CHUNK_BYTES = 32 * 1024
EVERYTHING = 2**60


class Gate:
    """Passes everything on, but of POST /generate what the test allows.

    The buffers are small, so that the browser's progress follows what has passed.
    """

    def __init__(self, url: str) -> None:
        port = int(url.rsplit(":", 1)[1])
        self._target = ("127.0.0.1", port)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._changed = threading.Condition()
        self._allowed = EVERYTHING
        self.answers = True
        """Whether POST /generate is answered. Otherwise its connection is cut."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.allow(EVERYTHING)
        self._listener.close()

    def allow(self, more: int) -> None:
        """Let this number of bytes pass, in place of what was allowed before."""
        with self._changed:
            self._allowed = more
            self._changed.notify_all()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                uploads = threading.Event()
                threading.Thread(
                    target=self._up, args=(client, server, uploads), daemon=True
                ).start()
                threading.Thread(
                    target=self._down, args=(server, client, uploads), daemon=True
                ).start()

    def _up(self, client: socket.socket, server: socket.socket, uploads: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(CHUNK_BYTES):
                if data.startswith(b"POST /generate"):
                    uploads.set()
                if uploads.is_set():
                    with self._changed:
                        self._changed.wait_for(lambda: self._allowed > 0)
                        self._allowed -= len(data)
                server.sendall(data)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _down(self, server: socket.socket, client: socket.socket, uploads: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK_BYTES):
                if uploads.is_set() and not self.answers:
                    break
                client.sendall(data)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
