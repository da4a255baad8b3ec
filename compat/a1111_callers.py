"""Maps callers to their tasks, because progress and interrupt of AUTOMATIC1111 name no task."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock

from api.client_queue import OwnQueue
from compat.sync_calls import Call
from errors import Gone, UnknownTask
from task import Task

Caller = tuple[str, ...]


@dataclass(eq=False)
class _Started:
    """A call, from the moment before its task is submitted until it is closed."""

    task_id: str = ""
    """Empty: it is being submitted."""
    interrupted: bool = False


class Callers:
    """Thread-safe."""

    def __init__(self, own_queue: OwnQueue) -> None:
        self._own_queue = own_queue
        self._lock = Lock()
        self._calls: dict[Caller, list[_Started]] = {}

    def start(self, caller: Caller, submit: Callable[[], Call]) -> Call:
        """Submit a task. Its caller can interrupt it from now on, also while it is being submitted,
        until the call is closed."""
        started = _Started()
        with self._lock:
            self._calls.setdefault(caller, []).append(started)
        with ExitStack() as unless_started:
            unless_started.callback(self._end, caller, started)
            call = unless_started.enter_context(submit())
            with self._lock:
                started.task_id = call.task_id
                interrupted = started.interrupted
            if interrupted:
                self._stop(call.task_id)
            unless_started.pop_all()
        call.at_close(partial(self._end, caller, started))
        return call

    def present(self, caller: Caller) -> Task | None:
        """Returns the running task of this caller, or its first waiting one."""
        return self._first(task_id for _, task_id in self._calls_of(caller))

    def interrupt(self, caller: Caller) -> None:
        """Stops the present task of this caller, or else the one that is being submitted, and no
        other one."""
        while True:
            calls = self._calls_of(caller)
            task = self._first(task_id for _, task_id in calls)
            present = task.task_id if task else ""
            started = next((one for one, task_id in calls if task_id == present), None)
            if started is None:
                return
            with self._lock:
                if started.task_id == present:  # else it has been submitted just now
                    started.interrupted = True
                    break
        if present:
            self._stop(present)

    def was_interrupted(self, task_id: str) -> bool:
        with self._lock:
            everybody = [one for calls in self._calls.values() for one in calls]
            return any(one.interrupted for one in everybody if one.task_id == task_id)

    def _calls_of(self, caller: Caller) -> list[tuple[_Started, str]]:
        """With their task_ids of this moment, the earliest one first."""
        with self._lock:
            return [(one, one.task_id) for one in self._calls.get(caller, ())]

    def _end(self, caller: Caller, started: _Started) -> None:
        with self._lock:
            self._calls[caller].remove(started)
            if not self._calls[caller]:
                del self._calls[caller]

    def _stop(self, task_id: str) -> None:
        with suppress(Gone, UnknownTask):
            self._own_queue().delete(task_id, only_unfinished=True)

    def _first(self, task_ids: Iterable[str]) -> Task | None:
        """Of those that have not ended, the one that ends first."""
        views = [view for task_id in task_ids if task_id and (view := self._unfinished(task_id))]
        return min(views, key=_end_s, default=None)

    def _unfinished(self, task_id: str) -> Task | None:
        try:
            view = self._own_queue().status(task_id)
        except (UnknownTask, Gone):
            return None
        return None if view.ended else view


def _end_s(task: Task) -> float:
    return task.forecast.end_s if task.forecast else 0.0
