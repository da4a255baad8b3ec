"""Ended tasks on disk: their images are fetched and removed, their records pruned.

A task that is removed leaves a row with the reason, so that its id is answered with 410; these rows
go after TOMBSTONE_S. Images can be removed on a full disk, too: the file is removed first, which
needs no space, and what the database refuses is written later (unwritten.py).
"""

import json
import logging
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

from errors import StorageUnavailable
from storage.callback_store import CallbackStore
from storage.database import Database, Row
from storage.file_store import FileStore, image_name
from storage.task_rows import UNFINISHED, image_sizes, is_anonymous
from storage.unwritten import Unwritten
from task import TaskStatus
from timing_model import LOCAL

log = logging.getLogger(__name__)

TOMBSTONE_S = 30 * 24 * 3600
MOST_TOMBSTONES = 1_000_000
"""About 400 bytes each."""
ENDED_WITH_IMAGES = "ended_at IS NOT NULL AND image_sizes IS NOT NULL AND gone IS NULL"


@dataclass(frozen=True)
class End:
    """The end of a task, or of its run."""

    ended_at: float
    """Unix seconds."""
    kept_since: float
    """The same moment in seconds of the KeepClock."""
    gpu_s: float = 0.0
    """Seconds that it was on the GPU since it was claimed last."""
    machine: str = LOCAL
    """Where it ran."""


