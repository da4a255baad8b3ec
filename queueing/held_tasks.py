"""Tasks whose weights are not on this machine yet, what else is wanted from Hugging Face, and the
download that is on.

These tasks are not in the line: those that can be drawn go on meanwhile. Not thread-safe: all of it
under QueueCore's lock.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from models.model_catalog import Model, Weights
from task import Task

USUAL_BYTES_PER_S = 20e6
"""Assumed of a connection until a download has shown its pace."""
PACE_AFTER_S = 5.0
FAILURE_TOLD_S = 300.0


@dataclass
class Download:
    """Weights on their way."""

    weights: Weights
    bytes_done: int
    """On disk so far."""
    began_at: float
    """Reading of the monotonic clock."""
    bytes_before: int
    """On disk when it began."""


@dataclass(frozen=True)
class Held:
    task: Task
    missing: tuple[Weights, ...]
    load_s: float
    work_s: float
    """Of the GPU and the encoder, as forecast when it came."""


@dataclass(frozen=True)
class HeldWait:
    """When a held task is expected to run. Seconds from now."""

    task: Task
    pos: int
    """Held tasks before it."""
    start_s: float
    end_s: float


class HeldTasks:
    """Args:
    monotonic: the clock, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.download: Download | None = None
        self.pace_known = False
        """Whether the seconds follow from a download that was watched."""
        self._monotonic = monotonic
        self._bytes_per_s = USUAL_BYTES_PER_S
        self._held: dict[str, Held] = {}
        self._ordered: dict[str, Weights] = {}  # by model; no task waits for them
        self._failures: dict[str, tuple[float, str]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, task: Task) -> bool:
        return task.task_id in self._held

    def add(self, task: Task, missing: tuple[Weights, ...], load_s: float, work_s: float) -> None:
        self._held[task.task_id] = Held(task, missing, load_s, work_s)

    def remove(self, task: Task) -> None:
        self._held.pop(task.task_id, None)

    def order(self, weights: Weights) -> None:
        """These shall be fetched, though no task waits for them."""
        self._ordered.setdefault(weights.model.name, weights)

    def next_missing(self) -> Weights | None:
        """What to download next: for tasks first, urgent ones first, each first come, first
        served."""
        wanted = [*(held.missing[0] for held in self._in_order()), *self._ordered.values()]
        return wanted[0] if wanted else None

    def wants(self, model: Model) -> bool:
        """Whether somebody still waits for this model."""
        return model.name in self._ordered or bool(self.needing(model))

    def needing(self, model: Model) -> list[Task]:
        return [
            held.task
            for held in self._in_order()
            if any(weights.model.name == model.name for weights in held.missing)
        ]

    def begin(self, weights: Weights, bytes_before: int) -> None:
        """The download of these begins, with what an earlier one has left on disk."""
        self.download = Download(weights, bytes_before, self._monotonic(), bytes_before)

    def progress(self, bytes_done: int) -> None:
        """So much of the weights is on disk now."""
        download = self.download
        if download is None:
            return
        download.bytes_done = bytes_done
        seconds, came = self._monotonic() - download.began_at, bytes_done - download.bytes_before
        if seconds >= PACE_AFTER_S and came > 0:
            self._bytes_per_s = came / seconds
            self.pace_known = True

    def leave(self) -> None:
        """The download is over, and nothing was decided: nobody wanted it, or it is tried again."""
        self.download = None

    def fail(self, model: Model, message: str) -> None:
        """This model cannot be had."""
        self.download = None
        self._ordered.pop(model.name, None)
        self._failures[model.name] = (self._monotonic(), message)

    def failure(self, model: Model) -> str | None:
        """Why this model could not be had a moment ago."""
        at, message = self._failures.get(model.name, (0.0, ""))
        return message if message and self._monotonic() - at < FAILURE_TOLD_S else None

    def end(self, model: Model) -> list[Task]:
        """This model is here. Returns the tasks that lack nothing more; they are held no longer."""
        self.download = None
        self._ordered.pop(model.name, None)
        ready = []
        for held in self._in_order():
            missing = tuple(w for w in held.missing if w.model.name != model.name)
            if missing:
                self._held[held.task.task_id] = replace(held, missing=missing)
            else:
                del self._held[held.task.task_id]
                ready.append(held.task)
        return ready

    def waits(self, line_s: Mapping[bool, float], *new: Held) -> list[HeldWait]:
        """The held tasks in the order in which they will run: as their weights come, each behind
        what is in the line by then and the held ones before it.

        Args:
            line_s: seconds until a task that joins the line now would start, by urgency.
            new: one that would be held.
        """
        ready_s = self._ready_s(*new)
        held_tasks = sorted(self._in_order(*new), key=lambda held: ready_s[held.task.task_id])
        waits, free_s, loaded = [], 0.0, ""
        for pos, held in enumerate(held_tasks):
            task = held.task
            start_s = max(ready_s[task.task_id], line_s[task.urgent], free_s)
            free_s = start_s + held.work_s
            if task.stages[0].weights.key != loaded:
                free_s += held.load_s
            loaded = task.stages[-1].weights.key
            waits.append(HeldWait(task, pos, start_s, free_s))
        return waits

    def first_ready_s(self) -> float:
        """Seconds until the first of them joins the line; 0 without any."""
        return min(self._ready_s().values(), default=0.0)

    def _ready_s(self, *new: Held) -> dict[str, float]:
        """By task, seconds until its weights are here: one model comes after the other, what is
        being downloaded first, then what tasks lack, in their order."""
        at_s, arrivals = 0.0, {}
        if self.download is not None:
            model = self.download.weights.model
            at_s = max(model.download_bytes - self.download.bytes_done, 0.0) / self._bytes_per_s
            arrivals[model.name] = at_s
        ready_s = {}
        for held in self._in_order(*new):
            for weights in held.missing:
                if weights.model.name not in arrivals:
                    at_s += weights.model.download_bytes / self._bytes_per_s
                    arrivals[weights.model.name] = at_s
            ready_s[held.task.task_id] = max(arrivals[w.model.name] for w in held.missing)
        return ready_s

    def _in_order(self, *new: Held) -> list[Held]:
        return sorted((*self._held.values(), *new), key=lambda held: not held.task.urgent)
