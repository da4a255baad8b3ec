"""Networks between a worker and the broker that can be broken.

A proxy works everywhere: it stalls, delays, or forgets its connections. A network namespace (Linux,
root) drops packets, which no end notices.
"""

import asyncio
import contextlib
import random
import subprocess
import threading

LATENCY_S = 0.3
LOSS = 0.01
RETRANSMISSION_S = 1.0
"""Delay of a lost packet."""
NOBODY = "02:00:00:00:00:99"
"""An address that no interface has: packets to it are dropped."""


class Proxy:
    """Forwards connections to a port of 127.0.0.1. Owns the thread "proxy"."""

    def __init__(self, port: int, seed: int) -> None:
        self._to_port = port
        self._random = random.Random(seed)
        self._slow = False
        self._far: set[asyncio.StreamWriter] = set()
        self._near: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._passes: asyncio.Event
        self.port = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="proxy", daemon=True)
        self._thread.start()
        assert ready.wait(60)

    def stall(self) -> None:
        """Nothing passes; what is sent comes later."""
        self._loop.call_soon_threadsafe(self._passes.clear)

    def slow(self) -> None:
        """Everything comes LATENCY_S later, and LOSS of it as if it had been lost once."""
        self._slow = True

    def forget(self) -> None:
        """The broker's side of all connections ends, and the worker's side stays; nothing
        passes until heal()."""
        self.stall()
        self._loop.call_soon_threadsafe(self._end_all, self._far)

    def cut(self) -> None:
        """All connections end; new ones are possible."""
        self._loop.call_soon_threadsafe(self._end_all, self._far | self._near)

    def _end_all(self, ends: set[asyncio.StreamWriter]) -> None:
        for end in ends:
            end.transport.abort()

    def heal(self) -> None:
        self._slow = False
        self._loop.call_soon_threadsafe(self._passes.set)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(60)

    async def _end(self) -> None:
        self._loop.set_exception_handler(lambda loop, context: None)  # of those that are cancelled
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._passes = asyncio.Event()
        self._passes.set()
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._passes.wait()
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:  # the broker is away
            writer.transport.abort()
            return
        self._far.add(far)
        self._near.add(writer)
        up = asyncio.create_task(self._pump(reader, far))
        down = asyncio.create_task(self._pump(far_reader, writer))
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        forgotten = far.is_closing() and not writer.is_closing()
        if forgotten and not self._passes.is_set():
            await up  # until the worker gives the connection up
        for task in (up, down):
            task.cancel()
        for end in (far, writer):
            end.transport.abort()
        self._far.discard(far)
        self._near.discard(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if self._slow:
                    lost = self._random.random() < LOSS
                    await asyncio.sleep(LATENCY_S + lost * RETRANSMISSION_S)
                await self._passes.wait()
                if not writer.is_closing():
                    writer.write(data)
                    await writer.drain()


class Namespace:
    """A network namespace that reaches this machine over a pair of interfaces.

    Args:
        name: of the namespace, at most 10 characters.
        subnet: two numbers of its addresses, 10.A.B.0/30.
    """

    def __init__(self, name: str, subnet: tuple[int, int]) -> None:
        self.name = name
        self.file = f"/run/netns/{name}"
        self.here, self._there = (f"10.{subnet[0]}.{subnet[1]}.{n}" for n in (1, 2))
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}w", "netns", name)
        _ip("addr", "add", f"{self.here}/30", "dev", f"{name}h")
        _ip("link", "set", f"{name}h", "up")
        _ip("-n", name, "addr", "add", f"{self._there}/30", "dev", f"{name}w")
        _ip("-n", name, "link", "set", f"{name}w", "up")

    def drop(self) -> None:
        """Packets are dropped in both directions, and neither end notices."""
        self._neighbours("replace", NOBODY)

    def drop_answers(self) -> None:
        """Packets to the worker are dropped; its own ones arrive."""
        entry = (self._there, "lladdr", NOBODY, "nud", "permanent", "dev", f"{self.name}h")
        _ip("neigh", "replace", *entry)

    def heal(self) -> None:
        for place, other, device in self._ends():
            with contextlib.suppress(subprocess.CalledProcessError):  # there is none
                _ip(*place, "neigh", "del", other, "dev", device)

    def close(self) -> None:
        _ip("netns", "del", self.name)

    def _neighbours(self, verb: str, address: str) -> None:
        for place, other, device in self._ends():
            entry = (other, "lladdr", address, "nud", "permanent", "dev", device)
            _ip(*place, "neigh", verb, *entry)

    def _ends(self) -> tuple[tuple[tuple[str, ...], str, str], ...]:
        return (
            ((), self._there, f"{self.name}h"),
            (("-n", self.name), self.here, f"{self.name}w"),
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)
