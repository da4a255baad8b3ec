"""The files of a TaskStore: finished images, and the pictures that tasks start from.

Files are written beside, synced, then renamed: complete or not there. Files and not blobs, because
deleting one gives its space back at once and needs none, even on a full disk.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from errors import StorageUnavailable


class FileStore:
    """Every method but the constructor raises StorageUnavailable when the disk refuses."""

    def __init__(self, data_dir: Path) -> None:
        """Raises OSError: the folder cannot be used."""
        self.refused_bytes = 0
        """Size of the image that the disk refused last."""
        self._images = data_dir / "images"
        self._inputs = data_dir / "inputs"
        self._input_bytes: dict[str, int] = {}
        """By task: what its input pictures take, or may take soon."""
        self._input_lock = Lock()
        self._images.mkdir(exist_ok=True)
        self._inputs.mkdir(exist_ok=True)

    def write_images(self, task_id: str, images: Sequence[bytes]) -> None:
        for index, image in enumerate(images):
            self.write_image(image_name(task_id, index), image)

    def write_image(self, name: str, image: bytes) -> None:
        draft = self._images / f"{name}.part"
        try:
            with draft.open("wb") as file:
                file.write(image)
                file.flush()
                _flush_to_disk(file.fileno())
            draft.rename(self._images / name)
            _sync_folder(self._images)
        except OSError as error:
            self.refused_bytes = len(image)
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise StorageUnavailable(f"The image cannot be written: {error.strerror}.") from error

    def read_image(self, task_id: str, index: int) -> bytes | None:
        try:
            return (self._images / image_name(task_id, index)).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageUnavailable(f"The image cannot be read: {error.strerror}.") from error

    def remove_images(self, task_id: str, count: int) -> None:
        for index in range(count):
            self.remove_image(image_name(task_id, index))

    def remove_image(self, name: str) -> None:
        try:
            (self._images / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"The image cannot be removed: {error.strerror}.") from error

    def inputs_of(self, task_id: str) -> Path:
        """The folder with the pictures that a task starts from, if there are any."""
        return self._inputs / task_id

    def reserve_inputs(self, task_id: str, size_bytes: int, limit_bytes: int) -> bool:
        """Count input pictures that will be written; returns False if those of all tasks would
        exceed the limit. remove_inputs() frees the space."""
        with self._input_lock:
            if sum(self._input_bytes.values()) + size_bytes > limit_bytes:
                return False
            self._input_bytes[task_id] = size_bytes
            return True

    def write_inputs(self, task_id: str, inputs: Mapping[str, bytes]) -> None:
        folder = self.inputs_of(task_id)
        try:
            folder.mkdir()
            for name, png in inputs.items():
                with (folder / f"{name}.png").open("wb") as file:
                    file.write(png)
                    file.flush()
                    _flush_to_disk(file.fileno())
            _sync_folder(folder)
            _sync_folder(self._inputs)
        except OSError as error:
            raise StorageUnavailable(f"The pictures cannot be kept: {error.strerror}.") from error

    def remove_inputs(self, task_id: str) -> None:
        try:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.inputs_of(task_id))
            with self._input_lock:
                self._input_bytes.pop(task_id, None)
        except OSError as error:
            raise StorageUnavailable(
                f"The pictures cannot be removed: {error.strerror}."
            ) from error

    def names(self) -> set[str]:
        """Of all image files, whatever they are."""
        return {path.name for path in self._images.iterdir()}

    def keep_inputs_of(self, task_ids: Iterable[str]) -> None:
        """Remove those of all other tasks."""
        known = set(task_ids)
        for path in self._inputs.iterdir():
            if path.is_symlink() or not path.is_dir():
                path.unlink()  # nothing of ours
            elif path.name not in known:
                shutil.rmtree(path)
            else:
                self._input_bytes[path.name] = sum(file.stat().st_size for file in path.iterdir())

    def probe(self) -> None:
        """Write something, of the size of the image refused last: raises while the disk refuses."""
        self.write_image("probe", bytes(self.refused_bytes or 1))
        self.remove_image("probe")
        self.refused_bytes = 0


def image_name(task_id: str, index: int) -> str:
    """Of an image's file; the first one has the name that it had when a task had just one."""
    return f"{task_id}.{index}" if index else task_id


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
