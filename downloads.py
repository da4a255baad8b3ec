"""The thread that fetches the weights which tasks wait for, while the worker draws with others.

Each download is a process of its own (server.py --download): it can be ended at any moment, and
takes neither the worker's memory nor Python's lock. The thread asks for one shape and does not
import it: a source of downloads (the QueueManager).
"""

import logging
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Protocol

from errors import StorageUnavailable, without_folders
from models.hub_cache import bytes_on_disk, partial_files
from models.model_catalog import Weights
from supervision import SupervisedThread

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
RETRY_S = 1.0
"""Pause before the disk is tried again, or a download that something else has ended."""
TRIES = 3
"""Of a download that a signal ends which is not ours: memory may have run short."""
STALLED_S = 600.0
"""A download of which not a byte has come for so long is given up."""
ERROR_START = "server.py: "


class DownloadSource(Protocol):
    def next_download(self) -> Weights | None:
        """What to fetch next; waits for something. None: the server stops."""

    def download_began(self, weights: Weights, bytes_before: int) -> None: ...
    def download_progress(self, weights: Weights, bytes_done: int) -> bool:
        """Returns whether it shall go on."""

    def download_left(self) -> None:
        """It is over, and nothing was decided."""

    def download_failed(self, weights: Weights, message: str) -> None: ...
    def download_ended(self, weights: Weights) -> None:
        """The weights are here."""


class _Refused(Exception):
    """The weights cannot be had; the message says why."""


class _Interrupted(Exception):
    """Nobody wants them any more, or something else has ended the process."""


class Downloads:
    """Args:
    command: what fetches weights: ends with 0 when they are here, else says why in a line that
        begins with ERROR_START.
    """

    def __init__(self, source: DownloadSource, command: Callable[[Weights], Sequence[str]]) -> None:
        self._source = source
        self._command = command
        self._stopping = Event()
        self._tries: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self._thread = SupervisedThread("downloads", self._run, source.download_left)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End, and the download with it: the next start goes on with the files that are there.

        Returns:
            Whether the thread has ended; for that, the source has to be stopping.
        """
        self._stopping.set()
        if process := self._process:
            process.terminate()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run_once(self) -> bool:
        """Fetch what is wanted next; returns whether there was something."""
        weights = self._source.next_download()
        if weights is None:
            return False
        name = weights.model.name
        self._tries[name] = self._tries.get(name, 0) + 1
        log.info("downloading the weights of %s", name)
        try:
            self._fetch(weights)
        except _Interrupted:
            self._source.download_left()
            return not self._stopping.wait(RETRY_S)
        except _Refused as refused:
            self._fail(weights, str(refused))
        except Exception as error:
            log.exception("the download of %s failed", name)
            self._fail(weights, f"The download of {name} failed ({type(error).__name__}).")
        else:
            self._source.download_ended(weights)
        self._tries.pop(name, None)
        return True

    def _fetch(self, weights: Weights) -> None:
        """Raises: _Refused, _Interrupted."""
        name, partial_before = weights.model.name, partial_files(weights.model)
        self._source.download_began(weights, bytes_on_disk(weights.model))
        try:
            self._process = subprocess.Popen(
                self._command(weights),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C is for the server, which ends it
            )
        except OSError as error:
            raise _Refused(f"The download of {name} cannot be started: {error}.") from error
        try:
            with self._process as process:
                try:
                    told, wanted = self._watch(process, weights)
                except BaseException:
                    process.kill()  # leaving the block waits for it
                    raise
        finally:
            self._process = None
            for path in partial_files(weights.model) - partial_before:
                _remove(path)
        if process.returncode == 0:
            return
        if self._stopping.is_set() or not wanted:
            raise _Interrupted
        lines = [line for line in told.splitlines() if line.startswith(ERROR_START)]
        if lines:
            raise _Refused(without_folders(lines[-1].removeprefix(ERROR_START)))
        if process.returncode < 0 and self._tries[name] < TRIES:
            raise _Interrupted
        by = f"exit code {process.returncode}"
        if process.returncode < 0:
            by = signal.Signals(-process.returncode).name
        raise _Refused(f"The download of the weights of {name} ended with {by}.")

    def _watch(self, process: subprocess.Popen[str], weights: Weights) -> tuple[str, bool]:
        """Until a process has ended; returns what it told, and whether it was wanted to the end.

        Raises:
            _Refused: it stalled.
        """
        told, bytes_done, came_at = "", -1, time.monotonic()
        wanted = True
        while process.returncode is None:
            if self._stopping.is_set() or not wanted:
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                _, told = process.communicate(timeout=PROGRESS_EVERY_S)
            before, bytes_done = bytes_done, bytes_on_disk(weights.model)
            wanted = self._source.download_progress(weights, bytes_done)
            if bytes_done != before:
                came_at = time.monotonic()
            elif time.monotonic() - came_at > STALLED_S:
                process.kill()
                raise _Refused(
                    f"The download of the weights of {weights.model.name} stalled: no byte came "
                    f"for {STALLED_S:.0f} s."
                )
        return told, wanted

    def _fail(self, weights: Weights, message: str) -> None:
        while not self._stopping.is_set():
            try:
                self._source.download_failed(weights, message)
            except StorageUnavailable:
                self._stopping.wait(RETRY_S)
            else:
                return

    def _run(self) -> None:
        while not self._stopping.is_set() and self.run_once():
            pass


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
