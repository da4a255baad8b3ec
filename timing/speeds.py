"""How quickly a machine computes, by kind of product: what first forecasts are made of."""

from collections.abc import Mapping
from enum import StrEnum

PRIOR_FLOP_PER_S = 10e12
"""Of an Apple M2 Max in bfloat16, and of a machine that was not measured."""


class Product(StrEnum):
    """A kind of product that models consist of. A GPU computes all about equally quickly, a CPU
    those in bfloat16 twenty times more slowly than those in 32 bits."""

    BF16 = "bf16"
    FLOAT32 = "float32"
    Q4 = "q4"
    """Of a matrix in bfloat16 with one that is quantized to 4 bits."""
    Q8 = "q8"
    CONVOLUTION = "convolution"
    """3 x 3, of decoders. A CPU computes it in 32 bits for all models."""


Speeds = Mapping[Product, float]
"""FLOP/s of products that fill the device."""
PRIOR_SPEEDS: Speeds = {Product.BF16: PRIOR_FLOP_PER_S}


def speed_of(speeds: Speeds, product: Product) -> float:
    """FLOP/s; a kind that was not measured is taken to be as quick as BF16."""
    return speeds.get(product) or speeds.get(Product.BF16) or PRIOR_FLOP_PER_S


def product_of(bits: int | None, *, float32: bool) -> Product:
    """What a model with such weights computes.

    Args:
        bits: to which they are quantized; None: they are not.
        float32: whether weights that are not quantized are multiplied in 32 bits.
    """
    if bits:
        return Product.Q4 if bits <= 4 else Product.Q8
    return Product.FLOAT32 if float32 else Product.BF16
