"""GPU seconds of each client, and of each machine by hour, on disk."""

from dataclasses import dataclass

from storage.database import Database
from storage.task_rows import is_anonymous
from timing_model import LOCAL

HOUR_S = 3600
DAY_S = 24 * HOUR_S
ANONYMOUS_KEPT_DAYS = 30
HOURS_KEPT = 24
"""Of the GPU seconds of machines, the present hour included."""


@dataclass(frozen=True)
class Usage:
    gpu_s: float = 0.0
    """In all."""
    today_s: float = 0.0
    """Since midnight, UTC."""


class UsageStore:
    """A part of a TaskStore. Any thread may call; StorageUnavailable: the disk refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, client: str, gpu_s: float, at: float, machine: str = LOCAL) -> None:
        """A client has used the GPU of a machine. Called in the transaction that ends or releases
        its task.

        Args:
            at: until when, in unix seconds.
        """
        if gpu_s <= 0:
            return
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO usage VALUES (:client, :gpu_s, :day, :gpu_s)"
                " ON CONFLICT (client) DO UPDATE SET gpu_s = gpu_s + :gpu_s, day = :day,"
                " day_gpu_s = :gpu_s + CASE WHEN day = :day THEN day_gpu_s ELSE 0 END",
                {"client": client, "gpu_s": gpu_s, "day": int(at // DAY_S)},
            )
            connection.executemany(
                "INSERT INTO busy VALUES (?, ?, ?)"
                " ON CONFLICT (hour, machine) DO UPDATE SET gpu_s = gpu_s + excluded.gpu_s",
                [(hour, machine, seconds) for hour, seconds in by_hour(at - gpu_s, at).items()],
            )
            connection.execute(
                "DELETE FROM busy WHERE hour <= ?", (int(at // HOUR_S) - HOURS_KEPT,)
            )

    def images_today(self, at: float) -> dict[str, int]:
        """By machine, the images of tasks that have ended since midnight, UTC.

        Args:
            at: now, in unix seconds.
        """
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT machine, sum(json_array_length(image_sizes)) AS images FROM tasks"
                " WHERE ended_at >= ? AND image_sizes IS NOT NULL GROUP BY machine",
                (at // DAY_S * DAY_S,),
            ).fetchall()
        return {row["machine"]: row["images"] for row in rows}

    def busy_hours(self, at: float) -> dict[str, dict[int, float]]:
        """GPU seconds of ended tasks by machine and hour since 1970, of the latest HOURS_KEPT."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM busy WHERE hour > ?", (int(at // HOUR_S) - HOURS_KEPT,)
            ).fetchall()
        machines: dict[str, dict[int, float]] = {}
        for row in rows:
            machines.setdefault(row["machine"], {})[row["hour"]] = row["gpu_s"]
        return machines

    def by_client(self, at: float) -> dict[str, Usage]:
        """By name of the client, as of this moment in unix seconds."""
        today = int(at // DAY_S)
        with self._database.reading() as connection:
            rows = connection.execute("SELECT * FROM usage").fetchall()
        return {
            row["client"]: Usage(row["gpu_s"], row["day_gpu_s"] if row["day"] == today else 0.0)
            for row in rows
        }

    def forget_anonymous(self, at: float) -> None:
        """Forget clients without a key that have not used the GPU for ANONYMOUS_KEPT_DAYS."""
        with self._database.transaction() as connection:
            connection.execute(
                f"DELETE FROM usage WHERE day < ? AND {is_anonymous('client')}",
                (int(at // DAY_S) - ANONYMOUS_KEPT_DAYS,),
            )


def by_hour(since: float, until: float) -> dict[int, float]:
    """The seconds of a time in each hour since 1970; only those of its latest HOURS_KEPT."""
    last = int(until // HOUR_S)
    first = max(int(since // HOUR_S), last - HOURS_KEPT + 1)
    return {
        hour: min(until, (hour + 1) * HOUR_S) - max(since, hour * HOUR_S)
        for hour in range(first, last + 1)
    }
