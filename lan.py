"""The server on the local network: its address, a QR code for phones, its announcement."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from io import StringIO
from threading import Event, Thread

import errors

log = logging.getLogger("mflux-server")

SOMEWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737). Nothing is sent to it."""
RETRY_S = 30.0
SERVICE = "_http._tcp.local."


def lan_address() -> str:
    """The IPv4 address under which others on the local network reach this machine: the one that
    it would send from. Without a network: 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((SOMEWHERE, 9))  # of a datagram socket: it only chooses a route
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def qr_code(text: str) -> str:
    """A QR code of half blocks, for a terminal that is dark or light."""
    import segno

    lines = StringIO()
    segno.make(text, error="l", micro=False).terminal(lines, compact=True)
    return lines.getvalue()


class Announcement:
    """Announces the server as "mflux on NAME" with Bonjour (mDNS), so that it is found by name.

    Args:
        host: name of this machine, without a domain.
        addresses: at which the server listens.

    Raises:
        BadOption: the package zeroconf is missing.
    """

    def __init__(self, host: str, addresses: Sequence[str], port: int) -> None:
        if find_spec("zeroconf") is None:
            raise errors.BadOption(
                f"--bonjour needs the package zeroconf: {sys.executable} -m pip install zeroconf"
            )
        self._host, self._addresses, self._port = host, list(addresses), port
        self._ended = Event()
        self._wake: Callable[[], object] = lambda: None
        self._thread = Thread(target=self._run, name="bonjour", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        """Withdraw it. No-op if it was not started."""
        self._ended.set()
        with suppress(RuntimeError):  # its loop has just ended
            self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        """Tries it again and again: perhaps the network is not there yet."""
        while not self._ended.is_set():
            try:
                asyncio.run(self._announce())
            except Exception as error:  # the server works without it
                log.warning("the server cannot be announced on the local network: %r", error)
                self._ended.wait(RETRY_S)

    async def _announce(self) -> None:
        """Others can object to the name within a second; then it gets a number."""
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(stopping.set)
        info = AsyncServiceInfo(
            SERVICE,
            f"mflux on {self._host}.{SERVICE}",
            parsed_addresses=self._addresses,
            port=self._port,
            properties={"path": "/"},
            server=f"mflux-{self._host}.local.",  # the system announces the name without mflux-
        )
        network = AsyncZeroconf(interfaces=self._addresses)
        try:
            await (await network.async_register_service(info, allow_name_change=True))
            log.info("announced as %s", info.name.removesuffix(f".{SERVICE}"))
            if not self._ended.is_set():
                await stopping.wait()
        finally:
            await network.async_close()
