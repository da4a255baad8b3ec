"""How long a task takes: arithmetic only, no clock, no files, no threads.

A task's time is a sum of phases, each linear in a few features of its work (x = latent tokens /
4096, so x = 1 is 1024 x 1024 pixels; n = steps):

    text encoding     a
    denoising         n (b + c x + d x^2)     linear layers cost x, attention costs x^2
    decoding          e + f x
    image encoding    g + h x                 by file format, off the GPU

All coefficients are >= 0. They are learned per key (model, quantization) by weighted least squares
with forgetting: every sample counts FORGETTING times as much as the one after it and is weighted
with 1 / prediction^2, so that relative errors count. A ridge holds the coefficients near a prior
shape whose scale the first sample sets; with more samples its pull vanishes.

Before anything was measured, the prior alone speaks, and says so (`Forecast.learned`): the work of
one step is about 2 FLOP per parameter and token, at 10 TFLOP/s (an Apple M2 Max at bf16).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

FORGETTING = 0.95
RIDGE = 0.02
"""Weight of the prior shape, in samples."""
OUTLIER_FACTOR = 3.0
"""A sample further off than this factor counts as if it were off by just this factor."""
REFERENCE_TOKENS = 4096
TEXT_TOKENS = 512
PRIOR_FLOP_PER_S = 10e12
PRIOR_LOAD_BYTES_PER_S = 1e9
FEATURES = 5
"""Length of Work.features."""
LIVE_STEPS_TO_TRUST = 2
"""After this many steps of a running task, its own pace counts as much as the model's."""


@dataclass(frozen=True)
class Work:
    """What a task's time depends on."""

    model: str
    """Key: model and quantization, whatever shares one law of time."""
    parameters_b: float
    """Billions of parameters, for the prior."""
    tokens: int
    steps: int
    format: str

    @property
    def features(self) -> tuple[float, ...]:
        """GPU seconds are linear in these: (1, n, n x, n x^2, x)."""
        x, n = self.tokens / REFERENCE_TOKENS, float(self.steps)
        return (1.0, n, n * x, n * x * x, x)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Work":
        return Work(**json.loads(text))


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds of one task's own work, all >= 0."""

    text_encoding_s: float
    step_s: float
    """Of one step; the task has `steps` of them."""
    steps: int
    decoding_s: float
    image_encoding_s: float
    learned: bool
    """False: nothing was measured for this model yet, this is only the prior."""

    @property
    def gpu_s(self) -> float:
        """Seconds for which the task keeps the GPU from the next one."""
        return self.text_encoding_s + self.steps * self.step_s + self.decoding_s

    @property
    def total_s(self) -> float:
        return self.gpu_s + self.image_encoding_s


@dataclass(frozen=True)
class Measured:
    """Seconds that one finished task really took."""

    text_encoding_s: float
    step_s: Sequence[float]
    """One value for each step that ran."""
    decoding_s: float
    image_encoding_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Measured":
        return Measured(**json.loads(text))


