"""How long a task takes: arithmetic only, no clock, no files, no threads.

A task's time is a sum of phases. Each is linear in a few features of its work (x = latent tokens /
4096, so x = 1 is 1024 x 1024 pixels; n = steps). All phases on the GPU share one scale s, the drift
of the machine (heat, other load):

    text encoding     s a                           once per task; once per image for pipelines
                                                    that also encode input images
    denoising         s n (b + c x + d x^2)         linear layers cost x, attention x^2
    its first step    s (g + h x + i x^2)           in addition (compilation, allocation)
    decoding          s (e + f x)
    image encoding    p + q x                       by file format, off the GPU

Coefficients are learned per key (model, quantization, and what else changes the work of a step);
see timing_laws.py. Before the first measurement only the prior is used (confidence "none"): one
step is about 2 FLOP per parameter and token, at 10 TFLOP/s (an Apple M2 Max at bf16).
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median

from timing_laws import REFERENCE_TOKENS, SAMPLES_TO_TRUST, GpuLaws, LinearLaw, text_was_kept

FORECASTS_KEPT = 10_000
"""Size of the cache of durations, which the next sample empties."""
LONGEST_S = 1e7
"""Seconds. Longer samples are discarded as measurement errors."""
PRIOR_LOAD_BYTES_PER_S = 1e9
LIVE_STEP_WEIGHT = 0.7
"""Weight of the measured pace of a running task, from its second step on; the learned pace has the
rest."""
OVERRUN = 0.1
"""Expected rest of a phase that takes longer than forecast, as a part of its elapsed time."""
FEATURES = 7
"""Length of Work.features."""
TASKS_FEATURE = 6
"""Index of the feature that is 1 or more for each task."""


class Confidence(StrEnum):
    NONE = "none"  # nothing measured for this model: only the prior is used
    LOW = "low"  # fewer than SAMPLES_TO_TRUST tasks, or far from the sizes seen
    HIGH = "high"


@dataclass(frozen=True)
class Work:
    """The work of a task: all that its duration depends on."""

    model: str
    """Key of the timing law: model, quantization and what else changes the work of a step."""
    parameters_b: float
    """Billions of parameters, for the prior."""
    tokens: int
    steps: int
    """Steps of each image."""
    format: str
    images: int = 1
    text_each: bool = False
    """Whether text encoding runs for each image, because it also encodes input images."""

    @property
    def x(self) -> float:
        return self.tokens / REFERENCE_TOKENS

    @property
    def features(self) -> tuple[float, ...]:
        """The features in which GPU seconds are linear: k (n, n x, n x^2, 1, x, x^2) for k images,
        and the number of text encodings."""
        n, x, k = float(self.steps * self.images), self.x, float(self.images)
        return (n, n * x, n * x * x, k, k * x, k * x * x, k if self.text_each else 1.0)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Work":
        return Work(**json.loads(text))


@dataclass(frozen=True)
class Durations:
    """Predicted seconds of one task's own work, all >= 0."""

    text_encoding_s: float
    """Seconds of text encoding: per task, or with text_each per image."""
    first_step_extra_s: float
    step_s: float
    """Seconds of one step; an image has `steps` of them."""
    steps: int
    decoding_s: float
    image_encoding_s: float
    sigma: float
    """Spread of log(truth / forecast) of the whole task."""
    confidence: Confidence
    images: int = 1
    text_each: bool = False
    before_s: float = 0.0
    """Seconds of the stages before this one."""

    @property
    def denoising_s(self) -> float:
        return self.first_step_extra_s + self.steps * self.step_s

    @property
    def image_gpu_s(self) -> float:
        """GPU seconds of one image, without text encoding."""
        return self.denoising_s + self.decoding_s

    @property
    def gpu_s(self) -> float:
        """GPU seconds of the whole task."""
        texts = self.images if self.text_each else 1
        return self.before_s + texts * self.text_encoding_s + self.images * self.image_gpu_s

    @property
    def total_s(self) -> float:
        return self.gpu_s + self.image_encoding_s


@dataclass(frozen=True)
class Measured:
    """Measured seconds of one image."""

    text_encoding_s: float
    step_s: Sequence[float]
    """Seconds of each step that ran."""
    decoding_s: float
    image_encoding_s: float

    @property
    def gpu_s(self) -> float:
        return self.text_encoding_s + sum(self.step_s) + self.decoding_s

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Measured":
        return Measured(**json.loads(text))


