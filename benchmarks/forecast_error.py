"""Accuracy of the forecasts: thousands of tasks in virtual time, with laws unknown to the server.

    python benchmarks/forecast_error.py [--quick]        writes docs/images/forecast.png, too

The real QueueManager and timing model run against a hidden law of time with log-normal noise: sizes
512 to 1536, steps 1 to 50 (log-uniform), 5 to 10 tasks deep, 10 % urgent, 5 % cancelled. Beside
them, in the same run:

    original   seconds so far / pixels so far (80 s for one megapixel at first) times the pixels
               ahead and its own, minus the time since submission
    oracle     knows the law and the queue, but not the noise and not future tasks

Errors are |forecast - truth| / truth; while a task runs, of the whole seconds on the wire and in
parts of the task's own running time, as a progress bar shows it (near the end any error is large
beside what remains).
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

from common import ROOT, Results
from forecast_laws import KLEIN, SCENARIOS, SCHNELL, Scenario, Seconds

from allowed import Allowed
from models.model_catalog import LoadSpec, Model
from queue_manager import QueueManager
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, GenerationParams, Phase, Progress
from timing_model import Measured, TimingModel

SIDES = range(512, 1537, 64)
URGENT_SHARE, CANCELLED_SHARE = 0.1, 0.05
DEPTH = (5, 10)
CONTENDERS = ("ours", "original", "oracle")
AFTER = (1, 3, 10, 50)


@dataclass
class Poll:
    """The forecasts of all methods for one task at one moment."""

    at: float
    finished: int
    """Number of finished tasks at that moment."""
    said: dict[str, float]
    p90_s: float


@dataclass
class Record:
    """A task of the replay, with all its forecasts."""

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
    forecast_end_at: float = math.inf
    step_back_s: float = 0.0
    """Largest increase of the countdown without a reason, in seconds."""


class Replay:
    """One run: `tasks` tasks, in virtual time."""

    def __init__(
        self, scenario: Scenario, noise: float, tasks: int, seed: int, *, urgent: float
    ) -> None:
        self.scenario, self.noise, self.tasks, self.urgent = scenario, noise, tasks, urgent
        self.dice = random.Random(seed)
        self.at = 1e6
        models = [m for m in (SCHNELL, KLEIN) if m.name in scenario.load_s] or [SCHNELL]
        self.models = models
        self.loaded: Model = models[0]
        scheduler = Scheduler(
            Allowed(models[0], tuple(models)),
            TimingModel(),
            TaskStore(None),
            QueueLimits(max_queue=1000, keep_s=1e9),
            monotonic=lambda: self.at,
            now=lambda: self.at,
        )
        self.queue, self.worker = QueueManager(scheduler), WorkerApi(scheduler)
        self.records: dict[str, Record] = {}
        self.done: list[Record] = []
        self.order: list[str] = []  # waiting, as the queue runs them
        self.submitted = 0
        self.next_arrival = self.at
        self.seconds_so_far = self.pixels_so_far = 0.0
        self.current: Record | None = None
        self.left = Seconds(0.0, [], 0.0)
        """Of the running task, by the law: the phases that have not ended."""
        self.phase_started_at = self.at

    def run(self) -> list[Record]:
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
        side_w, side_h = self.dice.choice(SIDES), self.dice.choice(SIDES)
        steps = round(math.exp(self.dice.uniform(0, math.log(50.49))))
        model = self.models[self.submitted % len(self.models)]
        params = GenerationParams(
            prompt="x", seed=0, width=side_w, height=side_h, steps=max(steps, 1), guidance=None,
            format="JPEG", quality=85, model=model.name,
        )  # fmt: skip
        urgent = self.dice.random() < self.urgent
        self.submitted += 1
        view, _ = self.queue.submit(params, priority=int(urgent))
        law = self.scenario.law(params, model, len(self.done) / self.tasks)
        poll = Poll(self.at, len(self.done), {}, view.forecast.p90_s if view.forecast else 0.0)
        record = Record(params, model, urgent, law, self.at, poll)
        self.records[view.task_id] = record
        self.reorder()
        poll.said = self.say(view.task_id, view.forecast.end_s if view.forecast else 0.0)
        if self.dice.random() < CANCELLED_SHARE:
            victim = self.dice.choice(self.order)
            self.queue.delete(victim)
            del self.records[victim]
            self.reorder()

    def poll(self) -> None:
        """Reads the forecasts of one waiting task and of the running one."""
        for task_id in {self.dice.choice(self.order) if self.order else "", self.running_id()}:
            record = self.records.get(task_id)
            if record is None:
                continue
            view = self.queue.status(task_id)
            if view.forecast is None:
                continue
            end_at = self.at + view.forecast.end_s
            if view.forecast.reason is None:
                record.step_back_s = max(record.step_back_s, end_at - record.forecast_end_at)
            record.forecast_end_at = end_at
            said = self.say(task_id, float(max(math.ceil(view.forecast.end_s), 1)))
            poll = Poll(self.at, len(self.done), said, view.forecast.p90_s)
            (record.running if record is self.current else record.waiting).append(poll)

    def say(self, task_id: str, ours: float) -> dict[str, float]:
        record = self.records[task_id]
        ahead = (
            [self.records[t] for t in self.order[: self.order.index(task_id)]]
            if (task_id in self.order)
            else []
        )
        everything = [*ahead, record] if record is not self.current else []
        pixels = sum(r.params.width * r.params.height for r in everything)
        if self.current:
            pixels += self.current.params.width * self.current.params.height
        rate = self.seconds_so_far / self.pixels_so_far if self.pixels_so_far else 80 / 2**20
        model, loads_s = self.current.model if self.current else self.loaded, 0.0
        for r in everything:
            if r.model is not model:
                loads_s += self.scenario.load_s[r.model.name]
            model = r.model
        work_s = sum(r.law.total for r in everything)
        return {
            "ours": ours,
            "original": max(rate * pixels - (self.at - record.submitted_at), 1.0),
            "oracle": self.left_s() + work_s + loads_s,
        }

    def left_s(self) -> float:
        """The remaining seconds of the running task under the law."""
        spent_s = self.at - self.phase_started_at
        for first in (self.left.text, *self.left.steps, self.left.decode):
            if first > 0.0:
                return self.left.total - min(spent_s, first)
        return 0.0

    def reorder(self) -> None:
        views, _ = self.queue.unfinished(1000, 0)
        self.order = [v.task_id for v in views if v.status == "waiting"]

    def running_id(self) -> str:
        return next((t for t, r in self.records.items() if r is self.current), "")

    # -- the worker ------------------------------------------------------------------------------

    def work(self) -> None:
        task = self.worker.claim(0)
        assert task
        record = self.current = self.records[task.task_id]
        record.started_at = self.at
        self.left = record.law
        self.phase_started_at = self.at
        self.reorder()
        if record.model is not self.loaded:
            load_s = self.scenario.load_s[record.model.name]
            law = record.law
            self.left = Seconds(load_s + law.text, law.steps, law.decode)
            self.load(record.model, load_s)
            self.left = law
            self.loaded = record.model
        begun_at = self.at
        factor = self.dice.lognormvariate(0, self.noise)
        if self.dice.random() < self.scenario.outliers:
            factor *= 3
        law, n = record.law, record.params.steps
        self.phase_started_at = self.at
        self.pass_s(law.text * factor)
        for done in range(n + 1):
            self.left = Seconds(0.0, law.steps[done:], law.decode)
            self.phase_started_at = self.at
            self.worker.report(task.task_id, 1, Progress(Phase.DENOISING, done, n))
            if done < n:
                self.pass_s(law.steps[done] * factor)
        self.worker.report(task.task_id, 1, Progress(Phase.DECODING, n, n))
        self.pass_s(law.decode * factor)
        self.worker.report(task.task_id, 1, Progress(Phase.IMAGE_ENCODING, n, n))
        took = law.times(factor)
        measured = Measured(took.text, took.steps, took.decode, 0.0)
        self.worker.finish(task.task_id, 1, Encoded(b"", 0, ((0, measured),)))
        record.ended_at = self.at
        self.current = None
        self.left = Seconds(0.0, [], 0.0)
        del self.records[task.task_id]
        self.done.append(record)
        self.seconds_so_far += self.at - begun_at
        self.pixels_so_far += record.params.width * record.params.height

    def pass_s(self, seconds: float) -> None:
        """Advances the time; clients submit and poll in between."""
        until = self.at + seconds
        while self.next_arrival < until:
            self.at = max(self.next_arrival, self.at)
            if len(self.order) < DEPTH[1]:
                self.submit()
            self.poll()
            mean_s = fmean(r.law.total for r in self.records.values()) if self.records else 10.0
            self.next_arrival = self.at + self.dice.expovariate(2.0 / mean_s)
        self.at = until


# -- figures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Errors in percent."""

    mean: float
    median: float
    p90: float
    bias: float

    @staticmethod
    def of(errors: list[float]) -> "Figures":
        sizes = sorted(abs(e) for e in errors)
        if not sizes:
            return Figures(*[math.nan] * 4)
        p90 = sizes[int(0.9 * (len(sizes) - 1))]
        return Figures(*(100 * v for v in (fmean(sizes), median(sizes), p90, fmean(errors))))

    def cells(self) -> list[float]:
        return [self.mean, self.median, self.p90, self.bias]


