"""Training batches: pictures of one size as packed latents, captions as tokens, and noise levels.

A batch depends on the seed and the number of its step only, so a resumed training goes on with the
same ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.painter.captions import caption
from models.painter.grammar import Scene, completed, placed_things, random_scene
from models.painter.layout import Layout, layout_of
from models.painter.patches import CHANNELS, SIDE, Array, Patches
from models.painter.rendering import render

STEPS = 4  # that the model is trained for
_NODES = (0.64, 0.12, 0.12, 0.12)  # how often each of their noise levels is drawn
_VALUES = 4 * CHANNELS  # of a token
_TOKEN = 2 * SIDE  # pixels
_THING_WEIGHT = 4.0  # of the loss where a thing is; elsewhere 1 (then the mean is made 1)
# Things whose outlines take longest to learn are in more pictures: most of the others are replaced.
HARD = ("star", "flower", "lighthouse", "boat")
_REPLACED = 0.6
# Pictures with noise that does not belong to them, for pictures that are changed and not drawn.
# In this noise one must still see the picture.
_FOREIGN = 0.2
_FOREIGN_MOST = 0.85


Repaint = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Bucket:
    """A size of pictures. `batch` makes each bucket's step take about as long. Several pictures in
    turn have the same caption, which is encoded once."""

    width: int
    height: int
    batch: int
    each: int = 1  # pictures of a caption

    @property
    def tokens(self) -> int:
        return self.width * self.height // _TOKEN**2


SMALL = (Bucket(128, 128, 32, 2), Bucket(160, 96, 32, 2), Bucket(96, 160, 32, 2))
MIDDLE = (Bucket(256, 256, 16, 2), Bucket(320, 192, 16, 2), Bucket(192, 320, 16, 2))
LARGE = (Bucket(512, 512, 4), Bucket(640, 384, 4), Bucket(384, 640, 4))
HUGE = (Bucket(1024, 1024, 1), Bucket(1024, 576, 1), Bucket(768, 768, 2))
ALL_SIZES_FROM = 0.6
"""Share of the training from which on all sizes are drawn."""
# From a share of the training on: how often each group of sizes is drawn.
CURRICULUM: tuple[tuple[float, tuple[float, float, float, float]], ...] = (
    (0.0, (1.0, 0.0, 0.0, 0.0)),
    (0.25, (0.5, 0.45, 0.05, 0.0)),
    (ALL_SIZES_FROM, (0.25, 0.4, 0.22, 0.13)),
    (0.89, (0.15, 0.6, 0.2, 0.05)),
)


@dataclass(frozen=True)
class Batch:
    bucket: Bucket
    latents: Array  # (batch, tokens, 64), without noise
    noise: Array
    sigmas: Array  # (batch,): 1 is noise only
    weights: Array  # (batch, tokens) of the loss
    t5: NDArray[np.int32]  # (captions, T5_LENGTH)
    clip: NDArray[np.int32]  # (captions, CLIP_LENGTH)

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What the loss is computed from, in the order of its arguments."""
        return (self.latents, self.noise, self.sigmas, self.weights, self.t5, self.clip)


def bucket_at(progress: float, random: Random) -> Bucket:
    """Args:
    progress: the share of the training that is over.
    """
    shares = next(shares for start, shares in reversed(CURRICULUM) if progress >= start)
    group = random.choices((SMALL, MIDDLE, LARGE, HUGE), shares)[0]
    # Squares are half of the pictures.
    return random.choices(group, (2, 1, 1))[0]


def training_scene(random: Random) -> Scene:
    scene = random_scene(random)
    if any(thing.name in HARD for thing in scene.things) or random.random() >= _REPLACED:
        return scene
    return random_scene(random)


def make_batch(  # noqa: PLR0917
    patches: Patches,
    tokenizers: dict[str, Any],
    bucket: Bucket,
    step: int,
    seed: int,
    repaint: Repaint = lambda picture: picture,
) -> Batch:
    random = Random(seed * 1_000_003 + step)
    numbers = np.random.default_rng((seed, step))
    noise = numbers.standard_normal((bucket.batch, bucket.tokens, _VALUES), np.float32)
    pixels, texts, weights = [], [], []
    for number, own in enumerate(noise):
        if number % bucket.each == 0:
            scene = training_scene(random)
            texts.append(caption(scene, random))
        layout = layout_of(own)
        picture = repaint(render(scene, bucket.width, bucket.height, layout))
        pixels.append(np.asarray(picture, np.float32) / 127.5 - 1)
        weights.append(_weights(scene, layout, bucket))
    foreign = numbers.random(bucket.batch) < _FOREIGN
    others = numbers.standard_normal(noise.shape, np.float32)
    sigmas = _sigmas(numbers, bucket.batch)
    return Batch(
        bucket,
        packed(patches.encode(np.stack(pixels))),
        np.where(foreign[:, None, None], others, noise),
        np.where(foreign, sigmas * _FOREIGN_MOST, sigmas),
        np.stack(weights),
        _tokens(tokenizers["t5"], texts),
        _tokens(tokenizers["clip"], texts),
    )


def packed(latents: Array) -> Array:
    """Returns tokens (batch, tokens, 64), as mflux packs latents, of (batch, rows, columns, 16)."""
    batch, rows, columns, _ = latents.shape
    squares = latents.reshape(batch, rows // 2, 2, columns // 2, 2, CHANNELS)
    tokens: Array = squares.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, 4 * CHANNELS)
    return tokens


def schedule(steps: int) -> Array:
    """Returns the noise levels of mflux's linear scheduler, from 1 to the last before 0."""
    return np.linspace(1, 1 / steps, steps, dtype=np.float32)


def _sigmas(numbers: np.random.Generator, count: int) -> Array:
    # Many are those that a picture of STEPS steps is drawn with, and most of these are its first.
    nodes = numbers.choice(schedule(STEPS), count, p=_NODES)
    others = numbers.random(count, np.float32)
    return np.where(numbers.random(count) < 0.7, nodes, np.maximum(others, 0.02))


def _weights(scene: Scene, layout: Layout, bucket: Bucket) -> Array:
    rows, columns = bucket.height // _TOKEN, bucket.width // _TOKEN
    weights = np.ones((rows, columns), np.float32)
    for thing in placed_things(completed(scene, layout), layout):
        half = thing.size * min(rows, columns) * 0.55
        y, x = thing.y * rows, thing.x * columns
        top, left = max(0, int(y - half)), max(0, int(x - half))
        weights[top : int(y + half) + 1, left : int(x + half) + 1] = _THING_WEIGHT
    return np.asarray(weights / weights.mean(), np.float32).reshape(-1)


def _tokens(tokenizer: Any, texts: list[str]) -> NDArray[np.int32]:
    return np.array(tokenizer.tokenize(texts).input_ids, np.int32)
