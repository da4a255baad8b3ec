"""How many requests may hold an HTTP thread for long, so that others always find one."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore


class WaitingPlaces:
    """Any thread may take a place; who gets none must not wait."""

    def __init__(self, places: int) -> None:
        self._free = BoundedSemaphore(places)

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Holds a place; yields whether there was one."""
        free = self._free.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._free.release()
