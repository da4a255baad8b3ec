"""The thread that downloads weights that tasks wait for, while the worker draws other tasks.

Each download is a separate process (server.py --download): it can be ended at any moment, and takes
neither the worker's memory nor the interpreter's lock. The thread depends on one Protocol: a source
of downloads (scheduler/download_api.py).
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
from models.model_catalog import LoadSpec
from supervision import SupervisedThread

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
RETRY_S = 1.0
"""Pause before the disk, or a download that a signal has ended, is tried again."""
TRIES = 3
"""Of a download that another process's signal ends: memory may have run short."""
STALLED_S = 600.0
"""A download that has received nothing for this long is given up."""
ERROR_START = "server.py: "


class DownloadSource(Protocol):
    def next_download(self) -> LoadSpec | None:
        """What to download next; waits until there is something. None: the server stops."""

    def download_began(self, spec: LoadSpec, bytes_before: int) -> None: ...
    def download_progress(self, spec: LoadSpec, bytes_done: int) -> bool:
        """Returns whether the download is still wanted."""

    def download_interrupted(self) -> None:
        """It has ended without a result."""

    def download_failed(self, spec: LoadSpec, message: str) -> None: ...
    def download_ended(self, spec: LoadSpec) -> None:
        """The weights are on this machine."""


class _Refused(Exception):
    """The weights cannot be downloaded; the message says why."""


class _Interrupted(Exception):
    """No task needs the weights any more, or a signal has ended the process."""


class Downloader:
    """Owns the thread.

    Args:
        command: downloads weights: ends with exit code 0 when they are complete, else prints why
            in a line that begins with ERROR_START.
    """

    def __init__(
        self, source: DownloadSource, command: Callable[[LoadSpec], Sequence[str]]
    ) -> None:
        self._source = source
        self._command = command
        self._stopping = Event()
        self._tries: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self._thread = SupervisedThread("downloads", self._run, source.download_interrupted)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread and the download; the next start continues with the complete files.

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
        """Download what is wanted next; returns whether there was something."""
        spec = self._source.next_download()
        if spec is None:
            return False
        name = spec.model.name
        self._tries[name] = self._tries.get(name, 0) + 1
        log.info("downloading the weights of %s", name)
        try:
            self._fetch(spec)
        except _Interrupted:
            self._source.download_interrupted()
            return not self._stopping.wait(RETRY_S)
        except _Refused as refused:
            self._fail(spec, str(refused))
        except Exception as error:
            log.exception("the download of %s failed", name)
            self._fail(spec, f"The download of {name} failed ({type(error).__name__}).")
        else:
            self._source.download_ended(spec)
        self._tries.pop(name, None)
        return True

    def _fetch(self, spec: LoadSpec) -> None:
        """Raises: _Refused, _Interrupted."""
        name, partial_before = spec.model.name, partial_files(spec.model)
        self._source.download_began(spec, bytes_on_disk(spec.model))
        try:
            self._process = subprocess.Popen(
                self._command(spec),
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
                    output, wanted = self._watch(process, spec)
                except BaseException:
                    process.kill()  # leaving the block waits for it
                    raise
        finally:
            self._process = None
            for path in partial_files(spec.model) - partial_before:
                _remove(path)
        if process.returncode == 0:
            return
        if self._stopping.is_set() or not wanted:
            raise _Interrupted
        lines = [line for line in output.splitlines() if line.startswith(ERROR_START)]
        if lines:
            raise _Refused(without_folders(lines[-1].removeprefix(ERROR_START)))
        if process.returncode < 0 and self._tries[name] < TRIES:
            raise _Interrupted
        by = f"exit code {process.returncode}"
        if process.returncode < 0:
            by = signal.Signals(-process.returncode).name
        raise _Refused(f"The download of the weights of {name} ended with {by}.")

    def _watch(self, process: subprocess.Popen[str], spec: LoadSpec) -> tuple[str, bool]:
        """Wait until a process has ended; returns its output, and whether it was wanted to the end.

        Raises:
            _Refused: it stalled.
        """
        output, bytes_done, came_at = "", -1, time.monotonic()
        wanted = True
        while process.returncode is None:
            if self._stopping.is_set() or not wanted:
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                _, output = process.communicate(timeout=PROGRESS_EVERY_S)
            before, bytes_done = bytes_done, bytes_on_disk(spec.model)
            wanted = self._source.download_progress(spec, bytes_done)
            if bytes_done != before:
                came_at = time.monotonic()
            elif time.monotonic() - came_at > STALLED_S:
                process.kill()
                raise _Refused(
                    f"The download of the weights of {spec.model.name} stalled: no byte came "
                    f"for {STALLED_S:.0f} s."
                )
        return output, wanted

    def _fail(self, spec: LoadSpec, message: str) -> None:
        while not self._stopping.is_set():
            try:
                self._source.download_failed(spec, message)
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
