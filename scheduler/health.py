"""Errors and state reported by /health."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum

from errors import StorageUnavailable
from models.model_catalog import LoadSpec
from scheduler.downloads import Download
from scheduler.machines import Machine

log = logging.getLogger(__name__)

ERROR_KEPT_S = 3600.0


class ServerState(StrEnum):
    LOADING = "loading"  # the worker loads weights; tasks are accepted and wait
    READY = "ready"  # nothing runs
    BUSY = "busy"  # a task runs
    DRAINING = "draining"  # the server is stopping; no new tasks
    FAILED = "failed"  # the model could not be loaded, or the disk refuses


class Cause(StrEnum):
    """What failed. Its error is over when the same succeeds."""

    DISK = "disk"
    LOAD = "load"
    DOWNLOAD = "download"
    TASK = "task"


@dataclass(frozen=True)
class LastError:
    cause: Cause
    message: str
    at: float
    """Unix seconds."""


class Health:
    """Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self.load_failed = False
        """The server's own model cannot be loaded: the server ends."""
        self.storage_error: str | None = None
        """The last error of the disk; None: it works."""
        self.broker_away_since: float | None = None
        """Unix seconds since which workers on other machines cannot be reached; None: they can, or
        there is no broker."""
        self._last_error: LastError | None = None
        self._refusals = 0
        self._refusals_at_probe = 0

    @property
    def last_error(self) -> LastError | None:
        """The latest error that is not over: the same has not succeeded since, and it is not older
        than ERROR_KEPT_S. An error of the disk has no such limit."""
        error = self._last_error
        lasts = error and (error.cause is Cause.DISK or self._now() - error.at < ERROR_KEPT_S)
        return error if lasts else None

    def failed(self, cause: Cause, message: str) -> None:
        """Note an error. While the disk refuses, others follow from that: it stays the last."""
        if self.storage_error is not None and cause is not Cause.DISK:
            return
        self._last_error = LastError(cause, message, self._now())

    def succeeded(self, cause: Cause) -> None:
        """An earlier error of this cause is over."""
        error = self._last_error
        if error and error.cause is cause:
            self._last_error = None

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
                self.storage_error = error.message
                self.failed(Cause.DISK, error.message)
            raise

    def accepting(self) -> AbstractContextManager[None]:
        """Raises at once while the disk refuses; else as noting_storage."""
        if self.storage_error is not None:
            raise StorageUnavailable(
                f"The server cannot store anything now and accepts nothing: {self.storage_error}"
            )
        return self.noting_storage()

    def storage_works(self) -> None:
        """A probe has succeeded. The error ends if nothing was refused since the probe before, so
        that the state does not alternate while something else is still refused."""
        refused_since = self._refusals != self._refusals_at_probe
        self._refusals_at_probe = self._refusals
        if self.storage_error is None or refused_since:
            return
        self.storage_error = None
        self.succeeded(Cause.DISK)
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
    last_error: LastError | None
    paused: bool = False
    """Whether the operator has paused the queue."""
    broker_away_since: float | None = None
    """As in Health."""
    machines: int = 1
    """How many draw."""

    @property
    def has_work(self) -> bool:
        """Whether something is drawn or downloaded, or will be without anybody doing anything."""
        return bool(self.running or self.download or (self.waiting and not self.paused))
