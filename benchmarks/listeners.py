"""The cost of listeners: /status and the worker, with 0, 50 and 200 streams of events open.

How to read it: one server whose fake generator draws for ever, a step each 50 ms (real models take
0.3 to 15 s), as a thread does whose GPU works; half the listeners watch the running task, half the
whole queue, and all read what they get. With listeners, all of them are sent each step. The
numbers of listeners take turns within each round. /status is asked by a client process over 8
keep-alive connections that send the next request as soon as they have an answer. `late` is how
much later than after 50 ms the next step begins, without and with that load: reporting the step,
and waiting for the interpreter. `of none` are medians over the rounds of the ratio to no listeners
in the same round. Goal: the worker is not slowed (late below 1 % of a step in the median).
"""

import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from socket import SHUT_RDWR, create_connection, socket
from threading import Event, Thread

from common import FakeServer, Remote, Results, make_params, median, percentile, temporary_folder
from load import Load, LoadClient, get
from PIL import Image

from task import GenerationParams, Phase, Report

LISTENERS = (0, 50, 200)
STEP_S = 0.05
CONNECTIONS = 8


class DrawingServer:
    """A server in which one task runs for ever."""

    def __init__(self, folder: Path) -> None:
        self._late: list[float] = []
        runs = Event()

        def draw(params: GenerationParams, report: Report) -> Image.Image:
            runs.set()
            step = 0
            while True:
                start = time.perf_counter()
                time.sleep(STEP_S)
                step += 1
                report(Phase.DENOISING, step % 1000, 1000)
                self._late.append(time.perf_counter() - start - STEP_S)

        self._server = FakeServer(folder, draw)
        self._task_id = self._server.queue.submit(make_params())[0].task_id
        runs.wait()

    def port_and_id(self) -> tuple[int, str]:
        return self._server.port, self._task_id

    def late(self) -> list[float]:
        """Seconds, of the steps since the last call."""
        late, self._late = self._late, []
        return late

    def listening(self) -> int:
        return self._server.queue.events.listeners


class Listeners:
    """Event streams that are read continuously."""

    def __init__(self) -> None:
        self._sockets: list[socket] = []
        self._received = 0

    def open(self, port: int, task_id: str, number: int) -> None:
        for index in range(number):
            opened = create_connection(("127.0.0.1", port))
            opened.sendall(get("/events" if index % 2 else f"/events?task_id={task_id}"))
            self._sockets.append(opened)
        if number:
            Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with DefaultSelector() as selector:
            for opened in self._sockets:
                selector.register(opened, EVENT_READ, opened)
            left = len(self._sockets)
            while left:
                for key, _ in selector.select():
                    data = b""
                    with suppress(ConnectionError):  # closed with something unread
                        data = key.data.recv(1 << 16)
                    self._received += data.count(b"event: step")
                    if not data:
                        selector.unregister(key.data)
                        left -= 1

    def received(self) -> int:
        """Steps, since the last call."""
        received, self._received = self._received, 0
        return received

    def close(self) -> None:
        for opened in self._sockets:
            opened.shutdown(SHUT_RDWR)
        self._sockets = []


def main() -> None:
    results = Results(__file__, __doc__)
    rounds, seconds = (1, 0.5) if results.quick else (7, 1.5)
    loads: dict[int, list[Load]] = defaultdict(list)
    quiet: dict[int, list[list[float]]] = defaultdict(list)
    loaded: dict[int, list[list[float]]] = defaultdict(list)
    received: dict[int, list[float]] = defaultdict(list)
    with temporary_folder() as folder:
        server = Remote(DrawingServer, folder)
        listeners, client = Remote(Listeners), Remote(LoadClient)
        port, task_id = server.call(DrawingServer.port_and_id)
        for number in range(rounds):
            for count in LISTENERS[:: 1 if number % 2 else -1]:
                listeners.call(Listeners.open, port, task_id, count)
                while server.call(DrawingServer.listening) < count:
                    time.sleep(0.01)
                server.call(DrawingServer.late)
                listeners.call(Listeners.received)
                time.sleep(seconds)
                received[count].append(listeners.call(Listeners.received) / seconds)
                quiet[count].append(server.call(DrawingServer.late))
                load = client.call(
                    LoadClient.closed_loop,
                    port,
                    [get(f"/status?task_id={task_id}")],
                    connections=CONNECTIONS,
                    seconds=seconds,
                )
                loads[count].append(load)
                loaded[count].append(server.call(DrawingServer.late))
                listeners.call(Listeners.close)
                while server.call(DrawingServer.listening):
                    time.sleep(0.01)
        for process in (server, listeners, client):
            process.close()
    report(results, loads, received, (quiet, loaded))


def report(
    results: Results,
    loads: dict[int, list[Load]],
    received: dict[int, list[float]],
    late_s: tuple[dict[int, list[list[float]]], ...],
) -> None:
    """Writes the tables; all values by number of listeners.

    Args:
        late_s: without load, and under load.
    """
    results.table(
        "/status",
        ("listeners", "req/s", "of none", "p99 ms", "p99 of none"),
        [
            (
                count,
                median([load.per_second for load in loads[count]]),
                f"{ratio([load.per_second for load in loads[count]], loads[0], 'rate'):.2f}",
                median([load.p99_ms for load in loads[count]]),
                f"{ratio([load.p99_ms for load in loads[count]], loads[0], 'p99'):.2f}",
            )
            for count in LISTENERS
        ],
    )
    results.table(
        "The worker: late for the next step, ms",
        ("listeners", "steps sent/s", "p50", "p99", "p50 under load", "p99 under load"),
        [
            (
                count,
                median(received[count]),
                *(
                    1e3 * median([percentile(late, percent) for late in measured[count]])
                    for measured in late_s
                    for percent in (50, 99)
                ),
            )
            for count in LISTENERS
        ],
    )
    results.save()


def ratio(values: list[float], none: list[Load], which: str) -> float:
    base = [load.per_second if which == "rate" else load.p99_ms for load in none]
    return median([value / other for value, other in zip(values, base, strict=True)])


if __name__ == "__main__":
    main()
