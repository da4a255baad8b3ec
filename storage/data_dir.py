"""The data dir: its lock (one server at a time) and its access rights (only its user)."""

import errno
import fcntl
import logging
import os
import re
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path

from errors import StoreError

log = logging.getLogger(__name__)

WORKER_INPUTS = "worker-inputs"
"""Name of the folder with input pictures of tasks that a worker draws for another machine."""
OWN_NAMES = {
    "images",
    "inputs",
    "lock",
    "downloads",
    "tiny-models",
    "weights",
    "secret",
    "worker-id",
    WORKER_INPUTS,
}
SECRET_BYTES = 32
DATABASE = "tasks.sqlite3"
NO_LOCKS_HERE = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of network file systems that cannot lock a folder."""


def own(data_dir: Path) -> ExitStack:
    """Create the data dir if it is missing, and lock it for this process.

    Two locks: on the folder, which also works where no file can be created, and on a file in it,
    which earlier versions lock too. They end with the process.

    Returns:
        What gives the locks back when it is closed.

    Raises:
        OSError: the folder cannot be created.
        StoreError: another server uses it.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as locks:
        _lock(data_dir, os.open(data_dir, os.O_RDONLY), locks)
        try:
            file = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            log.warning("no lock file can be created in %s: %s", data_dir, error.strerror)
        else:
            _lock(data_dir, file, locks)
        return locks.pop_all()


def secret_of(data_dir: Path) -> bytes:
    """The random bytes of this data dir, made at the first start; on a disk that refuses, those of
    this process."""
    path = data_dir / "secret"
    with suppress(OSError):
        if len(secret := path.read_bytes()) == SECRET_BYTES:
            return secret
    secret = secrets.token_bytes(SECRET_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.warning("the secret of the data dir cannot be kept: %s", error.strerror)
    return secret


def worker_id_of(data_dir: Path) -> str:
    """The id of the worker of this data dir, made at the first start."""
    path = data_dir / "worker-id"
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{32}", found := path.read_text(encoding="ascii").strip()):
            return found
    made = secrets.token_hex(16)
    path.write_text(made + "\n", encoding="ascii")
    return made


def _lock(data_dir: Path, descriptor: int, locks: ExitStack) -> None:
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(
            f"Another server uses the data dir {data_dir}: stop it, or choose another --data-dir."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise


def tighten(data_dir: Path) -> None:
    """Remove the access of other users: the server's folders get the mode 0700 and its files 0600,
    as far as the disk allows. A folder that also contains other files keeps its own mode."""
    entries = list(data_dir.iterdir())
    ours = [path for path in entries if path.name in OWN_NAMES or path.name.startswith(DATABASE)]
    refused = None
    for path in [*ours, *_below(data_dir / "images"), *_below(data_dir / "inputs")]:
        refused = _tighten_one(path) or refused
    if len(ours) == len(entries):
        refused = _tighten_one(data_dir) or refused
    elif data_dir.stat().st_mode & 0o077:
        log.warning(
            "the data dir %s holds other things too, so its own access rights stay: other users "
            "may list it",
            data_dir,
        )
    if refused is not None:
        log.warning("other users may be able to read the data dir %s: %s", data_dir, refused)


def _below(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return list(folder.rglob("*"))


def _tighten_one(path: Path) -> OSError | None:
    """Returns why it cannot be done."""
    try:
        found = path.lstat()
        mode = found.st_mode & (0o700 if path.is_dir() else 0o600)
        if found.st_mode & 0o077 and not path.is_symlink():
            path.chmod(mode)
    except OSError as error:
        return error
    return None
