"""Compiled denoising steps: made once for many pictures, and without weights of their own.

MLX (up to 0.32, https://github.com/ml-explore/mlx/issues/3932) does not free all of a compiled
function that contains an operation with several results, such as mx.split. What the function refers
to then stays in memory: a whole transformer, or the embeddings of a prompt. So functions are
compiled here with all their arrays as inputs, and what is left of them are a few bytes.

Depends on mlx.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

STEP_BUILDERS = ("_predict", "_predict_conditional", "_predict_unconditional")
"""Methods of mflux's classes that compile a denoising step."""
PICTURES_OF_A_STEP = 100
"""Pictures until a step is compiled again: MLX keeps a version per size and guidance."""


def compile_without_weights() -> None:
    """Makes mx.compile pass the arrays and modules of a closure as inputs, from now on.

    Calling this again changes nothing.
    """
    import mlx.core as mx

    if getattr(mx.compile, "func", None) is not _compiled:
        mx.compile = partial(_compiled, mx.compile)


def _compiled(compile_it: Any, function: Callable[..., Any], *more: Any, **options: Any) -> Any:
    """Compiles a function. While it is traced, its closure and modules hold placeholders."""
    import mlx.core as mx
    from mlx import nn

    contents = [(cell, _content(cell)) for cell in getattr(function, "__closure__", None) or ()]
    cells = [cell for cell, content in contents if isinstance(content, mx.array)]
    holders = [*(content for _, content in contents), getattr(function, "__self__", None)]
    modules = [holder for holder in holders if isinstance(holder, nn.Module)]
    if more or options or not (cells or modules):
        return compile_it(function, *more, **options)

    def traced(arrays: list[Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        before = [cell.cell_contents for cell in cells]
        _fill(cells, arrays)
        try:
            return function(*given, **named)
        finally:
            _fill(cells, before)

    compiled = compile_it(traced, inputs=modules)

    def call(*given: Any, **named: Any) -> Any:
        return compiled([cell.cell_contents for cell in cells], given, named)

    return call


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _fill(cells: list[Any], contents: list[Any]) -> None:
    for cell, content in zip(cells, contents, strict=True):
        cell.cell_contents = content


class KeptSteps:
    """The compiled steps of a loaded model that depend on its weights only.

    The steps of other classes refer to the prompt of their picture: each picture compiles one.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[str, str], tuple[Any, int]] = {}
        """By class and method: the step, and for how many pictures it was used."""

    def keep(self, pipeline: Any) -> None:
        """Let a pipeline compile its steps for many pictures at a time."""
        for name in STEP_BUILDERS:
            build = getattr(pipeline, name, None)
            if build and list(inspect.signature(build).parameters) == ["transformer"]:
                key = (type(pipeline).__name__, name)
                setattr(pipeline, name, partial(self._step, key, build))

    def clear(self) -> None:
        """To be called when weights change."""
        self._steps.clear()

    def _step(self, key: tuple[str, str], build: Callable[[Any], Any], transformer: Any) -> Any:
        step, pictures = self._steps.get(key, (None, PICTURES_OF_A_STEP))
        if pictures >= PICTURES_OF_A_STEP:
            step, pictures = build(transformer), 0
        self._steps[key] = step, pictures + 1
        return step
