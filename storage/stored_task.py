"""What the table of tasks says of a task."""

import json
from dataclasses import dataclass

from storage.database import Row
from task import GenerationParams, TaskStatus
from timing_model import Measured


@dataclass(frozen=True)
class StoredTask:
    """A row of the table of tasks."""

    number: int
    task_id: str
    urgent: bool
    status: TaskStatus
    attempts: int
    params: GenerationParams
    created_at: float
    started_at: float | None
    ended_at: float | None
    fetched_at: float | None
    """Seconds of the KeepClock."""
    measured: tuple[Measured, ...]
    """Of each image."""
    image_sizes: tuple[int, ...]
    """Bytes of each image."""
    error_code: str | None
    error: str | None


class Tombstone(str):
    """Why a task that once was is gone."""


def stored_task(row: Row) -> StoredTask:
    """Raises one of DAMAGED if the row is."""
    return StoredTask(
        number=row["number"],
        task_id=row["task_id"],
        urgent=bool(row["urgent"]),
        status=TaskStatus(row["status"]),
        attempts=row["attempts"],
        params=GenerationParams.model_validate_json(row["params"]),
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        fetched_at=row["fetched_at"],
        measured=_measured(row["measured"]) if row["measured"] else (),
        image_sizes=_image_sizes(row),
        error_code=row["error_code"],
        error=row["error"],
    )


def images_of(row: Row) -> int:
    """How many; a record from before a task could have several has one."""
    return len(json.loads(row["image_sizes"])) if row["image_sizes"] else 1


def _image_sizes(row: Row) -> tuple[int, ...]:
    if row["image_sizes"]:
        return tuple(int(size) for size in json.loads(row["image_sizes"]))
    return (row["image_bytes"],) if row["image_bytes"] is not None else ()


def _measured(text: str) -> tuple[Measured, ...]:
    values = json.loads(text)
    return tuple(Measured(**each) for each in (values if isinstance(values, list) else [values]))
