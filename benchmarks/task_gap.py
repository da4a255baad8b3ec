"""The GPU's idle time between two queued tasks: from the end of generate() to the next call.

How to read it: a fake generator sleeps for a while (as a thread does whose GPU works) and hands
out a noisy picture of 1024 x 1024. `server` is the real server; `reference` is a worker loop that
encodes and saves each picture itself before it claims the next task, over the same QueueManager
and store, as servers do that have no encoder thread. On a RAM disk the disk's share is gone.
`encoding` is encode_image() alone, in the same run. Goal: under 5 ms for both formats.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from common import (
    FakeServer,
    Results,
    describe_fsyncs,
    disks,
    fsyncs,
    make_params,
    make_scheduler,
    median,
    percentile,
    run_waiting,
    temporary_folder,
)
from PIL import Image

from images import encode_image
from queue_manager import QueueManager
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, GenerationParams, Report

GOAL_MS = 5.0
SIZE = (1024, 1024)
ImageFormat = Literal["JPEG", "PNG"]
FORMATS: tuple[ImageFormat, ...] = ("JPEG", "PNG")


class Gpu:
    """A generator that sleeps, and measures its idle time."""

    def __init__(self, picture: Image.Image, seconds: float) -> None:
        self.gaps: list[float] = []
        self._picture = picture
        self._seconds = seconds
        self._ended_at: float | None = None

    def draw(self, params: GenerationParams, report: Report) -> Image.Image:
        if self._ended_at is not None:
            self.gaps.append(time.perf_counter() - self._ended_at)
        time.sleep(self._seconds)
        self._ended_at = time.perf_counter()
        return self._picture


def main() -> None:
    results = Results(__file__, __doc__)
    rounds, tasks, drawing_s = (1, 4, 0.3) if results.quick else (3, 9, 0.5)
    picture = Image.merge("RGB", [Image.effect_noise(SIZE, 40) for _ in "RGB"])
    ways = {f"server, {disk}": (run_server, parent) for disk, parent in disks().items()}
    ways["reference, disk"] = (run_reference, None)
    syncs: list[float] = []
    gaps: dict[tuple[ImageFormat, str], list[float]] = defaultdict(list)
    encoding: dict[ImageFormat, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for image_format in FORMATS:
            encoding[image_format].append(seconds_to_encode(picture, image_format))
            for name, (run, parent) in ways.items():
                gpu = Gpu(picture, drawing_s)
                with temporary_folder(parent) as folder:
                    run(folder, gpu, image_format, tasks)
                    syncs += fsyncs(folder, 20) if parent is None else []
                gaps[image_format, name] += gpu.gaps
    results.table(
        "GPU idle between consecutive tasks, ms",
        ("format", "worker", "gaps", "p50", "p90", "max", "encoding"),
        [
            (
                image_format,
                name,
                len(values),
                *(1e3 * percentile(values, p) for p in (50, 90, 100)),
                1e3 * median(encoding[image_format]),
            )
            for (image_format, name), values in gaps.items()
        ],
    )
    medians = ", ".join(f"{f} {1e3 * median(gaps[f, 'server, disk']):.1f} ms" for f in FORMATS)
    results.note(f"Goal < {GOAL_MS:g} ms: {medians} (medians). {describe_fsyncs(syncs)}")
    results.save()


def run_server(folder: Path, gpu: Gpu, image_format: ImageFormat, tasks: int) -> None:
    server = FakeServer(folder, gpu.draw)
    for _ in range(tasks):
        server.queue.submit(make_params(image_format=image_format))
    run_waiting(server.queue, tasks)
    server.close()


def run_reference(folder: Path, gpu: Gpu, image_format: ImageFormat, tasks: int) -> None:
    store = TaskStore(folder)
    scheduler = make_scheduler(store)
    queue, worker = QueueManager(scheduler), WorkerApi(scheduler)
    for _ in range(tasks):
        queue.submit(make_params(image_format=image_format))
    while task := worker.claim(0):
        picture = gpu.draw(task.params, report_to_nobody)
        image = encode_image(picture, task.params.format, task.params.quality)
        worker.finish(task.task_id, task.attempt, Encoded(image, 0))
    store.close()


report_to_nobody: Report = lambda phase, steps_done, steps_total: None  # noqa: E731


def seconds_to_encode(picture: Image.Image, image_format: ImageFormat) -> float:
    return seconds_of(lambda: encode_image(picture, image_format, 85))


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
