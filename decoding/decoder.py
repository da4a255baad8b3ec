"""Decodes pictures from clients in separate processes (child.py), and supervises these.

The server only gets the result: a PNG that is checked, upright and no larger than needed. If a
picture takes too long or too much memory, its decoder process ends and its request gets an error;
nothing else is affected.
"""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, NamedTuple

import PIL

from decoding.protocol import Meaning, receive, send
from errors import InvalidInput, TooManyWaiting

log = logging.getLogger(__name__)

PROCESSES = 2
LINE = 32
"""Largest number of requests that wait for a decoder; each holds an HTTP thread and its body."""
DEADLINE_S = 30.0
"""Time limit for all pictures of one request, from the moment it has a decoder."""
RETRY_AFTER_S = 5
FULL = f"Too many pictures wait to be decoded: try again in {RETRY_AFTER_S} s."
IDLE_S = 60.0
"""A decoder ends after so many idle seconds."""
PICTURES_EACH = 100
"""A decoder is replaced after so many pictures, in case Pillow leaks memory."""
BASE_BYTES = 400_000_000
BYTES_PER_PIXEL = 24
"""Memory limit of a decoder. Up to four copies of a transparent picture are in memory."""

_ROOT, _SITE = Path(__file__).parent.parent, Path(PIL.__file__).parent.parent
_START = (
    "import sys; sys.path += sys.argv[1:3]; from decoding.child import main; "
    "main(int(sys.argv[3]), float(sys.argv[4]))"
)


class Png(NamedTuple):
    """A decoded picture."""

    data: bytes
    width: int
    height: int


