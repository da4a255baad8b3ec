"""Reading rows of the table of tasks."""

import json

from storage.database import Row
from task import ANONYMOUS, GenerationParams, Owner, Task, TaskStatus
from timing_model import Measured

END = "ended_at = :ended_at, kept_since = :kept_since"
FETCHED_AT_END = (
    "fetched_at = CASE WHEN json_array_length(image_sizes) > 0"
    " AND json_array_length(fetched) >= json_array_length(image_sizes) THEN :kept_since END"
)
"""A task that ends early was fetched if all images that it has were."""

UNFINISHED = (TaskStatus.WAITING, TaskStatus.RUNNING)


def is_anonymous(column: str) -> str:
    """The condition that the client named in a column has no key."""
    return "(" + " OR ".join(f"{column} LIKE '{begin}%'" for begin in ANONYMOUS) + ")"


class Tombstone(str):
    """Why a task that once was is gone, and whose it was."""

    owner: str

    def __new__(cls, reason: str, owner: str = "") -> "Tombstone":
        self = super().__new__(cls, reason)
        self.owner = owner
        return self


def task_of(row: Row) -> Task:
    """A task as it is stored, without its stages. Raises one of DAMAGED if the row is damaged."""
    return Task(
        task_id=row["task_id"],
        params=GenerationParams.model_validate_json(row["params"]),
        priority=row["priority"],
        created_at=row["created_at"],
        owner=Owner(row["owner"], row["end_user"], row["weight"]),
        status=TaskStatus(row["status"]),
        attempt=row["attempt"],
        retried_after=row["retried_after"],
        interruptions=row["interruptions"],
        machine=row["machine"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        fetched_at=row["fetched_at"],
        kept=bool(row["kept"]),
        kept_since=row["kept_since"],
        last_image=row["last_image"],
        image_sizes=image_sizes(row),
        measured=_measured(row["measured"]) if row["measured"] else (),
        error_code=row["error_code"],
        error=row["error"],
        sequence=row["sequence"],
        group=row["group_sequence"],
        start_by=row["start_by"],
        share_done=1.0 if row["status"] == TaskStatus.DONE else 0.0,
    )


def image_sizes(row: Row) -> tuple[int, ...]:
    """Bytes of each image file of a task."""
    return tuple(int(size) for size in json.loads(row["image_sizes"] or "[]"))


def _measured(text: str) -> tuple[Measured, ...]:
    values = json.loads(text)
    return tuple(Measured(**each) for each in (values if isinstance(values, list) else [values]))
