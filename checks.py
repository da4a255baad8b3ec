"""The thread that checks something every two seconds.

- Whether the disk accepts changes: so /health reports a full, read-only or removed data dir even if
  no task is submitted, without waiting for the disk, and the server continues by itself when there
  is space again.
- Which waiting tasks have to be cancelled because their time is up.
"""

import logging
from collections.abc import Callable
from threading import Event

from errors import StorageUnavailable
from supervision import SupervisedThread

log = logging.getLogger(__name__)

EVERY_S = 2.0


class Checks:
    """Owns the thread.

    Args:
        checks: what it calls; each may raise StorageUnavailable.
    """

    def __init__(self, *checks: Callable[[], None]) -> None:
        self._checks = checks
        self._stopping = Event()
        self._thread = SupervisedThread("checks", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        self._thread.let_end()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            for check in self._checks:
                try:
                    check()
                except StorageUnavailable as error:
                    log.debug("%s", error)  # the first refusal is logged as an error
