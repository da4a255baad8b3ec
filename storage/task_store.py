"""Tasks on disk: their params and status changes.

Tasks are rows of the database (database.py), and so are measured durations (timing_store.py) and
pending callbacks (callback_store.py). Images and input images are files beside it (file_store.py).

What becomes of tasks that have ended is in ended_tasks.py.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from errors import StorageUnavailable, StoreError
from storage.callback_store import CallbackStore
from storage.data_dir import DATABASE, own, tighten
from storage.database import DAMAGED, Database
from storage.ended_tasks import End, EndedTasks
from storage.file_store import PROBE_BYTES, FileStore, image_name
from storage.state_store import StateStore
from storage.task_rows import END, FETCHED_AT_END, Tombstone, task_of
from storage.timing_store import TimingStore
from storage.usage_store import UsageStore
from task import GenerationParams, Task, TaskStatus
from timing_model import LOCAL, Measured, Work

log = logging.getLogger(__name__)


class TaskStore:
    """Any thread may call; each method is one transaction.

    Every method but the constructor raises StorageUnavailable when the disk refuses (full,
    read-only, damaged); then nothing has changed.
    """

    def __init__(self, data_dir: Path | None) -> None:
        """Open or create the store.

        Args:
            data_dir: folder that holds everything; None: in memory, for measuring, and images in
                a temporary folder that close() removes.

        Raises:
            StoreError: the folder cannot be used, is used by another server, or holds a database
                that is damaged or was written by a newer version. A folder that can be read and
                not written to can be used: probe() then raises.
        """
        self._open = ExitStack()
        with ExitStack() as opened:
            try:
                if data_dir:
                    opened.push(own(data_dir))
                    path = data_dir / DATABASE
                else:
                    folder = opened.enter_context(TemporaryDirectory(prefix="mflux-server-"))
                    path, data_dir = None, Path(folder)
                self._data_dir = data_dir
                self._files = FileStore(data_dir)
                self._database = Database(path)
                opened.callback(self._database.close)
                tighten(data_dir)
                self.timings = TimingStore(self._database)
                self.callbacks = CallbackStore(self._database)
                self.state = StateStore(self._database)
                self.usage = UsageStore(self._database)
                self.ended = EndedTasks(self._database, self._files, self.callbacks)
                self.ended.remove_strays()
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
        self.ended.settle()

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
            and not self.ended.unwritten
        )

    # -- tasks ----------------------------------------------------------------------------------

    def insert(
        self, task: Task, *, client_key: str | None = None, callback_url: str | None = None
    ) -> None:
        """Store a new task, waiting. Raises sqlite3.IntegrityError if the id or key is taken."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO tasks (task_id, client_key, priority, status, params, created_at,"
                " owner, end_user, weight, sequence, group_sequence, start_by)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    task.task_id,
                    client_key,
                    task.priority,
                    TaskStatus.WAITING,
                    task.params.model_dump_json(),
                    task.created_at,
                    *task.owner,
                    task.sequence,
                    task.group,
                    task.start_by,
                ),
            )
            if callback_url is not None:
                self.callbacks.keep(task.task_id, callback_url)

    def reserve_inputs(self, task_id: str, size_bytes: int, limit_bytes: int) -> bool:
        """Count the pictures that keep_inputs() will write. False: all would exceed the limit."""
        return self._files.reserve_inputs(task_id, size_bytes, limit_bytes)

    def keep_inputs(self, task_id: str, inputs: Mapping[str, bytes]) -> None:
        """Store the input images of a task, before it is inserted: PNG bytes by InputImage.file.
        Those of tasks that were not inserted are removed at the next start."""
        with ExitStack() as unless_kept:
            unless_kept.callback(self._files.discard_inputs, task_id)
            self._files.write_inputs(task_id, inputs)
            unless_kept.pop_all()

    def discard_inputs(self, task_id: str, *, spare: bool = True) -> None:
        """As FileStore.discard_inputs()."""
        self._files.discard_inputs(task_id, spare=spare)

    def spare_inputs(self, task_id: str) -> None:
        self._files.spare_inputs(task_id)

    def reuse_inputs(self, task_id: str) -> bool:
        return self._files.reuse_inputs(task_id)

    def find(self, task_id: str) -> Task | Tombstone | None:
        """Returns a task, or why it was removed, or None if it is unknown."""
        removed = self.ended.unwritten.removed.get(task_id)
        with self._database.reading() as connection:
            row = connection.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        if row is None:
            return None
        if removed or row["gone"]:
            return Tombstone(removed.reason if removed else row["gone"], row["owner"])
        try:
            return task_of(row)
        except DAMAGED:
            log.error("the record of task %s is damaged", task_id)
            return Tombstone("The record of the task is damaged.", row["owner"])

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

    def rewrite(self, task: Task, params: GenerationParams) -> bool:
        """A waiting task has other params."""
        text = params.model_dump_json()
        return self._move(task, TaskStatus.WAITING, "params = :params", params=text)

    def claim(self, task: Task, *, started_at: float, machine: str = LOCAL) -> bool:
        """A waiting task is running now, on this machine. The one change that is not synced,
        because the GPU waits for it: after a power cut the task is still waiting."""
        return self._move(
            task,
            TaskStatus.RUNNING,
            "attempt = attempt + 1, started_at = :started_at, machine = :machine",
            synced=False,
            started_at=started_at,
            machine=machine,
        )

    def release(self, task: Task, *, interrupted: bool, run: End | None = None) -> bool:
        """A running task waits again.

        Args:
            interrupted: the worker or the server died meanwhile.
            run: the end of its run; None: it was that of an earlier process.
        """
        with self._database.transaction():
            released = self._move(
                task,
                TaskStatus.WAITING,
                "interruptions = interruptions + :interrupted, started_at = NULL",
                interrupted=int(interrupted),
            )
            if released and run:
                self.usage.add(task.owner.name, run.gpu_s, run.ended_at, run.machine)
        return released

    def forgive(self, task: Task) -> bool:
        """An interruption was no death. Returns whether the task has not ended since."""
        return self._move(task, task.status, "interruptions = MAX(interruptions - 1, 0)")

    def retry(self, task: Task, interruptions: int) -> bool:
        """A failed task waits again, with so many interruptions; it has its images, and no pin."""
        return self._move(
            task,
            TaskStatus.WAITING,
            "error_code = NULL, error = NULL, started_at = NULL, ended_at = NULL,"
            " kept = 0, kept_since = NULL, fetched_at = NULL, last_image = NULL, start_by = NULL,"
            " interruptions = :interruptions, retried_after = attempt, sequence = :sequence,"
            " group_sequence = :group",
            interruptions=interruptions,
            sequence=task.sequence,
            group=task.group,
        )

    def reorder(self, task_id: str, *, sequence: int, group: int) -> None:
        """A waiting task gets another place (policy.key)."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE tasks SET sequence = ?, group_sequence = ? WHERE task_id = ?",
                (sequence, group, task_id),
            )

    def add_image(
        self,
        task: Task,
        image: bytes,
        measured: Sequence[Measured],
        *,
        samples: Sequence[tuple[Work, Measured]],
        end: End | None,
        machine: str = LOCAL,
    ) -> bool:
        """Store the next image of a running task, and what was measured.

        Args:
            task: as it was claimed; its images are those stored before.
            measured: seconds that each stage of the image took.
            samples: what is learned from.
            end: the task is done with this image, at this moment; None: it continues.
            machine: where it was drawn.

        Returns:
            False, and nothing has changed: it was cancelled, or this attempt is not the latest.
        """
        name = image_name(task.task_id, task.images_done)
        with self._files.draft(f"{name}.attempt{task.attempt}", image) as draft:
            keep = partial(self.timings.keep_samples, samples, machine)
            return self._add_image(task, draft, len(image), measured, keep, end=end)

    def _add_image(
        self,
        task: Task,
        draft: Path,
        image_bytes: int,
        measured: Sequence[Measured],
        keep_samples: Callable[[], None],
        *,
        end: End | None,
    ) -> bool:
        name = image_name(task.task_id, task.images_done)
        sizes = (*task.image_sizes, image_bytes)
        all_measured = [*task.measured, *measured]
        # The lock is held until the file of a change that failed is removed: another attempt may
        # store an image under the same name.
        with self._database.exclusive(), ExitStack() as unless_stored:
            with self._database.transaction():
                stored = self._end(
                    task,
                    TaskStatus.DONE if end else TaskStatus.RUNNING,
                    "measured = :measured, image_bytes = :image_bytes, image_sizes = :image_sizes",
                    end,
                    measured=json.dumps([vars(each) for each in all_measured]),
                    image_bytes=sum(sizes),
                    image_sizes=json.dumps(sizes),
                )
                if stored:
                    unless_stored.callback(self._files.discard_image, name)
                    self._files.keep_draft(draft, name)
                    keep_samples()
            unless_stored.pop_all()
        return stored

    def cancel_after(self, task: Task, index: int) -> bool:
        """Note on disk that a running task is to be cancelled after the image of this index. False,
        and nothing has changed: the image is stored already, or the task no longer runs."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "UPDATE tasks SET last_image = :index WHERE task_id = :task_id"
                " AND status = 'running' AND attempt = :attempt"
                " AND coalesce(json_array_length(image_sizes), 0) <= :index",
                {"task_id": task.task_id, "attempt": task.attempt, "index": index},
            )
            return cursor.rowcount == 1

    def fail(self, task: Task, end: End, *, code: str, message: str) -> bool:
        return self._end_early(task, TaskStatus.FAILED, end, code, message)

    def cancel(
        self, task: Task, end: End, *, code: str | None = None, reason: str | None = None
    ) -> bool:
        """`code` and `reason` say why, if its client has not asked for it."""
        return self._end_early(task, TaskStatus.CANCELLED, end, code, reason)

    # -- files ------------------------------------------------------------------------------------

    def read_image(self, task_id: str, index: int = 0) -> bytes | None:
        return self._files.read_image(task_id, index)

    def inputs_of(self, task_id: str) -> Path:
        """Returns the folder with the input images of a task."""
        return self._files.inputs_of(task_id)

    # -- private ---------------------------------------------------------------------------------

    def _end_early(
        self, task: Task, to: TaskStatus, end: End, code: str | None, message: str | None
    ) -> bool:
        why = f"{FETCHED_AT_END}, error_code = :code, error = :message"
        return self._end(task, to, why, end, code=code, message=message)

    def _end(
        self, task: Task, to: TaskStatus, assignments: str, end: End | None, **values: Any
    ) -> bool:
        """A task ends (end None: it goes on): its client has used the GPU."""
        times = vars(end) if end else {"ended_at": None, "kept_since": None}
        with self._database.transaction():
            moved = self._move(task, to, f"{END}, {assignments}", **times, **values)
            if moved and end:
                self.usage.add(task.owner.name, end.gpu_s, end.ended_at, end.machine)
        return moved

    def _move(
        self, task: Task, to: TaskStatus, assignments: str, *, synced: bool = True, **values: Any
    ) -> bool:
        """The one statement that changes a status. Returns whether this call changed it."""
        with self._database.transaction(synced=synced) as connection:
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
