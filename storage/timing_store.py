"""Measured durations on disk: samples of each model, outcomes of forecasts, loading."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, fields

from storage.database import DAMAGED, Database, Row
from timing.speeds import Product, Speeds
from timing.spread import Outcome
from timing_model import LOCAL, Measured, TimingModel, Work

log = logging.getLogger(__name__)

SAMPLES_KEPT = 300
"""Timing samples of each model on each machine, and outcomes: as much as the forecast remembers."""

QUANTIZED = re.compile(r'"model": ?"[^"]*/q\d\b')
"""In the JSON of Work: a key of quantized weights."""


class TimingStore:
    """A part of a TaskStore. Any thread may call; StorageUnavailable: the disk refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def teach(self, timing: TimingModel) -> None:
        """Let a new model learn what earlier processes have measured, on each machine."""
        for machine in self.machines():
            own, speeds = timing.of(machine), self.speeds(machine)
            if speeds:
                own.calibrate(speeds)
            for model, seconds in self.loads(machine).items():
                own.learn_load(model, seconds)
            own.take(own.learned(self.samples(machine)))

    def keep_samples(self, samples: Sequence[tuple[Work, Measured]], machine: str = LOCAL) -> None:
        with self._database.transaction() as connection:
            for work, measured in samples:
                connection.execute(
                    "INSERT INTO samples (machine, model, work, measured) VALUES (?, ?, ?, ?)",
                    (machine, work.model, work.to_json(), measured.to_json()),
                )
            for model in {work.model for work, _ in samples}:
                connection.execute(
                    "DELETE FROM samples WHERE machine = ? AND model = ? AND number <= (SELECT"
                    " number FROM samples WHERE machine = ? AND model = ?"
                    " ORDER BY number DESC LIMIT 1 OFFSET ?)",
                    (machine, model, machine, model, SAMPLES_KEPT),
                )

    def machines(self) -> list[str]:
        """Those that something was measured on."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT machine FROM samples UNION SELECT machine FROM loads"
                " UNION SELECT machine FROM speeds ORDER BY machine"
            ).fetchall()
        return [row["machine"] for row in rows]

    def samples(self, machine: str = LOCAL) -> list[tuple[Work, Measured]]:
        """The latest timing samples of a machine, oldest first, but for those that say nothing
        about the products of today."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT work, measured FROM samples WHERE machine = ? ORDER BY number", (machine,)
            ).fetchall()
        rows = [row for row in rows if not _is_of_slow_products(machine, str(row["work"]))]
        return [(work, measured) for _, work, measured in _read(machine, rows)]

    def latest_samples(self, count: int) -> list[tuple[str, Work, Measured]]:
        """The latest timing samples of all machines, newest first, with their machines."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT machine, work, measured FROM samples ORDER BY number DESC LIMIT ?", (count,)
            ).fetchall()
        return [sample for row in rows for sample in _read(row["machine"], [row])]

    def keep_outcome(self, outcome: Outcome) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO outcomes"
                " (priority, forecast_s, p90_s, actual_s, model, machine, ended_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                astuple(outcome),
            )
            connection.execute(
                "DELETE FROM outcomes WHERE number <= (SELECT max(number) FROM outcomes) - ?",
                (SAMPLES_KEPT,),
            )

    def outcomes(self) -> list[Outcome]:
        """The latest outcomes of forecasts, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT * FROM outcomes ORDER BY number").fetchall()
        names = [field.name for field in fields(Outcome)]
        return [Outcome(*(row[name] for name in names)) for row in rows]

    def keep_load(self, model: str, seconds: float, machine: str = LOCAL) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (model, seconds, machine)
            )

    def loads(self, machine: str = LOCAL) -> dict[str, float]:
        """Seconds that each model last took to load on a machine."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT model, seconds FROM loads WHERE machine = ?", (machine,)
            ).fetchall()
        return {row["model"]: row["seconds"] for row in rows}

    def keep_speeds(self, speeds: Speeds, mlx: str, machine: str = LOCAL) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO speeds (machine, flop_per_s, by_product, mlx)"
                " VALUES (?, ?, ?, ?)",
                (machine, speeds[Product.BF16], json.dumps(speeds), mlx),
            )

    def speeds(self, machine: str = LOCAL, mlx: str | None = None) -> Speeds:
        """The measured speeds of a machine; empty: it was not measured yet.

        Args:
            mlx: only those that were measured with this version of MLX; None: with any.
        """
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT * FROM speeds WHERE machine = ?", (machine,)
            ).fetchone()
        if not row or mlx not in (None, row["mlx"]):
            return {}
        kept = {Product.BF16: float(row["flop_per_s"])}  # all that earlier versions measured
        with suppress(*DAMAGED):
            kept |= {Product(name): float(s) for name, s in json.loads(row["by_product"]).items()}
        return kept


def _is_of_slow_products(machine: str, work: str) -> bool:
    """Whether a sample is one of quantized weights from version 1, which named no product. Where
    MLX has no GPU, they took 10 to 100 times as long; on Linux with a GPU they are measured once
    more."""
    if machine != LOCAL or sys.platform == "darwin" or '"product"' in work:
        return False
    return bool(QUANTIZED.search(work))


def _read(machine: str, rows: Sequence[Row]) -> list[tuple[str, Work, Measured]]:
    samples = []
    for row in rows:
        try:
            work, measured = Work.from_json(row["work"]), Measured.from_json(row["measured"])
            samples.append((machine, work, measured))
        except DAMAGED:
            log.warning("a damaged timing sample is passed over")
    return samples
