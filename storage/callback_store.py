"""Callbacks that are still to be made, on disk."""

from dataclasses import dataclass

from storage.database import Database


@dataclass(frozen=True)
class Callback:
    """A callback that is still to be made."""

    task_id: str
    url: str
    tries: int
    """Number of failed tries."""
    due_at: float
    """Seconds of the KeepClock."""


class CallbackStore:
    """A part of a TaskStore. Any thread may call; StorageUnavailable: the disk refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep(self, task_id: str, url: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT INTO callbacks (task_id, url) VALUES (?, ?)", (task_id, url))

    def next(self) -> Callback | None:
        """Returns the callback that is due first, of the ended tasks."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT callbacks.* FROM callbacks JOIN tasks USING (task_id)"
                " WHERE status IN ('done', 'failed', 'cancelled') AND gone IS NULL"
                " ORDER BY due_at LIMIT 1"
            ).fetchone()
        return row and Callback(**row)

    def put_off(self, task_id: str, due_at: float) -> None:
        """Stores the time of the next try, after a failed one."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE callbacks SET tries = tries + 1, due_at = ? WHERE task_id = ?",
                (due_at, task_id),
            )

    def end(self, task_id: str) -> None:
        """The callback was made, or will not be made."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM callbacks WHERE task_id = ?", (task_id,))
