"""Protects against web pages of other sites: which host names requests may be addressed to, and
which pages may send requests that change something.

A page of another site can make a browser send requests here. Its own name may lead to this machine
(DNS rebinding), which the Host header shows. Its requests carry its origin in the Origin header.
"""

import ipaddress
import re
import socket
from collections.abc import Callable
from threading import Thread
from urllib.parse import urlsplit

from flask import Flask, request

import errors

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
DEFAULT_PORTS = {"http": 80, "https": 443}
NAME = re.compile(r"[a-z0-9._-]+")


class AllowedHosts:
    """Host names under which clients may address the server.

    On a loopback address these are the loopback names. On any other address they are localhost, IP
    addresses, names that end in `.local`, and the names of this machine. A page on the internet has
    none of these names.

    Args:
        listens_on: the address of --host.
        names: further names, of --allowed-hosts; `*` allows any.
        own_names: returns the names of this machine. May ask the DNS and take seconds, so it runs
            in a thread of its own.
    """

    def __init__(
        self, listens_on: str, names: str = "", own_names: Callable[[], set[str]] | None = None
    ) -> None:
        self._any = names.strip() == "*"
        self._is_local = listens_on in LOOPBACK
        self._names = LOOPBACK | {name.strip().lower() for name in names.split(",") if name.strip()}
        if not (self._any or self._is_local):
            self._names |= {socket.gethostname().lower()}
            lookup = Thread(
                target=self._look_up, args=(own_names or machine_names,), name="own-names"
            )
            lookup.daemon = True
            lookup.start()

    def allows(self, name: str) -> bool:
        name = name.removesuffix(".")
        if self._any or name in self._names:
            return True
        return not self._is_local and (name.endswith(".local") or _is_address(name))

    def _look_up(self, own_names: Callable[[], set[str]]) -> None:
        self._names |= {name.lower() for name in own_names()}


def machine_names() -> set[str]:
    """The fully qualified name of this machine, and its first part."""
    full = socket.getfqdn()
    return {full, full.partition(".")[0]}


def install_origin_check(
    app: Flask, hosts: AllowedHosts, is_allowed_origin: Callable[[str], bool]
) -> None:
    """Refuse requests for unknown hosts, and requests of other sites that change something.

    Args:
        is_allowed_origin: whether the operator allows pages of this origin.
    """

    @app.before_request
    def check_origin() -> None:
        host = request.headers.get("Host", "")
        if not host and request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
            return  # the header came with HTTP/1.1, which every browser speaks
        name = _host_name(host)
        if name is None:
            raise errors.InvalidInput("The Host header is missing or malformed.", field="Host")
        if not hosts.allows(name):
            raise errors.UnknownHost(
                f"This server does not answer under the host name {name[:100]!r}. To allow it, "
                f"start the server with --allowed-hosts {name[:100]}."
            )
        origin = request.headers.get("Origin")
        if origin is None or request.method in ("GET", "HEAD", "OPTIONS"):
            return
        # Only a browser can set this header, so it is right also where a proxy rewrites Host.
        if request.headers.get("Sec-Fetch-Site") == "same-origin":
            return
        if not (is_same_origin(origin, host) or is_allowed_origin(origin)):
            raise errors.ForeignPage


def is_same_origin(origin: str, host: str) -> bool:
    """Whether a page of this origin was served under this Host header.

    The Host header does not tell the scheme. Where it has no port, the default port of the page's
    own scheme is assumed: behind a proxy that speaks TLS the page is https, the request http.
    """
    try:
        page, served = urlsplit(origin), urlsplit(f"//{host}")
        default = DEFAULT_PORTS[page.scheme]
        page_port, served_port = page.port or default, served.port or default
    except (ValueError, KeyError):
        return False
    return bool(page.hostname) and (page.hostname, page_port) == (served.hostname, served_port)


def _host_name(host: str) -> str | None:
    """The name in a Host header, in lower case; None if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises when it is no port
    except ValueError:
        return None
    name = parts.hostname or ""
    is_name = NAME.fullmatch(name) is not None or _is_address(name)
    return name if is_name and parts.netloc == host and "@" not in host else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
