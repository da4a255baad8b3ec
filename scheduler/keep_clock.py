"""The clock that decides how long something is kept."""

from collections.abc import Callable


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
