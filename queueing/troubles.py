"""What goes wrong, as far as /health has to tell it."""

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
        self.storage_failed = False
        """The disk has refused something, and was not tried with success since."""
        self.last_error: str | None = None

    @contextmanager
    def noting_storage(self) -> Iterator[None]:
        """Remember that the disk refused; storage_works() alone forgets it."""
        try:
            yield
        except StorageUnavailable as error:
            if not self.storage_failed:
                log.error("%s", error)
            self.storage_failed = True
            self.last_error = error.message
            raise

    def storage_works(self) -> None:
        self.storage_failed = False
        log.info("the data dir can be written to again")
