"""Products with quantized matrices on a CPU, computed by its BLAS.

MLX multiplies them on a CPU at 0.2 GFLOP/s, and matrices of 32-bit numbers at 50 to 100. So here
parts of a matrix are restored in 32 bits, one after the other, and multiplied. That is more exact,
too: MLX sums up in 16 bits. Nothing is changed where MLX has a GPU.

Depends on mlx.
"""

from functools import partial
from typing import Any

LEAST_ROWS = 4
"""With fewer, restoring the matrix takes longer than MLX's own product."""
PART = 8_000_000
"""Numbers of a matrix that are restored at a time. MLX holds about three parts."""
USUAL = {"transpose": True, "mode": "affine"}
"""Options of quantized layers; products with other ones are left to MLX."""


def multiply_quantized_in_float32() -> None:
    """Let mx.quantized_matmul do so from now on. Calling this again changes nothing."""
    import mlx.core as mx

    if getattr(mx.quantized_matmul, "func", None) is not product:
        vars(mx)["quantized_matmul"] = partial(product, mx.quantized_matmul)


def product(of_mlx: Any, x: Any, w: Any, scales: Any, biases: Any = None, **options: Any) -> Any:
    """Multiply the last axis of x (..., inputs) by a quantized matrix (outputs, inputs).

    Args:
        of_mlx: mx.quantized_matmul, whose arguments the others are. Only they can be positional.
    """
    import mlx.core as mx

    sizes = {key: options[key] for key in ("group_size", "bits") if key in options}
    others = {key: value for key, value in options.items() if key not in sizes}
    is_usual = w.ndim == 2 and all(USUAL.get(key) == value for key, value in others.items())
    if not is_usual or x.size < LEAST_ROWS * x.shape[-1]:
        return of_mlx(x, w, scales, biases, **options)
    values = x.astype(mx.float32)
    products = [values]
    outputs = max(PART // x.shape[-1], 1)
    for start in range(0, w.shape[0], outputs):
        packed, *groups = (array[start : start + outputs] for array in (w, scales, biases))
        # without this, MLX restores the matrices of many layers before it multiplies the first
        packed = mx.depends([packed], products[-1:])[0]
        matrix = mx.dequantize(packed, *(one.astype(mx.float32) for one in groups), **sizes)
        products.append(values @ matrix.T)
    return mx.concatenate(products[1:], axis=-1).astype(mx.result_type(x, scales))
