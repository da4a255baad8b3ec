"""How long each call holds the lock of the tasks in memory (Scheduler.lock), with 10,000 tasks of
four models waiting that are grouped by model (affinity): one machine, and 32 of them.

How to read it: a call may take the lock several times; its longest time counts. `CPU max` leaves
out what other processes took while the lock was held. `whole call` is everything that the call
does, the disk included. One thread makes all calls. `dispatch` is what the thread that sends tasks
to other machines does after each change: which task is next on each, and a part of a new plan.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from functools import partial
from threading import Condition, Lock
from typing import TypeVar

from common import MAX_QUEUE, Results, make_params, median, percentile

from allowed import Allowed
from api.queue_answers import queue_answer
from models.mflux_registry import find_model
from queue_manager import QueueManager
from scheduler.limits import QueueLimits
from scheduler.machines import Machine
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, Phase, Progress, Task
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
MACHINES = 32
HEADER = ("call", "calls", "p50", "p99", "max", "CPU max", "goal p50 / max", "whole call p50")

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
    """The queue and its workers, all played by this thread."""

    def __init__(self, waiting: int, machines: int) -> None:
        self._store = TaskStore(None)
        scheduler = self._scheduler = Scheduler(
            Allowed(MODELS[0], tuple(MODELS)),
            TimingModel(),
            self._store,
            QueueLimits(max_queue=MAX_QUEUE, max_delay_s=MAX_DELAY_S),
        )
        self._lock = TimedLock()
        scheduler.lock = self._lock  # type: ignore[assignment]
        scheduler.wake_worker = Condition(self._lock)  # type: ignore[arg-type]
        scheduler.wake_downloads = Condition(self._lock)  # type: ignore[arg-type]
        self.queue = QueueManager(scheduler)
        self._workers = [WorkerApi(scheduler)]
        for number in range(1, machines):
            machine = Machine(f"machine {number}", speed=1.0 + number % 4)
            scheduler.machines.join(machine)
            self._workers.append(WorkerApi(scheduler, machine))
        self.held_s: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self.calls_s: defaultdict[str, list[float]] = defaultdict(list)
        self.ids: list[str] = []
        for worker in self._workers:
            worker.load_started(worker.first_spec)
            worker.load_finished(worker.first_spec, None, [worker.first_spec.key])
        for _ in range(waiting):
            self.submit()
        for worker in self._workers[1:]:
            self._claim(worker)
        self.held_s.clear()
        self.calls_s.clear()

    def close(self) -> None:
        self._store.close()

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

    def run(self, number: int) -> None:
        """The next task of a machine runs: it is done, or waits again in the middle. With several
        machines another one is claimed, so that all others run something."""
        worker = self._workers[number % len(self._workers)]
        run = next(iter(worker.machine.runs.values()), None)
        task = run.task if run else self._claim(worker)
        name, attempt = task.task_id, task.attempt
        for step in range(STEPS + 1):
            progress = Progress(Phase.DENOISING, step, STEPS)
            self._timed("report", partial(worker.report, name, attempt, progress))
            self.status(step)
        if number % 2 == 0:
            self._timed("release", lambda: worker.release(name, attempt))
        else:
            encoded = Encoded(b"image", 0, ((0, MEASURED),))
            self._timed("finish", lambda: worker.finish(name, attempt, encoded))
        if len(self._workers) > 1:
            self._timed("dispatch", self._dispatch)
            self._claim(worker)

    def _claim(self, worker: WorkerApi) -> Task:
        task = self._timed("claim", lambda: worker.claim(0))
        assert task
        return task

    def _dispatch(self) -> None:
        with self._scheduler.lock:
            self._scheduler.next_tasks()
            self._scheduler.forecaster.continue_plan()

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
    for machines in (1, MACHINES):
        with closing(Bench(waiting, machines)) as bench:
            rows = measure(bench, rounds)
        title = f"The lock is held, ms, with {waiting:,} tasks waiting and {machines} machine(s)"
        results.table(title, HEADER, rows)
    results.save()


def measure(bench: Bench, rounds: int) -> list[tuple[object, ...]]:
    """A row for each call."""
    for number in range(rounds):
        bench.submit()
        bench.status(number)
        bench.run(number)
        bench.status(number)
        if number % 10 == 0:
            bench.list_page(number // 10)
    rows: list[tuple[object, ...]] = []
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
    return rows


if __name__ == "__main__":
    main()
