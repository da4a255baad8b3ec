"""Limits the bytes of bodies and answers in memory, and the duration of a transfer."""

import time
from threading import Lock

LEAST_BYTES = 256_000_000
BODIES_AT_A_TIME = 4
"""So many bodies of the largest size always fit."""
FOR_ANSWERS = 4
"""Bodies leave one part in so many to answers: what was drawn comes before what is still asked."""
GRACE_S = 30.0
LEAST_BYTES_PER_S = 4_096
"""A client that sends or reads more slowly than this, for GRACE_S on end, is given up."""
MOST_TRANSFER_S = 300.0
"""Seconds for which one body or answer may be in memory."""


class TransferBudget:
    """Counts the bytes of bodies being received and of answers being sent. Any thread may call."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        return self._held

    def take_for_body(self, size: int) -> bool:
        return self._take(size, self.limit_bytes - self.limit_bytes // FOR_ANSWERS)

    def take_for_answer(self, size: int) -> bool:
        return self._take(size, self.limit_bytes)

    def give_back(self, size: int) -> None:
        with self._lock:
            self._held -= size

    def _take(self, size: int, limit_bytes: int) -> bool:
        """Takes `size` bytes of the budget; returns False if there is not enough."""
        with self._lock:
            fits = self._held + size <= limit_bytes
            self._held += size if fits else 0
        return fits


def budget_for(max_body_bytes: int) -> TransferBudget:
    return TransferBudget(max(LEAST_BYTES, BODIES_AT_A_TIME * max_body_bytes))


class Pace:
    """Whether a transfer is fast enough."""

    def __init__(self) -> None:
        self.started_at = self._since = time.monotonic()
        self._bytes = 0

    def too_slow(self, now: float, transferred_bytes: int, takes_memory: bool) -> bool:
        """Asked now and then, with the bytes so far (now: monotonic)."""
        if transferred_bytes - self._bytes >= LEAST_BYTES_PER_S * (now - self._since):
            self._since, self._bytes = now, transferred_bytes
        too_long = takes_memory and now - self.started_at > MOST_TRANSFER_S
        return too_long or now - self._since > GRACE_S
