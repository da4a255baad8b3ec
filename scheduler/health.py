"""Errors and state reported by /health."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from errors import StorageUnavailable
from models.model_catalog import LoadSpec
from scheduler.downloads import Download
from scheduler.machines import Machine

log = logging.getLogger(__name__)


class ServerState(StrEnum):
    LOADING = "loading"  # the worker loads weights; tasks are accepted and wait
    READY = "ready"  # nothing runs
    BUSY = "busy"  # a task runs
    DRAINING = "draining"  # the server is stopping; no new tasks
    FAILED = "failed"  # the model could not be loaded, or the disk refuses


class Health:
    """Thread-safe."""

    def __init__(self) -> None:
        self.load_failed = False
        """The server's own model cannot be loaded: the server ends."""
        self.storage_error: str | None = None
        """The last error of the disk; None: it works."""
        self.last_error: str | None = None
        self._refusals = 0
        self._refusals_at_probe = 0

    def state(self, machine: Machine, *, stopping: bool) -> ServerState:
        """The state of the server (under the scheduler's lock)."""
        if self.load_failed or self.storage_error is not None:
            return ServerState.FAILED
        if stopping:
            return ServerState.DRAINING
        if machine.loading is not None:
            return ServerState.LOADING
        return ServerState.BUSY if machine.runs or machine.stopping else ServerState.READY

    @contextmanager
    def noting_storage(self, *, probing: bool = False) -> Iterator[None]:
        """Stores an error of the disk; only storage_works() clears it.

        Args:
            probing: this gives a better reason than what was refused first.
        """
        try:
            yield
        except StorageUnavailable as error:
            self._refusals += 1
            if self.storage_error is None:
                log.error("the data dir cannot be written to: %s", error)
            if self.storage_error is None or probing:
                self.storage_error = self.last_error = error.message
            raise

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Raises at once while the disk refuses; else as noting_storage."""
        if self.storage_error is not None:
            raise StorageUnavailable(
                f"The server cannot store anything now and accepts nothing: {self.storage_error}"
            )
        with self.noting_storage():
            yield

    def storage_works(self) -> None:
        """A probe has succeeded. The error ends if nothing was refused since the probe before, so
        that the state does not alternate while something else is still refused."""
        refused_since = self._refusals != self._refusals_at_probe
        self._refusals_at_probe = self._refusals
        if self.storage_error is None or refused_since:
            return
        self.storage_error = None
        log.info("the data dir can be written to again")


@dataclass(frozen=True)
class QueueHealth:
    state: ServerState
    waiting: int
    running: int
    loaded: tuple[LoadSpec, ...]
    """In memory, the latest used first."""
    loading: LoadSpec | None
    download: Download | None
    quantize: int | None
    """Bits that the weights used last are quantized to."""
    last_error: str | None
    paused: bool = False
    """Whether the operator has paused the queue."""
