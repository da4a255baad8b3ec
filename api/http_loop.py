"""The event loop of the HTTP server: which sockets can be read or written now.

waitress' own loop asks every connection what it waits for whenever anything happens on one of them,
and other threads may change its list meanwhile. This loop asks only those that changed, so idle
connections and waiting requests cost nothing, and the list changes on the loop's thread alone.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from socket import socketpair
from threading import get_ident

from waitress import wasyncore

log = logging.getLogger(__name__)

CHECK_S = 5.0
"""Seconds between two checks of all connections for idle and slow ones."""


class ReadsOn:
    """A socket that may have read more than it could handle at once."""

    def read_on(self) -> None:
        """Handle what had to wait, if it can be handled now; the loop calls this before it waits
        for the socket again."""


class Sockets(dict[int, wasyncore.dispatcher]):
    """The open sockets by their file number. waitress adds and removes them; here the loop learns
    of it.

    Raises:
        RuntimeError: a thread other than the loop's changes it.
    """

    def __init__(self, loop: "HttpLoop") -> None:
        super().__init__()
        self._loop = loop

    def __setitem__(self, number: int, opened: wasyncore.dispatcher) -> None:
        self._loop.check_thread()
        super().__setitem__(number, opened)
        self._loop.changed(opened)

    def __delitem__(self, number: int) -> None:
        self._loop.check_thread()
        super().__delitem__(number)
        self._loop.forget(number)


class HttpLoop:
    """Runs on one thread. Other threads may call `changed` and `end`, and nothing else.

    Args:
        check: called each CHECK_S on the loop's thread.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.sockets = Sockets(self)
        self.check = check
        self._selector = DefaultSelector()
        self._woken, self._waker = socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, EVENT_READ)
        self._watched: dict[int, int] = {}
        """The events that the selector waits for, by file number."""
        self._changed: deque[wasyncore.dispatcher] = deque()
        self._woken_up = False
        """Whether a byte is on its way that wakes the loop."""
        self._thread: int | None = None
        self._ended = False
        self._check_at = 0.0

    def run(self) -> None:
        """Until end(); closes all sockets then. After an error it may be called again."""
        self._thread = get_ident()
        while not self._ended:
            while self._changed:
                self._watch(self._changed.popleft())
            wait_s = self._check_at - time.monotonic()
            if wait_s <= 0:
                self._check_at = time.monotonic() + CHECK_S
                self.check()
                continue
            for key, events in self._selector.select(wait_s):
                if key.data is None:
                    # In this order: a byte that is read here must not leave the mark behind.
                    self._woken.recv(4096)
                    self._woken_up = False
                else:
                    self._handle(key.data, events)
        self._close()

    def end(self) -> None:
        self._ended = True
        if self._thread is None:
            self._close()
        else:
            self._wake()

    def changed(self, socket: wasyncore.dispatcher) -> None:
        """What this socket waits for may have changed: the loop asks it before it waits again."""
        if self._ended:
            return
        self._changed.append(socket)
        if not self._woken_up and self._thread not in (None, get_ident()):
            self._woken_up = True
            self._wake()

    def forget(self, number: int) -> None:
        if self._watched.pop(number, 0):
            self._selector.unregister(number)

    def check_thread(self) -> None:
        if self._thread not in (None, get_ident()):
            raise RuntimeError("only the HTTP loop may open or close connections")

    def _wake(self) -> None:
        with suppress(OSError):  # it is woken already, or has ended
            self._waker.send(b"x")

    def _close(self) -> None:
        wasyncore.close_all(self.sockets, ignore_all=True)
        self._woken.close()
        self._waker.close()
        self._selector.close()

    def _watch(self, socket: wasyncore.dispatcher) -> None:
        number = socket._fileno
        if number is None:  # it was closed meanwhile
            return
        try:
            if isinstance(socket, ReadsOn):
                socket.read_on()
            wanted, watched = _wanted(socket), self._watched.get(number, 0)
            if wanted == watched:
                return
            if not wanted:
                self.forget(number)
                return
            if watched:
                self._selector.modify(number, wanted, socket)
            else:
                self._selector.register(number, wanted, socket)
            self._watched[number] = wanted
        except Exception:
            log.exception("a connection is closed because of an error")
            socket.handle_close()

    def _handle(self, socket: wasyncore.dispatcher, events: int) -> None:
        """Its own errors close it, and nothing else."""
        if events & EVENT_READ and socket._fileno is not None and socket.readable():
            wasyncore.read(socket)
        if events & EVENT_WRITE and socket._fileno is not None and socket.writable():
            wasyncore.write(socket)
        self._watch(socket)


def _wanted(socket: wasyncore.dispatcher) -> int:
    """The events that a socket waits for."""
    wanted = EVENT_READ if socket.readable() else 0
    if socket.writable() and not socket.accepting:
        wanted |= EVENT_WRITE
    return wanted
