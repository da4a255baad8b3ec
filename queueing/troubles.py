"""Errors that /health reports."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from errors import StorageUnavailable

log = logging.getLogger(__name__)


class Troubles:
    """Any thread may call and ask."""

    def __init__(self) -> None:
        self.load_failed = False
        """The server's own model cannot be loaded: it ends."""
        self.storage_error: str | None = None
        """Why the disk has refused something; None: it works, or was tried with success since."""
        self.last_error: str | None = None
        self._refusals = 0
        self._refusals_at_probe = 0

    @contextmanager
    def noting_storage(self, *, probing: bool = False) -> Iterator[None]:
        """Remember that the disk refused; only storage_works() forgets it.

        Args:
            probing: this tells the reason best, better than what was refused first.
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
        """For what is refused while the disk refuses, without trying it; else as noting_storage."""
        if self.storage_error is not None:
            raise StorageUnavailable(
                f"The server cannot store anything now and accepts nothing: {self.storage_error}"
            )
        with self.noting_storage():
            yield

    def storage_works(self) -> None:
        """A probe has succeeded. That is believed if nothing was refused since the probe before, so
        that the state does not alternate while something else is still refused."""
        refused_since = self._refusals != self._refusals_at_probe
        self._refusals_at_probe = self._refusals
        if self.storage_error is None or refused_since:
            return
        self.storage_error = None
        log.info("the data dir can be written to again")