@dataclass(frozen=True)
class Live:
    """How far a running task is."""

    phase: str
    """text_encoding, denoising, decoding, image_encoding."""
    phase_elapsed_s: float
    steps_done: int = 0
    steps_total: int = 0
    step_s: Sequence[float] = ()
    step_elapsed_s: float = 0.0
    images_done: int = 0


class TimingModel:
    """Learns durations from finished tasks. Not thread-safe: the owner holds a lock."""

    def __init__(self) -> None:
        self._laws: dict[str, GpuLaws] = {}
        self._image_encoding: dict[str, LinearLaw] = {}
        self._load_s: dict[str, float] = {}
        self._forecasts: dict[Work, Durations] = {}
        self.version = 0
        """Increases with each change of what was learned."""

    def durations(self, work: Work) -> Durations:
        known = self._forecasts.get(work)
        if known is None:
            if len(self._forecasts) >= FORECASTS_KEPT:
                self._forecasts.clear()
            known = self._forecasts[work] = self._compute(work)
        return known

    def _compute(self, work: Work) -> Durations:
        law = self._law(work.model, work.parameters_b)
        x, scale = work.x, law.scale
        return Durations(
            text_encoding_s=scale * law.text_encoding.predict((1.0,)),
            first_step_extra_s=scale * law.first_step.predict((1.0, x, x * x)),
            step_s=scale * law.step.predict((1.0, x, x * x)),
            steps=work.steps,
            decoding_s=scale * law.decoding.predict((1.0, x)),
            image_encoding_s=self._image_encoding_law(work.format).predict((1.0, x)),
            sigma=law.sigma,
            confidence=_confidence(law, x),
            images=work.images,
            text_each=work.text_each,
        )

    def coefficients(self, model: str, parameters_b: float) -> tuple[float, ...]:
        """Returns the GPU seconds per unit of each of Work.features."""
        law = self._law(model, parameters_b)
        (text,) = law.text_encoding.coefficients
        first, first_x, first_xx = law.first_step.coefficients
        decoding, decoding_x = law.decoding.coefficients
        each = (first + decoding, first_x + decoding_x, first_xx)
        return tuple(law.scale * c for c in (*law.step.coefficients, *each, text))

    def learn(self, work: Work, measured: Measured) -> None:
        """Learns from a finished image.

        A sample with an impossible duration (negative, NaN, above LONGEST_S) is ignored.
        """
        seconds = [measured.text_encoding_s, *measured.step_s, measured.decoding_s]
        if not all(0.0 <= s < LONGEST_S for s in [*seconds, measured.image_encoding_s]):
            return
        if sum(seconds) > 0.0 and measured.step_s:
            forecast = self.durations(work)
            predicted = forecast.image_gpu_s
            if not text_was_kept(measured.text_encoding_s, forecast.text_encoding_s):
                predicted += forecast.text_encoding_s
            self._law(work.model, work.parameters_b).learn(
                work.x,
                text_s=measured.text_encoding_s,
                step_s=measured.step_s,
                decoding_s=measured.decoding_s,
                predicted_s=predicted,
            )
        self._forecasts.clear()
        self.version += 1
        if measured.image_encoding_s <= 0.0:
            return  # an image that is upscaled next is not encoded
        encoding = self._image_encoding_law(work.format)
        encoding.learn((1.0, work.x), measured.image_encoding_s, sigma=1.0)

    def remaining_s(self, forecast: Durations, live: Live) -> float:
        """Returns the remaining GPU seconds of a running task, at its measured pace.

        After the first step the learned pace is used, from the second step on mostly
        (LIVE_STEP_WEIGHT) the median of its own steps without the first. If the law is well known,
        decoding follows the same pace, because it then shows the present speed of the machine.
        """
        images_after = forecast.images - live.images_done - 1
        after_s = images_after * forecast.image_gpu_s
        if forecast.text_each:
            after_s += images_after * forecast.text_encoding_s
        if live.phase == "text_encoding":
            left_s = 0.0
            if live.images_done == 0 or forecast.text_each:
                left_s = _left(forecast.text_encoding_s, live.phase_elapsed_s)
            return left_s + forecast.image_gpu_s + after_s
        if live.phase == "denoising":
            own = list(live.step_s[1:])
            pace = 1.0
            if own and forecast.step_s > 0.0:
                pace += LIVE_STEP_WEIGHT * (median(own) / forecast.step_s - 1.0)
            step_s = pace * forecast.step_s
            now_s = step_s + (0.0 if live.step_s else forecast.first_step_extra_s)
            decoding_s = forecast.decoding_s
            if forecast.confidence is Confidence.HIGH:  # else the pace shows errors of the law
                decoding_s *= pace
            steps_after = live.steps_total - live.steps_done - 1
            if steps_after < 0:
                return decoding_s + pace * after_s
            left_s = _left(now_s, live.step_elapsed_s)
            return left_s + steps_after * step_s + decoding_s + pace * after_s
        if live.phase == "decoding":
            return _left(forecast.decoding_s, live.phase_elapsed_s) + after_s
        return 0.0

    def load_s(self, model: str, parameters_b: float) -> float:
        """Seconds to load a model: the last measurement, or 2 bytes per parameter at 1 GB/s."""
        prior = 2.0 + parameters_b * 2e9 / PRIOR_LOAD_BYTES_PER_S
        return self._load_s.get(model, prior)

    def learn_load(self, model: str, seconds: float) -> None:
        if 0.0 <= seconds < LONGEST_S:
            self._load_s[model] = seconds
            self.version += 1

    def samples(self, model: str) -> int:
        """Number of tasks with this key that were learned."""
        return self._laws[model].samples if model in self._laws else 0

    def _law(self, model: str, parameters_b: float) -> GpuLaws:
        if model not in self._laws:
            self._laws[model] = GpuLaws(parameters_b)
        return self._laws[model]

    def _image_encoding_law(self, image_format: str) -> LinearLaw:
        if image_format not in self._image_encoding:
            per_megapixel = 0.3 if image_format == "PNG" else 0.02
            self._image_encoding[image_format] = LinearLaw((0.0, per_megapixel))
        return self._image_encoding[image_format]


