"""State of the server that the next start needs, on disk: its clocks, what is paused."""

from storage.database import Database

KEEP_OFFSET = "keep_offset_s"
EVENT_ID = "event_id"
PAUSED = "paused"
MEMORY = "memory: "
"""How the names of what is learned about memory begin."""

WEIGHTS = "weights of "
"""How the names of load specs begin among these; the values are bytes."""
DRAINED = "drained:"
"""Before the name of a machine."""


class StateStore:
    """A part of a TaskStore. Any thread may call; StorageUnavailable: the disk refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep_offset_s(self) -> float:
        """Seconds from the wall clock to the KeepClock, when they were noted last."""
        return self._mark(KEEP_OFFSET)

    def set_keep_offset_s(self, seconds: float) -> None:
        self._set_mark(KEEP_OFFSET, seconds)

    def reserved_event_id(self) -> int:
        """The highest event id that may have been used so far; 0: none."""
        return int(self._mark(EVENT_ID))

    def reserve_event_ids(self, up_to: int) -> None:
        self._set_mark(EVENT_ID, up_to)

    def paused(self) -> bool:
        """Whether the operator has paused the queue."""
        return bool(self._mark(PAUSED))

    def set_paused(self, paused: bool) -> None:
        self._set_mark(PAUSED, float(paused))

    def memory(self) -> dict[str, float]:
        """What was learned about the memory that models and pictures take, by name."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT name, value FROM marks").fetchall()
        return {
            row["name"].removeprefix(MEMORY): row["value"]
            for row in rows
            if row["name"].startswith(MEMORY)
        }

    def loaded_bytes(self) -> dict[str, int]:
        """Memory of the load specs that were loaded, by key."""
        return {
            name.removeprefix(WEIGHTS): int(value)
            for name, value in self.memory().items()
            if name.startswith(WEIGHTS)
        }

    def keep_memory(self, name: str, value: float) -> None:
        self._set_mark(MEMORY + name, value)

    def is_drained(self, machine: str) -> bool:
        """Whether the operator gives a machine of this name no more tasks."""
        return bool(self._mark(DRAINED + machine))

    def set_drained(self, machine: str, drained: bool) -> None:
        self._set_mark(DRAINED + machine, float(drained))

    def end_future(self, now: float) -> None:
        """Set times in the future, of tasks that ended, were fetched or removed, to now.

        Args:
            now: seconds of the KeepClock.
        """
        with self._database.transaction() as connection:
            for column in ("kept_since", "fetched_at", "gone_at"):
                connection.execute(
                    f"UPDATE tasks SET {column} = :now WHERE {column} > :now", {"now": now}
                )

    def _mark(self, name: str) -> float:
        with self._database.reading() as connection:
            row = connection.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return row["value"] if row else 0.0

    def _set_mark(self, name: str, value: float) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))
