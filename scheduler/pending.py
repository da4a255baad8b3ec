"""Tasks that wait for weights which are not on this machine (downloads.py), for their prompt to be
written, or for both.

They are not in the schedule: the other tasks go on meanwhile. Not thread-safe: the scheduler calls
it under its lock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from models.model_catalog import LoadSpec, Model
from scheduler.downloads import Downloads
from task import Task

USUAL_EXPANSION_S = 5.0
"""Assumed seconds until a prompt is written, before the first measurement."""
MOST_EXPANSION_S = 60.0
"""Seconds after its submit, or the server's start, until a task uses its prompt as it was sent."""
EXPANSION_KEY = "prompt expansion"
"""Under which the seconds of the latest prompt are stored, among the times of loading."""


@dataclass(frozen=True)
class Pending:
    """A task that waits for downloads, for its prompt, or for both."""

    task: Task
    missing: tuple[LoadSpec, ...]
    load_s: float
    work_s: float
    """Seconds of GPU and encoder, forecast at submit."""
    prompts: int = 0
    """Number of prompts still to be written."""
    written_by: float = 0.0
    """Reading of the monotonic clock at which they are used as they are."""


@dataclass(frozen=True)
class PendingWait:
    """When a task is expected to run. Seconds from now."""

    task: Task
    pos: int
    """Number of tasks that wait for downloads and run before it."""
    start_s: float
    end_s: float
    downloads: bool = True
    """Whether it waits for a download."""


