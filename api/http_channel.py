"""A connection: its output in memory, and whether its client is still connected."""

import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from waitress.buffers import ReadOnlyFileBasedBuffer
from waitress.channel import ClientDisconnected, HTTPChannel

import errors
from api.http_loop import ReadsOn
from api.http_request import FREE_BYTES, AnswerTask, ErrorAnswerTask, Request
from api.transfer_budget import Pace

MOST_UNREAD_BYTES = 1_000_000
"""A client that leaves more of an answer of unknown length unread while more comes counts as
gone."""
KEEP_ALIVE_S = 120.0
"""Seconds for which a connection may stay open without a request."""
LINGER_S = 10.0
MOST_LINGER_BYTES = 64_000_000
"""A refused client may send for so long and so much: it may read the answer only afterwards."""


class Pieces:
    """Bytes that are sent in order, each let go once it is sent. waitress' own buffer keeps what
    was sent for as long as the connection is busy, and moves to a temporary file."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, data: bytes) -> None:
        self._pieces.append(memoryview(data))
        self._size += len(data)

    def get(self, size: int) -> memoryview:
        return self._pieces[0][:size]

    def skip(self, size: int, allow_prune: bool = False) -> None:
        """Drop bytes that get() gave."""
        first = self._pieces.popleft()
        if size < len(first):
            self._pieces.appendleft(first[size:])
        self._size -= size

    def close(self) -> None:
        self._pieces.clear()
        self._size = 0


class Channel(HTTPChannel, ReadsOn):  # type: ignore[misc]
    """waitress' connection. The loop's thread reads, closes, and writes what is left; an HTTP
    thread writes under outbuf_lock while it answers. What only the loop may do is left to it with
    `changed`."""

    request: Request | None
    """One that has not come in completely."""
    requests: list[Request]
    """The one that is being answered, and those that wait behind it."""
    connected: bool
    will_close: bool
    close_when_flushed: bool
    task_class = AnswerTask
    error_task_class = ErrorAnswerTask

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.outbufs = [Pieces()]
        self.parser_class = partial(Request, self.server.budget)
        self.lingers = False
        """Whether the client may still be sending when its answer is complete."""
        self._behind = b""
        """What was read behind a request that is not answered yet."""
        self._linger_until: float | None = None
        self._lingered_bytes = 0
        self._idle_since = time.monotonic()
        self._begun = False
        """Whether the present answer has begun."""
        self._together: list[bytes] | None = None
        self._ahead = 0
        """So many bytes of it are sent already, see check_client_disconnected()."""
        self._half_closed_at: float | None = None
        self._reserved = 0
        """Bytes of answers whose length was known."""
        self._held = 0
        """Bytes that count against the budget."""
        self._sending, self._to_send = Pace(), 0

    # For the application, on an HTTP thread.

    def check_client_disconnected(self) -> bool:
        """Whether the client has gone, so that no answer is needed.

        A client that has sent its request may close its half of the connection and still wait. The
        system reports this like a close of both halves, until something is sent: only a client that
        has closed both answers with a reset. So the bytes with which every answer begins are sent
        ahead, one by one, at growing intervals. Once a stream has begun, its next part serves.
        """
        with self.outbuf_lock:
            if not self.connected or self.will_close:
                return True
            try:
                return self._has_gone()
            except OSError:
                return True

    @property
    def half_closed(self) -> bool:
        """Whether the client has closed its half at least, as far as the latest check saw."""
        return self._half_closed_at is not None

    def _has_gone(self) -> bool:
        if self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return True
        with suppress(BlockingIOError):
            if self.socket.recv(1, socket.MSG_PEEK):
                return False
            now = time.monotonic()
            if self._half_closed_at is None:
                self._half_closed_at = now
            probe_at = self._half_closed_at + 2**self._ahead - 1
            if not (self._begun or self.total_outbufs_len) and now >= probe_at:
                start = b"HTTP/1.1 " if self.requests[0].version == "1.1" else b"HTTP/1.0 "
                self._ahead += self.socket.send(start[self._ahead : self._ahead + 1])
        return False

    # For answers, on an HTTP thread.

    def service(self) -> None:
        self._begun = False
        try:
            super().service()
        finally:
            # Another thread may answer the next request of this connection already.
            with self.outbuf_lock:
                self._idle_since = time.monotonic()
                self._sending, self._to_send = Pace(), self.total_outbufs_len
                self._settle()
            self.server.loop.changed(self)

    def reserve(self, size: int) -> bool:
        """Room for an answer, before it begins."""
        with self.outbuf_lock:
            if size <= FREE_BYTES:
                return True
            free = self._hold(max(self._held, self._reserved + size))
            self._reserved += size if free else 0
            return free

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send what is written inside in one piece: one call of the system, and the client wakes
        once."""
        pieces: list[bytes] = []
        self._together = pieces
        try:
            yield
        finally:
            self._together = None
        self.write_soon(b"".join(pieces))

    def write_soon(self, data: bytes | ReadOnlyFileBasedBuffer) -> int:
        """Send what can be sent, and leave the rest to the loop. Never waits for the client.

        Raises:
            ClientDisconnected: it has disconnected, or reads too slowly.
        """
        if not data:
            return 0
        if self._together is not None and isinstance(data, bytes):
            self._together.append(data)
            return len(data)
        with self.outbuf_lock:
            if not self.connected or self.will_close:
                raise ClientDisconnected
            size = len(data)
            if isinstance(data, ReadOnlyFileBasedBuffer):
                self.outbufs += [data, Pieces()]
                self.total_outbufs_len += size
            else:
                ahead, self._ahead, self._begun = self._ahead, 0, True
                self.outbufs[-1].append(data[ahead:])
                self.total_outbufs_len += size - ahead
            self._flush_exception(self._flush_some, do_close=False)
            if not self._has_room():
                self.will_close = True
            gone = self.will_close
        if self.total_outbufs_len or gone:
            self.server.loop.changed(self)
        if gone:
            raise ClientDisconnected
        return size

    def send_continue(self) -> None:
        """As waitress', which may close the connection on an HTTP thread."""
        text = b"HTTP/1.1 100 Continue\r\n\r\n"
        with self.outbuf_lock:
            if self.request is not None:
                self.request.expect_continue = False
            self.sent_continue = True
            self.outbufs[-1].append(text)
            self.total_outbufs_len += len(text)
            self._flush_exception(self._flush_some, do_close=False)
        self.server.loop.changed(self)

    def _has_room(self) -> bool:
        """Whether what the client has not read may stay in memory; asked under outbuf_lock."""
        unread = sum(len(left) for left in self.outbufs if isinstance(left, Pieces))
        if unread - self._reserved > MOST_UNREAD_BYTES:
            return False
        return self._hold(max(self._reserved, unread if unread > FREE_BYTES else 0))

    def _hold(self, size: int) -> bool:
        """Have so many bytes count against the budget; under outbuf_lock."""
        more = size - self._held
        if more > 0 and not self.server.budget.take_for_answer(more):
            return False
        if more < 0:
            self.server.budget.give_back(-more)
        self._held = size
        return True

    def _settle(self) -> None:
        """Give room back once all answers are sent; under outbuf_lock."""
        if not self.connected or not (self.requests or self.total_outbufs_len):
            self._reserved = 0
            self._hold(0)

    # For the loop, on its thread.

    @property
    def waits_since(self) -> float | None:
        """When the server began to wait for the next request or the rest of one (monotonic); None:
        one is being answered."""
        if self.requests or self.total_outbufs_len:
            return None
        return self._idle_since if self.request is None else float(self.request.pace.started_at)

    def check(self, now: float) -> None:
        """Close or refuse a connection that is idle or too slow (now: monotonic)."""
        if self._is_overdue(now):
            self.handle_close()
        elif self.request is not None and self.waits_since is not None:
            request = self.request
            if request.pace.too_slow(now, request.received_bytes, request.held_bytes > 0):
                self._refuse(request, errors.RequestTooSlow())

    def _is_overdue(self, now: float) -> bool:
        """Whether the client is idle, lingers or reads its answer for longer than it may."""
        if self._linger_until is not None:
            return now > self._linger_until
        if self.requests:
            return False
        if self.total_outbufs_len:
            sent_bytes = self._to_send - self.total_outbufs_len
            return self._sending.too_slow(now, sent_bytes, self._held > 0)
        return self.request is None and now - self._idle_since > KEEP_ALIVE_S

    def readable(self) -> bool:
        if self._linger_until is not None:
            return True
        return not self._behind and bool(super().readable())

    def read_on(self) -> None:
        if self._behind and super().readable():
            data, self._behind = self._behind, b""
            self.received(data)

    def received(self, data: bytes) -> bool:
        """Takes one request at a time, other than waitress: thousands fit into what is read at
        once, and other connections would have to wait for all of them."""
        with self.requests_lock:
            if self.will_close or self.close_when_flushed:
                return False
            while data and not self.requests:
                if self.request is None:
                    data = data.lstrip(b"\r\n")  # some clients end a body with a line end
                    if not data:
                        break
                    self.request = self.parser_class(self.adj)
                data = data[self.request.received(data) :]
                asked = self.request.expect_continue and self.request.headers_finished
                if asked and not self.sent_continue:
                    self.send_continue()
                if self.request.completed:
                    self.sent_continue = False
                    self.requests.append(self.request)
                    self.request = None
                    self.server.add_task(self)
            self._behind = data
        return True

    def handle_read(self) -> None:
        if self._linger_until is None:
            super().handle_read()
            return
        self._lingered_bytes += len(self.recv(self.adj.recv_bytes))  # closes at the end
        if self._lingered_bytes > MOST_LINGER_BYTES:
            self.handle_close()

    def handle_write(self) -> None:
        if self.lingers and self.close_when_flushed:
            self._flush_exception(self._flush_some)
            if self.connected and not (self.will_close or self.total_outbufs_len):
                self._start_to_linger()
                return
        super().handle_write()
        with self.outbuf_lock:
            self._settle()

    def handle_close(self) -> None:
        super().handle_close()
        with self.outbuf_lock:
            self._settle()
        if self.request is not None:
            self.request.close()

    def close(self) -> None:
        self.handle_close()

    def _refuse(self, request: Request, error: errors.ServerError) -> None:
        with self.requests_lock:
            self.request = None
            request.refuse(error)
            self.requests.append(request)
            self.server.add_task(self)

    def _start_to_linger(self) -> None:
        """Closed with something unread, the connection would be reset, which may take the answer
        from a client that still sends."""
        self.close_when_flushed = False
        self._linger_until = time.monotonic() + LINGER_S
        self._behind = b""
        if self.request is not None:
            self.request.close()
            self.request = None
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.handle_close()
