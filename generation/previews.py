"""Small previews of running tasks, made only while a client requests them.

Latents become colours by a linear map of each latent and its eight neighbours, which is nearly free
and good enough to see what comes. It is learned by least squares from finished pictures, their last
latents against the picture averaged over 8 x 8 pixels, one map for each decoder; before there is
one, the three main directions of the latents stand for brightness and colours.

The worker thread copies the latents, at most once a step and for at most SHARE of its time; a
thread of its own ("previews") does the rest.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL import Image

from images import jpeg_of
from supervision import SupervisedQueue

log = logging.getLogger(__name__)

Array = NDArray[np.float32]

PACKED = frozenset({"flux", "flux2", "qwen"})
"""Families with latents (1, tokens, channels x 2 x 2), one token per 16 x 16 pixels."""
PLANES = frozenset({"z_image", "krea2", "anima"})
"""Families with latents (channels, H/8, W/8)."""
FAMILIES = PACKED | PLANES
SHARE = 0.03
"""Part of the worker's time that previews may take."""
WATCHED_S = 10.0
"""Seconds. Previews are made if one was requested in this time, or in the latest two steps."""
LEARN_FROM = 8
"""Number of pictures from which a map is learned."""
LATENTS_OF_EACH = 4096
"""Latents that are used of each of these pictures, at most."""
RIDGE = 1e-3
KEPT = 8
"""Previews, and tasks that somebody looks at: 100 times as many."""


