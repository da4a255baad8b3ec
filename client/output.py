"""Where the images of a task go: into files, to stdout, onto the terminal."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .mflux_client import free_name, say
from .terminal import picture_escape, picture_protocol

if TYPE_CHECKING:
    from .mflux_client import Client, Status

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".zip": None}


class BadUsage(Exception):
    """The options of the command exclude each other, or one cannot be used."""


def check_output(options: argparse.Namespace) -> None:
    """Checks the output file before a task is submitted.

    Raises:
        BadUsage: nothing can be written there.
    """
    if options.output is None:
        return
    if options.output == "-":
        if options.json:
            raise BadUsage("-o - and --json both want stdout")
        if sys.stdout.isatty():
            raise BadUsage("stdout is a terminal: -o - is for pipes")
        if (options.count or len(options.seeds or ()) or 1) > 1:
            raise BadUsage("several images do not fit into -o -: name a file")
        return
    path = Path(options.output)
    if options.format and FORMATS.get(path.suffix.lower()) not in (options.format, None):
        raise BadUsage(f"{path} is no name of a {options.format}: leave out --format")
    if not options.task and path.suffix.lower() not in FORMATS:
        raise BadUsage(f"{path}: the ending must be one of {', '.join(FORMATS)}")
    try:
        if not path.absolute().parent.is_dir():
            raise BadUsage(f"{path}: there is no such folder")
        if path.is_dir():
            raise BadUsage(f"{path} is a folder: name a file")
    except OSError as error:  # too long, not ours to look at
        raise BadUsage(f"{path}: {error.strerror}") from error


class Output:
    """Writes the images of one task: each into a file of its own as soon as it is stored, but all
    of them at the end to stdout (`-o -`) and into a zip archive."""

    def __init__(self, options: argparse.Namespace, task_id: str) -> None:
        self._options = options
        self._task_id = task_id
        self._name = options.output or ""
        self._all_at_once = self._name == "-" or Path(self._name).suffix.lower() == ".zip"
        self._fetched = self._written = 0

    def fetch(self, client: Client, status: Status) -> list[tuple[str, bytes]]:
        """The names of files and the bytes that are new; an empty name means stdout."""
        stored = _stored(status)
        if self._all_at_once:
            return [self._archive(client, status)] if status.ended and stored else []
        news = [self._image(client, index, status) for index in range(self._fetched, stored)]
        self._fetched = max(self._fetched, stored)
        return news

    def write(self, name: str, data: bytes) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        options = self._options
        if not name:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            path = _write(Path(name), data, overwrite=options.overwrite)
            say(path, sys.stderr if options.json else sys.stdout)
            if not self._all_at_once:
                self._show(data)
        self._written += 1

    def has_all(self, status: Status) -> bool:
        """Whether all stored images of an ended task are written."""
        files = 1 if self._all_at_once else _stored(status)
        return 0 < files <= self._written

    def _archive(self, client: Client, status: Status) -> tuple[str, bytes]:
        if self._name == "-" and status.params.get("count", 1) == 1:
            return "", client.image(self._task_id).data
        return "" if self._name == "-" else self._name, client.archive(self._task_id)

    def _image(self, client: Client, index: int, status: Status) -> tuple[str, bytes]:
        image = client.image(self._task_id, index)
        path = Path(self._name or image.file_name)
        if status.params.get("count", 1) > 1:
            path = path.with_name(f"{path.stem}-{index}{path.suffix}")
        return str(path), image.data

    def _show(self, data: bytes) -> None:
        if self._options.no_show or self._options.json or not sys.stdout.isatty():
            return
        if protocol := picture_protocol(os.environ):
            sys.stdout.write(picture_escape(data, protocol, shutil.get_terminal_size().columns))
            sys.stdout.flush()


def _stored(status: Status) -> int:
    """How many images can be fetched."""
    return int(status.params.get("count", 1)) if status.status == "done" else status.images_done


def _write(path: Path, data: bytes, *, overwrite: bool) -> Path:
    """Writes a complete file or none; under a name with a number if there is one already."""
    part = path.with_name(f".mflux-{os.getpid()}.part")
    taken: Path | None = None
    try:
        part.write_bytes(data)
        if not overwrite:
            path = taken = free_name(path)
        part.replace(path)
    except OSError:
        for left in (part, taken):
            if left:
                left.unlink(missing_ok=True)
        raise
    return path
