"""Tasks on disk: their params and status changes.

Tasks are rows of the database (database.py), and so are measured durations (timing_store.py) and
pending callbacks (callback_store.py). Images and input images are files beside it (file_store.py).

A task whose image was removed, or that was pruned, leaves a row with the reason, so that its id is
answered with 410; these rows go after TOMBSTONE_S.

Images can be removed on a full disk, too: the file is removed first, which needs no space, and what
the database refuses is written later (unwritten.py).
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any

from errors import StorageUnavailable, StoreError
from storage.callback_store import CallbackStore
from storage.clock_store import ClockStore
from storage.data_dir import DATABASE, own, tighten
from storage.database import DAMAGED, Database, Row
from storage.file_store import PROBE_BYTES, FileStore, image_name
from storage.task_rows import Tombstone, image_sizes, task_of
from storage.timing_store import TimingStore
from storage.unwritten import Unwritten
from task import Task, TaskStatus
from timing_model import Measured, Work

log = logging.getLogger(__name__)

TOMBSTONE_S = 30 * 24 * 3600
UNFINISHED = (TaskStatus.WAITING, TaskStatus.RUNNING)
ENDED_WITH_IMAGES = "ended_at IS NOT NULL AND image_sizes IS NOT NULL AND gone IS NULL"
END = "ended_at = :ended_at, kept_since = :kept_since"
FETCHED_AT_END = (
    "fetched_at = CASE WHEN json_array_length(image_sizes) > 0"
    " AND json_array_length(fetched) >= json_array_length(image_sizes) THEN :kept_since END"
)
"""A task that ends early was fetched if all images that it has were."""


@dataclass(frozen=True)
class End:
    """When a task ended."""

    ended_at: float
    """Unix seconds."""
    kept_since: float
    """The same moment in seconds of the KeepClock."""


class TaskStore:
    """Any thread may call; each method is one transaction.

    Every method but the constructor raises StorageUnavailable when the disk refuses (full,
    read-only, damaged); then nothing has changed.
    """

    def __init__(self, data_dir: Path | None) -> None:
        """Open or create the store.

        Args:
            data_dir: folder that holds everything; None: in memory, for measuring.

        Raises:
            StoreError: the folder cannot be used, is used by another server, or holds a database
                that is damaged or was written by a newer version. A folder that can be read and
                not written to can be used: probe() then raises.
        """
        self._open = ExitStack()
        self._unwritten = Unwritten()
        self._adding_images = Lock()
        """One image at a time: a worker that is refused removes its own file, and no other."""
        with ExitStack() as opened:
            try:
                if data_dir:
                    opened.push(own(data_dir))
                    path = data_dir / DATABASE
                else:
                    path, data_dir = None, Path(tempfile.mkdtemp())
                    opened.callback(shutil.rmtree, data_dir)
                self._data_dir = data_dir
                self._files = FileStore(data_dir)
                self._database = Database(path)
                opened.callback(self._database.close)
                tighten(data_dir)
                self.timings = TimingStore(self._database)
                self.callbacks = CallbackStore(self._database)
                self.clocks = ClockStore(self._database)
                self._remove_strays()
            except (OSError, ValueError, StorageUnavailable) as error:
                reason = str(error).removesuffix(".")
                raise StoreError(f"The data dir {data_dir} cannot be used: {reason}.") from error
            self._open = opened.pop_all()

    def close(self) -> None:
        self._open.close()

    def probe(self) -> None:
        """Write what the database has refused before, and a file with more bytes than were refused;
        raises while the disk refuses."""
        self._database.check_place()
        self._files.probe()
        self._database.probe()
        self._settle()

    def seems_fine(self) -> bool:
        """Whether the disk seems to accept changes, without writing anything.

        Raises:
            StorageUnavailable: the data dir was removed or replaced.
        """
        self._database.check_place()
        try:
            room = os.statvfs(self._data_dir)
        except OSError:
            return False
        return (
            room.f_bavail * room.f_frsize >= PROBE_BYTES
            and os.access(self._data_dir, os.W_OK)
            and self._database.in_memory_because is None
            and not self._unwritten
        )

    # -- tasks ----------------------------------------------------------------------------------

    def insert(
        self, task: Task, *, client_key: str | None = None, callback_url: str | None = None
    ) -> None:
        """Store a new task, waiting. Raises sqlite3.IntegrityError if the id or key is taken."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO tasks (task_id, client_key, priority, status, params, created_at,"
                " sequence, group_sequence) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    task.task_id,
                    client_key,
                    task.priority,
                    TaskStatus.WAITING,
                    task.params.model_dump_json(),
                    task.created_at,
                    task.sequence,
                    task.group,
                ),
            )
            if callback_url is not None:
                self.callbacks.keep(task.task_id, callback_url)

    def reserve_inputs(self, task_id: str, size_bytes: int, limit_bytes: int) -> bool:
        """Count the pictures that keep_inputs() will write; returns False if those of all tasks
        would exceed the limit. discard_inputs() frees the space."""
        return self._files.reserve_inputs(task_id, size_bytes, limit_bytes)

    def keep_inputs(self, task_id: str, inputs: Mapping[str, bytes]) -> None:
        """Store the input images of a task, before it is inserted: PNG bytes by InputImage.file.
        Those of tasks that were not inserted are removed at the next start."""
        with ExitStack() as unless_kept:
            unless_kept.callback(_quietly, self._files.remove_inputs, task_id)
            self._files.write_inputs(task_id, inputs)
            unless_kept.pop_all()

    def discard_inputs(self, task_id: str) -> None:
        """Remove the input images of a task, now or, if the disk refuses, at the next start."""
        _quietly(self._files.remove_inputs, task_id)

    def find(self, task_id: str) -> Task | Tombstone | None:
        """A task, or why it was removed, or None if it is unknown."""
        if removed := self._unwritten.removed.get(task_id):
            return Tombstone(removed.reason)
        with self._database.reading() as connection:
            row = connection.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        if row is None:
            return None
        if row["gone"]:
            return Tombstone(row["gone"])
        try:
            return task_of(row)
        except DAMAGED:
            log.error("the record of task %s is damaged", task_id)
            return Tombstone("The record of the task is damaged.")

    def find_by_key(self, client_key: str) -> str | None:
        """The id of the task that was submitted with this key."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT task_id FROM tasks WHERE client_key = ?", (client_key,)
            ).fetchone()
        return row and str(row["task_id"])

    def free_key(self, client_key: str) -> None:
        """Take the key from the task that has it, so that another task can be inserted with it."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET client_key = NULL WHERE client_key = ?", (client_key,)
            )

    def unfinished(self) -> list[Task]:
        """Tasks that waited or ran when the process ended, in the order of submission."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM tasks WHERE status IN ('waiting', 'running') ORDER BY number"
            ).fetchall()
        tasks = []
        for row in rows:
            try:
                tasks.append(task_of(row))
            except DAMAGED:
                log.error("the record of task %s is damaged and ignored", row["task_id"])
        return tasks

    # -- transitions: each names the status and the attempt that the task must have ---------------

    def claim(self, task: Task, *, started_at: float) -> bool:
        """A waiting task is running now. The one change that is not synced, because the GPU waits
        for it: it survives kill -9; after a power cut the task is still waiting."""
        with self._database.unsynced():
            return self._move(
                task,
                TaskStatus.RUNNING,
                "attempt = attempt + 1, started_at = :started_at",
                started_at=started_at,
            )

    def release(self, task: Task, *, interrupted: bool) -> bool:
        """A running task waits again.

        Args:
            interrupted: the worker or the server died meanwhile.
        """
        return self._move(
            task,
            TaskStatus.WAITING,
            "interruptions = interruptions + :interrupted, started_at = NULL",
            interrupted=int(interrupted),
        )

    def add_image(
        self,
        task: Task,
        image: bytes,
        measured: Sequence[Measured],
        *,
        samples: Sequence[tuple[Work, Measured]],
        end: End | None,
    ) -> bool:
        """Store the next image of a running task, and what was measured.

        Args:
            task: as it was claimed; its images are those stored before.
            measured: seconds that each stage of the image took.
            samples: what is learned from.
            end: the task is done with this image, at this moment; None: it continues.

        Returns:
            False, and nothing has changed: it was cancelled, or this attempt is not the latest.
        """
        with self._adding_images:
            if not self._runs(task):
                return False
            name = image_name(task.task_id, len(task.image_sizes))
            with ExitStack() as unless_stored:
                unless_stored.callback(_quietly, self._files.remove_image, name)
                self._files.write_image(name, image)
                stored = self._add_image(task, len(image), measured, samples=samples, end=end)
                if stored:
                    unless_stored.pop_all()
            return stored

    def _runs(self, task: Task) -> bool:
        """Whether this attempt of the task runs: a cheap check before its image is written."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT status, attempt FROM tasks WHERE task_id = ?", (task.task_id,)
            ).fetchone()
        return row is not None and (row["status"], row["attempt"]) == ("running", task.attempt)

    def _add_image(
        self,
        task: Task,
        image_bytes: int,
        measured: Sequence[Measured],
        *,
        samples: Sequence[tuple[Work, Measured]],
        end: End | None,
    ) -> bool:
        sizes = (*task.image_sizes, image_bytes)
        all_measured = [*task.measured, *measured]
        with self._database.transaction():
            stored = self._move(
                task,
                TaskStatus.DONE if end else TaskStatus.RUNNING,
                f"{END}, measured = :measured, image_bytes = :image_bytes,"
                " image_sizes = :image_sizes",
                **(asdict(end) if end else {"ended_at": None, "kept_since": None}),
                measured=json.dumps([json.loads(each.to_json()) for each in all_measured]),
                image_bytes=sum(sizes),
                image_sizes=json.dumps(sizes),
            )
            if stored:
                self.timings.keep_samples(samples)
        return stored

    def cancel_after(self, task: Task, index: int) -> bool:
        """Note on disk that a running task is to be cancelled after the image of this index.

        Returns:
            False, and nothing has changed: the image is stored already, or the task runs no more.
        """
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "UPDATE tasks SET last_image = :index WHERE task_id = :task_id"
                " AND status = 'running' AND attempt = :attempt"
                " AND coalesce(json_array_length(image_sizes), 0) <= :index",
                {"task_id": task.task_id, "attempt": task.attempt, "index": index},
            )
            return cursor.rowcount == 1

    def fail(self, task: Task, end: End, *, code: str, message: str) -> bool:
        return self._move(
            task,
            TaskStatus.FAILED,
            f"{END}, {FETCHED_AT_END}, error_code = :code, error = :message",
            **asdict(end),
            code=code,
            message=message,
        )

    def cancel(self, task: Task, end: End) -> bool:
        return self._move(task, TaskStatus.CANCELLED, f"{END}, {FETCHED_AT_END}", **asdict(end))

    # -- images -----------------------------------------------------------------------------------

    def drop(self, task_id: str, reason: str, *, gone_at: float | None = None) -> int:
        """Remove an ended task with its image, leaving the reason; returns the image's bytes.

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
        ended = row is not None and row["status"] not in UNFINISHED
        if ended:
            self._files.remove_images(task_id, len(sizes))
        _quietly(self._files.remove_inputs, task_id)
        try:
            self._write_drop(task_id, reason, gone_at)
        except StorageUnavailable as error:
            if not sizes:
                raise
            log.warning("the removal of task %s is written later: %s", task_id, error)
            self._unwritten.remove(task_id, reason, gone_at)
        else:
            self._unwritten.fetched.pop(task_id, None)
        return sum(sizes)

    def _write_drop(self, task_id: str, reason: str, gone_at: float | None) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET gone = ?, gone_at = ?, params = NULL, measured = NULL,"
                " image_bytes = NULL, image_sizes = NULL WHERE task_id = ?",
                (reason, gone_at, task_id),
            )
            self.callbacks.end(task_id)

    def mark_fetched(self, task_id: str, fetched_at: float, index: int | None = None) -> bool:
        """An image was sent and is removed (None: all of them); the first time counts. What the
        database refuses is written later.

        Returns:
            Whether the task has ended and all of its images were fetched now.
        """
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT status, image_sizes, fetched FROM tasks"
                " WHERE task_id = ? AND image_sizes IS NOT NULL AND gone IS NULL",
                (task_id,),
            ).fetchone()
        if row is None:
            return False
        count = len(image_sizes(row))
        fetched = set(json.loads(row["fetched"] or "[]"))
        if earlier := self._unwritten.fetched.get(task_id):
            fetched |= earlier.indexes
        fetched |= set(range(count)) if index is None else {index}
        all_fetched = 0 < count <= len(fetched) and row["status"] not in UNFINISHED
        done_at = fetched_at if all_fetched else None
        try:
            self._write_fetched(task_id, fetched, done_at)
        except StorageUnavailable as error:
            log.warning("that task %s was fetched is written later: %s", task_id, error)
            self._unwritten.fetch(task_id, fetched, done_at)
        return all_fetched

    def _write_fetched(self, task_id: str, fetched: Set[int], fetched_at: float | None) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET fetched = ?, fetched_at = coalesce(fetched_at, ?)"
                " WHERE task_id = ?",
                (json.dumps(sorted(fetched)), fetched_at, task_id),
            )

    def _settle(self) -> None:
        """Write what the database has refused before."""
        for task_id, fetch in list(self._unwritten.fetched.items()):
            self._write_fetched(task_id, fetch.indexes, fetch.at)
            self._unwritten.fetched.pop(task_id, None)
        for task_id, removal in list(self._unwritten.removed.items()):
            self._write_drop(task_id, removal.reason, removal.at)
            self._unwritten.removed.pop(task_id, None)

    # -- images ---------------------------------------------------------------------------------

    def read_image(self, task_id: str, index: int = 0) -> bytes | None:
        return self._files.read_image(task_id, index)

    def images(self) -> tuple[int, int]:
        """How many images are kept, and their bytes."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT count(*), coalesce(sum(image_bytes), 0) FROM tasks"
                " WHERE json_array_length(image_sizes) > 0 AND gone IS NULL"
            ).fetchone()
        return int(row[0]), int(row[1])

    def inputs_of(self, task_id: str) -> Path:
        """The folder with the pictures that a task needs, if it needs any."""
        return self._files.inputs_of(task_id)

    # -- keeping and dropping: all times in seconds of the KeepClock ------------------------------

    def ended_before(self, kept_since: float) -> list[str]:
        """Ended tasks that are older than this."""
        return self._ids("kept_since < ?", kept_since)

    def fetched_before(self, fetched_at: float) -> list[str]:
        """Tasks of which all images were fetched before this."""
        written = self._ids("fetched_at < ?", fetched_at)
        return written + self._unwritten.fetched_before(fetched_at)

    def oldest_images_over(self, keep_bytes: int) -> list[str]:
        """The oldest images that have to go so that the rest fits into keep_bytes; the newest one
        stays in any case."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM (SELECT task_id, sum(image_bytes) OVER"
                " (ORDER BY kept_since DESC, number DESC) AS size FROM tasks"
                f" WHERE {ENDED_WITH_IMAGES}) WHERE size > ?"
                f" AND task_id != (SELECT task_id FROM tasks WHERE {ENDED_WITH_IMAGES}"
                " ORDER BY kept_since DESC, number DESC LIMIT 1)",
                (keep_bytes,),
            ).fetchall()
        return self._still_there(rows)

    def remove_tombstones(self, gone_before: float) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM tasks WHERE gone IS NOT NULL AND coalesce(gone_at, kept_since) < ?",
                (gone_before,),
            )

    def _ids(self, condition: str, value: float) -> list[str]:
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM tasks WHERE gone IS NULL"
                f" AND status IN ('done', 'failed', 'cancelled') AND {condition}",
                (value,),
            ).fetchall()
        return self._still_there(rows)

    def _still_there(self, rows: Sequence[Row]) -> list[str]:
        return [row["task_id"] for row in rows if row["task_id"] not in self._unwritten.removed]

    # -- inside ---------------------------------------------------------------------------------

    def _move(self, task: Task, to: TaskStatus, assignments: str, **values: Any) -> bool:
        """The one statement that changes a status; returns whether this call changed it."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                f"UPDATE tasks SET status = :to, {assignments}"
                " WHERE task_id = :task_id AND status = :was AND attempt = :attempt",
                {
                    "task_id": task.task_id,
                    "was": task.status,
                    "attempt": task.attempt,
                    "to": to,
                    **values,
                },
            )
            return cursor.rowcount == 1

    def _remove_strays(self) -> None:
        """After a crash: files without a record, and records without their files."""
        files = self._files.names()
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id, status, image_sizes, measured FROM tasks WHERE gone IS NULL"
                " AND (image_sizes IS NOT NULL OR status IN ('waiting', 'running'))"
            ).fetchall()
        known = set()
        for row in rows:
            sizes = image_sizes(row)
            names = [image_name(row["task_id"], index) for index in range(len(sizes))]
            stored = list(takewhile(files.__contains__, names))
            known.update(stored)
            if len(stored) == len(names):
                continue
            if row["status"] == TaskStatus.DONE:
                self.drop(row["task_id"], "The image was removed.")
            else:
                _quietly(self._forget_images, row, len(stored))
        for name in files - known:
            _quietly(self._files.remove_image, name)
        self._files.keep_inputs_of(row["task_id"] for row in rows if row["status"] in UNFINISHED)

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


def _quietly(change: Callable[..., None], *arguments: object) -> None:
    with suppress(StorageUnavailable):
        change(*arguments)