class PictureDecoder:
    """Thread-safe. Processes start with the first picture and end when idle.

    Args:
        max_pixels: limit of width times height of a client's picture.
        own_pixels: the same for finished images (thumbnails), if it is higher.
        place: held by a request while it waits and its pictures are decoded; may raise TryLater.
        line: largest number of waiting requests.
        deadline_s: for all pictures of one request.
    """

    def __init__(
        self,
        max_pixels: int = 50_000_000,
        place: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        own_pixels: int = 0,
        processes: int = PROCESSES,
        line: int = LINE,
        deadline_s: float = DEADLINE_S,
        idle_s: float = IDLE_S,
        pictures_each: int = PICTURES_EACH,
    ) -> None:
        self.max_pixels = max_pixels
        self.own_pixels = max(own_pixels, max_pixels)
        self.deadline_s = deadline_s
        self._idle_s = idle_s
        self._pictures_each = pictures_each
        self._place = place
        self._line = Semaphore(processes + line)
        self._turns = Semaphore(processes)
        self._lock = Lock()
        self._free: list[_Child] = []
        self._closed = False

    @contextmanager
    def reading(self) -> Iterator["PictureReader"]:
        """Waits for a decoder and yields a reader for one request.

        Raises:
            TooManyWaiting: too many requests wait already, or this one has waited too long.
        """
        if not self._line.acquire(blocking=False):
            raise TooManyWaiting(FULL, retry_after_s=RETRY_AFTER_S)
        try:
            with self._place(), self._turn():
                reader = PictureReader(self)
                try:
                    yield reader
                finally:
                    reader.close()
        finally:
            self._line.release()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=self.deadline_s):
            raise TooManyWaiting(FULL, retry_after_s=RETRY_AFTER_S)
        try:
            yield
        finally:
            self._turns.release()

    def close(self) -> None:
        """Ends the idle decoders; the others end with their request."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        for child in free:
            child.end()

    def take(self) -> "_Child":
        """Returns a decoder process for one reader.

        Raises:
            TooManyWaiting: no process can be started now.
        """
        with self._lock:
            if self._free:
                return self._free.pop()
        try:
            return _Child(BASE_BYTES + BYTES_PER_PIXEL * self.own_pixels, self._idle_s)
        except OSError as error:
            log.error("no decoder process can be started: %s", error)
            raise TooManyWaiting(
                f"The server cannot decode pictures now: try again in {RETRY_AFTER_S} s.",
                retry_after_s=RETRY_AFTER_S,
            ) from error

    def give_back(self, child: "_Child") -> None:
        """Takes back the process of a reader. A process without errors serves the next reader."""
        with self._lock:
            if child.works and child.served < self._pictures_each and not self._closed:
                self._free.append(child)
                return
        child.end()


class PictureReader:
    """Decodes the pictures of one request.

    All methods raise InvalidInput, with the name of the field, if a picture cannot be decoded.
    """

    def __init__(self, decoder: PictureDecoder) -> None:
        self._decoder = decoder
        self._deadline = time.monotonic() + decoder.deadline_s
        self._child: _Child | None = None

    def size(self, data: bytes, field: str) -> tuple[int, int]:
        """Returns width and height of the upright picture, from its header."""
        width, height = self._ask({"do": "size"}, data, field)[0]["size"]
        return width, height

    def png(
        self,
        data: bytes,
        field: str,
        *,
        meaning: Meaning = Meaning.PICTURE,
        invert: bool = False,
        cover: tuple[int, int] | None = None,
        min_pixels: int = 0,
    ) -> Png:
        """Returns a picture as PNG, upright and scaled to what is used (child.read_picture)."""
        asked = {
            "do": "png",
            "meaning": meaning,
            "invert": invert,
            "cover": cover,
            "min_pixels": min_pixels,
        }
        reply, png = self._ask(asked, data, field)
        return Png(png, *reply["size"])

    def thumbnail(self, data: bytes, max_side: int) -> bytes:
        """Returns a JPEG with no side longer than max_side pixels."""
        asked = {"do": "thumbnail", "max_side": max_side, "max_pixels": self._decoder.own_pixels}
        return self._ask(asked, data, "image")[1]

    def texts(self, data: bytes, field: str) -> tuple[dict[str, str], dict[str, Any]]:
        """Returns the texts of a picture's file, and mflux's metadata."""
        reply, _ = self._ask({"do": "texts"}, data, field)
        return reply["texts"], reply["metadata"]

    def close(self) -> None:
        if self._child:
            self._decoder.give_back(self._child)
            self._child = None

    def _ask(self, asked: dict[str, Any], data: bytes, field: str) -> tuple[dict[str, Any], bytes]:
        reply, result = self._tried({"max_pixels": self._decoder.max_pixels} | asked, data, field)
        if refused := reply.get("refused"):
            raise InvalidInput("{field}" + refused, field=field)
        return reply, result

    def _tried(
        self, asked: dict[str, Any], data: bytes, field: str
    ) -> tuple[dict[str, Any], bytes]:
        while True:
            child = self._child = self._child or self._decoder.take()
            used_before = child.served > 0
            try:
                return child.ask(asked, data, self._deadline)
            except TimeoutError:
                self.close()
                raise InvalidInput(
                    f"{{field}} takes more than {self._decoder.deadline_s:g} s to decode: send a "
                    "smaller picture.",
                    field=field,
                ) from None
            except (OSError, EOFError):
                self.close()
                if not used_before:  # a used one may have ended because it was idle
                    raise InvalidInput(
                        "{field} cannot be decoded: the process that tried has ended, most likely "
                        "for lack of memory. Send a smaller picture.",
                        field=field,
                    ) from None


class _Child:
    """One decoder process.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, memory_bytes: int, idle_s: float) -> None:
        self.served = 0
        self.works = True
        self._channel, theirs = socket.socketpair()
        limits = [str(memory_bytes), str(idle_s)]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _START, str(_ROOT), str(_SITE), *limits],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=os.sep,
                )
        except OSError:
            self._channel.close()
            raise

    def ask(
        self, asked: dict[str, Any], data: bytes, deadline: float
    ) -> tuple[dict[str, Any], bytes]:
        """Sends a frame and returns the answer. After TimeoutError, OSError or EOFError the process
        cannot be used any more."""
        self.works = False
        send(self._channel, asked, data, deadline)
        reply = receive(self._channel, deadline)
        self.works = True
        self.served += 1
        return reply

    def end(self) -> None:
        self._channel.close()
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
