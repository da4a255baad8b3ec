"""The clock of durations and forecasts, and that of retention."""

import time
from collections.abc import Callable
from threading import Event, Lock

from supervision import SupervisedThread

TICK_S = 1.0
GAP_S = 5.0
"""Readings come each TICK_S. If there was none for longer than this, the process was stopped, or
another thread has kept the interpreter busy."""
CPU_EVERY_S = 0.1
"""The CPU time is read no more often: reading it takes twenty times as long as the other two."""
BUSY_SHARE = 0.5
"""A process that has used this part of a gap on the CPU was busy, not stopped."""


class RunningClock:
    """Seconds during which the process ran.

    SIGSTOP, a debugger and a suspended virtual machine stop all threads: no work is done, and what
    is measured across such a gap says nothing about the next task. The clock leaves the gap out
    and counts it, so that measurements across it can be discarded. While a computer sleeps, its
    monotonic clock stands still, too; the wall clock then moves ahead of it, as when it is set, and
    that counts as a gap. A wall clock that is set back changes nothing. Any thread may read it.

    Args:
        monotonic: the clock of the machine, in seconds.
        wall: the time of day, in seconds.
        cpu: seconds of the CPU that the process has used.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self.gaps = 0
        """How often the process was stopped."""
        self._monotonic, self._wall, self._cpu = monotonic, wall, cpu
        self._lock = Lock()
        self._read_at, self._wall_at, self._cpu_s = monotonic(), wall(), cpu()
        self._cpu_at = self._read_at
        self._stopped_s = 0.0
        self._end = Event()

    def __call__(self) -> float:
        with self._lock:
            at, wall_at = self._monotonic(), self._wall()
            passed_s = at - self._read_at
            if passed_s > GAP_S and self._cpu() - self._cpu_s < BUSY_SHARE * passed_s:
                self.gaps += 1
                self._stopped_s += passed_s
            elif wall_at - self._wall_at > passed_s + GAP_S:
                self.gaps += 1
            if at - self._cpu_at >= CPU_EVERY_S:
                self._cpu_at, self._cpu_s = at, self._cpu()
            self._read_at, self._wall_at = at, wall_at
            return at - self._stopped_s

    def start(self) -> None:
        """Read the clock each TICK_S on a thread, so that an idle process has no gaps."""
        SupervisedThread("clock", self._tick).start()

    def stop(self) -> None:
        self._end.set()

    def _tick(self) -> None:
        while not self._end.wait(TICK_S):
            self()


class KeepClock:
    """Seconds that the wall clock cannot change while the server runs.

    They begin as unix seconds and follow the monotonic clock. When the wall clock is set forward or
    back, the distance to it changes instead. The next start takes over this distance.

    Args:
        offset_s: seconds from the wall clock to this one at the start.
    """

    def __init__(
        self, now: Callable[[], float], monotonic: Callable[[], float], offset_s: float = 0.0
    ) -> None:
        self._now, self._monotonic = now, monotonic
        self._start = now() + offset_s - monotonic()

    def __call__(self) -> float:
        return self._start + self._monotonic()

    def offset_s(self) -> float:
        return self() - self._now()
