"""The disk: tasks, their params and status changes, timing samples and images.

Tasks are rows of one SQLite database in WAL mode with synchronous=FULL: a change is on disk when
its call returns, so what a client was told survives kill -9 and, as far as fsync tells the truth,
a power cut (on macOS with fullfsync, which alone makes the drive write). That costs about half a
millisecond a change on an SSD; pictures take seconds.

Images, and the pictures that tasks start from, are files beside it (file_store.py).

A task whose image was removed, or that was pruned, leaves a row with the reason, so that its id is
answered with 410; these rows go after TOMBSTONE_S.
"""

import fcntl
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from errors import StorageUnavailable, StoreError
from file_store import FileStore, image_name
from task import GenerationParams, TaskStatus
from timing_model import Measured, Outcome, Work

log = logging.getLogger(__name__)

TOMBSTONE_S = 30 * 24 * 3600
DAMAGED = (ValueError, TypeError)
"""What reading a damaged record raises."""
SAMPLES_KEPT = 300
"""Timing samples of each model, and outcomes: as much as the forecast remembers."""

MIGRATIONS = (
    """
    CREATE TABLE tasks (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of submission
        task_id TEXT NOT NULL UNIQUE,
        client_key TEXT UNIQUE,                    -- of an idempotent submit
        urgent INTEGER NOT NULL,
        status TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,       -- claims that were not released
        params TEXT,                               -- JSON; NULL once the task is gone
        created_at REAL NOT NULL,                  -- unix seconds, like all that follow
        started_at REAL,
        ended_at REAL,
        fetched_at REAL,                           -- when its image was sent and shall go
        measured TEXT,                             -- JSON: seconds of each phase
        image_bytes INTEGER,                       -- size of its image file
        error_code TEXT,
        error TEXT,
        gone TEXT                                  -- why there is nothing to see any more
    );
    CREATE INDEX tasks_by_end ON tasks (gone, status, ended_at);
    CREATE TABLE samples (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        work TEXT NOT NULL,                        -- JSON
        measured TEXT NOT NULL                     -- JSON
    );
    CREATE TABLE loads (model TEXT PRIMARY KEY, seconds REAL NOT NULL);
    """,
    """
    ALTER TABLE samples ADD COLUMN model TEXT;     -- the timing key
    UPDATE samples SET model = json_extract(work, '$.model');
    CREATE INDEX samples_by_model ON samples (model, number);
    ALTER TABLE tasks ADD COLUMN gone_at REAL;     -- NULL: as early as it ended
    CREATE TABLE outcomes (                        -- what was forecast at submit, and what came
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        urgent INTEGER NOT NULL,
        forecast_s REAL NOT NULL,
        p90_s REAL NOT NULL,
        actual_s REAL NOT NULL
    );
    """,
    """
    ALTER TABLE tasks ADD COLUMN image_sizes TEXT; -- JSON: bytes of each of its image files
    ALTER TABLE tasks ADD COLUMN fetched TEXT;     -- JSON: which of them were sent and shall go
    """,
    """
    CREATE TABLE callbacks (                       -- who has to be told yet that a task has ended
        task_id TEXT PRIMARY KEY,
        url TEXT NOT NULL,
        tries INTEGER NOT NULL DEFAULT 0,          -- that failed
        due_at REAL NOT NULL DEFAULT 0             -- not before
    );
    """,
)
"""Script n brings schema version n to n + 1 (PRAGMA user_version)."""


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
    measured: tuple[Measured, ...]
    """Of each image."""
    image_sizes: tuple[int, ...]
    """Bytes of each image."""
    error_code: str | None
    error: str | None


@dataclass(frozen=True)
class Callback:
    """Somebody who has to be told that a task has ended."""

    task_id: str
    url: str
    tries: int
    """Those that failed."""
    due_at: float
    """Unix seconds."""


