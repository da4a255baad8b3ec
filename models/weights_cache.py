"""Copies of quantized weights in the data dir, saved once and loaded instead of the originals.

A copy belongs to a load spec. Its record, written last, holds a digest of the files that it was
made from (names, sizes, times of change, hashes of the safetensors headers) and the sizes and times
of its own files. A copy whose record does not match is removed. The arrays themselves are not
hashed: reading them would take as long as loading.

Files only; generation/weights_copy.py writes and compares the arrays. One thread at a time may
call, the worker's; `keys` may be read by any.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.hub_cache import source_folders
from models.model_catalog import LoadSpec
from models.weight_files import BadWeightFile, first_bad_file, header_bytes

log = logging.getLogger(__name__)

RECORD = "copy.json"
MIN_FREE_BYTES = 20_000_000_000
"""Free space of the disk that copies leave alone."""
MIN_KEPT_S = 3600.0
"""A copy that was used within this time is not removed for another one: two models that take turns
and do not fit together would else be written again and again."""
MADE_BY = ("mflux", "mlx")


class WeightsCache:
    """Args:
    folder: where the copies are.
    most_bytes: of all copies together; 0: there are none.
    free_bytes: free space of the disk of a folder.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        *,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._free_bytes = free_bytes
        for draft in folder.glob(".*"):  # the process died while it wrote them
            _remove(draft)
        self._trim()
        self.keys = self._keys()
        """Of the load specs that have a copy."""

    def takes(self, spec: LoadSpec) -> bool:
        """Whether a copy of these weights makes loading faster: they are quantized when they are
        loaded, and nothing else is merged into them. mflux does not save what was built with
        options."""
        model = spec.model
        builds_itself = model.tiny and model.path is None
        merged = spec.control_strength is not None or bool(spec.options.in_use)
        return bool(
            self._most_bytes
            and spec.quantize
            and not (model.stored_bits or model.makes or builds_itself or merged)
        )

    def find(self, spec: LoadSpec) -> LoadSpec | None:
        """Returns the same load spec with the copy as its source, None if there is no copy.
        Removes one that is broken, or that was made from other files."""
        if not self.takes(spec):
            return None
        folder = self._folder_of(spec)
        try:
            record = _record(folder)
            if record is None:
                return None
            if record["source"] != _digest(spec) or record["files"] != _files(folder):
                raise ValueError("its files or those that it was made from have changed")
            if bad := first_bad_file(sorted(folder.rglob("*.safetensors"))):
                raise ValueError(f"{bad[0].name} is broken: {bad[1]}")
            os.utime(folder / RECORD)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.info("the saved copy of %s is not used: %s", spec.key, error)
            self.remove(spec)
            return None
        return at_path(spec, folder)

    def has_room(self, spec: LoadSpec, size: int) -> bool:
        """Makes room for a copy of this size. Returns whether there is enough."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = self._free_bytes(self._folder)
        except OSError:
            return False
        sizes = {path: _size(path) for path, one in self._copies() if one["key"] != spec.key}
        in_the_way = sum(sizes.values()) + size - self._most_bytes
        gives_way: list[Path] = []
        for path, taken in sizes.items():
            if in_the_way > 0 and not _is_recent(path):
                gives_way.append(path)
                in_the_way -= taken
        if in_the_way > 0 or free + sum(map(_size, gives_way)) - size < MIN_FREE_BYTES:
            return False
        for path in gives_way:
            self._drop(path)
        return True

    @contextmanager
    def writing(self, spec: LoadSpec) -> Iterator[Path]:
        """A new folder that is the copy of these weights when the block has ended. If it raises,
        the folder is removed."""
        source = _digest(spec)
        folder = self._folder_of(spec)
        draft = folder.with_name(f".{folder.name}")
        _remove(draft)
        try:
            draft.mkdir(parents=True)
            yield draft
            for path in draft.rglob("*"):
                _sync(path)
            if source != _digest(spec):
                raise ValueError("the files of the weights have changed meanwhile")
            record = {"key": spec.key, "source": source, "files": _files(draft)}
            (draft / RECORD).write_text(json.dumps(record))
            _sync(draft / RECORD)
            _remove(folder)
            draft.rename(folder)
            _sync(self._folder)
        finally:
            _remove(draft)
        self.keys |= {spec.key}

    def remove(self, spec: LoadSpec) -> None:
        _remove(self._folder_of(spec))
        self.keys -= {spec.key}

    def prune(self) -> None:
        """Removes the copies used longest ago while the disk has less free space than they leave
        alone: others need it more."""
        for path, record in self._copies():
            try:
                if self._free_bytes(self._folder) >= MIN_FREE_BYTES:
                    return
            except OSError:
                return
            log.info("the disk is nearly full: the saved copy of %s is removed", record["key"])
            self._drop(path)

    def _trim(self) -> None:
        """Removes the copies used longest ago that are too much for a limit that was lowered."""
        copies = [path for path, _ in self._copies()]
        filled = sum(map(_size, copies))
        for path in copies:
            if filled <= self._most_bytes:
                return
            filled -= _size(path)
            _remove(path)

    def _copies(self) -> list[tuple[Path, dict[str, Any]]]:
        """The copies and their records, the one used longest ago first."""
        found = []
        for path in self._folder.glob("[!.]*"):
            with suppress(OSError):
                if record := _record(path):
                    found.append(((path / RECORD).stat().st_mtime, path, record))
        return [(path, record) for _, path, record in sorted(found, key=lambda one: one[0])]

    def _drop(self, path: Path) -> None:
        _remove(path)
        self.keys = self._keys()

    def _keys(self) -> frozenset[str]:
        return frozenset(str(record["key"]) for _, record in self._copies())

    def _folder_of(self, spec: LoadSpec) -> Path:
        readable = re.sub(r"[^\w.-]+", "-", spec.key)[:80]
        return self._folder / f"{readable}-{hashlib.sha256(spec.key.encode()).hexdigest()[:8]}"


def at_path(spec: LoadSpec, folder: Path) -> LoadSpec:
    """Returns the load spec with another source of its weights."""
    return LoadSpec(replace(spec.model, path=str(folder)), spec.pipeline, spec.quantize)


def _digest(spec: LoadSpec) -> str:
    """Returns a digest of what a copy is made from. Raises: OSError."""
    made_from: list[Any] = [
        *(version(library) for library in MADE_BY),
        spec.key,
        spec.model.key,
        spec.pipeline.loaded_as or spec.pipeline.name,
    ]
    for folder in source_folders(spec.model):
        made_from.append(str(folder))
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                made_from.append((str(path.relative_to(folder)), *_mark(path), _header(path)))
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _header(path: Path) -> str:
    if path.suffix != ".safetensors":
        return ""
    try:
        return hashlib.sha256(header_bytes(path)).hexdigest()
    except BadWeightFile as error:  # who loads it reports it
        return str(error)


def _mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _files(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of change of the files of a copy."""
    return {
        str(path.relative_to(folder)): list(_mark(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def _record(folder: Path) -> dict[str, Any] | None:
    """Raises: ValueError, OSError: it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {"key": "", "source": "", "files": {}}
    return record if isinstance(record, dict) and "key" in record else {"key": ""}


def _is_recent(folder: Path) -> bool:
    with suppress(OSError):
        return 0 <= time.time() - (folder / RECORD).stat().st_mtime < MIN_KEPT_S
    return False


def _size(folder: Path) -> int:
    return sum(size for size, _ in _files(folder).values())


def _sync(path: Path) -> None:
    """Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)
