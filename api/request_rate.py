"""The requests of each client: the latest one, and how many more it may send now."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from threading import Lock

from cachetools import LRUCache

from errors import TooManyRequests
from key_file import Client

MOST_CLIENTS = 10_000
"""Clients that are remembered; one that is forgotten may send as much as a new one."""
BURST_S = 10.0
"""A client that was quiet may send at once what it may send in this time."""


@dataclass
class _Bucket:
    """A token bucket: each request takes a token, and tokens come at the rate of the client."""

    tokens: float
    filled_at: float
    """Monotonic seconds."""
    seen_at: float
    """Unix seconds."""


class RequestRates:
    """In memory. Any thread may call.

    Args:
        monotonic: the clock, in seconds.
        now: unix seconds.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic = monotonic
        self._now = now
        self._lock = Lock()  # the buckets
        self._buckets: LRUCache[str, _Bucket] = LRUCache(MOST_CLIENTS)

    def note(self, client: Client) -> None:
        """A client sends a request.

        Raises:
            TooManyRequests: it sends more than it may.
        """
        rate, at, now = client.max_requests_per_s, self._monotonic(), self._now()
        most = max((rate or 0.0) * BURST_S, 1.0)
        with self._lock:
            bucket = self._buckets.setdefault(client.name, _Bucket(most, at, now))
            bucket.seen_at = now
            if rate is None:
                return
            bucket.tokens = min(bucket.tokens + (at - bucket.filled_at) * rate, most)
            bucket.filled_at = at
            missing = 1.0 - bucket.tokens
            if missing <= 0:
                bucket.tokens -= 1.0
                return
        retry_after_s = max(ceil(missing / rate), 1)
        raise TooManyRequests(
            f"You may send {rate:g} requests per second: try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )

    def last_seen_at(self, name: str) -> float | None:
        """Unix seconds of the latest request of this client; None: it is not remembered."""
        with self._lock:
            bucket = self._buckets.get(name)
            return bucket.seen_at if bucket else None
