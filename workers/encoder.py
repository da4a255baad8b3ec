"""Encodes and stores finished pictures on its own thread: the next one starts at once."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from errors import StorageUnavailable
from images import encode_image
from supervision import SupervisedQueue
from task import Drawn, Encoded, GenerationParams, Task
from timing_model import Measured
from workers.endings import Endings
from workers.protocols import TaskSource

log = logging.getLogger(__name__)

PICTURES_WAITING = 1
"""Decoded pictures that wait for the encoder; the worker then waits too, which bounds memory."""
STORE_FOR_S = 600.0
"""A finished picture that the disk has refused for this long is given up, and its task fails."""


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn, for the encoder."""

    task: Task
    index: int
    drawn: Drawn
    measured: tuple[tuple[int, Measured], ...]
    """Stage, and the seconds that it took."""


class Encoder:
    """Owns the encoder thread.

    Args:
        mark_generated: whether files say that a trained model has made them (images.py).
    """

    def __init__(
        self, source: TaskSource, endings: Endings, *, mark_generated: bool = True
    ) -> None:
        self._mark_generated = mark_generated
        self._source = source
        self._endings = endings
        self._pictures = SupervisedQueue("encoder", self.encode, self._died, size=PICTURES_WAITING)

    def put(self, picture: Picture) -> None:
        """Encode and store this picture soon; waits while PICTURES_WAITING others do."""
        self._pictures.put(picture)

    def drain(self) -> None:
        """Wait until all pictures are stored, or refused for good."""
        self._pictures.drain()

    def stop(self, timeout_s: float) -> bool:
        """End after the pictures that wait; returns whether the thread has ended in time."""
        return self._pictures.stop(timeout_s)

    def encode(self, picture: Picture) -> None:
        """Encode and store a picture."""
        task = picture.task
        try:
            started_at = time.monotonic()
            image = _encoded(picture.drawn, task.params, self._mark_generated)
            *before, (stage, own) = picture.measured
            own = replace(own, image_encoding_s=time.monotonic() - started_at)
            encoded = Encoded(image, picture.index, (*before, (stage, own)))
            self._endings.insist(self._storing(picture, encoded))
        except Exception as error:
            log.exception("task %s failed while an image was encoded", task.task_id)
            self._endings.fail(task, error)

    def _died(self, picture: Picture) -> None:
        self._endings.release(picture.task, interrupted=True)

    def _storing(self, picture: Picture, encoded: Encoded) -> Callable[[], object]:
        """A try to store an image; after STORE_FOR_S it fails the task where storing fails."""
        task, until = picture.task, time.monotonic() + STORE_FOR_S
        is_last = picture.index == task.params.count - 1
        store = self._source.finish if is_last else self._source.store_image

        def try_once() -> None:
            try:
                store(task.task_id, task.attempt, encoded)
            except StorageUnavailable as error:
                if time.monotonic() < until:
                    raise
                self._source.fail(
                    task.task_id,
                    task.attempt,
                    StorageUnavailable.code,
                    f"The finished picture could not be stored for {STORE_FOR_S:.0f} s: {error} "
                    "Submit the task again when there is room.",
                )

        return try_once


def _encoded(drawn: Drawn, params: GenerationParams, mark_generated: bool) -> bytes:
    """The bytes of an image file; without metadata if these cannot be written."""
    metadata = drawn.metadata if params.metadata else None
    encode = partial(
        encode_image,
        drawn.picture,
        params.format,
        params.quality,
        opaque=params.background == "opaque",
        generated=mark_generated,
    )
    try:
        return encode(metadata)
    except Exception:
        if metadata is None:
            raise
        log.exception("the metadata of a picture cannot be written: it is stored without")
        return encode(None)
