"""Laws of time of further shapes for forecast_error.py."""

import math
from collections.abc import Callable

from forecast_laws import Scenario, Seconds, no_drift, shared_machine

from models.model_catalog import Model
from task import GenerationParams

StepLaw = Callable[[float, int, int], float]
"""(x, number of the step from 0, steps) -> seconds."""
OfSize = Callable[[float], float]


def _law(
    name: str,
    text_s: float,
    step: StepLaw,
    decoding: OfSize,
    *,
    first: OfSize = lambda x: 0.0,
    slower: Callable[[int, int], float] = lambda width, height: 1.0,
    outliers: float = 0.0,
    drift: Callable[[float], float] = no_drift,
) -> Scenario:
    """Args: first: more seconds of the first step; slower: factor of steps, by width and height."""

    def law(params: GenerationParams, model: Model, over: float) -> Seconds:
        x, n = params.tokens / 4096, params.steps
        factor = slower(params.width, params.height)
        steps = [factor * step(x, i, n) for i in range(n)]
        return Seconds(text_s, [steps[0] + first(x), *steps[1:]], decoding(x))

    return Scenario(name, law, outliers=outliers, drift=drift)


def _two_thresholds(x: float, i: int, n: int) -> float:
    return (0.2 + 1.4 * x) * (1.6 if x > 0.6 else 1.0) * (1.5 if x > 1.5 else 1.0)


def _aspect(width: int, height: int) -> float:
    return 1.0 + 0.5 * abs(math.log2(width / height))


def _alignment(width: int, height: int) -> float:
    return 1.0 if width % 128 == height % 128 == 0 else 1.35


SHAPED = (
    _law(
        "logarithmic",
        0.6,
        lambda x, i, n: 1.9 * math.log1p(2.1 * x),
        lambda x: 0.8 * math.sqrt(x) + 0.2,
    ),
    _law("two thresholds", 1.1, _two_thresholds, lambda x: 0.5 * math.ceil(4.0 * x)),
    _law(
        "three slow first steps",
        0.9,
        lambda x, i, n: (0.15 + 1.3 * x + 0.3 * x * x) * (2.5 if i < 3 else 1.0),
        lambda x: 0.4 + 0.9 * x,
    ),
    _law(
        "hotter with each step",
        0.5,
        lambda x, i, n: (0.1 + 2.0 * x) * min(1.0 + 0.015 * i, 1.4),
        lambda x: 0.3 + 1.1 * x,
    ),
    _law(
        "step cache from the sixth step on",
        1.5,
        lambda x, i, n: 2.4 * x**1.15 * (0.3 if i >= 5 and i % 2 else 1.0),
        lambda x: x,
    ),
    _law(
        "compiling by size, floor",
        0.8,
        lambda x, i, n: 0.2 + 1.6 * max(x, 0.7) + 0.5 * max(x, 0.7) ** 2,
        lambda x: 0.2 + 0.8 * max(x, 0.5),
        first=lambda x: 6.0 + 4.0 * max(x, 0.7),
    ),
    _law(
        "steps filled up to four",
        1.0,
        lambda x, i, n: (0.3 + 1.5 * x) * math.ceil(n / 4) * 4 / n,
        lambda x: 0.6 + 0.6 * x,
    ),
    _law(
        "slower if not square",
        0.7,
        lambda x, i, n: 0.2 + 1.8 * x,
        lambda x: 0.2 + 0.9 * x,
        slower=_aspect,
    ),
    _law(
        "slower unless in 128ths",
        0.4,
        lambda x, i, n: 0.1 + 1.5 * x + 0.4 * x * x,
        lambda x: 0.3 + 1.2 * x,
        slower=_alignment,
    ),
    _law(
        "text and decoding, 8 % outliers",
        12.0,
        lambda x, i, n: 0.4 * x,
        lambda x: (0.5 + 2.0 * x) * (3.0 if x > 1.0 else 1.0),
        outliers=0.08,
    ),
    _law(
        "saturating, 8 % outliers",
        0.3,
        lambda x, i, n: 1.2 * min(x, 0.9) ** 0.5 * max(x / 0.9, 1.0) ** 1.6,
        lambda x: 0.7 * x,
        outliers=0.08,
    ),
    _law(
        "twice as slow from step 20 on",
        0.8,
        lambda x, i, n: (0.2 + 1.2 * x) * (2.0 if i >= 20 else 1.0),
        lambda x: 0.3 + 0.8 * x,
    ),
    _law(
        "slower with more steps, 8 % outliers",
        0.8,
        lambda x, i, n: (0.2 + 1.1 * x) * (1.0 + 0.02 * n),
        lambda x: 0.3 + 0.8 * x,
        outliers=0.08,
    ),
    _law(
        "hotter with each step, shared machine",
        0.5,
        lambda x, i, n: (0.1 + 2.0 * x) * min(1.0 + 0.015 * i, 1.4),
        lambda x: 0.3 + 1.1 * x,
        drift=shared_machine,
    ),
)
