"""RAM per waiting task and per image kept, RAM over many tasks, and the time of a restart.

How to read it: each server is a process of its own whose RSS is asked from the system. `submitted`
tasks came in one by one, `restored` ones were read back at a start (which needs more for a moment:
Python gives little of it back). Images are on disk, so an image kept should cost next to nothing.
Over many tasks the RSS must stop growing: compare the middle with the end. A restart is timed from
the start of `python server.py --model noise-flux1` until it listens; `store and queue alone` is
the part that depends on the tasks, measured beside it in a process of its own.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    FakeServer,
    Remote,
    Results,
    fill,
    make_params,
    make_scheduler,
    median,
    rss_mb,
    run_waiting,
    set_synchronous,
    temporary_folder,
)
from PIL import Image

from queue_manager import QueueManager
from storage.task_store import TaskStore
from task import GenerationParams, Report

SIDE = 256
"""Width and height of the kept pictures in pixels."""


class Waiting:
    """A queue without a worker."""

    def __init__(self, data_dir: Path) -> None:
        start = time.perf_counter()
        self._store = TaskStore(data_dir)
        self._queue = QueueManager(make_scheduler(self._store))
        self._seconds = time.perf_counter() - start
        set_synchronous(self._store, "OFF")
        gc.collect()

    def submit(self, tasks: int) -> None:
        for _ in range(tasks):
            self._queue.submit(make_params())
        gc.collect()

    def seconds(self) -> float:
        """That opening the store and reading the tasks back took."""
        return self._seconds


class Finishing:
    """A server whose pictures take no time."""

    def __init__(self, data_dir: Path) -> None:
        noise = Image.merge("RGB", [Image.effect_noise((SIDE, SIDE), 40) for _ in "RGB"])

        def draw(params: GenerationParams, report: Report) -> Image.Image:
            return noise

        self._server = FakeServer(data_dir, draw)

    def finish(self, tasks: int) -> None:
        """In batches, so that the number of waiting tasks stays as it is."""
        batch = 50
        for _ in range(tasks // batch):
            for _ in range(batch):
                self._server.queue.submit(make_params(side=SIDE))
            run_waiting(self._server.queue, batch)
        gc.collect()

    def kept(self) -> tuple[int, int]:
        return self._server.queue.images()


class TinyServer:
    """`python server.py --model noise-flux1`: real mflux, random weights. Or another model."""

    def __init__(self, data_dir: Path, model: Sequence[str] = ("--model", "noise-flux1")) -> None:
        start = time.perf_counter()
        command = [sys.executable, "server.py", *model, "--port", "0"]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MFLUX_SERVER_")}
        self._process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir), "--max-queue", "1000000"],
            cwd=ROOT,
            env={**inherited, "HF_HUB_OFFLINE": "1", "MFLUX_SERVER_LOG_LEVEL": "info"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr
        log = ""
        for line in self._process.stderr:
            log += line
            if found := re.search(r"serving .* on (http://127\.0\.0\.1:\d+)", line):
                self._url = found[1]
                break
        else:
            raise RuntimeError(f"the server did not start:\n{log}")
        self.start_s = time.perf_counter() - start
        self._drain = subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=-3)

    @property
    def pid(self) -> int:
        return self._process.pid

    def draw(self, count: int) -> None:
        for number in range(count):
            side = 64 + 16 * (number % 5)
            body = {"prompt": f"picture {number}", "width": side, "height": side, "steps": 2}
            task_id = self.ask("/generate", body)["task_id"]
            while self.ask(f"/status?task_id={task_id}")["status"] != "done":
                time.sleep(0.005)

    def ask(self, target: str, body: object = None) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + target,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            asked: dict[str, Any] = json.load(answer)
        return asked

    def fetch(self, target: str) -> bytes:
        with urllib.request.urlopen(self._url + target, timeout=60) as answer:
            data: bytes = answer.read()
        return data

    def delete(self, task_id: str) -> None:
        target = f"{self._url}/delete?task_id={task_id}"
        urllib.request.urlopen(urllib.request.Request(target, method="DELETE"), timeout=60).close()

    def stop(self) -> float:
        """Returns the seconds that it took to stop."""
        start = time.perf_counter()
        self._process.terminate()
        self._process.wait()
        self._drain.wait()
        return time.perf_counter() - start

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._drain.wait()


def main() -> None:
    results = Results(__file__, __doc__)
    depths = (200,) if results.quick else (10_000, 100_000)
    measure_waiting(results, depths)
    measure_finishing(results, 300 if results.quick else 5_000)
    measure_tiny(results, 12 if results.quick else 300)
    measure_restart(results, depths, 1 if results.quick else 3)
    results.save()


def measure_waiting(results: Results, depths: tuple[int, ...]) -> None:
    rows: list[tuple[object, ...]] = []
    for depth in depths:
        with temporary_folder() as folder:
            first = Remote(Waiting, folder)
            empty = rss_mb(first.pid)
            first.call(Waiting.submit, depth)
            submitted = rss_mb(first.pid)
            first.close()
            again = Remote(Waiting, folder)
            restored = rss_mb(again.pid)
            again.close()
        for way, rss in (("submitted", submitted), ("restored", restored)):
            rows.append((f"{depth:,}", way, empty, rss, 1e3 * (rss - empty) / depth))
    results.table("Waiting tasks", ("waiting", "", "empty MB", "MB", "KB a task"), rows)


def measure_finishing(results: Results, tasks: int) -> None:
    with temporary_folder() as folder:
        server = Remote(Finishing, folder)
        rows = [(0, rss_mb(server.pid), 0.0)]
        for _ in range(4):
            server.call(Finishing.finish, tasks // 4)
            images, size = server.call(Finishing.kept)
            rows.append((images, rss_mb(server.pid), size / 1e6))
        server.close()
    results.table("Tasks finished, images kept", ("finished", "RSS MB", "images MB"), rows)
    (middle, middle_mb, _), (end, end_mb, _) = rows[2], rows[4]
    results.note(
        f"From the middle to the end {end_mb - middle_mb:+.2f} MB: "
        f"{1e3 * (end_mb - middle_mb) / (end - middle):.2f} KB for each image kept."
    )


def measure_tiny(results: Results, tasks: int) -> None:
    with temporary_folder() as folder:
        server = TinyServer(folder)
        server.draw(5)  # what is loaded when it is first used
        rows = [(0, rss_mb(server.pid))]
        for _ in range(4):
            server.draw(tasks // 4)
            rows.append((rows[-1][0] + tasks // 4, rss_mb(server.pid)))
        server.kill()
    results.table("The tiny model over HTTP, five sizes in turn", ("pictures", "RSS MB"), rows)


def measure_restart(results: Results, depths: tuple[int, ...], rounds: int) -> None:
    whole: dict[int, list[float]] = defaultdict(list)
    queue: dict[int, list[float]] = defaultdict(list)
    with temporary_folder() as folder:
        for depth in (0, *depths):
            fill(folder / str(depth), depth)
        for _ in range(rounds):
            for depth in (0, *depths):
                alone = Remote(Waiting, folder / str(depth))
                queue[depth].append(alone.call(Waiting.seconds))
                alone.close()
                server = TinyServer(folder / str(depth))
                whole[depth].append(server.start_s)
                server.kill()
    results.table(
        "Restart",
        ("waiting", "seconds until it listens", "store and queue alone, s"),
        [(f"{depth:,}", median(whole[depth]), median(queue[depth])) for depth in whole],
    )


if __name__ == "__main__":
    main()
