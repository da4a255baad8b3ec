"""What a task's own work takes: its features under the key of their law, and the forecast.

Not thread-safe: the LiveQueue calls it under the QueueCore's lock.
"""

from collections.abc import Iterable
from dataclasses import replace

from models.model_catalog import Weights
from task import SIDE_STEP, Stage, Task
from timing_model import Confidence, Forecast, TimingModel, Work


class WorkForecast:
    def __init__(self, timing: TimingModel) -> None:
        self.timing = timing
        self._bits: dict[str, int | None] = {}  # of weights once loaded: what is stored won

    def bits(self, weights: Weights) -> int | None:
        """Bits that weights are quantized to; as asked for, until they are loaded."""
        return self._bits.get(weights.key, weights.quantize)

    def learn_bits(self, weights: Weights, bits: int | None) -> bool:
        """Weights were loaded, quantized to so many bits; whether that is news."""
        news = bits != self.bits(weights)
        self._bits[weights.key] = bits
        return news

    def load_key(self, weights: Weights) -> str:
        """What takes the same time to load: the model and its quantization."""
        bits = self.bits(weights)
        return f"{weights.model.name}/q{bits}" if bits else weights.model.name

    def timing_key(self, stage: Stage) -> str:
        """What shares one law of time: the model, its quantization, and whatever changes a step's
        work: guidance above 1, with which most run each step twice, and pictures that are read."""
        weights, params = stage.weights, stage.params
        key = self.load_key(weights)
        if (params.guidance or 0) > 1 and weights.model.family != "flux":
            key += "/guided"
        if params.images:
            key += f"/images{len(params.images)}"
        if params.control_image:
            key += "/control"
        if params.init_image and not weights.model.upscaler:
            key += "/img2img"
        return key

    def works(self, task: Task) -> list[Work]:
        """The work of each of its stages."""
        return [self.work(stage) for stage in task.stages]

    def work(self, stage: Stage) -> Work:
        params = stage.params
        tokens = params.tokens
        if stage.weights.model.upscaler:
            width, height = params.final_size
            tokens = max(width * height // SIDE_STEP**2, 1)
        return Work(
            model=self.timing_key(stage),
            parameters_b=stage.weights.model.parameters_b,
            tokens=tokens,
            steps=params.steps_run,
            format=params.format,
            images=params.count,
            text_each=bool(params.inputs) or stage.weights.model.upscaler,
        )

    def forecast_of(self, stages: tuple[Stage, ...]) -> Forecast:
        """Of all stages."""
        forecasts = [self.timing.forecast(self.work(stage)) for stage in stages]
        last = forecasts[-1]
        if len(forecasts) == 1:
            return last
        order = list(Confidence)
        return replace(
            last,
            before_s=sum(f.gpu_s for f in forecasts[:-1]),
            sigma=max(f.sigma for f in forecasts),
            confidence=min((f.confidence for f in forecasts), key=order.index),
        )

    def loads_s(self, loads: Iterable[Weights]) -> float:
        """Seconds to load all of these."""
        return sum(map(self.load_s, loads))

    def load_s(self, weights: Weights) -> float:
        return self.timing.forecast_load_s(self.load_key(weights), weights.model.parameters_b)
