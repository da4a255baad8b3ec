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
USUAL_GROUP = 64
"""Numbers of a row that share a scale, where a call does not say."""


def multiply_quantized_in_float32() -> None:
    """Let mx.quantized_matmul do so from now on. Calling this again changes nothing."""
    import mlx.core as mx

    if getattr(mx.quantized_matmul, "func", None) is not product:
        vars(mx)["quantized_matmul"] = partial(product, mx.quantized_matmul)


def product(  # noqa: PLR0917  MLX takes them so
    of_mlx: Any,
    x: Any,
    w: Any,
    /,
    scales: Any,
    biases: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    stream: Any = None,
) -> Any:
    """Multiply the last axis of x (..., inputs) by a quantized matrix (outputs, inputs).

    Args:
        of_mlx: mx.quantized_matmul, whose arguments the others are. It computes what quantized
            layers do not ask for, and raises what it raises.
    """
    import mlx.core as mx

    given = (x, w, scales, biases)
    is_usual = stream is None and transpose is True and mode == "affine"
    if not is_usual or not _are_of_a_layer(*given, group_size or USUAL_GROUP):
        return of_mlx(*given, transpose, group_size, bits, mode, stream=stream)
    values = x.astype(mx.float32)
    products = [values]
    outputs = max(PART // x.shape[-1], 1)
    for start in range(0, w.shape[0], outputs):
        packed, factors, offsets = (array[start : start + outputs] for array in (w, scales, biases))
        # without this, MLX restores the matrices of many layers before it multiplies the first
        packed = mx.depends([packed], products[-1:])[0]
        groups = factors.astype(mx.float32), offsets.astype(mx.float32)
        matrix = mx.dequantize(packed, *groups, group_size=group_size, bits=bits)
        products.append(values @ matrix.T)
    return mx.concatenate(products[1:], axis=-1).astype(mx.result_type(x, scales))


def _are_of_a_layer(x: Any, w: Any, scales: Any, biases: Any, group_size: int) -> bool:
    """Whether these are enough rows to multiply, and a matrix for them."""
    import mlx.core as mx

    if not all(isinstance(one, mx.array) for one in (x, w, scales, biases)):
        return False
    has_rows = x.ndim > 0 and x.size >= max(LEAST_ROWS * x.shape[-1], 1)
    fits = w.ndim == 2 and scales.shape == (w.shape[0], x.shape[-1] / group_size) == biases.shape
    return has_rows and bool(fits)
