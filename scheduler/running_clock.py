"""A monotonic clock that stands still while the process is stopped."""

import time
from collections.abc import Callable
from threading import Event, Lock

from supervision import SupervisedThread

TICK_S = 1.0
GAP_S = 5.0
"""Readings come each TICK_S. If there was none for longer than this, the process was stopped."""


class RunningClock:
    """Seconds during which the process ran.

    SIGSTOP, a debugger and a suspended virtual machine stop all threads: no work is done, and what
    is measured across such a gap says nothing about the next task. The clock leaves the gap out
    and counts it, so that measurements across it can be discarded. Any thread may read it.

    Args:
        monotonic: the clock of the machine, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.gaps = 0
        """How often the process was stopped."""
        self._monotonic = monotonic
        self._lock = Lock()
        self._read_at = monotonic()
        self._stopped_s = 0.0
        self._end = Event()

    def __call__(self) -> float:
        with self._lock:
            at = self._monotonic()
            if at - self._read_at > GAP_S:
                self.gaps += 1
                self._stopped_s += at - self._read_at
            self._read_at = at
            return at - self._stopped_s

    def start(self) -> None:
        """Read the clock each TICK_S on a thread, so that an idle process has no gaps."""
        SupervisedThread("clock", self._tick).start()

    def stop(self) -> None:
        self._end.set()

    def _tick(self) -> None:
        while not self._end.wait(TICK_S):
            self()
