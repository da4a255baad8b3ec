"""Products with quantized matrices, as the server computes them on a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from models import cpu_products
from models.mlx_setup import prepare_mlx

BITS = (3, 4, 5, 6, 8)
Call = Callable[..., Any]
"""Calls a function like mx.quantized_matmul with x, w, scales and biases."""


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    prepare_mlx()
    import mlx.core as mx

    with mx.stream(mx.cpu):
        yield


def mlx_cpu() -> Any:
    import mlx.core as mx

    return mx.cpu


def product_of_mlx() -> Any:
    import mlx.core as mx

    return getattr(mx.quantized_matmul, "args", [mx.quantized_matmul])[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", [100, 1_000_000])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_restored_matrix(
    monkeypatch: pytest.MonkeyPatch, name: str, part: int, bits: int
) -> None:
    import mlx.core as mx

    monkeypatch.setattr(cpu_products, "PART", part)
    values = mx.random.normal((2, 3, 128)).astype(getattr(mx, name))
    matrix = mx.quantize(mx.random.normal((7, 128)), bits=bits)
    got = cpu_products.product(product_of_mlx(), values, *matrix, bits=bits)
    restored = mx.dequantize(*matrix, bits=bits)
    exact = values.astype(mx.float32) @ restored.T
    assert (got.shape, got.dtype) == ((2, 3, 7), mx.float32)
    assert mx.allclose(got, exact, rtol=1e-5, atol=1e-4).item()


@pytest.mark.parametrize("rows", [1, 8])
def test_what_mlx_returns_has_the_same_type_and_nearly_the_same_numbers(rows: int) -> None:
    import mlx.core as mx

    values = mx.random.normal((rows, 128)).astype(mx.bfloat16)
    matrix = mx.quantize(mx.random.normal((64, 128)).astype(mx.bfloat16), bits=4)
    of_mlx = product_of_mlx()(values, *matrix, bits=4)
    got = cpu_products.product(product_of_mlx(), values, *matrix, bits=4)
    assert got.dtype == of_mlx.dtype
    assert mx.allclose(got, of_mlx, rtol=0.05, atol=0.5).item()
    assert mx.array_equal(got, of_mlx).item() == (rows < cpu_products.LEAST_ROWS)


COMPUTED: tuple[Call, ...] = (
    lambda multiply, x, w, s, b: multiply(x, w, s, b),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, True, 64, 4, "affine"),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, True, bits=4, group_size=None),
    lambda multiply, x, w, s, b: multiply(x, w, scales=s, biases=b, mode="affine", stream=None),
    lambda multiply, x, w, s, b: multiply(x.reshape(2, 4, -1), w, s, biases=b, bits=None),
)
LEFT: tuple[Call, ...] = (
    lambda multiply, x, w, s, b: multiply(x, w, s, b, stream=mlx_cpu()),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, False),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, transpose=False),
    lambda multiply, x, w, s, b: multiply(x[:2], w, s, b),
    lambda multiply, x, w, s, b: multiply(x[0], w, s, b),
    lambda multiply, x, w, s, b: multiply(x[None], w[None], s[None], b[None]),
)
REFUSED: tuple[Call, ...] = (
    lambda multiply, x, w, s, b: multiply(x, w),
    lambda multiply, x, w, s, b: multiply(x, w=w, scales=s, biases=b),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, True, 64, 4, "affine", None),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, other=1),
    lambda multiply, x, w, s, b: multiply(np.array(x), w, s, b),
    lambda multiply, x, w, s, b: multiply(x, w, s),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, mode="mxfp4"),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, group_size=32),
    lambda multiply, x, w, s, b: multiply(x, w, s, b, bits=8),
    lambda multiply, x, w, s, b: multiply(x[:, :64], w, s, b),
    lambda multiply, x, w, s, b: multiply(x, w, s, b[:64]),
)


def operands() -> tuple[Any, ...]:
    """Eight rows of 128 numbers, and a matrix of 128 x 128 at 4 bits."""
    import mlx.core as mx

    return mx.random.normal((8, 128)), *mx.quantize(mx.random.normal((128, 128)), bits=4)


@pytest.mark.parametrize("call", [*COMPUTED, *LEFT])
def test_it_takes_the_calls_of_the_function_that_it_replaces(call: Call) -> None:
    import mlx.core as mx

    asked, given = [], operands()

    def of_mlx(*values: Any, **options: Any) -> Any:
        asked.append(values)
        return product_of_mlx()(*values, **options)

    got, expected = (
        call(partial(cpu_products.product, of_mlx), *given),
        call(product_of_mlx(), *given),
    )
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert mx.allclose(got, expected, rtol=1e-4, atol=1e-3).item()
    assert bool(asked) == (call in LEFT)


@pytest.mark.parametrize("call", REFUSED)
def test_it_refuses_what_the_function_that_it_replaces_refuses(call: Call) -> None:
    import mlx.core as mx

    given = operands()
    with pytest.raises((TypeError, ValueError)) as expected:
        mx.eval(call(product_of_mlx(), *given))
    with pytest.raises(expected.type):
        mx.eval(call(partial(cpu_products.product, product_of_mlx()), *given))


def test_the_matrices_of_later_layers_are_not_restored_beforehand() -> None:
    import mlx.core as mx

    layers = [mx.quantize(mx.random.normal((512, 512)), bits=8) for _ in range(20)]
    values = mx.random.normal((8, 512))
    mx.eval(layers, values)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for layer in layers:
        values = cpu_products.product(product_of_mlx(), values, *layer, bits=8) / 16.0
    mx.eval(values)
    restored = len(layers) * 512 * 512 * 4
    assert mx.get_peak_memory() - before < restored / 2


def test_quantized_layers_use_it_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx
    from mlx import nn

    monkeypatch.setattr(mx, "is_available", lambda device: False)
    monkeypatch.setattr(mx, "quantized_matmul", product_of_mlx())
    prepare_mlx()
    prepare_mlx()
    assert getattr(mx.quantized_matmul, "args", None) == (product_of_mlx(),)
    layer = nn.Linear(128, 64).to_quantized(bits=4)
    assert layer(mx.ones((8, 128))).shape == (8, 64)
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "quantized_matmul", product_of_mlx())
    prepare_mlx()
    assert not hasattr(mx.quantized_matmul, "args")
