"""How fairly the GPU is shared, in virtual time: one client with many tasks, others with few.

    python3 benchmarks/fair_share.py [--quick]

The real scheduler and a worker that takes the seconds of the plan. "Equal shares" is what a client
would wait if it had a tenth of the GPU for itself alone (generalised processor sharing).
"""

import argparse
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import median

from common import OFFER, make_params

from queue_manager import QueueManager
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, Owner, Phase, Progress
from timing_model import Measured, TimingModel

SIDES = (512, 768, 1024)
SECONDS_PER_MEGAPIXEL = 10.0


@dataclass
class Job:
    client: str
    side: int
    at: float
    seconds: float
    waited_s: float = 0.0


class World:
    """One GPU under the real scheduler. Time is virtual."""

    def __init__(self, seed: int, max_overtaken_s: float = 600.0) -> None:
        self.at = 0.0
        self.dice = random.Random(seed)
        self._store = TaskStore(None)
        self.scheduler = Scheduler(
            OFFER,
            TimingModel(),
            self._store,
            QueueLimits(max_queue=10_000, keep_s=1e9, max_overtaken_s=max_overtaken_s),
            monotonic=lambda: self.at,
            now=lambda: self.at + 1e6,
        )
        self.queue, self.worker = QueueManager(self.scheduler), WorkerApi(self.scheduler)
        spec = self.scheduler.allowed.first_spec
        self.worker.load_started(spec)
        self.worker.load_finished(spec, None, [spec.key])
        self.jobs: dict[str, Job] = {}
        self.had_s: dict[str, float] = {}

    def close(self) -> None:
        self._store.close()

    def job(self, client: str, at: float) -> Job:
        side = self.dice.choice(SIDES)
        noise = self.dice.lognormvariate(0.0, 0.1)
        return Job(client, side, at, SECONDS_PER_MEGAPIXEL * side**2 / 2**20 * noise)

    def submit(self, job: Job, weight: float = 1.0, priority: int = 0) -> None:
        owner = Owner(job.client, weight=weight)
        task, _ = self.queue.submit(make_params(side=job.side), owner=owner, priority=priority)
        self.jobs[task.task_id] = job

    def run_next(self) -> Job | None:
        """Run the next task to its end, at once."""
        task = self.worker.claim(0)
        if task is None:
            return None
        job = self.jobs.pop(task.task_id)
        step_s = job.seconds / task.params.steps
        for step in range(task.params.steps + 1):
            progress = Progress(Phase.DENOISING, step, task.params.steps)
            self.worker.report(task.task_id, task.attempt, progress)
            self.at += step_s if step < task.params.steps else 0.0
        progress = Progress(Phase.IMAGE_ENCODING, task.params.steps, task.params.steps)
        self.worker.report(task.task_id, task.attempt, progress)
        measured = Measured(0.0, [step_s] * task.params.steps, 0.0, 0.0)
        self.worker.finish(task.task_id, task.attempt, Encoded(b"image", 0, ((0, measured),)))
        job.waited_s = self.at - job.at
        self.had_s[job.client] = self.had_s.get(job.client, 0.0) + job.seconds
        return job


def one_and_nine(world: World, hours: float) -> float:
    """Returns the median wait of nine clients with one task now and then, beside one with 100
    tasks, over what they would wait with a tenth of the GPU each."""
    for _ in range(100):
        world.submit(world.job("many", 0.0))
    arrivals = sorted(
        (world.job(f"few{number}", world.dice.uniform(0, hours * 3600.0)) for number in range(9)
         for _ in range(round(hours * 3))),
        key=lambda job: job.at,
    )  # fmt: skip
    waited, alone = [], []
    while arrivals or world.jobs:
        while arrivals and arrivals[0].at <= world.at:
            world.submit(arrivals.pop(0))
        done = world.run_next()
        if done is None:
            world.at = arrivals[0].at
        elif done.client != "many":
            waited.append(done.waited_s)
            alone.append(10 * done.seconds)
        if sum(job.client == "many" for job in world.jobs.values()) < 50:
            world.submit(world.job("many", world.at))
        if not arrivals and all(job.client == "many" for job in world.jobs.values()):
            break
    return median(waited) / median(alone)


def jain_of_backlogged(world: World, tasks: int) -> float:
    """Returns Jain's index of weighted seconds over ten clients that always have tasks waiting."""
    weights = {f"c{number}": float(1 + number % 3) for number in range(10)}
    for name, weight in weights.items():
        for _ in range(5):
            world.submit(world.job(name, world.at), weight)
    for _ in range(tasks):
        done = world.run_next()
        assert done is not None
        world.submit(world.job(done.client, world.at), weights[done.client])
    had = [world.had_s.get(name, 0.0) / weight for name, weight in weights.items()]
    return sum(had) ** 2 / (len(had) * sum(value * value for value in had))


def longest_overtaking(world: World) -> float:
    """Returns the most seconds that a normal task waited beside a client that sends urgent ones
    without end, where urgent tasks may overtake a normal one for 600 s."""
    longest = 0.0
    for number in range(400):
        if number % 40 == 0:
            world.submit(world.job("patient", world.at))
        while sum(job.client == "urgent" for job in world.jobs.values()) < 5:
            world.submit(world.job("urgent", world.at), priority=1)
        done = world.run_next()
        if done and done.client == "patient":
            longest = max(longest, done.waited_s)
    return longest


def figures(seeds: range, figure: Callable[[World], float]) -> list[float]:
    """Of a world for each seed."""
    found = []
    for seed in seeds:
        with closing(World(seed)) as world:
            found.append(figure(world))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    seeds = range(1 if quick else 5)
    ratios = figures(seeds, partial(one_and_nine, hours=1.0 if quick else 3.0))
    print(f"one with 100, nine with one: wait over equal shares {median(ratios):.2f} (bar 1.2)")
    index = min(figures(seeds, partial(jain_of_backlogged, tasks=200 if quick else 1000)))
    print(f"Jain's index of ten backlogged clients, weights 1 to 3: {index:.4f} (bar 0.98)")
    waited_s = max(figures(seeds, longest_overtaking))
    print(f"longest wait of a normal task beside endless urgent ones: {waited_s:.0f} s")


if __name__ == "__main__":
    main()
