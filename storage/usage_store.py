"""GPU seconds of each client, on disk."""

from dataclasses import dataclass

from storage.database import Database

DAY_S = 24 * 3600
ANONYMOUS_KEPT_DAYS = 30


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

    def add(self, client: str, gpu_s: float, at: float) -> None:
        """A client has used the GPU. Called in the transaction that ends or releases its task.

        Args:
            at: unix seconds.
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
                "DELETE FROM usage WHERE day < ?"
                " AND (client LIKE 'id:%' OR client LIKE 'address:%')",
                (int(at // DAY_S) - ANONYMOUS_KEPT_DAYS,),
            )
