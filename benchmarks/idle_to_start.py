"""From POST /generate on an idle server to the generator's call, over real HTTP.

How to read it: the clock starts before the request is sent by a client process and stops on the
worker thread when generate() is entered, so parsing, two durable changes (submit, claim) and the
wake-up are in it. With the data dir on a RAM disk, in alternating rounds, the disk's share shows.
The reference is a worker that looks up once per second (sleep(1)), measured in the same run on
bare threads, without HTTP or disk. Goal: p99 under 10 ms.
"""

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

from common import (
    FakeServer,
    Remote,
    Results,
    describe_fsyncs,
    disks,
    fsyncs,
    percentile,
    small_picture,
    temporary_folder,
)
from load import Answer, LoadClient, post
from PIL import Image

from task import GenerationParams, Report

GOAL_MS = 10.0


class Idle:
    """An idle server, and how long each task took to start."""

    def __init__(self, folder: Path) -> None:
        self.to_start: list[float] = []
        self.to_answer: list[float] = []
        self._started_at: dict[int, float] = {}
        self.server = FakeServer(folder, self._draw)

    def _draw(self, params: GenerationParams, report: Report) -> Image.Image:
        self._started_at[params.seed] = time.monotonic()
        return small_picture(params, report)

    def note(self, seeds: Sequence[int], answers: Sequence[Answer]) -> None:
        """Skips requests that arrived while the previous image was being stored."""
        while self.server.queue.unfinished(1, 0)[1]:
            time.sleep(0.01)
        for seed, answer in zip(seeds, answers, strict=True):
            if json.loads(answer.body)["task_length"] == 0:
                self.to_start.append(self._started_at[seed] - answer.sent_at)
                self.to_answer.append(answer.seconds)


def main() -> None:
    results = Results(__file__, __doc__)
    rounds, count = (1, 30) if results.quick else (10, 50)
    syncs: list[float] = []
    client = Remote(LoadClient)
    with ExitStack() as stack:
        folders = {n: stack.enter_context(temporary_folder(p)) for n, p in disks().items()}
        servers = {name: Idle(folder) for name, folder in folders.items()}
        for number in range(rounds):
            seeds = range(number * count, (number + 1) * count)
            requests = [make_request(seed) for seed in seeds]
            for idle in servers.values():
                port = idle.server.port
                idle.note(seeds, client.call(LoadClient.one_by_one, port, requests, pause_s))
            syncs += fsyncs(folders["disk"], 20)
        for idle in servers.values():
            idle.server.close()
    client.close()
    rows: dict[str, list[float]] = defaultdict(list)
    for name, idle in servers.items():
        rows[f"POST /generate -> generate(), {name}"] = idle.to_start
        rows[f"POST /generate -> answer, {name}"] = idle.to_answer
    rows["reference: polls with sleep(1)"] = polled_starts(30 if results.quick else 300)
    results.table(
        "Idle to start, ms",
        ("", "n", "p50", "p90", "p99", "max"),
        [
            (name, len(values), *(1e3 * percentile(values, p) for p in (50, 90, 99, 100)))
            for name, values in rows.items()
        ],
    )
    p99s = (f"{name} {1e3 * percentile(i.to_start, 99):.1f} ms" for name, i in servers.items())
    results.note(f"Goal p99 < {GOAL_MS:g} ms: {', '.join(p99s)}. {describe_fsyncs(syncs)}")
    results.save()


def make_request(seed: int) -> bytes:
    return post("/generate", json.dumps({"prompt": "x", "seed": seed, "width": 64, "height": 64}))


def pause_s() -> float:
    """Long enough for storing the previous task; random, to avoid synchronization."""
    return random.uniform(0.02, 0.06)


def polled_starts(count: int) -> list[float]:
    """Seconds from a submit until a worker that polls once a second sees the task."""
    waited: list[float] = []

    def poll(comes_at: float) -> None:
        while time.monotonic() < comes_at:
            time.sleep(1.0)
        waited.append(time.monotonic() - comes_at)

    now = time.monotonic()
    threads = [Thread(target=poll, args=(now + random.uniform(0.0, 2.0),)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waited


if __name__ == "__main__":
    main()
