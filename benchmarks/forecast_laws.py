"""Laws of time and scenarios for forecast_error.py, unknown to the server."""

from collections.abc import Callable
from dataclasses import dataclass, field

from models.mflux_registry import find_model
from models.model_catalog import Model
from task import GenerationParams


def model(name: str) -> Model:
    found = find_model(name)
    assert found
    return found


SCHNELL, KLEIN = model("schnell"), model("flux2-klein-4b")


@dataclass(frozen=True)
class Seconds:
    """What a task takes under a law, without noise."""

    text: float
    steps: list[float]
    decode: float

    @property
    def total(self) -> float:
        return self.text + sum(self.steps) + self.decode

    def times(self, factor: float) -> "Seconds":
        return Seconds(self.text * factor, [s * factor for s in self.steps], self.decode * factor)


Law = Callable[[GenerationParams, Model, float], Seconds]
"""(params, model, part of the run that is over) -> seconds."""


def linear(params: GenerationParams, model: Model, over: float) -> Seconds:
    return Seconds(0.0, [3.1 * params.tokens / 4096] * params.steps, 0.0)


def quadratic(params: GenerationParams, model: Model, over: float) -> Seconds:
    x = params.tokens / 4096
    return Seconds(0.0, [2.2 * x + 0.9 * x * x] * params.steps, 0.0)


def phases(params: GenerationParams, model: Model, over: float) -> Seconds:
    x = params.tokens / 4096
    step = 0.3 + 2.2 * x + 0.9 * x * x
    steps = [step + 0.8 + 0.3 * x, *[step] * (params.steps - 1)]
    return Seconds(1.4, steps, 0.3 + 1.6 * x)


def throttled(params: GenerationParams, model: Model, over: float) -> Seconds:
    return phases(params, model, over).times(1.2 if over > 0.5 else 1.0)


def two_models(params: GenerationParams, model: Model, over: float) -> Seconds:
    return phases(params, model, over).times(1.0 if model is SCHNELL else 0.4)


@dataclass(frozen=True)
class Scenario:
    name: str
    law: Law
    outliers: float = 0.0
    """Part of the tasks that take three times as long."""
    load_s: dict[str, float] = field(default_factory=dict)
    """More than one: the tasks alternate between these models."""


SCENARIOS = (
    Scenario("a linear", linear),
    Scenario("b attention", quadratic),
    Scenario("c phases", phases),
    Scenario("d throttled", throttled),
    Scenario("e outliers", phases, outliers=0.03),
    Scenario("f two models", two_models, load_s={SCHNELL.name: 20.0, KLEIN.name: 9.0}),
)
