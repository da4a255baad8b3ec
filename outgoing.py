"""Outgoing HTTP calls, each within a time limit of its own."""

import http.client
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Timer
from urllib.parse import urlsplit

import certifi

CONNECT_S = 5.0


class TooLarge(ValueError):
    """The body of an answer has more bytes than are read."""


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float, most_bytes: int = 0
) -> tuple[int, bytes]:
    """POST; returns the status of the answer and its body.

    Redirects are not followed, and no proxy is used.

    Args:
        timeout_s: connecting, sending, and the answer. A timeout of a socket is for each of its
            bytes, so the whole call ends by hanging up.
        most_bytes: of the body; 0: it is not read.

    Raises:
        http.client.HTTPException, OSError, ValueError
    """
    deadline = time.monotonic() + timeout_s
    address = urlsplit(url)
    host, is_tls = address.hostname or "", address.scheme == "https"
    port = address.port or (443 if is_tls else 80)
    target = (address.path or "/") + (f"?{address.query}" if address.query else "")
    with socket.create_connection((host, port), timeout=min(CONNECT_S, timeout_s)) as connected:
        line = connected.dup()  # TLS takes over the other one
        hang_up = Timer(deadline - time.monotonic(), _hang_up, (line,))
        hang_up.daemon = True
        hang_up.start()
        try:
            connected.settimeout(timeout_s)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = (
                _tls().wrap_socket(connected, server_hostname=host) if is_tls else connected
            )
            with connection.sock:
                connection.request("POST", target, body, {"Host": address.netloc, **headers})
                response = connection.getresponse()
                content = response.read(most_bytes + 1) if most_bytes else b""
        finally:
            hang_up.cancel()
            line.close()
    if time.monotonic() >= deadline:  # what was cut off looks like an end
        raise TimeoutError
    if len(content) > most_bytes:
        raise TooLarge
    return response.status, content


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _tls() -> ssl.SSLContext:
    """A TLS context with the certificates of the machine and of browsers."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