def submit_errors(records: list[Record], who: str) -> list[float]:
    return [r.at_submit.said[who] / (r.ended_at - r.submitted_at) - 1 for r in records]


def waiting_errors(records: list[Record], who: str) -> list[float]:
    return [p.said[who] / (r.ended_at - p.at) - 1 for r in records for p in r.waiting]


def running_errors(records: list[Record], who: str) -> list[float]:
    return [
        (p.said[who] - (r.ended_at - p.at)) / (r.ended_at - r.started_at)
        for r in records
        for p in r.running
        if r.ended_at > r.started_at
    ]


WHILE = {"at submit": submit_errors, "while waiting": waiting_errors, "running": running_errors}


def coverage(records: list[Record]) -> float:
    inside = [r.ended_at - r.submitted_at <= r.at_submit.p90_s for r in records]
    return 100 * fmean(inside) if inside else math.nan


def measure(
    scenario: Scenario, noise: float, tasks: int
) -> tuple[list[list[object]], dict[str, float]]:
    """Rows of the table of errors, and what the bars are about."""
    mixed = Replay(scenario, noise, tasks, 1, urgent=URGENT_SHARE).run()
    calm = Replay(scenario, noise, tasks, 2, urgent=0.0).run()
    starts = [Replay(scenario, noise, 12, 100 + n, urgent=0.0).run() for n in range(tasks // 25)]
    warm_mixed = [r for r in mixed if r.at_submit.finished >= AFTER[-1]]
    warm_calm = [r for r in calm if r.at_submit.finished >= AFTER[-1]]
    rows: list[list[object]] = []
    for when, errors_of in WHILE.items():
        for label, records in (("10 % urgent", warm_mixed), ("none urgent", warm_calm)):
            for who in CONTENDERS:
                figures = Figures.of(errors_of(records, who))
                rows.append([scenario.name, f"{noise:.0%}", when, label, who, *figures.cells()])
    early = {}
    for after in AFTER:
        some = [
            r for run in [*starts, calm] for r in run if after <= r.at_submit.finished < after * 2
        ]
        early[after] = Figures.of(submit_errors(some, "ours")).median
    ours, oracle = (Figures.of(submit_errors(warm_calm, who)).median for who in ("ours", "oracle"))
    waiting = {who: Figures.of(waiting_errors(warm_calm, who)).mean for who in CONTENDERS}
    return rows, {
        "median at submit / oracle's": ours / oracle,
        "running: mean %": Figures.of(running_errors(warm_mixed, "ours")).mean,
        "inside p90 %": coverage(warm_mixed),
        **{f"median % after {n}": early[n] for n in AFTER},
        "waiting: original's mean / ours": waiting["original"] / waiting["ours"],
        "furthest step back, no reason, s": max(r.step_back_s for r in mixed + calm),
    }


def plot(path: Path, tasks: int) -> None:
    """Plots forecast at submit against truth for the three methods, law c with 3 % noise."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    records = Replay(SCENARIOS[2], 0.03, tasks, 1, urgent=URGENT_SHARE).run()
    warm = [r for r in records if r.at_submit.finished >= 20]
    truth = [r.ended_at - r.submitted_at for r in warm]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), sharex=True, sharey=True)
    colours = {"ours": "#1b9e77", "original": "#d95f02", "oracle": "#7570b3"}
    names = {"ours": "mflux-server", "original": "average over pixels", "oracle": "oracle"}
    for axis, who in zip(axes, ("original", "ours", "oracle"), strict=True):
        said = [r.at_submit.said[who] for r in warm]
        axis.scatter(truth, said, s=7, alpha=0.5, color=colours[who], linewidths=0)
        axis.plot([10, 3000], [10, 3000], color="#888", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(10, 3000), ylim=(10, 3000))
        error = Figures.of(submit_errors(warm, who)).median
        axis.set_title(f"{names[who]}: median error {error:.1f} %", fontsize=11)
        axis.set_xlabel("seconds it took")
    axes[0].set_ylabel("seconds forecast at submit")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    results = Results(__file__, __doc__)
    tasks = 150 if results.quick else 1000
    errors: list[list[object]] = []
    bars: list[list[object]] = []
    for scenario in SCENARIOS:
        for noise in (0.03, 0.10):
            rows, figures = measure(scenario, noise, tasks)
            errors += rows
            bars.append([scenario.name, f"{noise:.0%}", *figures.values()])
    results.table("What is promised", ["law", "noise", *figures], bars)
    header = ["law", "noise", "when", "tasks", "who", "mean %", "median %", "p90 %", "bias %"]
    results.table("Errors, from the 50th task on", header, errors)
    if not results.quick:
        plot(ROOT / "docs" / "images" / "forecast.png", tasks)
    results.save()


if __name__ == "__main__":
    main()
