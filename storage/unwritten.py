"""Removals and fetches that have happened and that the database has refused to store so far."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Removal:
    """A task whose image files are removed."""

    reason: str
    at: float | None
    """Seconds of the KeepClock."""


@dataclass(frozen=True)
class Fetch:
    """Images of a task that were sent and are to be removed."""

    indexes: frozenset[int]
    at: float | None
    """Seconds of the KeepClock at which the last of its images was sent; None: not all were."""


class Unwritten:
    """In memory only: after a restart, a removed task is found by its missing files, and a fetched
    one is kept as long as one that was never fetched.

    Changed under the scheduler's `changes` lock; any thread may read.
    """

    def __init__(self) -> None:
        self.removed: dict[str, Removal] = {}
        self.fetched: dict[str, Fetch] = {}

    def __bool__(self) -> bool:
        return bool(self.removed or self.fetched)

    def remove(self, task_id: str, reason: str, at: float | None) -> None:
        self.fetched.pop(task_id, None)
        self.removed[task_id] = Removal(reason, at)

    def fetch(self, task_id: str, indexes: set[int], at: float | None) -> None:
        """The first time that the last image was sent counts."""
        earlier = self.fetched.get(task_id)
        if earlier and earlier.at is not None:
            at = earlier.at
        self.fetched[task_id] = Fetch(frozenset(indexes), at)

    def fetched_before(self, fetched_at: float) -> list[str]:
        """Tasks of which all images were fetched before this, in seconds of the KeepClock."""
        return [
            task_id
            for task_id, fetch in list(self.fetched.items())
            if fetch.at is not None and fetch.at < fetched_at
        ]
