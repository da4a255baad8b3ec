"""What /stats reports: how accurate forecasts are, what was learned, how busy the machines are."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from models.model_rules import SIDE_STEP
from scheduler.scheduler import Scheduler
from storage.usage_store import HOUR_S, HOURS_KEPT, by_hour
from timing.spread import Outcome
from timing_model import Durations, Measured, Work

SIDES = (512, 768, 1024, 1536)
"""Pixels of the square images whose forecasts are reported."""
LAST_TASKS = 200
STEP_SAMPLES = 500
"""Latest timing samples that the seconds of a step are taken from."""
MOST_ROWS = 100
"""Of StepSeconds; machines of BusyHours."""


@dataclass(frozen=True)
class StepSeconds:
    """What a step took lately."""

    machine: str
    timing_key: str
    """The model, its quantization, and what else changes the work of a step."""
    width: int
    height: int
    step_s: float
    """Median over pictures; the first step counts only where there is no other one."""
    pictures: int
    """That it is the median of."""


@dataclass(frozen=True)
class BusyHours:
    machine: str
    starts_at: int
    """Unix seconds: the beginning of the first hour."""
    shares: list[float]
    """Of HOURS_KEPT hours, the present one last: share of the hour, or of what has passed of it, in
    which the GPU had a task, 0 to 1."""


@dataclass(frozen=True)
class Stats:
    timing_key: str
    """The server's own model and its quantization."""
    samples: int
    """Number of learned images."""
    load_s: float
    durations: list[tuple[int, Durations]]
    """For square images of SIDES pixels, with the model's default steps."""
    outcomes: int
    """Number of forecasts at submit with a known true duration."""
    median_error: float | None
    """Median of |forecast - truth| / truth."""
    share_inside_p90: float | None
    tasks_last_hour: int
    busy_share: float
    """Share of the last hour in which the GPU had a task, 0 to 1."""
    last_tasks: list[Outcome]
    """The latest LAST_TASKS, oldest first."""
    drift: dict[str, float]
    """By machine, how many times slower than usual it is now."""
    step_seconds: list[StepSeconds]
    """By machine and model; small sizes first."""
    busy_hours: list[BusyHours]
    """By machine."""


def stats_of(scheduler: Scheduler) -> Stats:
    """Takes milliseconds, most of them without a lock. Raises StorageUnavailable."""
    now = scheduler.now()
    step_seconds = _step_seconds(scheduler.store.timings.latest_samples(STEP_SAMPLES))
    busy = scheduler.store.usage.busy_hours(now)
    with scheduler.lock:
        monotonic = scheduler.monotonic()
        tasks_last_hour, busy_share = scheduler.machine.last_hour(monotonic)
        key = scheduler.estimates.load_key(scheduler.allowed.first_spec)
        work = scheduler.estimates.work_of_key(key, scheduler.allowed.first_spec)
        works = [replace(work, tokens=(side // SIDE_STEP) ** 2) for side in SIDES]
        here = scheduler.machines.drawing
        for machine in here:
            runs = [run.gpu_s(monotonic) for run in machine.runs.values() if run.on_gpu]
            _add(busy.setdefault(machine.name, {}), now, runs)
        drift = {m.name: scheduler.timing.of(m.name).drift for m in here}
        return Stats(
            timing_key=key,
            samples=scheduler.timing.samples(key),
            load_s=scheduler.estimates.load_s(scheduler.allowed.first_spec),
            durations=[
                (side, scheduler.timing.durations(work))
                for side, work in zip(SIDES, works, strict=True)
            ],
            outcomes=scheduler.spread.count,
            median_error=scheduler.spread.median_error(),
            share_inside_p90=scheduler.spread.share_inside_p90(),
            tasks_last_hour=tasks_last_hour,
            busy_share=busy_share,
            last_tasks=scheduler.spread.latest(LAST_TASKS),
            drift={name: pace for name, pace in drift.items() if pace is not None},
            step_seconds=step_seconds,
            busy_hours=_busy_hours(busy, now),
        )


def _step_seconds(samples: Iterable[tuple[str, Work, Measured]]) -> list[StepSeconds]:
    seconds: defaultdict[tuple[str, str, int, int], list[float]] = defaultdict(list)
    for machine, work, measured in samples:
        if measured.step_s:
            pixels = work.tokens * SIDE_STEP**2
            width = work.width or round(pixels**0.5)
            step_s = median(measured.step_s[1:] or measured.step_s)
            seconds[machine, work.model, width, round(pixels / width)].append(step_s)
    rows = [StepSeconds(*place, median(s), len(s)) for place, s in seconds.items()]
    rows.sort(key=lambda row: row.pictures, reverse=True)
    return sorted(
        rows[:MOST_ROWS], key=lambda row: (row.machine, row.timing_key, row.width * row.height)
    )


def _add(hours: dict[int, float], now: float, running_s: Iterable[float]) -> None:
    """Add the seconds of tasks that run."""
    for gpu_s in running_s:
        for hour, seconds in by_hour(now - gpu_s, now).items():
            hours[hour] = hours.get(hour, 0.0) + seconds


def _busy_hours(busy: dict[str, dict[int, float]], now: float) -> list[BusyHours]:
    present = int(now // HOUR_S)
    first = present - HOURS_KEPT + 1
    lengths = dict.fromkeys(range(first, present), float(HOUR_S))
    lengths[present] = max(now - present * HOUR_S, 1.0)
    return [
        BusyHours(
            machine,
            first * HOUR_S,
            [min(hours.get(hour, 0.0) / length_s, 1.0) for hour, length_s in lengths.items()],
        )
        for machine, hours in sorted(busy.items())[:MOST_ROWS]
    ]
