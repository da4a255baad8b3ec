"""Backups of a data dir: made while a server uses it, and restored into an empty one.

A backup is a tar file with a snapshot of the database, the images and input images that it names,
and the secret that signs links.
"""

import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from errors import StorageUnavailable, StoreError
from storage.data_dir import DATABASE, own
from storage.database import DAMAGED, Database, write_snapshot
from task import GenerationParams, InputImage

TRIES = 5
NAMES = re.compile(rf"({DATABASE}|secret|images/[\w.-]+|inputs/[\w-]+/[\w.-]+)")
"""Names of the files of a backup."""
UNFINISHED = "SELECT task_id, params FROM tasks WHERE status IN ('waiting', 'running')"


def copy_data(data_dir: Path, *, to: Path | None, source: Path | None) -> int:
    """Does what --backup or --restore asks for; returns the exit code. Raises StoreError."""
    if to:
        back_up(data_dir, to)
        print(f"The tasks and images of {data_dir} are in {to}.")
    elif source:
        restore(data_dir, source)
        print(f"The tasks and images of {source} are in {data_dir}.")
    return 0


def back_up(data_dir: Path, file: Path) -> None:
    """Writes a backup. It is complete or not there.

    Raises:
        StoreError: there is nothing to copy, or the file exists or cannot be written.
    """
    if not (data_dir / DATABASE).is_file():
        raise StoreError(f"There is no database in the data dir {data_dir}.")
    if file.exists():
        raise StoreError(f"{file} exists: name a new file.")
    part = file.with_name(f"{file.name}.part")
    try:
        with (
            TemporaryDirectory(prefix="backup-", dir=data_dir) as made,
            open(part, "wb", opener=_private) as written,
        ):
            _collect(data_dir, Path(made))
            with tarfile.open(fileobj=written, mode="w") as archive:
                for path in _files(Path(made)):
                    archive.add(path, path.relative_to(made).as_posix())
            written.flush()
            os.fsync(written.fileno())
        part.rename(file)
    except (OSError, StorageUnavailable) as error:
        with suppress(OSError):
            part.unlink()
        raise StoreError(f"The backup cannot be written: {error}") from error


def restore(data_dir: Path, file: Path) -> None:
    """Fills a new data dir from a backup.

    Raises:
        StoreError: the data dir has tasks or is in use; the file is no backup.
    """
    try:
        with ExitStack() as open_until_end:
            open_until_end.push(own(data_dir))
            if any((data_dir / name).exists() for name in (DATABASE, *_filled(data_dir))):
                raise StoreError(f"The data dir {data_dir} has tasks already: name a new folder.")
            unpacked = Path(
                open_until_end.enter_context(TemporaryDirectory(prefix="restore-", dir=data_dir))
            )
            archive = open_until_end.enter_context(tarfile.open(file, "r:"))
            for member in archive:
                if not (member.isreg() and NAMES.fullmatch(member.name)):
                    raise StoreError(f"{file} is no backup: it contains {member.name[:100]!r}.")
                archive.extract(member, unpacked, filter="data")
            Database(unpacked / DATABASE).close()  # refuses what is damaged or too new
            for name in {path.name for path in unpacked.iterdir()} - {DATABASE}:
                (unpacked / name).rename(data_dir / name)
            (unpacked / DATABASE).rename(data_dir / DATABASE)
    except (OSError, tarfile.TarError, StorageUnavailable) as error:
        raise StoreError(f"{file} cannot be restored: {error}") from error


def _collect(data_dir: Path, made: Path) -> None:
    """Put a consistent copy into a folder. Raises OSError, StorageUnavailable.

    Files are never changed, so links to them are copies. They are linked before the snapshot,
    because the server may remove some, and after it, because it may add some. An ended task whose
    image is missing was removed meanwhile; the next start drops it.
    """
    for _ in range(TRIES):
        _link_files(data_dir, made)
        (made / DATABASE).unlink(missing_ok=True)
        write_snapshot(data_dir / DATABASE, made / DATABASE)
        _link_files(data_dir, made)
        if not any(not path.is_file() for path in _inputs_of_unfinished(made)):
            return
    raise StorageUnavailable("the queue changes too fast: try again.")


def _link_files(data_dir: Path, made: Path) -> None:
    for path in [*_files(data_dir / "images"), *_files(data_dir / "inputs"), data_dir / "secret"]:
        target = made / path.relative_to(data_dir)
        if target.exists() or path.suffix == ".part":
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            _link(path, target)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(path, target)


def _inputs_of_unfinished(made: Path) -> Iterator[Path]:
    database = Database(made / DATABASE)
    try:
        with database.reading() as connection:
            rows = connection.execute(UNFINISHED).fetchall()
    finally:
        database.close()
    for row in rows:
        with suppress(*DAMAGED):  # the next start drops this record
            params = GenerationParams.model_validate_json(row["params"])
            for picture in _pictures([getattr(params, name) for name in type(params).model_fields]):
                yield made / "inputs" / row["task_id"] / f"{picture.file}.png"


def _pictures(value: object) -> Iterator[InputImage]:
    if isinstance(value, InputImage):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _pictures(part)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _filled(data_dir: Path) -> list[str]:
    return [name for name in ("images", "inputs") if _files(data_dir / name)]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
