"""Measured durations on disk: samples of each model, outcomes of forecasts, loading."""

import logging
from collections.abc import Sequence

from storage.database import DAMAGED, Database
from timing.spread import Outcome
from timing_model import Measured, Work

log = logging.getLogger(__name__)

SAMPLES_KEPT = 300
"""Timing samples of each model, and outcomes: as much as the forecast remembers."""


class TimingStore:
    """A part of a TaskStore. Any thread may call; StorageUnavailable: the disk refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep_samples(self, samples: Sequence[tuple[Work, Measured]]) -> None:
        with self._database.transaction() as connection:
            for work, measured in samples:
                connection.execute(
                    "INSERT INTO samples (model, work, measured) VALUES (?, ?, ?)",
                    (work.model, work.to_json(), measured.to_json()),
                )
            for model in {work.model for work, _ in samples}:
                connection.execute(
                    "DELETE FROM samples WHERE model = ? AND number <= (SELECT number FROM samples"
                    " WHERE model = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
                    (model, model, SAMPLES_KEPT),
                )

    def samples(self) -> list[tuple[Work, Measured]]:
        """The latest timing samples, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT work, measured FROM samples ORDER BY number"
            ).fetchall()
        samples = []
        for row in rows:
            try:
                samples.append((Work.from_json(row["work"]), Measured.from_json(row["measured"])))
            except DAMAGED:
                log.warning("a damaged timing sample is passed over")
        return samples

    def keep_outcome(self, outcome: Outcome) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO outcomes (priority, forecast_s, p90_s, actual_s) VALUES (?, ?, ?, ?)",
                (outcome.priority, outcome.forecast_s, outcome.p90_s, outcome.actual_s),
            )
            connection.execute(
                "DELETE FROM outcomes WHERE number <= (SELECT max(number) FROM outcomes) - ?",
                (SAMPLES_KEPT,),
            )

    def outcomes(self) -> list[Outcome]:
        """The latest outcomes of forecasts, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT * FROM outcomes ORDER BY number").fetchall()
        return [
            Outcome(row["priority"], row["forecast_s"], row["p90_s"], row["actual_s"])
            for row in rows
        ]

    def keep_load(self, model: str, seconds: float) -> None:
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES (?, ?)", (model, seconds))

    def loads(self) -> dict[str, float]:
        """Seconds that each model last took to load."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT model, seconds FROM loads").fetchall()
        return {row["model"]: row["seconds"] for row in rows}
