"""Small copies of finished images, made by the decoder processes and kept for a while."""

from collections import OrderedDict
from threading import Lock

from decoding.decoder import PictureDecoder
from errors import NotReady
from queue_manager import QueueManager

CACHE_BYTES = 16_000_000
Key = tuple[str, int, int]
"""task_id, index of the image, most pixels of a side."""


class Thumbnails:
    """Any thread may call."""

    def __init__(
        self, queue: QueueManager, decoder: PictureDecoder, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._queue = queue
        self._decoder = decoder
        self._cache_bytes = cache_bytes
        self._lock = Lock()
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, task_id: str, index: int, max_side: int) -> bytes:
        """A JPEG with no side longer than max_side pixels.

        Raises:
            UnknownTask, NotReady, Gone, InvalidInput: there is no such image.
            TryLater: too many pictures wait to be decoded.
        """
        if self._queue.status(task_id).wait is not None:
            raise NotReady
        key = (task_id, index, max_side)
        if small := self._find(key):
            return small
        with self._decoder.reading() as reader:
            if small := self._find(key):  # another request has made it meanwhile
                return small
            # The image is read here, so that few are in memory at a time.
            image, _ = self._queue.image(task_id, index)
            small = reader.thumbnail(image, max_side)
        self._keep(key, small)
        return small

    def _find(self, key: Key) -> bytes | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: Key, small: bytes) -> None:
        with self._lock:
            self._bytes += len(small) - len(self._kept.get(key, b""))
            self._kept[key] = small
            while self._bytes > self._cache_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= len(dropped)