class EndedTasks:
    """A part of a TaskStore. Any thread may call; changes are made under the scheduler's `changes`
    lock. Times are seconds of the KeepClock. StorageUnavailable: the disk refuses; then nothing has
    changed."""

    def __init__(self, database: Database, files: FileStore, callbacks: CallbackStore) -> None:
        self.unwritten = Unwritten()
        self._database = database
        self._files = files
        self._callbacks = callbacks

    def drop(self, task_id: str, reason: str, *, gone_at: float | None = None) -> int:
        """Remove an ended task with its images, leaving the reason; returns their bytes.

        The files are removed first, which makes room. Then the task is gone, whatever the database
        says: should it refuse, that is written later; should the process end before, the next start
        finds the task without its image and drops it.

        Raises:
            StorageUnavailable: the image cannot be removed, or the task has none and the database
                refuses; nothing has changed.
        """
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT status, image_bytes, image_sizes FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone()
        sizes = image_sizes(row) if row else ()
        if row is not None and row["status"] not in UNFINISHED:
            for index in range(len(sizes)):
                self._files.remove_image(image_name(task_id, index))
        self._files.discard_inputs(task_id)
        try:
            self._write_drop(task_id, reason, gone_at)
        except StorageUnavailable as error:
            if not sizes:
                raise
            log.warning("the removal of task %s is written later: %s", task_id, error)
            self.unwritten.remove(task_id, reason, gone_at)
        else:
            self.unwritten.fetched.pop(task_id, None)
        return sum(sizes)

    def drop_over(self, most: int, reason: str, gone_at: float) -> list[str]:
        """Remove failed and cancelled tasks without images, but for the latest ones: their params
        may take half a megabyte each. Returns which.

        Args:
            most: failed and cancelled tasks; among more, the oldest ones are removed.
        """
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM tasks WHERE coalesce(json_array_length(image_sizes), 0) = 0"
                " AND number IN (SELECT number FROM tasks"  # which reads an index alone
                " WHERE gone IS NULL AND status IN ('failed', 'cancelled')"
                " ORDER BY kept_since DESC, number DESC LIMIT -1 OFFSET ?)",
                (most,),
            ).fetchall()
        task_ids = self._still_there(rows)
        if not task_ids:
            return []
        with self._database.transaction():
            for task_id in task_ids:
                self._write_drop(task_id, reason, gone_at)
        for task_id in task_ids:
            self._files.discard_inputs(task_id)
        return task_ids

    def mark_fetched(self, task_id: str, fetched_at: float, index: int | None = None) -> bool:
        """An image was sent and is removed (None: all of them); the first time counts. Kept tasks
        stay. What the database refuses is written later.

        Returns:
            Whether the task has ended and all of its images were fetched now.
        """
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT status, image_sizes, fetched FROM tasks"
                " WHERE task_id = ? AND image_sizes IS NOT NULL AND gone IS NULL AND NOT kept",
                (task_id,),
            ).fetchone()
        if row is None:
            return False
        count = len(image_sizes(row))
        fetched = set(json.loads(row["fetched"] or "[]"))
        if earlier := self.unwritten.fetched.get(task_id):
            fetched |= earlier.indexes
        fetched |= set(range(count)) if index is None else {index}
        all_fetched = 0 < count <= len(fetched) and row["status"] not in UNFINISHED
        done_at = fetched_at if all_fetched else None
        try:
            self._write_fetched(task_id, fetched, done_at)
        except StorageUnavailable as error:
            log.warning("that task %s was fetched is written later: %s", task_id, error)
            self.unwritten.fetch(task_id, fetched, done_at)
        return all_fetched

    def keep(self, task_id: str, kept: bool, at: float) -> None:
        """Pin a task, or release it, as if it had just ended and had not been fetched."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET kept = ?, kept_since = ?, fetched = NULL, fetched_at = NULL"
                " WHERE task_id = ? AND gone IS NULL",
                (kept, at, task_id),
            )
        self.unwritten.fetched.pop(task_id, None)

    def kept(self, owner: str | None = None) -> tuple[int, int]:
        """Returns the number of images that this client keeps (None: all clients), and their
        bytes."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT coalesce(sum(json_array_length(image_sizes)), 0),"
                " coalesce(sum(image_bytes), 0) FROM tasks"
                " WHERE kept AND owner = coalesce(?, owner)",
                (owner,),
            ).fetchone()
        return int(row[0]), int(row[1])

    def kept_ids(self, owner: str) -> list[str]:
        """Tasks that this client has pinned, the latest first."""
        return self._ids("kept AND owner = ? ORDER BY kept_since DESC", owner)

    def settle(self) -> None:
        """Writes the changes that the database has refused before."""
        for task_id, fetch in list(self.unwritten.fetched.items()):
            self._write_fetched(task_id, fetch.indexes, fetch.at)
            self.unwritten.fetched.pop(task_id, None)
        for task_id, removal in list(self.unwritten.removed.items()):
            self._write_drop(task_id, removal.reason, removal.at)
            self.unwritten.removed.pop(task_id, None)

    def images(self) -> tuple[int, int]:
        """Returns the number of tasks with images, and the bytes of these."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT count(*), coalesce(sum(image_bytes), 0) FROM tasks"
                " WHERE json_array_length(image_sizes) > 0 AND gone IS NULL"
            ).fetchone()
        return int(row[0]), int(row[1])

    def ended_before(self, kept_since: float) -> list[str]:
        """Ended tasks that are older than this and not pinned."""
        return self._ids("NOT kept AND kept_since < ?", kept_since)

    def anonymous_pins_before(self, pinned_at: float) -> list[str]:
        """Tasks that clients without a key have pinned before this."""
        return self._ids(f"kept AND {is_anonymous('owner')} AND kept_since < ?", pinned_at)

    def fetched_before(self, fetched_at: float) -> list[str]:
        """Tasks of which all images were fetched before this."""
        written = self._ids("fetched_at < ?", fetched_at)
        return written + self.unwritten.fetched_before(fetched_at)

    def oldest_images_over(self, keep_bytes: int) -> list[str]:
        """The oldest images that have to go so that the rest fits into keep_bytes; those that are
        pinned and the newest one stay in any case."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM (SELECT task_id, kept, sum(image_bytes) OVER"
                " (ORDER BY kept DESC, kept_since DESC, number DESC) AS size FROM tasks"
                f" WHERE {ENDED_WITH_IMAGES}) WHERE size > ? AND NOT kept"
                f" AND task_id != (SELECT task_id FROM tasks WHERE {ENDED_WITH_IMAGES} AND NOT kept"
                " ORDER BY kept_since DESC, number DESC LIMIT 1)",
                (keep_bytes,),
            ).fetchall()
        return self._still_there(rows)

    def newest_done(self, owner: str, most: int) -> list[str]:
        """The ids of tasks of this client that are done and kept, the latest one first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM tasks WHERE gone IS NULL AND status = 'done' AND owner = ?"
                " ORDER BY kept_since DESC LIMIT ?",
                (owner, most),
            ).fetchall()
        return self._still_there(rows)

    def remove_tombstones(self, gone_before: float, most: int = MOST_TOMBSTONES) -> None:
        """Those that are older than this, and all but the latest submitted ones."""
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM tasks WHERE gone IS NOT NULL AND coalesce(gone_at, kept_since) < ?",
                (gone_before,),
            )
            connection.execute(
                "DELETE FROM tasks WHERE gone IS NOT NULL AND number <= (SELECT number FROM tasks"
                " WHERE gone IS NOT NULL ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (most,),
            )

    def remove_strays(self) -> None:
        """After a crash: files without a record, and records without their files. Raises OSError,
        too."""
        files = self._files.names()
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id, status, image_sizes, measured FROM tasks WHERE gone IS NULL"
                " AND (image_sizes IS NOT NULL OR status IN ('waiting', 'running', 'failed'))"
                " ORDER BY ended_at"
            ).fetchall()
        known = set()
        for row in rows:
            count = len(image_sizes(row))
            names = [image_name(row["task_id"], index) for index in range(count)]
            stored = list(takewhile(files.__contains__, names))
            known.update(stored)
            if len(stored) == count:
                continue
            if row["status"] == TaskStatus.DONE:
                self.drop(row["task_id"], "The image was removed.")
            else:
                with suppress(StorageUnavailable):
                    self._forget_images(row, len(stored))
        for name in files - known:
            with suppress(StorageUnavailable):
                self._files.remove_image(name)
        self._files.keep_inputs_of(
            (row["task_id"] for row in rows if row["status"] in UNFINISHED),
            (row["task_id"] for row in rows if row["status"] == TaskStatus.FAILED),
        )

    # -- private -----------------------------------------------------------------------------------

    def _write_drop(self, task_id: str, reason: str, gone_at: float | None) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET gone = ?, gone_at = ?, params = NULL, measured = NULL,"
                " image_bytes = NULL, image_sizes = NULL, kept = 0 WHERE task_id = ?",
                (reason, gone_at, task_id),
            )
            self._callbacks.end(task_id)

    def _write_fetched(self, task_id: str, fetched: Set[int], fetched_at: float | None) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET fetched = ?, fetched_at = coalesce(fetched_at, ?)"
                " WHERE task_id = ?",
                (json.dumps(sorted(fetched)), fetched_at, task_id),
            )

    def _ids(self, condition: str, value: float | str) -> list[str]:
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM tasks WHERE gone IS NULL"
                f" AND status IN ('done', 'failed', 'cancelled') AND {condition}",
                (value,),
            ).fetchall()
        return self._still_there(rows)

    def _still_there(self, rows: Sequence[Row]) -> list[str]:
        return [row["task_id"] for row in rows if row["task_id"] not in self.unwritten.removed]

    def _forget_images(self, row: Row, stored: int) -> None:
        """Of a task that is not done only the first images are left; if it has not ended, the
        others are drawn again."""
        sizes, measured = image_sizes(row), json.loads(row["measured"] or "[]")
        kept = measured[: len(measured) // len(sizes) * stored]
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET image_sizes = ?, image_bytes = ?, measured = ? WHERE task_id = ?",
                (
                    json.dumps(sizes[:stored]),
                    sum(sizes[:stored]),
                    json.dumps(kept),
                    row["task_id"],
                ),
            )
