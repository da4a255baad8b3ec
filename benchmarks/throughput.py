"""Requests per second and p99 of /status, /generate and /queue while many tasks wait.

How to read it: one server process per depth, each with one running task that never ends; a client
process with 8 or 64 keep-alive connections sends the next request as soon as it has an answer.
The depths take turns within each round. /status asks for random waiting tasks (on the empty queue
for the running one); what /generate added is deleted after each turn; /queue uses its default
limit of 100 tasks, so its answer is short before there are 100. `of empty` and `of 1` are medians
over the rounds of the ratio to depth 0 and 1 in the same round: /status must not fall below 0.9 at
10,000. The step from 0 to 1 is that from a running to a waiting task, not growth.
`queue.status()` is the call alone, without HTTP: position and forecast, O(log n).
"""

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from threading import Event

from common import (
    FakeServer,
    Remote,
    Results,
    fill,
    make_params,
    median,
    small_picture,
    temporary_folder,
)
from load import Load, LoadClient, get, post
from PIL import Image

from task import GenerationParams, Report

DEPTHS = (0, 1, 100, 1_000, 10_000, 100_000)
CONNECTIONS = (8, 64)
ROUTES = ("/status", "/generate", "/queue")
SAMPLE = 1_000
"""Different tasks that are asked for."""


class DeepServer:
    """A server in which one task runs for ever and `depth` tasks wait."""

    def __init__(self, folder: Path, depth: int) -> None:
        data_dir = folder / str(depth)
        waiting = fill(data_dir, depth + 1)[1:]
        self._ended, runs = Event(), Event()

        def draw(params: GenerationParams, report: Report) -> Image.Image:
            runs.set()
            self._ended.wait()
            return small_picture(params, report)

        self._server = FakeServer(data_dir, draw)
        runs.wait()
        running = self._server.queue.unfinished(1, 0)[0][0].task_id
        self._ids = random.sample(waiting, min(SAMPLE, depth)) or [running]

    def port_and_ids(self) -> tuple[int, list[str]]:
        return self._server.port, self._ids

    def delete(self, ids: Sequence[str]) -> None:
        for task_id in ids:
            self._server.queue.delete(task_id)

    def status_us(self) -> float:
        """Microseconds of queue.status() for one task."""
        status = self._server.queue.status
        calls = 2 * SAMPLE // len(self._ids) * self._ids
        start = time.perf_counter()
        for task_id in calls:
            status(task_id)
        return 1e6 * (time.perf_counter() - start) / len(calls)


class Bench:
    """The server of one depth, and what was measured there: one value per round."""

    def __init__(self, folder: Path, depth: int) -> None:
        self.depth = depth
        self.server = Remote(DeepServer, folder, depth)
        self._port, ids = self.server.call(DeepServer.port_and_ids)
        generate = json.dumps(make_params().model_dump(include={"prompt", "width", "height"}))
        self._requests = {
            "/status": [get(f"/status?task_id={task_id}") for task_id in ids],
            "/generate": [post("/generate", generate)],
            "/queue": [get("/queue")],
        }
        self.loads: dict[tuple[str, int], list[Load]] = defaultdict(list)
        self.status_us: list[float] = []

    def measure(
        self, client: Remote[LoadClient], route: str, connections: int, seconds: float
    ) -> None:
        adds = route == "/generate"
        load = client.call(
            LoadClient.closed_loop,
            self._port,
            self._requests[route],
            connections=connections,
            seconds=seconds,
            keep_bodies=adds,
        )
        self.loads[route, connections].append(load)
        if adds:
            added = [json.loads(answer.body)["task_id"] for answer in load.answers if answer.ok]
            self.server.call(DeepServer.delete, added)

    def rate(self, route: str, connections: int) -> float:
        return median([load.per_second for load in self.loads[route, connections]])

    def p99_ms(self, route: str, connections: int) -> float:
        return median([load.p99_ms for load in self.loads[route, connections]])

    def share_of(self, other: "Bench", route: str, connections: int) -> float:
        pairs = zip(self.loads[route, connections], other.loads[route, connections], strict=True)
        return median([mine.per_second / theirs.per_second for mine, theirs in pairs])


def main() -> None:
    results = Results(__file__, __doc__)
    depths, rounds, seconds = (DEPTHS[:4], 1, 0.2) if results.quick else (DEPTHS, 5, 0.5)
    client = Remote(LoadClient)
    with temporary_folder() as folder:
        benches = [Bench(folder, depth) for depth in depths]
        for number in range(rounds):
            for bench in benches:
                bench.status_us.append(bench.server.call(DeepServer.status_us))
            for route, connections in product(ROUTES, CONNECTIONS):
                for bench in benches[:: 1 if number % 2 else -1]:
                    bench.measure(client, route, connections, seconds)
        for bench in benches:
            bench.server.close()
    client.close()
    empty, one = benches[:2]
    for route in ROUTES:
        results.table(
            route,
            ("waiting", "connections", "req/s", "of empty", "of 1", "p99 ms"),
            [
                (
                    f"{bench.depth:,}",
                    connections,
                    bench.rate(route, connections),
                    f"{bench.share_of(empty, route, connections):.2f}",
                    f"{bench.share_of(one, route, connections):.2f}",
                    bench.p99_ms(route, connections),
                )
                for connections in CONNECTIONS
                for bench in benches
            ],
        )
    results.table(
        "queue.status() alone",
        ("waiting", "us a call"),
        [(f"{bench.depth:,}", median(bench.status_us)) for bench in benches],
    )
    results.save()


if __name__ == "__main__":
    main()
