"""The files of a TaskStore: finished images, and the pictures that tasks start from.

Files are written beside, synced, then renamed: complete or not there. Files and not blobs, because
deleting one frees its space at once and needs none, even on a full disk.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from errors import StorageUnavailable

PROBE_BYTES = 1 << 20
"""Free space needed, beyond what was refused, before the disk counts as working."""


class FileStore:
    """Every method but the constructor raises StorageUnavailable when the disk refuses.

    Folders have the mode 0700 and files 0600, whatever the umask is.
    """

    def __init__(self, data_dir: Path) -> None:
        """Raises OSError: a file has the name of one of the folders."""
        self.refused_bytes = 0
        """Size of the largest task's files that the disk has refused since the last probe that
        succeeded."""
        self._images = data_dir / "images"
        self._inputs = data_dir / "inputs"
        self._input_bytes: dict[str, int] = {}
        """By task: bytes of its input images, also of those that are about to be written."""
        self._spare: dict[str, None] = {}
        """Failed tasks with input images, the one that failed longest ago first."""
        self._input_lock = Lock()
        for folder in (self._images, self._inputs):
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"{folder} is not a folder")
            with suppress(OSError):  # a full or read-only disk; it is tried again when it is needed
                folder.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def draft(self, name: str, image: bytes) -> Iterator[Path]:
        """An image in a file of its own, written and synced. It is removed at the end unless
        keep_draft() took it.

        Args:
            name: of the draft; no other one has it at the same time.
        """
        draft = self._images / f"{name}.part"
        try:
            self._images.mkdir(mode=0o700, exist_ok=True)
            _write(draft, image)
        except OSError as error:
            self._note_refused(len(image))
            self.discard_image(draft.name)
            raise _cannot_write(error) from error
        try:
            yield draft
        finally:
            self.discard_image(draft.name)

    def keep_draft(self, draft: Path, name: str) -> None:
        """A draft becomes the image of this name."""
        try:
            draft.rename(self._images / name)
            _sync_folder(self._images)
        except OSError as error:
            raise _cannot_write(error) from error

    def read_image(self, task_id: str, index: int) -> bytes | None:
        """Returns the bytes of an image; None: there is no such file."""
        try:
            return (self._images / image_name(task_id, index)).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageUnavailable(f"The image cannot be read: {error.strerror}.") from error

    def remove_image(self, name: str) -> None:
        try:
            (self._images / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"The image cannot be removed: {error.strerror}.") from error

    def discard_image(self, name: str) -> None:
        """Remove a file now or, if the disk refuses, at the next start."""
        with suppress(StorageUnavailable):
            self.remove_image(name)

    def inputs_of(self, task_id: str) -> Path:
        """Returns the folder with the input images of a task, or None."""
        return self._inputs / task_id

    def reserve_inputs(self, task_id: str, size_bytes: int, limit_bytes: int) -> bool:
        """Count input pictures that will be written; returns False if those of all tasks would
        exceed the limit. discard_inputs() frees the space. Those of failed tasks make room."""
        with self._input_lock:
            taken = sum(self._input_bytes.values())
            give_way = []
            for spare in self._spare:
                if taken + size_bytes > limit_bytes:
                    give_way.append(spare)
                    taken -= self._input_bytes.get(spare, 0)
            if taken + size_bytes > limit_bytes:
                return False
            for spare in give_way:
                del self._spare[spare]
            self._input_bytes[task_id] = size_bytes
        for spare in give_way:
            self.discard_inputs(spare)
        return True

    def spare_inputs(self, task_id: str) -> None:
        """A task has failed: its input images stay as long as there is room for them."""
        with self._input_lock:
            if task_id in self._input_bytes:
                self._spare[task_id] = None

    def reuse_inputs(self, task_id: str) -> bool:
        """A failed task needs its input images again. Returns whether they are still there."""
        with self._input_lock:
            return self._spare.pop(task_id, 0) is None

    def write_inputs(self, task_id: str, inputs: Mapping[str, bytes]) -> None:
        folder = self.inputs_of(task_id)
        try:
            self._inputs.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700)
            for name, png in inputs.items():
                _write(folder / f"{name}.png", png)
            _sync_folder(folder)
            _sync_folder(self._inputs)
        except OSError as error:
            self._note_refused(sum(map(len, inputs.values())))
            raise StorageUnavailable(f"The pictures cannot be kept: {error.strerror}.") from error

    def discard_inputs(self, task_id: str, *, spare: bool = True) -> None:
        """Remove the input images of a task, now or, if the disk refuses, at the next start.

        Args:
            spare: also those of a task that has failed.
        """
        with self._input_lock:
            if not spare and task_id in self._spare:
                return
            self._spare.pop(task_id, None)
        with suppress(OSError):
            shutil.rmtree(self.inputs_of(task_id))
        with self._input_lock:
            self._input_bytes.pop(task_id, None)

    def names(self) -> set[str]:
        """Returns the names of all files in the folder of images. Raises OSError."""
        return {path.name for path in _entries(self._images)}

    def keep_inputs_of(self, unfinished: Iterable[str], failed: Iterable[str]) -> None:
        """Remove those of all other tasks, as far as the disk allows."""
        spare = dict.fromkeys(failed)
        known = {*unfinished, *spare}
        for path in _entries(self._inputs):
            with suppress(OSError):
                if path.is_symlink() or not path.is_dir():
                    path.unlink()  # not a folder of this server
                elif path.name not in known:
                    shutil.rmtree(path)
                else:
                    files = path.iterdir()
                    self._input_bytes[path.name] = sum(file.stat().st_size for file in files)
        self._spare = {task_id: None for task_id in spare if task_id in self._input_bytes}

    def probe(self) -> None:
        """Write PROBE_BYTES more than what was refused, sync it and remove it."""
        draft = self._images / "probe.part"
        # Random: a file system that compresses needs no space for zeros.
        blocks = [os.urandom(PROBE_BYTES)] * (1 + -(-self.refused_bytes // PROBE_BYTES))
        try:
            self._images.mkdir(mode=0o700, exist_ok=True)
            try:
                _write(draft, *blocks)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StorageUnavailable(
                f"The data dir cannot be written to: {error.strerror}."
            ) from error
        self.refused_bytes = 0

    def _note_refused(self, size: int) -> None:
        self.refused_bytes = max(self.refused_bytes, size)


def image_name(task_id: str, index: int) -> str:
    """Returns the file name of an image. The first one is named by the task id alone."""
    return f"{task_id}.{index}" if index else task_id


def _cannot_write(error: OSError) -> StorageUnavailable:
    return StorageUnavailable(f"The image cannot be written: {error.strerror}.")


def _write(path: Path, *blocks: bytes) -> None:
    """Write a file and sync it. Raises OSError."""
    with open(path, "wb", opener=_private) as file:
        for block in blocks:
            file.write(block)
        file.flush()
        _flush_to_disk(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _entries(folder: Path) -> list[Path]:
    """Raises OSError."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _flush_to_disk(descriptor: int) -> None:
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        os.fsync(descriptor)
    else:  # macOS: fsync alone leaves the data in the drive's cache
        fcntl.fcntl(descriptor, full_sync)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
