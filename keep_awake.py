"""Keeps a Mac awake while tasks wait or run.

`caffeinate -i` holds the assertion: macOS does not sleep by itself, but the display may, and
closing the lid still puts a MacBook to sleep. `-w` ends it with this process, also after kill -9.
Other systems have nothing that an ordinary process may do without asking: there it does nothing.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

log = logging.getLogger(__name__)

STOP_S = 1.0


class KeepAwake:
    """Args:
    has_work: whether tasks wait or run; called by check().
    system: as sys.platform; only darwin has what is needed.
    on: False: it does nothing.
    """

    def __init__(
        self, has_work: Callable[[], bool], system: str = sys.platform, *, on: bool = True
    ) -> None:
        self._has_work = has_work
        self._program = shutil.which("caffeinate") if on and system == "darwin" else None
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Hold or release the assertion; to be called every few seconds, by one thread."""
        if self._program is None:
            return
        held = self._process is not None and self._process.poll() is None
        if self._has_work():
            if not held:
                self._hold(self._program)
        elif held:
            self.release()

    def release(self) -> None:
        """No-op if nothing is held."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()

    def _hold(self, program: str) -> None:
        try:
            self._process = subprocess.Popen(
                [program, "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the server, which ends it
            )
        except OSError as error:
            log.warning("the Mac may fall asleep while tasks wait: %s", error)
            self._program = None
