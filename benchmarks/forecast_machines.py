"""Accuracy of the forecasts with several machines of different speed, in virtual time.

    python benchmarks/forecast_machines.py [--quick]

The real schedule, plan, forecast and timing model of the server, without its disk. Machine n takes
SLOWER[n] times as long as the hidden law says, with 3 % of log-normal noise. The server does not
know these factors: it learns a law for each machine, and its speed beside that of the first one. A
machine that is free draws the first waiting task that is planned for it. Sizes and steps are those
of forecast_error.py, two to five tasks wait for each machine, none is urgent.

The oracle knows the law, the speeds and the queue, but neither noise nor future tasks; it plans as
the server does. In the jagged law each request has a time of its own: "knowable" is an oracle that
knows those of the requests that were run before, on any machine, and of the others the median.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from statistics import fmean, median

from common import Results
from forecast_laws import KNOWN, REPEATED, SCHNELL, UNSEEN, Scenario
from forecast_replay import REPEATED_REQUESTS, size_and_steps

from allowed import Allowed
from models.model_catalog import LoadSpec
from scheduler.downloads import Downloads
from scheduler.estimates import Estimates
from scheduler.forecast import Forecaster
from scheduler.limits import QueueLimits
from scheduler.machines import Machine
from scheduler.pending import PendingTasks
from scheduler.policy import Policy, key
from scheduler.schedule import Schedule
from task import GenerationParams, Phase, Progress, Task
from timing.spread import Outcome, Spread
from timing_model import LOCAL, Measured, TimingModel

SLOWER = (1.0, 1.6, 0.7, 2.2, 1.2, 0.5, 3.0, 1.4)
MACHINES = (2, 4, 8)
LAWS = (KNOWN[2], UNSEEN[1], REPEATED[1])
NOISE = 0.03
DEPTH = (2, 5)
"""Waiting tasks for each machine: at the least, and at the most."""
WARM = 25
"""Tasks for each machine that only teach."""
SPEC = LoadSpec(SCHNELL, SCHNELL.pipelines[0], None)
ALLOWED = Allowed(SCHNELL, (SCHNELL,))
Row = tuple[float, float, float, float, float]


class Farm:
    """One run."""

    def __init__(self, scenario: Scenario, machines: int, seed: int) -> None:
        self.scenario, self.dice, self.at = scenario, random.Random(seed), 1000.0
        self.timing = TimingModel()
        self.estimates = Estimates(self.timing)
        self.schedule = Schedule(self.estimates, key)
        names = [LOCAL, *(f"machine {n}" for n in range(1, machines))]
        self.machines = [Machine(name) for name in names]
        for machine in self.machines:
            machine.load_started(SPEC, self.at)
            machine.load_finished(SPEC, [SPEC.key], self.at)
        self.policy = Policy(self.schedule, QueueLimits())
        self.spread = Spread()
        self.forecaster = Forecaster(
            schedule=self.schedule,
            machines=self.machines,
            policy=self.policy,
            estimates=self.estimates,
            spread=self.spread,
            pending=PendingTasks(Downloads(lambda: self.at), lambda: self.at),
            monotonic=lambda: self.at,
        )
        self.requests = [size_and_steps(self.dice) for _ in range(REPEATED_REQUESTS)]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.counter = itertools.count(1)
        self.free_at = [self.at] * machines
        """When each machine is free, by the law."""
        self.runs: Counter[tuple[int, int, int]] = Counter()
        self.said: dict[str, Row] = {}
        """By task: when it was submitted, forecast, p90, the oracle's forecast, the knowable."""
        self.done: list[Row] = []
        """Truth, forecast, p90, the oracle's forecast, what is knowable."""

    def run(self, tasks: int) -> list[Row]:
        while len(self.done) < tasks:
            while len(self.schedule) < DEPTH[0] * len(self.machines):
                self.submit()
            for number, machine in enumerate(self.machines):
                if not machine.runs:
                    self.claim(number, machine)
            self.at, _, happen = heapq.heappop(self.events)
            happen()
            most = DEPTH[1] * len(self.machines)
            if len(self.schedule) < most and self.dice.random() < 0.1:
                self.submit()
        return self.done

    def submit(self) -> None:
        again = self.dice.random() < self.scenario.repeated
        width, height, steps = (
            self.dice.choice(self.requests) if again else size_and_steps(self.dice)
        )
        params = GenerationParams(
            prompt="x", seed=0, width=width, height=height, steps=steps, guidance=None,
            format="JPEG", quality=85, model=SCHNELL.name,
        )  # fmt: skip
        number = next(self.counter)
        task = Task(f"{number:016x}", params, 0, created_at=0.0, stages=ALLOWED.stages(params))
        resident = self.forecaster.resident_at_start()
        place = self.policy.place(task, self.gpu_s(task), resident)
        place.give(task, number)
        self.policy.join(task, place)
        forecast = self.forecaster.of(task)
        by_oracle, knowable = self.by_oracle(self.law_s), self.by_oracle(self.knowable_s)
        self.said[task.task_id] = (
            self.at, forecast.end_s, forecast.p90_s, by_oracle, knowable,
        )  # fmt: skip

    def by_oracle(self, seconds_of: Callable[[Task], float]) -> float:
        """Seconds until the last waiting task is done."""
        free_at = [max(at, self.at) for at in self.free_at]
        end_at = self.at
        for task in self.schedule:
            law_s = seconds_of(task)
            ends = [at + law_s * SLOWER[n] for n, at in enumerate(free_at)]
            end_at = min(ends)
            free_at[ends.index(end_at)] = end_at
        return end_at - self.at

    def law_s(self, task: Task) -> float:
        return self.scenario.law(task.params, SCHNELL, 0.0).total

    def knowable_s(self, task: Task) -> float:
        expected, params = self.scenario.expected, task.params
        if expected is None or self.runs[params.width, params.height, params.steps]:
            return self.law_s(task)
        return expected(params, SCHNELL, 0.0).total

    def gpu_s(self, task: Task) -> float:
        return self.estimates.durations(*task.stages).gpu_s

    def claim(self, number: int, machine: Machine) -> None:
        """The first waiting task that is planned for this machine, if there is one."""
        task = self.forecaster.next_tasks().get(machine.name)
        if task is not None:
            self.draw(task, number, machine)

    def draw(self, task: Task, number: int, machine: Machine) -> None:
        self.policy.start(task, self.gpu_s(task))
        task.attempt += 1
        machine.start(task, self.at)
        law, n = self.scenario.law(task.params, SCHNELL, 0.0), task.params.steps
        self.free_at[number] = self.at + SLOWER[number] * law.total
        slower = SLOWER[number] * self.dice.lognormvariate(0.0, NOISE)
        at = self.at + slower * law.text
        for done in range(n + 1):
            self.report_at(at, machine, task, Progress(Phase.DENOISING, done, n))
            at += slower * law.steps[done] if done < n else 0.0
        self.report_at(at, machine, task, Progress(Phase.DECODING, n, n))
        measured = law.times(slower)
        own = Measured(measured.text, measured.steps, measured.decode, 0.0)
        self.happen_at(at + measured.decode, lambda: self.finish(task, machine, own))

    def report_at(self, at: float, machine: Machine, task: Task, progress: Progress) -> None:
        self.happen_at(at, lambda: machine.report(machine.runs[task.task_id], progress, self.at))

    def happen_at(self, at: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at, next(self.counter), what))

    def finish(self, task: Task, machine: Machine, measured: Measured) -> None:
        run = machine.runs[task.task_id]
        machine.end(run, self.at)
        self.policy.end(task, run.gpu_s(self.at))
        timing = self.timing.of(machine.name)
        timing.take(timing.learned([(self.estimates.work(task.stages[0]), measured)]))
        for other in self.machines:
            other.speed = self.timing.of(other.name).relative_speed(self.timing)
        self.runs[task.params.width, task.params.height, task.params.steps] += 1
        submitted_at, forecast_s, p90_s, *others = self.said.pop(task.task_id)
        truth_s = self.at - submitted_at
        if self.done:  # else nothing was known
            self.spread.learn(Outcome(0, forecast_s, p90_s, truth_s))
        self.done.append((truth_s, forecast_s, p90_s, others[0], others[1]))


def measure(scenario: Scenario, machines: int, tasks: int) -> list[object]:
    """A row of the table."""
    done = Farm(scenario, machines, 1).run(WARM * machines + tasks)
    warm = done[WARM * machines :]
    ours, oracle, knowable = (
        100 * median(abs(row[i] / row[0] - 1) for row in warm) for i in (1, 3, 4)
    )
    inside = 100 * fmean(row[0] <= row[2] for row in warm)
    ratios = [ours / oracle, ours / knowable]
    return [scenario.name, machines, len(warm), ours, oracle, knowable, *ratios, inside]


def main() -> None:
    results = Results(__file__, __doc__)
    tasks, counts = (40, MACHINES[:1]) if results.quick else (300, MACHINES)
    rows = [measure(scenario, count, tasks) for scenario in LAWS for count in counts]
    header = [
        "law", "machines", "tasks", "median % at submit", "oracle's median %", "knowable: median %",
        "ours / oracle's", "ours / knowable's", "inside p90 %",
    ]  # fmt: skip
    results.table("Several machines", header, rows)
    results.save()


if __name__ == "__main__":
    main()