class TimingModel:
    """Learns from finished tasks. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._laws: dict[str, _Law] = {}
        self._image_encoding: dict[str, _LinearLaw] = {}
        self._load_s: dict[str, float] = {}

    def forecast(self, work: Work) -> Forecast:
        law = self._law(work.model, work.parameters_b)
        x = work.tokens / REFERENCE_TOKENS
        return Forecast(
            text_encoding_s=law.text_encoding.predict((1.0,)),
            step_s=law.step.predict((1.0, x, x * x)),
            steps=work.steps,
            decoding_s=law.decoding.predict((1.0, x)),
            image_encoding_s=self._image_encoding_law(work.format).predict((1.0, x)),
            learned=law.step.samples > 0,
        )

    def gpu_s(self, model: str, parameters_b: float, feature_sums: Sequence[float]) -> float:
        """GPU seconds of many tasks of one model, from the sums of their features."""
        law = self._law(model, parameters_b)
        constant, per_token = law.decoding.coefficients
        coefficients = (
            law.text_encoding.coefficients[0] + constant,
            *law.step.coefficients,
            per_token,
        )
        return sum(c * f for c, f in zip(coefficients, feature_sums, strict=True))

    def learn(self, work: Work, measured: Measured) -> None:
        """Take in a task that ran to its end. Values that cannot be durations are passed over."""
        law = self._law(work.model, work.parameters_b)
        x = work.tokens / REFERENCE_TOKENS
        law.text_encoding.learn((1.0,), measured.text_encoding_s)
        if measured.step_s:
            steady = measured.step_s[1:] or measured.step_s
            law.step.learn((1.0, x, x * x), median(steady))
        law.decoding.learn((1.0, x), measured.decoding_s)
        self._image_encoding_law(work.format).learn((1.0, x), measured.image_encoding_s)

    def remaining_s(
        self,
        forecast: Forecast,
        *,
        phase: str,
        phase_elapsed_s: float,
        steps_done: int,
        steps_total: int,
        step_s: Sequence[float],
        step_elapsed_s: float,
    ) -> float:
        """Seconds of GPU work that a running task still has, at the pace it is really going.

        A step's pace is the mean of the forecast and of the median of the task's own steps, the
        latter weighted with steps / LIVE_STEPS_TO_TRUST.
        """
        if phase == "text_encoding":
            text_left = max(forecast.text_encoding_s - phase_elapsed_s, 0.0)
            return text_left + forecast.steps * forecast.step_s + forecast.decoding_s
        if phase == "denoising":
            weight = len(step_s) / LIVE_STEPS_TO_TRUST
            own = median(step_s) if step_s else 0.0
            pace = (forecast.step_s + weight * own) / (1.0 + weight)
            steps_left_s = (steps_total - steps_done) * pace
            return max(steps_left_s - min(step_elapsed_s, pace), 0.0) + forecast.decoding_s
        if phase == "decoding":
            return max(forecast.decoding_s - phase_elapsed_s, 0.0)
        return 0.0

    def forecast_load_s(self, work_model: str, parameters_b: float) -> float:
        """Seconds to load a model: as last measured, else 2 bytes per parameter at 1 GB/s."""
        prior = 2.0 + parameters_b * 2e9 / PRIOR_LOAD_BYTES_PER_S
        return self._load_s.get(work_model, prior)

    def learn_load(self, work_model: str, seconds: float) -> None:
        if _is_duration(seconds):
            self._load_s[work_model] = seconds

    def _law(self, model: str, parameters_b: float) -> "_Law":
        if model not in self._laws:
            self._laws[model] = _Law.prior(parameters_b)
        return self._laws[model]

    def _image_encoding_law(self, image_format: str) -> "_LinearLaw":
        if image_format not in self._image_encoding:
            per_megapixel = 0.3 if image_format == "PNG" else 0.02
            self._image_encoding[image_format] = _LinearLaw((0.0, per_megapixel))
        return self._image_encoding[image_format]


@dataclass
class _Law:
    """The phases of one model."""

    text_encoding: "_LinearLaw"
    step: "_LinearLaw"
    decoding: "_LinearLaw"

    @staticmethod
    def prior(parameters_b: float) -> "_Law":
        per_token = 2 * parameters_b * 1e9 / PRIOR_FLOP_PER_S
        step = (per_token * TEXT_TOKENS, per_token * REFERENCE_TOKENS, 0.1 * per_token * 4096)
        return _Law(
            text_encoding=_LinearLaw((0.05 + 0.05 * parameters_b,)),
            step=_LinearLaw(step),
            decoding=_LinearLaw((0.05, 1.0)),
        )


@dataclass
class _LinearLaw:
    """y = sum of coefficient * feature, all coefficients >= 0, learned online."""

    coefficients: tuple[float, ...]
    samples: int = 0
    _normal: list[list[float]] = field(default_factory=list)
    _right: list[float] = field(default_factory=list)

    def predict(self, features: Sequence[float]) -> float:
        return sum(c * f for c, f in zip(self.coefficients, features, strict=True))

    def learn(self, features: Sequence[float], y: float) -> None:
        if not _is_duration(y):
            return
        y = max(y, 1e-6)
        predicted = max(self.predict(features), 1e-9)
        if self.samples == 0:
            self._start_from(tuple(c * y / predicted for c in self.coefficients))
            predicted = y
        y = min(max(y, predicted / OUTLIER_FACTOR), predicted * OUTLIER_FACTOR)
        weight = 1.0 / predicted**2
        for row, f in enumerate(features):
            for column, g in enumerate(features):
                self._normal[row][column] = FORGETTING * self._normal[row][column] + weight * f * g
            self._right[row] = FORGETTING * self._right[row] + weight * f * y
        self.samples += 1
        self._solve()

    def _start_from(self, prior: tuple[float, ...]) -> None:
        """A ridge: as if each coefficient alone had been measured, with the weight RIDGE."""
        scale = max(sum(prior), 1e-9)
        self.coefficients = prior
        self._normal = [
            [RIDGE / scale**2 if row == column else 0.0 for column in range(len(prior))]
            for row in range(len(prior))
        ]
        self._right = [RIDGE / scale**2 * c for c in prior]

    def _solve(self) -> None:
        """Non-negative least squares by coordinate descent (Franc et al., 2005), warm-started."""
        c = list(self.coefficients)
        for _ in range(100):
            for i, row in enumerate(self._normal):
                rest = sum(a * c[j] for j, a in enumerate(row) if j != i)
                c[i] = max((self._right[i] - rest) / row[i], 0.0)
        self.coefficients = tuple(c)


def _is_duration(seconds: float) -> bool:
    return 0.0 <= seconds < float("inf")
