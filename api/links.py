"""Links to images that work for a limited time without a key, as picture URLs of chat apps must."""

import hmac
from collections.abc import Callable

from flask import request

import errors
from api.client_queue import ClientQueue, OwnQueue
from api.identity import client
from api.query_values import text_value
from key_file import EVERYBODY, NOBODY
from queue_manager import QueueManager

LINK_S = 3600
EXPIRES, SIGNATURE = "expires", "signature"
"""Fields of the query: seconds of the KeepClock, and what proves that this server made the link."""


class Links:
    """Args:
    sign: the signature of a text (Identity.sign); None: links need none, because everyone is
        trusted.
    public_url: under which clients reach this server; empty: the address of each request.
    """

    def __init__(
        self, queue: QueueManager, sign: Callable[[str], str] | None, public_url: str = ""
    ) -> None:
        self._queue = queue
        self._sign = sign
        self._public_url = public_url

    def to(self, name: str) -> tuple[str, float | None]:
        """The URL of an image, and when it expires; None: as long as the image is kept.

        Args:
            name: id of the task, index and extension, as in 1fc9cc4f9d3b27a1_0.jpg.
        """
        base = (self._public_url or request.url_root).rstrip("/")
        url = f"{base}/v1/images/img-{name}"
        if self._sign is None:
            return url, None
        expires = int(self._queue.keep_clock()) + LINK_S
        return f"{url}?{EXPIRES}={expires}&{SIGNATURE}={self._signature(name, expires)}", expires

    def queue_for(self, name: str, own_queue: OwnQueue) -> ClientQueue:
        """Where the present request may look for the image of this name: among all with a valid
        link, else among those of its client.

        Raises:
            Unauthorized: it has no key, and its link is not valid.
        """
        if self._is_valid(name):
            return ClientQueue(self._queue, EVERYBODY)
        if client() is NOBODY:
            if text_value(SIGNATURE):
                raise errors.Unauthorized("This link is not valid, or not any more: get a new one.")
            raise errors.Unauthorized
        return own_queue()

    def _is_valid(self, name: str) -> bool:
        expires, given = text_value(EXPIRES), text_value(SIGNATURE)
        if self._sign is None or not (expires.isascii() and expires.isdigit() and given):
            return False
        if len(expires) > 20 or int(expires) <= self._queue.keep_clock():
            return False
        signature = self._signature(name, int(expires))
        return hmac.compare_digest(signature.encode(), given.encode("utf-8", "surrogatepass"))

    def _signature(self, name: str, expires: int) -> str:
        assert self._sign is not None
        return self._sign(f"link\0{name}\0{expires}")
