"""The SQLite database of a data dir: its transactions and its errors. schema.py has its tables.

It is in WAL mode with synchronous=FULL: a change is on disk when its transaction has ended, so what
a client was answered survives kill -9 and, if fsync works as specified, a power cut (on macOS with
fullfsync, which alone makes the drive write). That costs about half a millisecond a change on an
SSD; pictures take seconds.

Two connections: one writes, the other one only reads. A read waits for no fsync and for no lock
that another process holds.

Where the disk is full or read-only at the start, SQLite cannot open a database in WAL mode. It is
then read into memory, and each transaction tries first to open it on disk.
"""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import RLock

from errors import StorageUnavailable, StoreError
from storage.schema import MIGRATIONS, SCHEMA

log = logging.getLogger(__name__)

Row = sqlite3.Row
DAMAGED = (ValueError, TypeError)
"""Exceptions that reading a damaged record raises."""
BUSY_S = 1.0
"""Seconds that a change waits for a lock of another process."""
REFUSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
"""Temporary errors of the disk; all others mean that the database is damaged."""


class Database:
    """Any thread may call; changes exclude each other, and reads exclude each other.

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
        self._path = path
        self._closed = False
        self._write_lock = RLock()
        self._read_lock = RLock() if path else self._write_lock
        self._synced = True
        """Whether a transaction waits for the disk, as the connection is set now."""
        self.in_memory_because: str | None = None
        """Why the database on disk could only be read into memory; None: it is open on disk."""
        try:
            self._open()
        except sqlite3.Error as error:
            if not _is_refusal(error) or path is None:
                raise StorageUnavailable(str(error)) from error
            self._open_copy(path, error)

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._closed = True
            self.connection.close()
            self._reader.close()

    @contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction: all changes or none. An inner one is part of the outer one.

        Args:
            synced: wait for the disk; else the changes survive kill -9, but perhaps not a power
                cut.
        """
        with self._write_lock, _refusals():
            if self.in_memory_because and not self._closed:
                self._open_on_disk()
            connection = self.connection
            if connection.in_transaction:  # inside another one, which commits
                yield connection
                return
            if synced != self._synced:
                connection.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
                self._synced = synced
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                self.check_place()
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Excludes changes by other threads."""
        with self._write_lock:
            yield

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Reads committed data. Not to be used inside a transaction."""
        with self._read_lock, _refusals():
            yield self._reader

    def probe(self) -> None:
        """Writes something and removes it again."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES ('', 0, '')")
            connection.execute("DELETE FROM loads WHERE model = ''")

    def check_place(self) -> None:
        """Raise StorageUnavailable unless the open file is the one that has the path. SQLite goes
        on writing to a file that was removed, and what it writes there is lost."""
        if self._path is not None and _identity(self._path) != self._identity:
            raise StorageUnavailable(
                "The data dir was removed or replaced while the server ran: put it back, or "
                "restart the server."
            )

    # -- private -----------------------------------------------------------------------------------

    def _open(self) -> None:
        """Raises sqlite3.Error, StoreError."""
        self._synced = True
        if self._path is None:
            self.connection = self._reader = _connect(":memory:")
            _set_up(self.connection)
            return
        with suppress(OSError):  # SQLite says better why; -wal and -shm get the same mode
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = _connect(str(self._path))
        try:
            _set_up(connection)
            reader = _connect(str(self._path))
        except BaseException:
            connection.close()
            raise
        reader.execute("PRAGMA query_only = ON")
        self.connection, self._reader = connection, reader
        self._identity = _identity(self._path)

    def _open_copy(self, path: Path, refusal: sqlite3.Error) -> None:
        """Read the database on disk into memory.

        Raises:
            StorageUnavailable: it cannot even be read.
            StoreError: it was written by a newer version.
        """
        try:
            copy = _copy_of(path)
            try:
                _set_up(copy)
            except BaseException:
                copy.close()
                raise
        except sqlite3.Error as error:
            raise StorageUnavailable(str(refusal)) from error
        self.connection = self._reader = copy
        self._identity = _identity(path)
        self.in_memory_because = str(refusal)

    def _open_on_disk(self) -> None:
        """Replace the copy in memory, which has not changed. Raises sqlite3.Error."""
        with self._read_lock:
            copy = self.connection
            self._open()
            self.in_memory_because = None
            copy.close()


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # What could not be decoded is quoted: it may contain a prompt.
        reason = str(error).split(" with text ")[0]
        raise StorageUnavailable(f"The task database refuses: {reason}.") from error


def _is_refusal(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in REFUSING


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns device and inode of a file; None: there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(
        name, timeout=BUSY_S, check_same_thread=False, isolation_level=None, uri=uri
    )
    connection.row_factory = Row
    connection.execute("PRAGMA temp_store = MEMORY")  # the temp dir may be full
    return connection


def write_snapshot(path: Path, target: Path) -> None:
    """Copies a database that may be in use, as it is at one moment. Raises StorageUnavailable."""
    with _refusals(), closing(_copy_of(path)) as copy, closing(_connect(str(target))) as written:
        copy.backup(written)


def _copy_of(path: Path) -> sqlite3.Connection:
    """A copy in memory of a database that is not written to. Raises sqlite3.Error."""
    if not path.is_file() or not path.stat().st_size:
        raise sqlite3.OperationalError("there is no database")
    wal = path.with_name(f"{path.name}-wal")
    ways = ["mode=ro"]
    if not wal.exists() or not wal.stat().st_size:  # else the latest changes would be missing
        ways.append("mode=ro&immutable=1")
    for number, way in enumerate(ways):
        copy = _connect(":memory:")
        try:
            with closing(_connect(f"{path.absolute().as_uri()}?{way}", uri=True)) as source:
                source.backup(copy)
        except sqlite3.Error:
            copy.close()
            if number == len(ways) - 1:
                raise
        else:
            return copy
    raise AssertionError("there is at least one way")


def _set_up(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.Error, StoreError."""
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
    scripts = MIGRATIONS[version:] if version else (SCHEMA,)
    if scripts:
        steps = "\n;\n".join(scripts)
        end = f"PRAGMA user_version = {len(MIGRATIONS)}; COMMIT;"
        connection.executescript(f"BEGIN; {steps}\n; {end}")