class Tombstone(str):
    """Why a task that once was is gone."""


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
                that is damaged or was written by a newer version.
        """
        self._lock = RLock()
        self._open = ExitStack()
        with ExitStack() as opened:
            try:
                if data_dir:
                    opened.callback(os.close, _own(data_dir))
                    path = str(data_dir / "tasks.sqlite3")
                else:
                    path, data_dir = ":memory:", Path(tempfile.mkdtemp())
                    opened.callback(shutil.rmtree, data_dir)
                self._files = FileStore(data_dir)
                self._database = sqlite3.connect(
                    path, check_same_thread=False, isolation_level=None
                )
                opened.callback(self._database.close)
                self._database.row_factory = sqlite3.Row
                self._set_up()
                self._remove_strays()
            except (sqlite3.Error, OSError, ValueError, StorageUnavailable) as error:
                reason = str(error).removesuffix(".")
                raise StoreError(f"The data dir {data_dir} cannot be used: {reason}.") from error
            self._open = opened.pop_all()

    def close(self) -> None:
        with self._lock:
            self._open.close()

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
        with self._transaction() as database:
            database.execute(
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
                database.execute(
                    "INSERT INTO callbacks (task_id, url) VALUES (?, ?)", (task_id, callback_url)
                )

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
        with self._reading() as database:
            row = database.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        if row is None:
            return None
        if row["gone"]:
            return Tombstone(row["gone"])
        try:
            return _stored(row)
        except DAMAGED:
            log.error("the record of task %s is damaged", task_id)
            return Tombstone("The record of the task is damaged.")

    def find_by_key(self, client_key: str) -> str | None:
        """The id of the task that was submitted with this key."""
        with self._reading() as database:
            row = database.execute(
                "SELECT task_id FROM tasks WHERE client_key = ?", (client_key,)
            ).fetchone()
        return row and str(row["task_id"])

    def unfinished(self) -> list[StoredTask]:
        """Tasks that wait or ran when the process ended, in the order in which they run."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT * FROM tasks WHERE status IN ('waiting', 'running')"
                " ORDER BY urgent DESC, number"
            ).fetchall()
        tasks = []
        for row in rows:
            try:
                tasks.append(_stored(row))
            except DAMAGED:
                log.error("the record of task %s is damaged and left alone", row["task_id"])
        return tasks

    def claim(self, task_id: str, *, started_at: float) -> bool:
        """The one change that is not synced, for the GPU waits for it: it survives kill -9, and
        without it, after a power cut, the task still waits, which is as good."""
        with self._reading() as database:
            database.execute("PRAGMA synchronous = NORMAL")
            try:
                return self._move(
                    task_id,
                    TaskStatus.WAITING,
                    TaskStatus.RUNNING,
                    "attempts = attempts + 1, started_at = :started_at",
                    started_at=started_at,
                )
            finally:
                database.execute("PRAGMA synchronous = FULL")

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
        samples: Sequence[tuple[Work, Measured]],
    ) -> bool:
        """Keep the images, then say that the task is done, and keep its timings, one sample for
        each picture that was made."""
        with self._reading() as database:
            row = database.execute(
                "SELECT status FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone()
        if row is None or row["status"] != TaskStatus.RUNNING:
            return False
        with ExitStack() as unless_done:
            unless_done.callback(_quietly, self._files.remove_images, task_id, len(images))
            self._files.write_images(task_id, images)
            moved = self._finish(task_id, [len(image) for image in images], ended_at, samples)
            if moved:
                unless_done.pop_all()
        return moved

    def _finish(
        self,
        task_id: str,
        image_sizes: list[int],
        ended_at: float,
        samples: Sequence[tuple[Work, Measured]],
    ) -> bool:
        with self._transaction() as database:
            moved = self._move(
                task_id,
                TaskStatus.RUNNING,
                TaskStatus.DONE,
                "ended_at = :ended_at, measured = :measured, image_bytes = :image_bytes,"
                " image_sizes = :image_sizes",
                ended_at=ended_at,
                measured=json.dumps([json.loads(measured.to_json()) for _, measured in samples]),
                image_bytes=sum(image_sizes),
                image_sizes=json.dumps(image_sizes),
            )
            for work, measured in samples if moved else ():
                database.execute(
                    "INSERT INTO samples (model, work, measured) VALUES (?, ?, ?)",
                    (work.model, work.to_json(), measured.to_json()),
                )
            for model in {work.model for work, _ in samples} if moved else ():
                database.execute(
                    "DELETE FROM samples WHERE model = ? AND number <= (SELECT number FROM samples"
                    " WHERE model = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
                    (model, model, SAMPLES_KEPT),
                )
        return moved

    def fail(
        self, task_id: str, was: TaskStatus, *, code: str, message: str, ended_at: float
    ) -> bool:
        return self._move(
            task_id,
            was,
            TaskStatus.FAILED,
            "ended_at = :ended_at, error_code = :code, error = :message",
            ended_at=ended_at,
            code=code,
            message=message,
        )

    def cancel(self, task_id: str, was: TaskStatus, *, ended_at: float) -> bool:
        return self._move(
            task_id, was, TaskStatus.CANCELLED, "ended_at = :ended_at", ended_at=ended_at
        )

    def drop(self, task_id: str, reason: str, *, gone_at: float | None = None) -> int:
        """Remove an ended task with its image, leaving the reason; returns the image's bytes.

        The file goes first: should the process end in between, the next start finds the task
        without its image and drops it.
        """
        with self._reading() as database:
            row = database.execute(
                "SELECT image_bytes, image_sizes FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone()
        self._files.remove_images(task_id, _images_of(row) if row else 1)
        self._files.remove_inputs(task_id)
        with self._transaction() as database:
            database.execute(
                "UPDATE tasks SET gone = ?, gone_at = ?, params = NULL, measured = NULL,"
                " image_bytes = NULL, image_sizes = NULL WHERE task_id = ?",
                (reason, gone_at, task_id),
            )
            database.execute("DELETE FROM callbacks WHERE task_id = ?", (task_id,))
        return (row and row["image_bytes"]) or 0

    def mark_fetched(self, task_id: str, fetched_at: float, index: int | None = None) -> bool:
        """An image was sent and shall go (None: all of them); the first time counts.

        Returns:
            Whether all images of the task were fetched now.
        """
        with self._transaction() as database:
            row = database.execute(
                "SELECT image_sizes, fetched FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone()
            if row is None:
                return False
            count = _images_of(row)
            fetched = set(json.loads(row["fetched"] or "[]"))
            fetched |= set(range(count)) if index is None else {index}
            database.execute(
                "UPDATE tasks SET fetched = ? WHERE task_id = ?",
                (json.dumps(sorted(fetched)), task_id),
            )
            if len(fetched) < count:
                return False
            database.execute(
                "UPDATE tasks SET fetched_at = ? WHERE task_id = ? AND fetched_at IS NULL",
                (fetched_at, task_id),
            )
            return True

    # -- callbacks ------------------------------------------------------------------------------

    def next_callback(self) -> Callback | None:
        """Of the tasks that have ended, the one that is due first."""
        with self._reading() as database:
            row = database.execute(
                "SELECT callbacks.* FROM callbacks JOIN tasks USING (task_id)"
                " WHERE status IN ('done', 'failed', 'cancelled') AND gone IS NULL"
                " ORDER BY due_at LIMIT 1"
            ).fetchone()
        return row and Callback(**row)

    def put_off_callback(self, task_id: str, due_at: float) -> None:
        with self._transaction() as database:
            database.execute(
                "UPDATE callbacks SET tries = tries + 1, due_at = ? WHERE task_id = ?",
                (due_at, task_id),
            )

    def end_callback(self, task_id: str) -> None:
        """It was told, or will not be."""
        with self._transaction() as database:
            database.execute("DELETE FROM callbacks WHERE task_id = ?", (task_id,))

    # -- images ---------------------------------------------------------------------------------

    def read_image(self, task_id: str, index: int = 0) -> bytes | None:
        return self._files.read_image(task_id, index)

    def images(self) -> tuple[int, int]:
        """How many images are kept, and their bytes."""
        with self._reading() as database:
            row = database.execute(
                "SELECT count(*), coalesce(sum(image_bytes), 0) FROM tasks"
                " WHERE status = 'done' AND gone IS NULL"
            ).fetchone()
        return int(row[0]), int(row[1])

    def inputs_of(self, task_id: str) -> Path:
        """The folder with the pictures that a task needs, if it needs any."""
        return self._files.inputs_of(task_id)

    # -- keeping and dropping -------------------------------------------------------------------

    def ended_before(self, ended_at: float) -> list[str]:
        """Ended tasks that are older than this."""
        return self._ids("ended_at < ?", ended_at)

    def fetched_before(self, fetched_at: float) -> list[str]:
        return self._ids("status = 'done' AND fetched_at < ?", fetched_at)

    def oldest_images_over(self, keep_bytes: int) -> list[str]:
        """The oldest images that have to go so that the rest fits into keep_bytes; the newest one
        stays in any case."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT task_id FROM (SELECT task_id, sum(image_bytes) OVER"
                " (ORDER BY ended_at DESC, number DESC) AS size FROM tasks"
                " WHERE status = 'done' AND gone IS NULL) WHERE size > ?"
                " AND task_id != (SELECT task_id FROM tasks WHERE status = 'done' AND gone IS NULL"
                " ORDER BY ended_at DESC, number DESC LIMIT 1)",
                (keep_bytes,),
            ).fetchall()
        return [row["task_id"] for row in rows]

    def remove_tombstones(self, gone_before: float) -> None:
        with self._transaction() as database:
            database.execute(
                "DELETE FROM tasks WHERE gone IS NOT NULL AND coalesce(gone_at, ended_at) < ?",
                (gone_before,),
            )

    def _ids(self, condition: str, value: float) -> list[str]:
        with self._reading() as database:
            rows = database.execute(
                "SELECT task_id FROM tasks WHERE gone IS NULL"
                f" AND status IN ('done', 'failed', 'cancelled') AND {condition}",
                (value,),
            ).fetchall()
        return [row["task_id"] for row in rows]

    # -- timings --------------------------------------------------------------------------------

    def samples(self) -> list[tuple[Work, Measured]]:
        """The latest timing samples, oldest first."""
        with self._reading() as database:
            rows = database.execute("SELECT work, measured FROM samples ORDER BY number").fetchall()
        samples = []
        for row in rows:
            try:
                samples.append((Work.from_json(row["work"]), Measured.from_json(row["measured"])))
            except DAMAGED:
                log.warning("a damaged timing sample is passed over")
        return samples

    def keep_outcome(self, outcome: Outcome) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO outcomes (urgent, forecast_s, p90_s, actual_s) VALUES (?, ?, ?, ?)",
                (outcome.urgent, outcome.forecast_s, outcome.p90_s, outcome.actual_s),
            )
            database.execute(
                "DELETE FROM outcomes WHERE number <= (SELECT max(number) FROM outcomes) - ?",
                (SAMPLES_KEPT,),
            )

    def outcomes(self) -> list[Outcome]:
        """The latest outcomes of forecasts, oldest first."""
        with self._reading() as database:
            rows = database.execute("SELECT * FROM outcomes ORDER BY number").fetchall()
        return [
            Outcome(bool(row["urgent"]), row["forecast_s"], row["p90_s"], row["actual_s"])
            for row in rows
        ]

    def keep_load(self, model: str, seconds: float) -> None:
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO loads VALUES (?, ?)", (model, seconds))

    def loads(self) -> dict[str, float]:
        """Seconds that each model last took to load."""
        with self._reading() as database:
            rows = database.execute("SELECT model, seconds FROM loads").fetchall()
        return {row["model"]: row["seconds"] for row in rows}

    def probe(self) -> None:
        """Write something, of the size of the image refused last: raises while the disk refuses."""
        self._files.probe()
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO loads VALUES ('', 0)")
            database.execute("DELETE FROM loads WHERE model = ''")

    # -- inside ---------------------------------------------------------------------------------

    def _move(
        self, task_id: str, was: TaskStatus, to: TaskStatus, assignments: str, **values: Any
    ) -> bool:
        """The one guarded statement that changes a status; tells whether this call moved it."""
        with self._transaction() as database:
            cursor = database.execute(
                f"UPDATE tasks SET status = :to, {assignments}"
                " WHERE task_id = :task_id AND status = :was",
                {"task_id": task_id, "was": was, "to": to, **values},
            )
            return cursor.rowcount == 1

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as database:
            if database.in_transaction:  # inside another one, which commits
                yield database
                return
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.rollback()
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._database
            except sqlite3.IntegrityError:
                raise
            except (sqlite3.Error, UnicodeDecodeError) as error:
                # What could not be decoded is quoted: it may hold a prompt.
                reason = str(error).split(" with text ")[0]
                raise StorageUnavailable(f"The task database refuses: {reason}.") from error

    def _set_up(self) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA fullfsync = ON")
        database.execute("PRAGMA checkpoint_fullfsync = ON")
        damage = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            damage = " ".join(damage.split())
            raise sqlite3.DatabaseError(f"tasks.sqlite3 is damaged ({damage}): move it away")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"tasks.sqlite3 has schema version {version}, this server knows up to "
                f"{len(MIGRATIONS)}: it was written by a newer version. Update the server, or "
                "choose another --data-dir."
            )
        for number in range(version, len(MIGRATIONS)):
            script = MIGRATIONS[number]
            database.executescript(f"BEGIN; {script}; PRAGMA user_version = {number + 1}; COMMIT;")

    def _remove_strays(self) -> None:
        """After a crash: files without a finished task, and finished tasks without their file."""
        files = self._files.names()
        with self._reading() as database:
            rows = database.execute(
                "SELECT task_id, image_sizes FROM tasks WHERE status = 'done' AND gone IS NULL"
            ).fetchall()
            unfinished = database.execute(
                "SELECT task_id FROM tasks WHERE status IN ('waiting', 'running')"
            ).fetchall()
        finished = {
            row["task_id"]: {image_name(row["task_id"], index) for index in range(_images_of(row))}
            for row in rows
        }
        for name in files.difference(*finished.values()):
            self._files.remove_image(name)
        for task_id, names in finished.items():
            if not names <= files:
                self.drop(task_id, "The image was removed.")
        self._files.keep_inputs_of(row["task_id"] for row in unfinished)


def _own(data_dir: Path) -> int:
    """Lock the data dir for this process; the lock goes with the process, however it ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreError(
            f"Another server uses the data dir {data_dir}: stop it, or choose another --data-dir."
        ) from None
    return lock


def _quietly(change: Callable[..., None], *arguments: object) -> None:
    with suppress(StorageUnavailable):
        change(*arguments)


def _image_sizes(row: sqlite3.Row) -> tuple[int, ...]:
    if row["image_sizes"]:
        return tuple(int(size) for size in json.loads(row["image_sizes"]))
    return (row["image_bytes"],) if row["image_bytes"] is not None else ()


def _images_of(row: sqlite3.Row) -> int:
    """How many; a record from before a task could have several has one."""
    return len(json.loads(row["image_sizes"])) if row["image_sizes"] else 1


def _measured(text: str) -> tuple[Measured, ...]:
    values = json.loads(text)
    return tuple(Measured(**each) for each in (values if isinstance(values, list) else [values]))


def _stored(row: sqlite3.Row) -> StoredTask:
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
