"""How long each call holds the lock of the tasks in memory (Scheduler.lock), with 10,000 tasks of
four models waiting that are grouped by model (affinity).

How to read it: a call may take the lock several times; its longest time counts. `CPU max` leaves
out what other processes took while the lock was held. `whole call` is everything that the call
does, the disk included. One thread makes all calls.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from threading import Condition, Lock
from typing import TypeVar

from common import MAX_QUEUE, Results, make_params, median, percentile

from allowed import Allowed
from api.queue_answers import queue_answer
from models.mflux_registry import find_model
from queue_manager import QueueManager
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, Phase, Progress
from timing_model import Measured, TimingModel

MODELS = [
    model
    for name in ("schnell", "flux2-klein-4b", "z-image-turbo", "qwen")
    if (model := find_model(name))
]
MAX_DELAY_S = 1e6
STEPS = 4
MEASURED = Measured(0.5, [1.0] * STEPS, 0.5, 0.01)
GOALS_MS = {
    "submit": (2.0, 10.0),
    "release": (2.0, 10.0),
    "report": (0.2, 0.2),
    "status": (0.2, 0.2),
}
"""Median and maximum."""

R = TypeVar("R")


class TimedLock:
    """A lock that notes for how long it is held."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._since = (0.0, 0.0)
        self.held_s: list[tuple[float, float]] = []
        """Of each time: seconds, and those of the CPU."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        acquired = self._lock.acquire(blocking, timeout)
        if acquired:
            self._since = time.perf_counter(), time.thread_time()
        return acquired

    def release(self) -> None:
        wall, cpu = self._since
        self.held_s.append((time.perf_counter() - wall, time.thread_time() - cpu))
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Bench:
    """The queue and its one worker, both played by this thread."""

    def __init__(self, waiting: int) -> None:
        scheduler = Scheduler(
            Allowed(MODELS[0], tuple(MODELS)),
            TimingModel(),
            TaskStore(None),
            QueueLimits(max_queue=MAX_QUEUE, max_delay_s=MAX_DELAY_S),
        )
        self._lock = TimedLock()
        scheduler.lock = self._lock  # type: ignore[assignment]
        scheduler.wake_worker = Condition(self._lock)  # type: ignore[arg-type]
        scheduler.wake_downloads = Condition(self._lock)  # type: ignore[arg-type]
        self.queue = QueueManager(scheduler)
        self.worker = WorkerApi(scheduler)
        self.held_s: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self.calls_s: defaultdict[str, list[float]] = defaultdict(list)
        self.ids: list[str] = []
        self.worker.load_started(scheduler.allowed.first_spec)
        self.worker.load_finished(
            scheduler.allowed.first_spec, None, [scheduler.allowed.first_spec.key]
        )
        for _ in range(waiting):
            self.submit()
        self.held_s.clear()
        self.calls_s.clear()

    def submit(self) -> None:
        model = MODELS[len(self.ids) % len(MODELS)].name
        params = make_params().model_copy(update={"model": model})
        task, _ = self._timed("submit", lambda: self.queue.submit(params))
        self.ids.append(task.task_id)

    def status(self, number: int) -> None:
        """Of a task that waits somewhere."""
        task_id = self.ids[-1 - number * 7919 % (len(self.ids) // 2)]
        self._timed("status", lambda: self.queue.status(task_id))

    def list_page(self, number: int) -> None:
        """GET /queue?limit=1000."""
        offset = number * 1000 % 10_000
        self._timed(
            "list 1,000",
            lambda: queue_answer(
                *self.queue.unfinished(1000, offset), owns=lambda task: True, paused=False
            ),
        )

    def run(self, *, release: bool) -> None:
        """The next task runs: it is done, or waits again in the middle."""
        task = self._timed("claim", lambda: self.worker.claim(0))
        assert task
        name, attempt = task.task_id, task.attempt
        for step in range(STEPS + 1):
            progress = Progress(Phase.DENOISING, step, STEPS)
            self._timed("report", partial(self.worker.report, name, attempt, progress))
            self.status(step)
        if release:
            self._timed("release", lambda: self.worker.release(name, attempt))
            return
        encoded = Encoded(b"image", 0, ((0, MEASURED),))
        self._timed("finish", lambda: self.worker.finish(name, attempt, encoded))

    def _timed(self, name: str, call: Callable[[], R]) -> R:
        self._lock.held_s.clear()
        start = time.perf_counter()
        answer = call()
        self.calls_s[name].append(time.perf_counter() - start)
        self.held_s[name].append(max(self._lock.held_s))
        return answer


def main() -> None:
    results = Results(__file__, __doc__)
    waiting, rounds = (1_000, 20) if results.quick else (10_000, 500)
    bench = Bench(waiting)
    for number in range(rounds):
        bench.submit()
        bench.status(number)
        bench.run(release=number % 2 == 0)
        bench.status(number)
        if number % 10 == 0:
            bench.list_page(number // 10)
    rows = []
    for name, held_s in sorted(bench.held_s.items()):
        wall_ms = [1e3 * wall for wall, _ in held_s]
        goal = GOALS_MS.get(name)
        rows.append(
            (
                name,
                len(bench.calls_s[name]),
                median(wall_ms),
                percentile(wall_ms, 99),
                max(wall_ms),
                1e3 * max(cpu for _, cpu in held_s),
                f"{goal[0]:g} / {goal[1]:g}" if goal else "",
                1e3 * median(bench.calls_s[name]),
            )
        )
    header = ("call", "calls", "p50", "p99", "max", "CPU max", "goal p50 / max", "whole call p50")
    results.table(f"The lock is held, ms, with {waiting:,} tasks waiting", header, rows)
    results.save()


if __name__ == "__main__":
    main()