@dataclass
class _Map:
    """A linear map from latent channels to a colour, with the sums it was learned from."""

    weights: Array | None = None
    pictures: int = 0
    inputs: Any = 0.0
    outputs: Any = 0.0
    """Sums over the latents: channels x channels, channels x colours."""

    def learn(self, latents: Array, colours: Array) -> None:
        every = -(-latents.shape[0] * latents.shape[1] // LATENTS_OF_EACH)
        known, wanted = _with_neighbours(latents)[::every], colours.reshape(-1, 3)[::every]
        self.inputs = self.inputs + known.T @ known
        self.outputs = self.outputs + known.T @ wanted
        size = len(self.inputs)
        steady = RIDGE * np.trace(self.inputs) / size * np.eye(size, dtype=np.float32)
        self.weights = np.linalg.solve(self.inputs + steady, self.outputs)
        self.pictures += 1

    def colours(self, latents: Array) -> Array:
        """0 to 255, as many rows and columns as the latents."""
        if self.weights is None:
            return _main_directions(latents)
        shape = (*latents.shape[:2], 3)
        return np.asarray(
            (_with_neighbours(latents) @ self.weights).reshape(shape), dtype=np.float32
        )


@dataclass
class Sketch:
    """The preview of one picture, updated by the hook between the steps."""

    task_id: str = ""
    family: str = ""
    decoder: str = ""
    """The decoder; pictures of the same decoder share a map."""
    step_at: float = 0.0
    step_before_at: float = 0.0
    """When the latest steps ended; monotonic clock."""
    final: Array | None = field(default=None, repr=False)


class Previews:
    """Args:
    on: whether any are made.
    """

    def __init__(self, *, on: bool = True, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.on = on
        self.made = 0
        """Number of JPEGs since the start."""
        self.on_new: Callable[[str], None] = lambda task_id: None
        """Called with the id of a task that has a newer preview, on the thread that made it."""
        self.on_look: Callable[[str], None] = lambda task_id: None
        """Called with the id of a task whose preview a client requests."""
        self._monotonic = monotonic
        self._lock = Lock()
        self._looked_at: LRUCache[str, float] = LRUCache(100 * KEPT)
        self._jpegs: LRUCache[str, bytes] = LRUCache(KEPT)
        self._maps: dict[str, _Map] = {}
        self._thread = SupervisedQueue[Callable[[], None]]("previews", self._do, self._job_died)
        self._busy = False
        self._task_id = ""
        self._now = Sketch()
        self._rest_until = self._started_at = 0.0

    # -- HTTP threads -----------------------------------------------------------------------------

    def look(self, task_id: str) -> bytes | None:
        """Returns the latest preview of a task (JPEG) and requests further ones."""
        self.on_look(task_id)
        with self._lock:
            self._looked_at[task_id] = self._monotonic()
            return self._jpegs.get(task_id)

    def latest(self, task_id: str) -> bytes | None:
        """As look(), without a request."""
        with self._lock:
            return self._jpegs.get(task_id)

    def put(self, task_id: str, jpeg: bytes) -> None:
        """Another machine has made a preview."""
        with self._lock:
            self._jpegs[task_id] = jpeg
        self.on_new(task_id)

    # -- the worker thread ------------------------------------------------------------------------

    def turn_to(self, task_id: str) -> None:
        """The next pictures belong to this task."""
        self._task_id = task_id

    @contextmanager
    def picture(self, family: str, decoder: str) -> Iterator[None]:
        """A picture is drawn inside; another one may be drawn meanwhile, between two steps."""
        at = self._monotonic()
        before, self._now = self._now, Sketch(self._task_id, family, decoder, at, at)
        try:
            yield
        finally:
            self._now = before

    def must_generate(self) -> bool:
        """Whether draw() must be called now. Called once after each step."""
        now, at = self._now, self._monotonic()
        since = min(at - WATCHED_S, now.step_before_at)
        now.step_before_at, now.step_at, self._started_at = now.step_at, at, at
        with self._lock:
            looked_at = self._looked_at.get(now.task_id, -1.0)
        return (
            self.on
            and now.family in FAMILIES
            and not self._busy
            and at >= self._rest_until
            and looked_at >= since
        )

    def draw(self, latents: Any, width: int, height: int) -> None:
        """Make a preview of the picture as it will be.

        Args:
            latents: without noise, 32 bit floats, evaluated.
        """
        copy = _arranged(latents, self._now.family, width, height)
        at = self._monotonic()
        self._rest_until = at + (at - self._started_at) * (1 - SHARE) / SHARE
        if copy is not None:
            self._busy = True
            self._thread.put(partial(self._draw, self._now.task_id, self._map_of(self._now), copy))

    def may_learn(self) -> bool:
        """Whether keep() and learn() have an effect."""
        now = self._now
        return self.on and now.family in FAMILIES and self._map_of(now).pictures < LEARN_FROM

    def keep(self, latents: Any, width: int, height: int) -> None:
        """Takes the last latents of a picture, 32 bit floats."""
        self._now.final = _arranged(latents, self._now.family, width, height)

    def learn(self, picture: Image.Image) -> None:
        """Takes the picture that the kept latents became."""
        final, self._now.final = self._now.final, None
        if final is not None:
            self._thread.put(partial(self._learn, self._map_of(self._now), final, picture))

    # -- its own thread ---------------------------------------------------------------------------

    def _do(self, job: Callable[[], None]) -> None:
        job()

    def _job_died(self, job: Callable[[], None]) -> None:
        self._busy = False

    def _draw(self, task_id: str, known: _Map, latents: Array) -> None:
        try:
            colours = known.colours(latents).clip(0, 255).astype(np.uint8)
            height, width, _ = colours.shape
            jpeg = jpeg_of(colours.tobytes(), width, height)
            with self._lock:
                self._jpegs[task_id] = jpeg
            self.made += 1
            self.on_new(task_id)
        except Exception:
            log.exception("a preview of task %s failed", task_id)
        finally:
            self._busy = False

    def _learn(self, known: _Map, latents: Array, picture: Image.Image) -> None:
        try:
            rows, columns, _ = latents.shape
            if picture.size == (columns * 8, rows * 8):
                small = np.asarray(picture.convert("RGB").reduce(8), dtype=np.float32)
                known.learn(latents, small)
        except Exception:
            log.exception("nothing could be learned for previews")

    def _map_of(self, sketch: Sketch) -> _Map:
        return self._maps.setdefault(sketch.decoder, _Map())


def _arranged(latents: Any, family: str, width: int, height: int) -> Array | None:
    """A copy of latents as rows, columns, channels, one for each 8 x 8 pixels; None: they are
    arranged in a way that is not known, or hold NaN."""
    rows, columns = height // 8, width // 8
    copy = np.array(latents, dtype=np.float32)
    if not np.isfinite(copy).all():
        return None
    if family in PACKED:
        if copy.ndim != 3 or copy.shape[1] != (rows // 2) * (columns // 2) or copy.shape[2] % 4:
            return None
        copy = copy.reshape(rows // 2, columns // 2, copy.shape[2] // 4, 2, 2)
        return copy.transpose(0, 3, 1, 4, 2).reshape(rows, columns, -1)
    copy = copy.squeeze()
    if copy.ndim != 3 or copy.shape[1:] != (rows, columns):
        return None
    return copy.transpose(1, 2, 0)


def _with_neighbours(latents: Array) -> Array:
    """Returns a row per latent: its channels, those of its neighbours, and a constant."""
    rows, columns, channels = latents.shape
    around = np.pad(latents, ((1, 1), (1, 1), (0, 0)), mode="edge")
    known = np.ones((rows, columns, 9 * channels + 1), np.float32)
    for number in range(9):
        down, right = divmod(number, 3)
        part = known[:, :, number * channels : (number + 1) * channels]
        part[:] = around[down : down + rows, right : right + columns]
    return known.reshape(rows * columns, -1)


def _main_directions(latents: Array) -> Array:
    """Returns colours before a map is learned: the main direction is brightness, the next ones
    less tints it."""
    flat = latents.reshape(-1, latents.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, directions = np.linalg.eigh(flat.T @ flat)
    main = flat @ directions[:, :-4:-1]
    main = main / (main.std(axis=0) + 1e-6)
    light, warm, green = main.T
    colours = np.stack([light + 0.4 * warm, light + 0.4 * green, light - 0.4 * warm], axis=-1)
    return np.asarray(128 + 45 * colours, dtype=np.float32).reshape(*latents.shape[:2], 3)
