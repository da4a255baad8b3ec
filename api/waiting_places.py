"""One budget for all requests that hold an HTTP thread for long.

A request takes a place before it waits for anything but microseconds of a lock: a long poll, a
stream of events, a picture to be decoded, a large body, a finished task. The other threads are
left for requests that are answered at once (GET /status, GET /health, a small POST /generate).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock, get_ident

from errors import TooManyWaiting, TryLater

RETRY_AFTER_S = 10


class WaitingPlaces:
    """Counts the threads that wait. Any thread may call.

    Args:
        places: most threads that may wait at a time.
        for_changes: so many more that may wait for the disk.
    """

    def __init__(self, places: int, for_changes: int = 0) -> None:
        self.places = places
        self._for_changes = for_changes
        self._holders: Counter[int] = Counter()
        """Number of nested blocks with a place, by thread."""
        self._lock = Lock()

    @property
    def taken(self) -> int:
        """Number of used places."""
        return len(self._holders)

    def place(self, when_full: TryLater | None = None) -> AbstractContextManager[None]:
        """Hold a place until the block ends. A thread that has one shares it with inner blocks.

        Args:
            when_full: raised if no place is free; default: TooManyWaiting.

        Raises:
            TryLater: no place is free.
        """
        return self._hold(self.places, when_full)

    def place_for_change(self) -> AbstractContextManager[None]:
        """The same while something is written to the database, one request after the other. Also
        has the places for changes, so that it is not refused where all others wait for long.

        Raises:
            TooManyWaiting: the disk does not keep up.
        """
        return self._hold(self.places + self._for_changes)

    @contextmanager
    def _hold(self, most: int, when_full: TryLater | None = None) -> Iterator[None]:
        thread = get_ident()
        with self._lock:
            if thread not in self._holders and len(self._holders) >= most:
                raise when_full or TooManyWaiting(retry_after_s=RETRY_AFTER_S)
            self._holders[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders[thread] -= 1
                if not self._holders[thread]:
                    del self._holders[thread]
