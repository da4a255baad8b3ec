"""An HTTP client that loads a server: keep-alive connections over one selector, no threads.

A response is read by its Content-Length; http.client would cost more than the server does. It is
meant to live in a process of its own (`common.Remote(LoadClient, ...)`).
"""

import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from selectors import EVENT_READ, DefaultSelector

from common import percentile

TIMEOUT_S = 30.0
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    sent_at: float
    """Readings of the monotonic clock, which all processes of a machine share."""
    answered_at: float
    ok: bool
    body: bytes

    @property
    def seconds(self) -> float:
        return self.answered_at - self.sent_at


@dataclass(frozen=True)
class Load:
    seconds: float
    answers: list[Answer]

    @property
    def per_second(self) -> float:
        """Good answers."""
        return sum(answer.ok for answer in self.answers) / self.seconds

    @property
    def p99_ms(self) -> float:
        return 1e3 * percentile([answer.seconds for answer in self.answers], 99)


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def post(target: str, body: str) -> bytes:
    return (
        f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body.encode())}\r\n\r\n{body}"
    ).encode()


@dataclass
class _Connection:
    socket: socket.socket
    sent_at: float = 0.0
    received: bytearray = field(default_factory=bytearray)

    def send(self, request: bytes) -> None:
        self.received.clear()
        self.sent_at = time.monotonic()
        self.socket.sendall(request)

    def receive(self) -> Answer | None:
        """To be called when there is something to read; the answer once it is complete."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError(f"the server closed a connection: {bytes(self.received)!r}")
        self.received += data
        head_end = self.received.find(b"\r\n\r\n") + 4
        if head_end < 4:
            return None
        length = LENGTH.search(self.received, 0, head_end)
        assert length, bytes(self.received)
        if len(self.received) < head_end + int(length[1]):
            return None
        ok = self.received.startswith(b"HTTP/1.1 200")
        return Answer(self.sent_at, time.monotonic(), ok, bytes(self.received[head_end:]))


class LoadClient:
    def closed_loop(
        self,
        port: int,
        requests: Sequence[bytes],
        *,
        connections: int,
        seconds: float,
        keep_bodies: bool = False,
    ) -> Load:
        """Each connection sends its next request as soon as it has an answer."""
        ahead = cycle(requests)
        answers: list[Answer] = []
        with DefaultSelector() as selector:
            opened = [_connect(port) for _ in range(connections)]
            start = time.monotonic()
            for each in opened:
                selector.register(each.socket, EVENT_READ, each)
                each.send(next(ahead))
            open_loops = connections
            while open_loops:
                ready = selector.select(TIMEOUT_S)
                if not ready:
                    raise TimeoutError(f"no answer for {TIMEOUT_S} s")
                for key, _ in ready:
                    connection: _Connection = key.data
                    answer = connection.receive()
                    if answer is None:
                        continue
                    if not keep_bodies:
                        answer = Answer(answer.sent_at, answer.answered_at, answer.ok, b"")
                    answers.append(answer)
                    if answer.answered_at - start < seconds:
                        connection.send(next(ahead))
                    else:
                        open_loops -= 1
                        selector.unregister(connection.socket)
            took = time.monotonic() - start
            for each in opened:
                each.socket.close()
        return Load(took, answers)

    def one_by_one(
        self, port: int, requests: Sequence[bytes], pause_s: Callable[[], float]
    ) -> list[Answer]:
        """One connection, a pause before each request."""
        connection = _connect(port)
        answers: list[Answer] = []
        for request in requests:
            time.sleep(pause_s())
            connection.send(request)
            while (answer := connection.receive()) is None:
                pass
            answers.append(answer)
        connection.socket.close()
        return answers


def _connect(port: int) -> _Connection:
    opened = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _Connection(opened)
