"""The thread that fetches the weights which tasks wait for, while the worker draws with others.

Each download is a process of its own (server.py --download): it can be ended at any moment, and
takes nothing from the worker, neither memory nor Python's lock. The thread asks for one shape and
does not import it: a source of downloads (the QueueManager).
"""

import logging
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread
from typing import Protocol

from errors import StorageUnavailable, without_folders
from models.hub_cache import bytes_on_disk
from models.model_catalog import Weights

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
RETRY_S = 1.0
"""Pause before the disk is tried again."""
ERROR_START = "server.py: "


class DownloadSource(Protocol):
    def next_download(self) -> Weights | None:
        """What to fetch next; waits for something. None: the server stops."""

    def download_began(self, weights: Weights, bytes_before: int) -> None: ...
    def download_progress(self, bytes_done: int) -> None: ...
    def download_ended(self, weights: Weights, error: str | None) -> None:
        """The weights are here, or why they cannot be had."""


class Downloads:
    """Args:
    command: what fetches weights: ends with 0 when they are here, else writes why as its last line.
    """

    def __init__(self, source: DownloadSource, command: Callable[[Weights], Sequence[str]]) -> None:
        self._source = source
        self._command = command
        self._stopping = Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = Thread(target=self._run, name="downloads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End, and the download with it: the next start goes on with what is there. Returns whether
        the thread has ended; the source has to be stopping."""
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
        log.info("downloading the weights of %s", weights.model.name)
        error = self._fetch(weights)
        if self._stopping.is_set():
            return False
        while True:
            try:
                self._source.download_ended(weights, error)
            except StorageUnavailable:
                if self._stopping.wait(RETRY_S):
                    return False
            else:
                return True

    def _fetch(self, weights: Weights) -> str | None:
        """Returns why they cannot be had, or None."""
        self._source.download_began(weights, bytes_on_disk(weights.model))
        try:
            self._process = subprocess.Popen(
                self._command(weights),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            return f"The download of {weights.model.name} cannot be started: {error}."
        with self._process as process:
            if self._stopping.is_set():  # stop() came before there was a process to end
                process.terminate()
            told = ""
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    _, told = process.communicate(timeout=PROGRESS_EVERY_S)
                self._source.download_progress(bytes_on_disk(weights.model))
        self._process = None
        if process.returncode == 0:
            return None
        last = (told.strip().splitlines() or [""])[-1]
        if last.startswith(ERROR_START):
            return without_folders(last.removeprefix(ERROR_START))
        return (
            f"The download of the weights of {weights.model.name} ended with exit code "
            f"{process.returncode}."
        )

    def _run(self) -> None:
        while not self._stopping.is_set() and self.run_once():
            pass
