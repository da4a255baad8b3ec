"""The SQLite database of a data dir: its schema, its transactions, and how it refuses.

It is in WAL mode with synchronous=FULL: a change is on disk when its transaction has ended, so what
a client was told survives kill -9 and, as far as fsync tells the truth, a power cut (on macOS with
fullfsync, which alone makes the drive write). That costs about half a millisecond a change on an
SSD; pictures take seconds.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from errors import StorageUnavailable, StoreError

Row = sqlite3.Row
DAMAGED = (ValueError, TypeError)
"""What reading a damaged record raises."""

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
    """
    ALTER TABLE tasks ADD COLUMN kept_since REAL;  -- when it ended, in seconds of the KeepClock
    UPDATE tasks SET kept_since = ended_at;        -- (like fetched_at, gone_at and due_at)
    DROP INDEX tasks_by_end;
    CREATE INDEX tasks_by_keeping ON tasks (gone, status, kept_since);
    CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL);
    """,
)
"""Script n brings schema version n to n + 1 (PRAGMA user_version)."""


class Database:
    """Any thread may call; whoever reads or changes something keeps the others out meanwhile.

    Every method but the constructor raises StorageUnavailable when SQLite refuses (the disk is
    full, read-only, damaged); then nothing has changed.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or create it.

        Args:
            path: of the file; None: in memory, for measuring.

        Raises:
            StorageUnavailable: it cannot be opened, or is damaged.
            StoreError: it was written by a newer version.
        """
        self._lock = RLock()
        try:
            self.connection = sqlite3.connect(
                path or ":memory:", check_same_thread=False, isolation_level=None
            )
            try:
                self.connection.row_factory = Row
                self._set_up()
            except BaseException:
                self.connection.close()
                raise
        except sqlite3.Error as error:
            raise StorageUnavailable(str(error)) from error

    def close(self) -> None:
        with self._lock:
            self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is changed inside, or nothing; one inside another one is part of that."""
        with self.reading() as connection:
            if connection.in_transaction:  # inside another one, which commits
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self.connection
            except sqlite3.IntegrityError:
                raise
            except (sqlite3.Error, UnicodeDecodeError) as error:
                # What could not be decoded is quoted: it may hold a prompt.
                reason = str(error).split(" with text ")[0]
                raise StorageUnavailable(f"The task database refuses: {reason}.") from error

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        """A transaction inside does not wait for the disk: it survives kill -9, but perhaps not a
        power cut."""
        with self.reading() as connection:
            connection.execute("PRAGMA synchronous = NORMAL")
            try:
                yield
            finally:
                connection.execute("PRAGMA synchronous = FULL")

    def probe(self) -> None:
        """Write something, and take it out again."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES ('', 0)")
            connection.execute("DELETE FROM loads WHERE model = ''")

    def _set_up(self) -> None:
        connection = self.connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute("PRAGMA checkpoint_fullfsync = ON")
        damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            damage = " ".join(damage.split())
            raise sqlite3.DatabaseError(f"tasks.sqlite3 is damaged ({damage}): move it away")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"tasks.sqlite3 has schema version {version}, this server knows up to "
                f"{len(MIGRATIONS)}: it was written by a newer version. Update the server, or "
                "choose another --data-dir."
            )
        for number in range(version, len(MIGRATIONS)):
            script = MIGRATIONS[number]
            connection.executescript(
                f"BEGIN; {script}; PRAGMA user_version = {number + 1}; COMMIT;"
            )
