"""Inpainting with mflux's classes that start from a picture but have no mask of their own.

mflux blends the latents of the source with noise and draws from there. After each step, the latents
outside the mask are replaced by those of the source, with the same noise, at the noise level of
that step. The finished picture is laid over the source with the feathered mask. This is what the
inpainting pipelines of diffusers do with models without inpainting weights.

Depends on mflux, mlx and numpy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from task import GenerationParams, InputImage, Stage

WHITE = 128
"""Grey values from here on count as white, as in mflux."""
PIXELS_PER_TOKEN = 16
"""Side of what one token covers, in all families whose latents are a list of tokens."""


class KeptSource:
    """The source of one picture, and where it is kept.

    Args:
        params: with an init_image and a mask.
        inputs: the folder of the pictures that the params name.
    """

    def __init__(self, params: GenerationParams, inputs: Path) -> None:
        assert params.init_image is not None
        assert params.mask is not None
        size = (params.width, params.height)
        self._source = _read(params.init_image, inputs, "RGB", size)
        self._mask = feathered(_read(params.mask, inputs, "L", size), params.mask_feather or 0)
        self._noised: Callable[[Any], Any] | None = None
        """The source's latents at a noise level."""
        self._redrawn: Any = None

    def note(self, add_noise: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps mflux's function that blends the source with noise: what it blends first is kept.
        Later calls are those of other pictures, drawn between two steps of this one."""

        def noted(clean: Any, noise: Any, sigma: Any) -> Any:
            if self._noised is None:
                self._noised = lambda level: add_noise(clean=clean, noise=noise, sigma=level)
            return add_noise(clean=clean, noise=noise, sigma=sigma)

        return noted

    def put_back(self, latents: Any, sigma: Any) -> None:
        """Replace the latents outside the mask, in place: mflux goes on with this array.

        Args:
            sigma: their noise level, 0 to 1.
        """
        import mlx.core as mx

        latents[:] = self.blended(latents, sigma)
        mx.eval(latents)

    def blended(self, latents: Any, sigma: Any) -> Any:
        """Returns the latents, outside the mask those of the source."""
        import mlx.core as mx

        if self._noised is None:
            raise RuntimeError("mflux has not blended the source with noise")
        if self._redrawn is None:
            self._redrawn = mx.array(redrawn_latents(np.asarray(self._mask), latents.shape))
        source = self._noised(sigma).astype(latents.dtype)
        return mx.where(self._redrawn, latents, source)

    def over_source(self, picture: Image.Image) -> Image.Image:
        """Returns the finished picture laid over the source. Where the feathered mask is black, the
        pixels are exactly those of the source."""
        return Image.composite(picture, self._source.convert(picture.mode), self._mask)


@contextmanager
def keeping_source(stage: Stage, inputs: Path) -> Iterator[KeptSource | None]:
    """Yields the source that is kept while one picture is drawn; None: the stage has no mask, or
    its class works with the mask itself.

    All classes blend the source with noise by the same function of mflux, each after encoding it in
    its own way: the function is wrapped meanwhile. Only the thread that draws may call.
    """
    if not stage.load_spec.pipeline.inpaints:
        yield None
        return
    from mflux.models.common.latent_creator.latent_creator import LatentCreator

    kept = KeptSource(stage.params, inputs)
    add_noise = LatentCreator.add_noise_by_interpolation
    LatentCreator.add_noise_by_interpolation = staticmethod(kept.note(add_noise))
    try:
        yield kept
    finally:
        LatentCreator.add_noise_by_interpolation = staticmethod(add_noise)


def feathered(mask: Image.Image, feather: int) -> Image.Image:
    """Returns a mask in black and white whose edge fades outwards, grey values.

    Args:
        feather: pixels outside the mask until it is black; 0: none.
    """
    white = (np.asarray(mask) >= WHITE).astype(np.int64)
    radius = feather // 2
    grown = (_window_sums(white, feather - radius) > 0).astype(np.int64)
    faded = _window_sums(grown, radius) / (2 * radius + 1) ** 2
    return Image.fromarray(np.rint(faded * 255).astype(np.uint8))


def redrawn_latents(mask: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Returns which latents are redrawn: those that the mask touches. It broadcasts to `shape`.

    Args:
        mask: grey values, rows of pixels.
        shape: of the latents, (..., rows, columns) or (1, tokens, channels).
    """
    height, width = mask.shape
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    grid: tuple[int, ...] = (1, rows * columns, 1)
    if len(shape) == 4:
        rows, columns = shape[-2:]
        grid = (1, 1, rows, columns)
    elif shape[1] != rows * columns:
        raise RuntimeError(f"latents of shape {shape} for a picture of {width} x {height}")
    cells = mask.reshape(rows, height // rows, columns, width // columns)
    touched: np.ndarray[Any, Any] = cells.max(axis=(1, 3)) > 0
    return touched.reshape(grid)


def _window_sums(values: np.ndarray[Any, Any], radius: int) -> np.ndarray[Any, Any]:
    """Returns the sum of the square around each value; beyond the edge the values continue."""
    side = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(values, ((radius + 1, radius), (0, 0)), mode="edge")
        sums = padded.cumsum(axis=0)
        values = (sums[side:] - sums[:-side]).T
    return values


def _read(image: InputImage, inputs: Path, mode: str, size: tuple[int, int]) -> Image.Image:
    """Scaled as mflux scales the picture that it starts from."""
    with Image.open(inputs / f"{image.file}.png") as opened:
        picture = opened.convert(mode)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
