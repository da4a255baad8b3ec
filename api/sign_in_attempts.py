"""Wrong keys of each address: who guesses keys is soon refused."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from threading import Lock

from cachetools import LRUCache

from errors import TooManyRequests

MOST_AT_ONCE = 10
"""Wrong keys that an address may send at once."""
EVERY_S = 6.0
"""Seconds after which it may send another one."""
MOST_ADDRESSES = 10_000
"""Addresses that are remembered, and keys that they have tried."""


@dataclass
class _Attempts:
    left: float
    at: float
    """Monotonic seconds at which so many were left."""


class SignInAttempts:
    """In memory. Any thread may call.

    A key that an address has tried before may be tried there again. So a program with a wrong key
    takes one attempt only, and one who guesses does not shut out those who have signed in before
    behind the same proxy or router.

    Args:
        monotonic: the clock, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = Lock()  # what is remembered
        self._attempts: LRUCache[str, _Attempts] = LRUCache(MOST_ADDRESSES)
        self._tried: LRUCache[tuple[str, bytes], bool] = LRUCache(MOST_ADDRESSES)

    def wait_s(self, address: str | None, key: str) -> float:
        """Seconds until this address may try this key; 0: now."""
        place = _place(address)
        with self._lock:
            return (
                0.0
                if (place, _digest(key)) in self._tried
                else max(1 - self._left(place), 0) * EVERY_S
            )

    def check(self, address: str | None, key: str) -> None:
        """Raises: TooManyRequests: the address has to wait before it may try this key."""
        if wait_s := self.wait_s(address, key):
            raise TooManyRequests(
                f"Too many wrong keys came from this address: try again in {ceil(wait_s)} s.",
                retry_after_s=ceil(wait_s),
            )

    def note(self, address: str | None, key: str, *, right: bool) -> None:
        """An address has sent a key."""
        place = _place(address)
        with self._lock:
            if not right and (place, _digest(key)) not in self._tried:
                self._attempts[place] = _Attempts(self._left(place) - 1, self._monotonic())
            self._tried[place, _digest(key)] = True

    def _left(self, place: str) -> float:
        """(locked)"""
        known = self._attempts.get(place)
        if known is None:
            return MOST_AT_ONCE
        return min(known.left + (self._monotonic() - known.at) / EVERY_S, MOST_AT_ONCE)


def _place(address: str | None) -> str:
    """An address of IPv4; the network of one of IPv6, because each home has one of its own."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return address or ""
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(ip_network((parsed, 64), strict=False))
    return str(parsed)


def _digest(key: str) -> bytes:
    """A key itself is kept nowhere."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
