"""Waiting tasks that are cancelled because their time is up.

`max_age_s`: the task has not started in time. `keep_alive_s`: its client has not asked for it for
too long while it waits. Not thread-safe: the scheduler calls it under its lock.
"""

from collections.abc import Callable, Iterable

from task import Task, TaskStatus

EXPIRED = "expired"
ABANDONED = "abandoned"
"""Codes of the two reasons."""


class Deadlines:
    """The unfinished tasks that have a deadline.

    Args:
        now: the KeepClock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._tasks: dict[str, Task] = {}
        """Unfinished tasks with one of the two fields."""

    def add(self, task: Task) -> None:
        """A task waits."""
        if task.start_by is not None or task.params.keep_alive_s is not None:
            task.asked_at = self._now()
            self._tasks[task.task_id] = task

    def remove(self, task: Task) -> None:
        """A task has ended."""
        self._tasks.pop(task.task_id, None)

    def asked(self, owner: str, task_ids: Iterable[str] | None = None) -> None:
        """A client has asked for these of its tasks (None: for all)."""
        now = self._now()
        tasks: Iterable[Task | None] = self._tasks.values()
        if task_ids is not None:
            tasks = map(self._tasks.get, task_ids)
        for task in tasks:
            if task and task.owner.name == owner:
                task.asked_at = now

    def overdue(self, task: Task) -> tuple[str, str] | None:
        """Code and message of why a waiting task is cancelled now; None: it is not."""
        params = task.params
        if task.status is not TaskStatus.WAITING:
            return None
        has_run = task.attempt > task.retried_after
        if task.start_by is not None and not has_run and self._now() >= task.start_by:
            return EXPIRED, (
                f"The task was cancelled because it had not started within {params.max_age_s:g} s "
                "(max_age_s)."
            )
        alive_s = params.keep_alive_s
        if alive_s is not None and self._now() >= task.asked_at + alive_s:
            return ABANDONED, (
                "The task was cancelled because its client had not asked for it for "
                f"{alive_s:g} s (keep_alive_s)."
            )
        return None

    def all_overdue(self) -> list[Task]:
        return [task for task in self._tasks.values() if self.overdue(task)]
