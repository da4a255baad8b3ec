"""How many requests may wait for something at a time, so that threads are left for the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class WaitingPlaces:
    """Whoever holds an HTTP thread for long takes a place first: a long-poll, a stream of events,
    a call that answers with the finished picture."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._taken = 0
        self._lock = Lock()

    @property
    def taken(self) -> int:
        return self._taken

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Whether a place was free, which is then held until the block ends."""
        with self._lock:
            free = self._taken < self.places
            self._taken += free
        try:
            yield free
        finally:
            with self._lock:
                self._taken -= free