class PendingTasks:
    """The tasks that wait and are not in the schedule yet.

    Args:
        monotonic: the clock, in seconds.
    """

    def __init__(self, downloads: Downloads, monotonic: Callable[[], float]) -> None:
        self.downloads = downloads
        self.expansion_s = USUAL_EXPANSION_S
        """Seconds until a prompt is written, as it was the last time."""
        self._monotonic = monotonic
        self._pending: dict[str, Pending] = {}
        self._expanding: tuple[str, float] | None = None  # task, and since when

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, task: Task) -> bool:
        return task.task_id in self._pending

    def entry(
        self, task: Task, missing: tuple[LoadSpec, ...], load_s: float, work_s: float
    ) -> Pending:
        """Returns what a task waits for from now on, for add() or waits().

        Args:
            missing, load_s, work_s: as in Pending.
        """
        prompts = 0
        if task.params.expand:
            prompts = len(set(task.params.prompts)) or 1
        written_by = self._monotonic() + MOST_EXPANSION_S
        return Pending(task, missing, load_s, work_s, prompts, written_by)

    def add(self, pending: Pending) -> None:
        self._pending[pending.task.task_id] = pending

    def remove(self, task: Task) -> None:
        self._pending.pop(task.task_id, None)

    def lacks_weights(self, task_id: str) -> bool:
        """Whether a task waits for weights."""
        return task_id in self._pending and bool(self._pending[task_id].missing)

    def lacks_prompt(self, task_id: str) -> bool:
        """Whether a task waits for its prompt."""
        return task_id in self._pending and self._pending[task_id].prompts > 0

    def waiting_of(self, owner: str) -> list[tuple[str, float]]:
        """The tasks of a client that wait here, with forecast seconds of work."""
        return [
            (pending.task.task_id, pending.work_s)
            for pending in self._in_order()
            if pending.task.owner.name == owner
        ]

    @property
    def has_unwritten(self) -> bool:
        """Whether a prompt is to be written."""
        return any(pending.prompts for pending in self._pending.values())

    def begin_expansion(self) -> tuple[Task, float]:
        """Returns the task whose prompts are written next, and the seconds that they may take."""
        pending = next(pending for pending in self._in_order() if pending.prompts)
        at = self._monotonic()
        self._expanding = pending.task.task_id, at
        return pending.task, max(pending.written_by - at, 0.0)

    def written(self, task: Task) -> bool:
        """The prompts of a task are written. Returns whether it waits for nothing any more."""
        self._expanding = None
        pending = replace(self._pending[task.task_id], task=task, prompts=0)
        self._pending[task.task_id] = pending
        if not pending.missing:
            del self._pending[task.task_id]
        return not pending.missing

    def next_missing(self) -> LoadSpec | None:
        """Returns what to download next: weights of waiting tasks first, in their order."""
        lacking = (pending.missing for pending in self._in_order() if pending.missing)
        wanted = [*(missing[0] for missing in lacking), *self.downloads.ordered.values()]
        return wanted[0] if wanted else None

    def lacking(self, name: str) -> LoadSpec | None:
        """Weights of this model that a task waits for."""
        lacking = (spec for pending in self._pending.values() for spec in pending.missing)
        return next((spec for spec in lacking if spec.model.name == name), None)

    def wants(self, model: Model) -> bool:
        """Whether a task waits for this model, or it was ordered."""
        return model.name in self.downloads.ordered or bool(self.needing(model))

    def needing(self, model: Model) -> list[Task]:
        """The tasks that wait for this model."""
        return [
            pending.task
            for pending in self._in_order()
            if any(spec.model.name == model.name for spec in pending.missing)
        ]

    def downloaded(self, model: Model) -> list[Task]:
        """This model is on disk. Removes and returns the tasks that wait for nothing any more."""
        ready = []
        for pending in self._in_order():
            missing = tuple(spec for spec in pending.missing if spec.model.name != model.name)
            if missing or pending.prompts:
                self._pending[pending.task.task_id] = replace(pending, missing=missing)
            else:
                del self._pending[pending.task.task_id]
                ready.append(pending.task)
        return ready

    def waits(self, joining_s: Callable[[int], float], *new: Pending) -> list[PendingWait]:
        """The tasks in the order in which they will run: when their weights have come, behind what
        is in the schedule by then and those before them here.

        Args:
            joining_s: seconds until a task of this priority would start that joined the schedule
                now.
            new: a task that would wait here.
        """
        ready_s = self._ready_s(*new)
        in_order = sorted(self._in_order(*new), key=lambda pending: ready_s[pending.task.task_id])
        joining = {p: joining_s(p) for p in {pending.task.priority for pending in in_order}}
        waits, free_s, loaded = [], 0.0, ""
        for pos, pending in enumerate(in_order):
            task = pending.task
            start_s = max(ready_s[task.task_id], joining[task.priority], free_s)
            free_s = start_s + pending.work_s
            if task.stages[0].load_spec.key != loaded:
                free_s += pending.load_s
            loaded = task.stages[-1].load_spec.key
            waits.append(PendingWait(task, pos, start_s, free_s, bool(pending.missing)))
        return waits

    def first_ready_s(self) -> float:
        """Seconds until the first of them joins the schedule; 0 without any."""
        return min(self._ready_s().values(), default=0.0)

    def _ready_s(self, *new: Pending) -> dict[str, float]:
        """By task, seconds until its weights are on disk and its prompts are written."""
        in_order = self._in_order(*new)
        arrivals = self.downloads.arrivals_s(spec for p in in_order for spec in p.missing)
        ready_s = {}
        for pending in in_order:
            lacking = (arrivals[spec.model.name] for spec in pending.missing)
            ready_s[pending.task.task_id] = max(lacking, default=0.0)
        for task_id, written_s in self._written_s(*new).items():
            ready_s[task_id] = max(ready_s[task_id], written_s)
        return ready_s

    def _written_s(self, *new: Pending) -> dict[str, float]:
        """By task, seconds until its prompts are written: one after the other, in their order."""
        at_s, now, written_s = 0.0, self._monotonic(), {}
        unwritten = [pending for pending in self._in_order(*new) if pending.prompts]
        current, since = self._expanding or ("", now)
        unwritten.sort(key=lambda pending: pending.task.task_id != current)
        for pending in unwritten:
            takes_s = pending.prompts * self.expansion_s
            if pending.task.task_id == current:
                takes_s = max(takes_s - (now - since), 0.0)
            at_s += takes_s
            at_s = max(min(at_s, pending.written_by - now), 0.0)
            written_s[pending.task.task_id] = at_s
        return written_s

    def _in_order(self, *new: Pending) -> list[Pending]:
        return sorted((*self._pending.values(), *new), key=lambda pending: -pending.task.priority)