def _confidence(law: GpuLaws, x: float) -> Confidence:
    if law.samples == 0:
        return Confidence.NONE
    few = law.samples < SAMPLES_TO_TRUST
    return Confidence.LOW if few or law.is_far(x) else Confidence.HIGH


def _left(forecast_s: float, elapsed_s: float) -> float:
    """Returns the remaining seconds of a phase, also if it takes longer than forecast."""
    return max(forecast_s - elapsed_s, OVERRUN * min(elapsed_s, forecast_s * 10))


@dataclass(frozen=True)
class Outcome:
    """The forecast of a task at submit, and the true duration."""

    priority: int
    forecast_s: float
    p90_s: float
    actual_s: float


class Spread:
    """The distribution of truth / forecast: gives the p90 and the accuracy of the forecasts.

    The p90 is the 90 % quantile of truth / forecast over the last tasks of the same priority. It is
    empirical, so that it includes urgent tasks that overtake, which no model of one task predicts.
    """

    KEPT = 200
    AT_FIRST = (0.8, 1.0, 1.25, 1.6)
    """Assumed ratios, used while few true ones are known."""
    QUANTILE = 0.92
    """A little over 0.9: errors of neighbouring tasks are correlated, so the sample lags."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self._outcomes: defaultdict[int, deque[Outcome]] = defaultdict(
            lambda: deque(maxlen=self.KEPT)
        )
        self._factors: dict[int, float] = {}
        for outcome in outcomes:
            self.learn(outcome)

    def learn(self, outcome: Outcome) -> None:
        seconds = (outcome.forecast_s, outcome.actual_s, outcome.p90_s)
        if all(0.0 < s < LONGEST_S for s in seconds):
            self._outcomes[outcome.priority].append(outcome)
            self._factors.pop(outcome.priority, None)

    def p90_factor(self, priority: int) -> float:
        """Returns the 90 % bound as a multiple of the forecast."""
        if priority not in self._factors:
            known = self._outcomes[priority]
            ratios = [o.actual_s / o.forecast_s for o in known]
            if len(ratios) < 30:
                ratios += self.AT_FIRST
            ratios.sort()
            position = self.QUANTILE * (len(ratios) - 1)
            below = int(position)
            above = min(below + 1, len(ratios) - 1)
            between = ratios[below] + (position - below) * (ratios[above] - ratios[below])
            self._factors[priority] = max(between, 1.0)
        return self._factors[priority]

    @property
    def count(self) -> int:
        """Number of known outcomes."""
        return sum(map(len, self._outcomes.values()))

    def median_error(self) -> float | None:
        """Median of |forecast - truth| / truth over the known outcomes."""
        known = [o for level in self._outcomes.values() for o in level]
        return median(abs(o.forecast_s / o.actual_s - 1) for o in known) if known else None

    def share_inside_p90(self) -> float | None:
        known = [o for level in self._outcomes.values() for o in level]
        return sum(o.actual_s <= o.p90_s for o in known) / len(known) if known else None
