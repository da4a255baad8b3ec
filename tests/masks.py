"""A picture and a mask, and the tiny models that keep what is outside it."""

from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64
BOX = (32, 16, 64, 48)
"""Left, upper, right, lower edge of what is redrawn: whole latents of every family."""


def box_of(box: tuple[int, int, int, int], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


SOURCE = Image.merge(
    "RGB", [Image.radial_gradient("L").rotate(90 * n).resize((WIDTH, HEIGHT)) for n in range(3)]
)

MASK = box_of(BOX)
TINY = (
    "noise-flux1",
    "noise-flux2",
    "noise-z-image",
    "noise-qwen",
    "noise-krea2",
    "noise-ernie",
    "noise-qwen21",
)


def inside(feather: int = 0) -> np.ndarray[Any, Any]:
    left, top, right, bottom = BOX
    return (
        np.asarray(box_of((left - feather, top - feather, right + feather, bottom + feather))) > 0
    )
