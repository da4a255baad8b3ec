"""Small copies of finished images, made by the decoder processes and kept for a while."""

from concurrent.futures import Future
from contextlib import suppress
from threading import Lock

from cachetools import LRUCache

from api.waiting_places import WaitingPlaces
from decoding.decoder import PictureDecoder
from errors import Gone, InvalidInput, NotReady
from queue_manager import QueueManager
from task import Task

CACHE_BYTES = 16_000_000
Key = tuple[str, int, int]
"""task_id, index of the image, most pixels of a side."""


class Thumbnails:
    """Thread-safe. Requests for the same thumbnail wait for the first of them.

    Args:
        places: for requests that wait.
    """

    def __init__(
        self,
        queue: QueueManager,
        decoder: PictureDecoder,
        places: WaitingPlaces,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._queue = queue
        self._places = places
        self._making: dict[Key, Future[bytes]] = {}
        self._decoder = decoder
        self._lock = Lock()
        self._kept: LRUCache[Key, bytes] = LRUCache(cache_bytes, getsizeof=len)

    def get(self, task: Task, index: int, max_side: int) -> bytes:
        """A JPEG with no side longer than max_side pixels.

        Raises:
            NotReady, Gone, InvalidInput: there is no such image.
            TryLater: too many pictures wait to be decoded.
        """
        if not task.ended and task.images_done <= index < task.params.count:
            raise NotReady
        key = (task.task_id, index, max_side)
        with self._lock:
            if small := self._kept.get(key):
                return small
            made = Future[bytes]()
            making = self._making.setdefault(key, made)
        if making is not made:
            with self._places.place():
                return making.result()
        try:
            small = self._make(task, key)
        except BaseException as error:
            made.set_exception(error)
            raise
        else:
            made.set_result(small)
            return small
        finally:
            with self._lock:
                del self._making[key]

    def _make(self, task: Task, key: Key) -> bytes:
        _, index, max_side = key
        with self._decoder.reading() as reader:
            # The image is read here, so that few are in memory at a time.
            image, _ = self._queue.image_of(task, index)
            try:
                small = reader.thumbnail(image, max_side)
            except InvalidInput:
                raise Gone("The image's file is damaged: it cannot be decoded.") from None
        with self._lock, suppress(ValueError):  # larger than the cache
            self._kept[key] = small
        return small
