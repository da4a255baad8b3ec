"""The replay of forecast_error.py: the real QueueManager and timing model in virtual time."""

import math
import random
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from statistics import fmean

from forecast_laws import KLEIN, SCHNELL, Scenario, Seconds

from allowed import Allowed
from models.model_catalog import LoadSpec, Model
from queue_manager import QueueManager
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, GenerationParams, Phase, Progress, Task, Verdict
from timing_model import Measured, TimingModel

SIDES = range(512, 1537, 64)
URGENT_SHARE, CANCELLED_SHARE = 0.1, 0.05
DEPTH = (5, 10)
CONTENDERS = ("ours", "original", "oracle")
REPEATED_REQUESTS = 5
DRIFT_S = 5.0
"""The pace of the machine is looked at this often, in seconds of the law."""


@dataclass
class Poll:
    """What each contender said at one moment about one task."""

    at: float
    finished: int
    """Tasks finished by then."""
    said: dict[str, float]
    p90_s: float


@dataclass
class Record:
    """A task of the replay, and everything that was said about it."""

    params: GenerationParams
    model: Model
    urgent: bool
    law: Seconds
    submitted_at: float
    at_submit: Poll
    waiting: list[Poll] = field(default_factory=list)
    running: list[Poll] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float = 0.0
    paused: bool = False
    own_s: float = 0.0
    """Forecast of its own seconds at submit."""
    runs_before: int = 0
    """Runs of the same request that had ended when it was submitted."""
    forecast_end_at: float = math.inf
    step_back_s: float = 0.0
    """Furthest that the countdown went back without a reason."""


