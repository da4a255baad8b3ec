"""Threads that live as long as the server.

A Python thread that raises ends silently, and the rest of the process continues without it. Every
long-lived thread is therefore a SupervisedThread: it is started again, and if it dies too often the
process ends, so that launchd or systemd starts a new one. Everything accepted is on disk by then.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from threading import Lock, Thread
from typing import Generic, NoReturn, TypeVar

log = logging.getLogger(__name__)

MOST_DEATHS = 5
WITHIN_S = 60.0
"""A thread that dies more than MOST_DEATHS times within WITHIN_S ends the process."""
EXIT_CODE = 1

Item = TypeVar("Item")


class SupervisedThread(Thread):
    """Runs a loop until it returns. If the loop raises, it is called again.

    Args:
        loop: returns only when the server stops.
        recover: called before the loop is called again, on the same thread.
    """

    def __init__(
        self, name: str, loop: Callable[[], None], recover: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.restarts = 0
        """How often the loop was called again after an error."""
        self._loop = loop
        self._recover = recover
        self._may_end = False
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS + 1)

    def let_end(self) -> None:
        """Stop restarting: when the loop ends, it is not called again."""
        self._may_end = True

    def run(self) -> None:
        while True:
            try:
                if self.restarts:
                    self._recover()
                self._loop()
                return
            except BaseException:
                if self._may_end:
                    log.debug("the thread %s ended with an error", self.name, exc_info=True)
                    return
                log.critical("the thread %s died; it is started again", self.name, exc_info=True)
            self._deaths.append(time.monotonic())
            if len(self._deaths) > MOST_DEATHS and self._deaths[-1] - self._deaths[0] < WITHIN_S:
                log.critical(
                    "the thread %s died %d times within %.0f s: the server ends with exit code %d",
                    self.name,
                    len(self._deaths),
                    self._deaths[-1] - self._deaths[0],
                    EXIT_CODE,
                )
                end_process(EXIT_CODE)
            self.restarts += 1


class SupervisedQueue(Generic[Item]):
    """Handles items one after the other on a supervised thread. The first item starts the thread.

    Args:
        handle: called with each item.
        lost: called with an item if handling it raised an error.
        size: largest number of waiting items; put() blocks while it is reached. 0: no limit.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[Item], None],
        lost: Callable[[Item], None],
        *,
        size: int = 0,
    ) -> None:
        self._handle = handle
        self._lost = lost
        self._items: Queue[tuple[Item] | None] = Queue(size)
        self._current: tuple[Item] | None = None
        self._lock = Lock()
        self._started = False
        self._thread = SupervisedThread(name, self._run, self._recover)

    def put(self, item: Item) -> None:
        with self._lock:
            if not self._started:
                self._thread.start()
                self._started = True
        self._items.put((item,))

    def drain(self) -> None:
        """Waits until no item waits or is being handled."""
        self._items.join()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the waiting items; returns whether it has ended."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if not self._started:
                return True
        with suppress(Full):
            self._items.put(None, timeout=max(timeout_s, 0.0))
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while item := self._items.get():
            self._current = item
            self._handle(*item)
            self._current = None
            self._items.task_done()

    def _recover(self) -> None:
        if self._current:
            lost, self._current = self._current, None
            try:
                self._lost(*lost)
            finally:
                self._items.task_done()


def end_process(exit_code: int) -> NoReturn:
    """Ends the process at once, from any thread, without Python's cleanup."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(exit_code)
