"""Tasks whose weights are not on this machine yet, and the download that they wait for.

They are not in the line: those that can be drawn go on meanwhile. Not thread-safe: the LiveQueue
calls it under the QueueManager's lock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from models.model_catalog import Model, Weights
from task import Task

USUAL_BYTES_PER_S = 20e6
"""Assumed of a connection until a download has shown its pace."""
PACE_AFTER_S = 5.0


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
class _Held:
    task: Task
    missing: tuple[Weights, ...]


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
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, task: Task) -> bool:
        return task.task_id in self._held

    def __iter__(self) -> Iterator[Task]:
        """Urgent ones first, each first come, first served: so they get their weights."""
        return (held.task for held in self._in_order())

    def add(self, task: Task, missing: tuple[Weights, ...]) -> None:
        self._held[task.task_id] = _Held(task, missing)

    def remove(self, task: Task) -> None:
        self._held.pop(task.task_id, None)

    def next_missing(self) -> Weights | None:
        """What to download next."""
        return next((held.missing[0] for held in self._in_order()), None)

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
        assert download is not None, "begin() made it"
        download.bytes_done = bytes_done
        seconds, came = self._monotonic() - download.began_at, bytes_done - download.bytes_before
        if seconds >= PACE_AFTER_S and came > 0:
            self._bytes_per_s = came / seconds
            self.pace_known = True

    def end(self, model: Model) -> list[Task]:
        """This model is here. Returns the tasks that lack nothing more; they are held no longer."""
        self.download = None
        ready = []
        for held in self._in_order():
            missing = tuple(w for w in held.missing if w.model.name != model.name)
            if missing:
                self._held[held.task.task_id] = _Held(held.task, missing)
            else:
                del self._held[held.task.task_id]
                ready.append(held.task)
        return ready

    def waits(
        self, new: tuple[Task, tuple[Weights, ...]] | None = None
    ) -> list[tuple[Task, float]]:
        """Each task in order, and the seconds until its weights are here: what is being downloaded
        comes first, then what those before it lack, then its own.

        Args:
            new: a task that would be held, and what it lacks.
        """
        needed: dict[str, float] = {}
        if self.download is not None:
            model = self.download.weights.model
            left = max(_size(model) - self.download.bytes_done, 0.0)
            needed[model.name] = left / self._bytes_per_s
        waits = []
        for held in self._in_order(_Held(*new) if new else None):
            for weights in held.missing:
                needed.setdefault(weights.model.name, _size(weights.model) / self._bytes_per_s)
            waits.append((held.task, sum(needed.values())))
        return waits

    def _in_order(self, new: _Held | None = None) -> list[_Held]:
        held = [*self._held.values(), *([new] if new else [])]
        return sorted(held, key=lambda each: not each.task.urgent)


def _size(model: Model) -> float:
    """Bytes; where they are not known, two for each parameter."""
    return (model.weights_gb or 2 * model.parameters_b) * 1e9
