"""The thread that checks whether the disk accepts changes.

So /health reports a full, read-only or removed data dir even if no task is submitted, without
waiting for the disk. The server continues by itself when there is space again.
"""

import logging
from threading import Event
from typing import Protocol

from errors import StorageUnavailable
from supervision import SupervisedThread

log = logging.getLogger(__name__)

EVERY_S = 2.0


class Storage(Protocol):
    def check_storage(self) -> None:
        """Raises StorageUnavailable while the disk refuses."""


class StorageCheck:
    """Owns the thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._stopping = Event()
        self._thread = SupervisedThread("storage-check", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        self._thread.let_end()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            try:
                self._storage.check_storage()
            except StorageUnavailable as error:
                log.debug("%s", error)  # the first refusal is logged as an error