class Replay:
    """One run: `tasks` tasks, in virtual time."""

    def __init__(
        self,
        scenario: Scenario,
        noise: float,
        tasks: int,
        seed: int,
        *,
        urgent: float,
        cancelled: float = CANCELLED_SHARE,
        preempt: bool = False,
    ) -> None:
        self.scenario, self.noise, self.tasks, self.urgent = scenario, noise, tasks, urgent
        self.cancelled = cancelled
        self.dice = random.Random(seed)
        self.at = self.begun_at = 1e6
        models = [m for m in (SCHNELL, KLEIN) if m.name in scenario.load_s] or [scenario.model]
        self.models = models
        self.loaded: Model = models[0]
        self.store = TaskStore(None)
        scheduler = Scheduler(
            Allowed(models[0], tuple(models)),
            TimingModel(),
            self.store,
            QueueLimits(max_queue=1000, keep_s=1e9, preempt=preempt),
            monotonic=lambda: self.at,
            now=lambda: self.at,
        )
        self.queue, self.worker = QueueManager(scheduler), WorkerApi(scheduler)
        self.repeated = [size_and_steps(self.dice) for _ in range(REPEATED_REQUESTS)]
        self.runs: Counter[tuple[int, int, int, str]] = Counter()
        self.records: dict[str, Record] = {}
        self.done: list[Record] = []
        self.order: list[str] = []  # waiting, as the queue runs them
        self.submitted = 0
        self.next_arrival = self.at
        self.seconds_so_far = self.pixels_so_far = 0.0
        self.running: list[Record] = []
        """The task that is drawn, after the one that it preempts."""
        self.left = Seconds(0.0, [], 0.0)
        """Of the task that is drawn, by the law: the phases that have not ended."""
        self.phase_started_at = self.at

    def run(self) -> list[Record]:
        with closing(self.store):
            self.load(self.loaded, self.scenario.load_s.get(self.loaded.name, 5.0))
            while len(self.done) < self.tasks:
                while len(self.order) < DEPTH[0]:
                    self.submit()
                self.work()
        return self.done

    def load(self, model: Model, seconds: float) -> None:
        weights = LoadSpec(model, model.pipelines[0], None)
        self.worker.load_started(weights)
        self.pass_s(seconds)
        self.worker.load_finished(weights, None, [weights.key])

    # -- the clients -----------------------------------------------------------------------------

    def submit(self) -> None:
        again = self.scenario.repeated > 0.0 and self.dice.random() < self.scenario.repeated
        width, height, steps = (
            self.dice.choice(self.repeated) if again else size_and_steps(self.dice)
        )
        model = self.models[self.submitted % len(self.models)]
        params = GenerationParams(
            prompt=self.prompt(), seed=0, width=width, height=height, steps=steps, guidance=None,
            format="JPEG", quality=85, model=model.name,
        )  # fmt: skip
        urgent = self.dice.random() < self.urgent
        self.submitted += 1
        view, _ = self.queue.submit(params, priority=int(urgent))
        law = self.scenario.law(params, model, len(self.done) / self.tasks)
        poll = Poll(self.at, len(self.done), {}, view.forecast.p90_s if view.forecast else 0.0)
        record = Record(params, model, urgent, law, self.at, poll)
        record.runs_before = self.runs[width, height, steps, model.name]
        self.records[view.task_id] = record
        self.reorder()
        if view.forecast:
            record.own_s = view.forecast.end_s - view.forecast.start_s
        poll.said = self.say(view.task_id, view.forecast.end_s if view.forecast else 0.0)
        if self.dice.random() < self.cancelled:
            victim = self.dice.choice(self.order)
            self.queue.delete(victim)
            del self.records[victim]
            self.reorder()

    def prompt(self) -> str:
        """A new one each time."""
        longest = self.scenario.longest_prompt
        if longest == 1:
            return "x"
        return f"{self.submitted} ".ljust(self.dice.randint(10, longest), "x")

    def poll(self) -> None:
        """One waiting task and the running ones are asked for."""
        running = {t for t, record in self.records.items() if record in self.running}
        for task_id in {*running, *([self.dice.choice(self.order)] if self.order else [])}:
            record = self.records[task_id]
            view = self.queue.status(task_id)
            if view.forecast is None:
                continue
            end_at = self.at + view.forecast.end_s
            if view.forecast.reason is None:
                record.step_back_s = max(record.step_back_s, end_at - record.forecast_end_at)
            record.forecast_end_at = end_at
            said = self.say(task_id, float(max(math.ceil(view.forecast.end_s), 1)))
            poll = Poll(self.at, len(self.done), said, view.forecast.p90_s)
            (record.running if task_id in running else record.waiting).append(poll)

    def say(self, task_id: str, ours: float) -> dict[str, float]:
        record = self.records[task_id]
        everything = []
        if task_id in self.order:
            everything = [self.records[t] for t in self.order[: self.order.index(task_id) + 1]]
        pixels = sum(r.params.width * r.params.height for r in [*everything, *self.running])
        rate = self.seconds_so_far / self.pixels_so_far if self.pixels_so_far else 80 / 2**20
        model, loads_s = self.running[-1].model if self.running else self.loaded, 0.0
        for r in everything:
            if r.model is not model:
                loads_s += self.scenario.load_s[r.model.name]
            model = r.model
        work_s = sum(r.law.total for r in everything)
        knowable_s = sum(map(self.knowable_s, everything))
        return {
            "ours": ours,
            "original": max(rate * pixels - (self.at - record.submitted_at), 1.0),
            "oracle": self.left_s() + self.pace() * work_s + loads_s,
            "knowable": self.left_s() + self.pace() * knowable_s + loads_s,
        }

    def knowable_s(self, record: Record) -> float:
        """Seconds of a task, as far as they follow from the requests that were run before."""
        params, expected = record.params, self.scenario.expected
        key = params.width, params.height, params.steps, record.model.name
        if expected is None or self.runs[key]:
            return record.law.total
        return expected(params, record.model, len(self.done) / self.tasks).total

    def left_s(self) -> float:
        """What the law says that the running task still needs, at the machine's present pace."""
        spent_s, pace = (self.at - self.phase_started_at), self.pace()
        for first in (self.left.text, *self.left.steps, self.left.decode):
            if first > 0.0:
                return pace * self.left.total - min(spent_s, pace * first)
        return 0.0

    def pace(self) -> float:
        return self.scenario.drift(self.at - self.begun_at)

    def reorder(self) -> None:
        views, _ = self.queue.unfinished(1000, 0)
        self.order = [v.task_id for v in views if v.status == "waiting"]

    # -- the worker ------------------------------------------------------------------------------

    def work(self) -> None:
        task = self.worker.claim(0)
        assert task
        self.run_task(task)

    def run_task(self, task: Task) -> None:
        record = self.records[task.task_id]
        self.running.append(record)
        record.started_at = self.at
        self.to_do(record.law)
        self.reorder()
        if record.model is not self.loaded:
            load_s = self.scenario.load_s[record.model.name]
            law = record.law
            self.to_do(Seconds(load_s + law.text, law.steps, law.decode))
            self.load(record.model, load_s)
            self.loaded = record.model
        factor = self.dice.lognormvariate(0, self.noise)
        if self.dice.random() < self.scenario.outliers:
            factor *= 3
        law, n = record.law, record.params.steps
        self.to_do(law)
        text_s = self.draw(law.text * factor)
        step_s = []
        for done in range(n + 1):
            self.end_step(task, record, done)
            if done < n:
                step_s.append(self.draw(law.steps[done] * factor))
        self.worker.report(task.task_id, 1, Progress(Phase.DECODING, n, n))
        decode_s = self.draw(law.decode * factor)
        self.worker.report(task.task_id, 1, Progress(Phase.IMAGE_ENCODING, n, n))
        measured = Measured(text_s, step_s, decode_s, 0.0)
        self.worker.finish(task.task_id, 1, Encoded(b"", 0, ((0, measured),)))
        record.ended_at = self.at
        self.running.remove(record)
        self.to_do(Seconds(0.0, [], 0.0))
        del self.records[task.task_id]
        self.done.append(record)
        params = record.params
        self.runs[params.width, params.height, params.steps, record.model.name] += 1
        self.seconds_so_far += measured.gpu_s
        self.pixels_so_far += record.params.width * record.params.height

    def end_step(self, task: Task, record: Record, done: int) -> None:
        """A step is reported; other tasks may be drawn before the next one."""
        rest = Seconds(0.0, record.law.steps[done:], record.law.decode)
        progress = Progress(Phase.DENOISING, done, record.params.steps)
        self.to_do(rest)
        while self.worker.report(task.task_id, 1, progress) is Verdict.PAUSE:
            other = self.worker.claim_preempting(task.task_id, 1)
            assert other
            record.paused = True
            self.run_task(other)
            self.to_do(rest)

    def to_do(self, law: Seconds) -> None:
        """This is left of the task that is drawn, from now on."""
        self.left, self.phase_started_at = law, self.at

    def draw(self, seconds: float) -> float:
        """So many seconds of the law go by. Returns how many it really took."""
        started_at = self.at
        while seconds > 0.0:
            part = min(seconds, DRIFT_S)
            self.pass_s(part * self.pace())
            seconds -= part
        return self.at - started_at

    def pass_s(self, seconds: float) -> None:
        """Time goes by; clients come, and ask, in between."""
        until = self.at + seconds
        while self.next_arrival < until:
            self.at = max(self.next_arrival, self.at)
            if len(self.order) < DEPTH[1]:
                self.submit()
            self.poll()
            mean_s = fmean(r.law.total for r in self.records.values()) if self.records else 10.0
            self.next_arrival = self.at + self.dice.expovariate(2.0 / mean_s)
        self.at = until


def size_and_steps(dice: random.Random) -> tuple[int, int, int]:
    """Width, height, steps of a request."""
    width, height = dice.choice(SIDES), dice.choice(SIDES)
    return width, height, max(round(math.exp(dice.uniform(0, math.log(50.49)))), 1)
