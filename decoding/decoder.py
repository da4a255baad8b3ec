"""Reads pictures that clients send, in decoder processes (child.py) that are watched here.

The server itself only sees the result: a PNG that is checked, upright and no larger than needed.
A picture that takes too long or too much memory costs its decoder process, and its own request an
error; nothing else is affected.
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
"""Requests that may wait for a decoder; each holds an HTTP thread and its body."""
DEADLINE_S = 30.0
"""For all pictures of one request, from when a decoder is free for it."""
RETRY_AFTER_S = 5
FULL = f"Too many pictures wait to be decoded: try again in {RETRY_AFTER_S} s."
IDLE_S = 60.0
"""A decoder that has nothing to do for so long ends."""
PICTURES_EACH = 100
"""After so many pictures a decoder is replaced, whatever Pillow has left in its memory."""
BASE_BYTES = 400_000_000
BYTES_PER_PIXEL = 24
"""Memory limit of a decoder: a picture with transparency is in memory up to four times at once."""

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
    """Any thread may call. Processes start with the first picture and end when idle.

    Args:
        max_pixels: limit of width times height of a client's picture.
        own_pixels: the same of finished images, for thumbnails, if it is higher.
        place: held by a request from when it waits until its pictures are read; may raise TryLater.
        line: requests that may wait.
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
        """One request's turn with a decoder. Waits for it.

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
        """End the decoders that have nothing to do; the others end with their request."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        for child in free:
            child.end()

    def take(self) -> "_Child":
        """A decoder process for one reader.

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
        """A reader needs its process no more; one that works well serves the next reader."""
        with self._lock:
            if child.works and child.served < self._pictures_each and not self._closed:
                self._free.append(child)
                return
        child.end()


class PictureReader:
    """Reads the pictures of one request.

    Every method raises InvalidInput, with the field at fault, for a picture that cannot be read.
    """

    def __init__(self, decoder: PictureDecoder) -> None:
        self._decoder = decoder
        self._deadline = time.monotonic() + decoder.deadline_s
        self._child: _Child | None = None

    def size(self, data: bytes, field: str) -> tuple[int, int]:
        """Width and height of a picture when it is upright, from its header."""
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
        """A picture, upright and scaled down to what is used: child.py's read_picture."""
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
        """A JPEG with no side longer than max_side pixels."""
        asked = {"do": "thumbnail", "max_side": max_side, "max_pixels": self._decoder.own_pixels}
        return self._ask(asked, data, "image")[1]

    def texts(self, data: bytes, field: str) -> tuple[dict[str, str], dict[str, Any]]:
        """How a picture was made, as far as its file says: its texts, and mflux's metadata."""
        reply, _ = self._ask({"do": "texts"}, data, field)
        return reply["texts"], reply["metadata"]

    def close(self) -> None:
        if self._child:
            self._decoder.give_back(self._child)
            self._child = None

    def _ask(self, asked: dict[str, Any], data: bytes, field: str) -> tuple[dict[str, Any], bytes]:
        reply, result = self._tried({"max_pixels": self._decoder.max_pixels} | asked, data, field)
        if refused := reply.get("refused"):
            raise InvalidInput(field + refused, field=field)
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
                    f"{field} takes more than {self._decoder.deadline_s:g} s to decode: send a "
                    "smaller picture.",
                    field=field,
                ) from None
            except (OSError, EOFError):
                self.close()
                if not used_before:  # else it may have ended because it was idle
                    raise InvalidInput(
                        f"{field} cannot be decoded: the process that tried has ended, most likely "
                        "for lack of memory.",
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
        """Raises: TimeoutError, OSError, EOFError; then it is of no use any more."""
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
