"""How quickly this machine multiplies matrices, for its first forecasts."""

import time

LONGEST_S = 1.0
"""Seconds after which no other product begins."""
SMALLEST, LARGEST = 128, 4096
ENOUGH_S = 0.02
"""A product that takes this long fills the device: larger ones are not quicker per operation."""
REPEATS = 5


def measure() -> float:
    """FLOP/s of products of square matrices in bfloat16, on the device that draws.

    Small products do not fill a GPU, large ones take seconds on a CPU: the side is doubled until a
    product takes ENOUGH_S. The quickest one counts, because other programs use the machine, too. A
    GPU raises its clock under load, so it computes for LONGEST_S; a CPU only REPEATS times. Call it
    on the worker's thread: MLX ties arrays to the thread that made them.
    """
    import mlx.core as mx

    began = time.perf_counter()
    side, best, repeated = SMALLEST, 0.0, 0
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    while time.perf_counter() - began < LONGEST_S and not (is_cpu and repeated == REPEATS):
        matrix = mx.random.normal((side, side)).astype(mx.bfloat16)
        mx.eval(matrix)
        product_at = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds = time.perf_counter() - product_at
        best = max(best, 2.0 * side**3 / seconds)
        if seconds < ENOUGH_S and side < LARGEST:
            side *= 2
        else:
            repeated += 1
    return best
