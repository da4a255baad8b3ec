"""How quickly this machine computes, for its first forecasts."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from timing.speeds import Product

LONGEST_S, LONGEST_ON_CPU_S = 0.25, 0.1
"""Seconds after which no other product of a kind begins. A GPU raises its clock under load."""
SMALLEST, LARGEST = 64, 4096
"""Rows of matrices."""
SMALLEST_PICTURE, LARGEST_PICTURE = 8, 512
CHANNELS = 128
"""Of a decoder where its picture is largest."""
ENOUGH_S = 0.02
"""A product that takes this long fills the device: larger ones are not quicker per operation."""
PRODUCTS = 2
"""Increased with each change of models/cpu_products.py: speeds are then measured again."""

Compute = Callable[[], Any]


def mlx_version() -> str:
    """Version of MLX, and of what the server changes of its products: the speed depends on both.
    Empty: MLX is not installed."""
    with suppress(PackageNotFoundError):
        changes = "" if sys.platform == "darwin" else f"/{PRODUCTS}"
        return f"{version('mlx')}{changes}"
    return ""


def measure() -> dict[Product, float]:
    """FLOP/s of each kind of product, on the device that draws. Takes a second or two.

    Call it on the worker's thread: MLX ties arrays to the thread that made them. What most models
    consist of comes last, when the clock of a GPU is high.
    """
    return {product: _speed(product) for product in reversed(Product)}


def _speed(product: Product) -> float:
    """Small products do not fill a GPU, large ones take seconds on a CPU: the size is doubled until
    a product takes ENOUGH_S. The median of the largest ones counts: the first one may include
    compilation, and what other programs leave of the machine is what pictures will get."""
    import mlx.core as mx

    is_convolution = product is Product.CONVOLUTION
    side, largest = (SMALLEST_PICTURE, LARGEST_PICTURE) if is_convolution else (SMALLEST, LARGEST)
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    ends_at = time.perf_counter() + (LONGEST_ON_CPU_S if is_cpu else LONGEST_S)
    taken: list[float] = []
    speed = 0.0
    while time.perf_counter() < ends_at:
        compute = _convolution(side) if is_convolution else _product(product, side)
        product_at = time.perf_counter()
        mx.eval(compute())
        taken.append(time.perf_counter() - product_at)
        flop = 2.0 * 9 * (side * CHANNELS) ** 2 if is_convolution else 2.0 * side**3
        speed = flop / median(taken)
        if taken[-1] < ENOUGH_S and side < largest:
            side, taken = side * 2, []
    return speed


def _product(product: Product, side: int) -> Compute:
    """A product of square matrices."""
    import mlx.core as mx

    dtype = mx.float32 if product is Product.FLOAT32 else mx.bfloat16
    matrix = mx.random.normal((side, side)).astype(dtype)
    if product in (Product.BF16, Product.FLOAT32):
        mx.eval(matrix)
        return lambda: matrix @ matrix
    bits = 4 if product is Product.Q4 else 8
    weights = mx.quantize(matrix, bits=bits)
    mx.eval(matrix, weights)
    return lambda: mx.quantized_matmul(matrix, *weights, bits=bits)


def _convolution(side: int) -> Compute:
    """A convolution of a square picture."""
    import mlx.core as mx

    picture = mx.random.normal((1, side, side, CHANNELS)).astype(mx.bfloat16)
    weights = mx.random.normal((CHANNELS, 3, 3, CHANNELS)).astype(mx.bfloat16)
    mx.eval(picture, weights)
    return lambda: mx.conv2d(picture, weights, padding=1)
