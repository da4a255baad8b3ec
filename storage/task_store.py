"""The disk: tasks, their params and status changes.

Tasks are rows of the database (database.py), and so are what was learned from them about time
(timing_store.py) and who has to be told of their ends (callback_store.py). Images, and the pictures
that tasks start from, are files beside it (file_store.py).

A task whose image was removed, or that was pruned, leaves a row with the reason, so that its id is
answered with 410; these rows go after TOMBSTONE_S.

On a full disk, images can be removed all the same: the file goes first, which needs no room, and
what the database refuses to note is noted later (unwritten.py).
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from errors import StorageUnavailable, StoreError
from storage.callback_store import CallbackStore
from storage.clock_store import ClockStore
from storage.data_dir import DATABASE, own, tighten
from storage.database import DAMAGED, Database, Row
from storage.file_store import PROBE_BYTES, FileStore, image_name
from storage.stored_task import StoredTask, Tombstone, images_of, stored_task
from storage.timing_store import TimingStore
from storage.unwritten import Unwritten
from task import GenerationParams, TaskStatus
from timing_model import Measured, Work

log = logging.getLogger(__name__)

TOMBSTONE_S = 30 * 24 * 3600
END = "ended_at = :ended_at, kept_since = :kept_since"


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
        """Whether the disk looks as if it took every change, without writing anything.

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
        self,
        task_id: str,
        params: GenerationParams,
        *,
        urgent: bool,
        created_at: float,
        client_key: str | None = None,
        callback_url: str | None = None,
    ) -> None:
        """Keep a new task, waiting. Raises sqlite3.IntegrityError if the id or key is taken."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO tasks (task_id, client_key, urgent, status, params, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    task_id,
                    client_key,
                    urgent,
                    TaskStatus.WAITING,
                    params.model_dump_json(),
                    created_at,
                ),
            )
            if callback_url is not None:
                self.callbacks.keep(task_id, callback_url)

    def reserve_inputs(self, task_id: str, size_bytes: int, limit_bytes: int) -> bool:
        """Count the pictures that keep_inputs() will write; returns False if those of all tasks
        would exceed the limit. discard_inputs() frees the space."""
        return self._files.reserve_inputs(task_id, size_bytes, limit_bytes)

    def keep_inputs(self, task_id: str, inputs: Mapping[str, bytes]) -> None:
        """The pictures that a task starts from, before it is inserted: PNG bytes by
        InputImage.file. Those of tasks that never were go with the next start."""
        with ExitStack() as unless_kept:
            unless_kept.callback(_quietly, self._files.remove_inputs, task_id)
            self._files.write_inputs(task_id, inputs)
            unless_kept.pop_all()

    def discard_inputs(self, task_id: str) -> None:
        """They are of no use any more; what cannot be removed now goes with the next start."""
        _quietly(self._files.remove_inputs, task_id)

    def find(self, task_id: str) -> StoredTask | Tombstone | None:
        """A task, or why it is gone, or None if it was never known."""
        if removed := self._unwritten.removed.get(task_id):
            return Tombstone(removed.reason)
        with self._database.reading() as connection:
            row = connection.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        if row is None:
            return None
        if row["gone"]:
            return Tombstone(row["gone"])
        try:
            return stored_task(row)
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

    def unfinished(self) -> list[StoredTask]:
        """Tasks that wait or ran when the process ended, in the order in which they run."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM tasks WHERE status IN ('waiting', 'running')"
                " ORDER BY urgent DESC, number"
            ).fetchall()
        tasks = []
        for row in rows:
            try:
                tasks.append(stored_task(row))
            except DAMAGED:
                log.error("the record of task %s is damaged and left alone", row["task_id"])
        return tasks

    def claim(self, task_id: str, *, started_at: float) -> bool:
        """The one change that is not synced, for the GPU waits for it: it survives kill -9, and
        without it, after a power cut, the task still waits, which is as good."""
        with self._database.unsynced():
            return self._move(
                task_id,
                TaskStatus.WAITING,
                TaskStatus.RUNNING,
                "attempts = attempts + 1, started_at = :started_at",
                started_at=started_at,
            )

    def release(self, task_id: str, *, count_attempt: bool) -> bool:
        """A running task waits again; the attempt counts only if it may have been at fault."""
        return self._move(
            task_id,
            TaskStatus.RUNNING,
            TaskStatus.WAITING,
            "attempts = attempts - :back, started_at = NULL",
            back=0 if count_attempt else 1,
        )

    def finish(
        self,
        task_id: str,
        images: Sequence[bytes],
        *,
        ended_at: float,
        kept_since: float | None = None,
        samples: Sequence[tuple[Work, Measured]],
        learns: bool = True,
    ) -> bool:
        """Keep the images, then say that the task is done, and keep its timings, one sample for
        each picture that was made.

        Args:
            ended_at: unix seconds.
            kept_since: the same moment in seconds of the KeepClock; None: both clocks agree.
            learns: whether the samples say something of other tasks.
        """
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT status FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone()
        if row is None or row["status"] != TaskStatus.RUNNING:
            return False
        with ExitStack() as unless_done:
            unless_done.callback(_quietly, self._files.remove_images, task_id, len(images))
            self._files.write_images(task_id, images)
            sizes = [len(image) for image in images]
            end = _end(ended_at, kept_since)
            moved = self._finish(task_id, sizes, end, samples, learns)
            if moved:
                unless_done.pop_all()
        return moved

    def _finish(
        self,
        task_id: str,
        image_sizes: list[int],
        end: dict[str, float],
        samples: Sequence[tuple[Work, Measured]],
        learns: bool,
    ) -> bool:
        with self._database.transaction():
            moved = self._move(
                task_id,
                TaskStatus.RUNNING,
                TaskStatus.DONE,
                f"{END}, measured = :measured, image_bytes = :image_bytes,"
                " image_sizes = :image_sizes",
                **end,
                measured=json.dumps([json.loads(measured.to_json()) for _, measured in samples]),
                image_bytes=sum(image_sizes),
                image_sizes=json.dumps(image_sizes),
            )
            if moved and learns:
                self.timings.keep_samples(samples)
        return moved

    def fail(
        self,
        task_id: str,
        was: TaskStatus,
        *,
        code: str,
        message: str,
        ended_at: float,
        kept_since: float | None = None,
    ) -> bool:
        return self._move(
            task_id,
            was,
            TaskStatus.FAILED,
            f"{END}, error_code = :code, error = :message",
            **_end(ended_at, kept_since),
            code=code,
            message=message,
        )

    def cancel(
        self, task_id: str, was: TaskStatus, *, ended_at: float, kept_since: float | None = None
    ) -> bool:
        return self._move(task_id, was, TaskStatus.CANCELLED, END, **_end(ended_at, kept_since))

    def drop(self, task_id: str, reason: str, *, gone_at: float | None = None) -> int:
        """Remove an ended task with its image, leaving the reason; returns the image's bytes.

        The files go first, which makes room. Once they are gone the task is, whatever the database
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
        has_images = row is not None and row["status"] == TaskStatus.DONE
        if has_images:
            self._files.remove_images(task_id, images_of(row))
        _quietly(self._files.remove_inputs, task_id)
        try:
            self._write_drop(task_id, reason, gone_at)
        except StorageUnavailable as error:
            if not has_images:
                raise
            log.warning("that task %s was removed is written later: %s", task_id, error)
            self._unwritten.remove(task_id, reason, gone_at)
        else:
            self._unwritten.fetched.pop(task_id, None)
        return (row and row["image_bytes"]) or 0

    def _write_drop(self, task_id: str, reason: str, gone_at: float | None) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET gone = ?, gone_at = ?, params = NULL, measured = NULL,"
                " image_bytes = NULL, image_sizes = NULL WHERE task_id = ?",
                (reason, gone_at, task_id),
            )
            self.callbacks.end(task_id)

    def mark_fetched(self, task_id: str, fetched_at: float, index: int | None = None) -> bool:
        """An image was sent and shall go (None: all of them); the first time counts. What the
        database refuses is written later.

        Returns:
            Whether all images of the task were fetched now.
        """
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT image_sizes, fetched, fetched_at FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone()
        if row is None:
            return False
        count = images_of(row)
        fetched = set(json.loads(row["fetched"] or "[]"))
        if earlier := self._unwritten.fetched.get(task_id):
            fetched |= earlier.indexes
        fetched |= set(range(count)) if index is None else {index}
        done_at = fetched_at if len(fetched) == count else None
        try:
            self._write_fetched(task_id, fetched, done_at)
        except StorageUnavailable as error:
            log.warning("that task %s was fetched is written later: %s", task_id, error)
            self._unwritten.fetch(task_id, fetched, done_at)
        return done_at is not None

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
                " WHERE status = 'done' AND gone IS NULL"
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
        written = self._ids("status = 'done' AND fetched_at < ?", fetched_at)
        return written + self._unwritten.fetched_before(fetched_at)

    def oldest_images_over(self, keep_bytes: int) -> list[str]:
        """The oldest images that have to go so that the rest fits into keep_bytes; the newest one
        stays in any case."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id FROM (SELECT task_id, sum(image_bytes) OVER"
                " (ORDER BY kept_since DESC, number DESC) AS size FROM tasks"
                " WHERE status = 'done' AND gone IS NULL) WHERE size > ?"
                " AND task_id != (SELECT task_id FROM tasks WHERE status = 'done' AND gone IS NULL"
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

    def _move(
        self, task_id: str, was: TaskStatus, to: TaskStatus, assignments: str, **values: Any
    ) -> bool:
        """The one guarded statement that changes a status; tells whether this call moved it."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                f"UPDATE tasks SET status = :to, {assignments}"
                " WHERE task_id = :task_id AND status = :was",
                {"task_id": task_id, "was": was, "to": to, **values},
            )
            return cursor.rowcount == 1

    def _remove_strays(self) -> None:
        """After a crash: files without a finished task, and finished tasks without their file."""
        files = self._files.names()
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task_id, image_sizes FROM tasks WHERE status = 'done' AND gone IS NULL"
            ).fetchall()
            unfinished = connection.execute(
                "SELECT task_id FROM tasks WHERE status IN ('waiting', 'running')"
            ).fetchall()
        finished = {
            row["task_id"]: {image_name(row["task_id"], index) for index in range(images_of(row))}
            for row in rows
        }
        for name in files.difference(*finished.values()):
            _quietly(self._files.remove_image, name)
        for task_id, names in finished.items():
            if not names <= files:
                self.drop(task_id, "The image was removed.")
        self._files.keep_inputs_of(row["task_id"] for row in unfinished)


def _end(ended_at: float, kept_since: float | None) -> dict[str, float]:
    """The values of END."""
    return {"ended_at": ended_at, "kept_since": ended_at if kept_since is None else kept_since}


def _quietly(change: Callable[..., None], *arguments: object) -> None:
    with suppress(StorageUnavailable):
        change(*arguments)
