"""How long a task takes: arithmetic only, no clock, no files, no threads.

A task's time is a sum of phases, each linear in a few features of its work (x = latent tokens /
4096, so x = 1 is 1024 x 1024 pixels; n = steps), and all of the GPU's phases share one scale s,
the machine's drift (heat, other load):

    text encoding     s a                           once for all images of a task; for each, where
                                                    pictures are encoded with it
    denoising         s n (b + c x + d x^2)         linear layers cost x, attention x^2
    its first step    s (g + h x + i x^2)           on top (graphs are compiled, memory is taken)
    decoding          s (e + f x)
    image encoding    p + q x                       by file format, off the GPU

Coefficients are >= 0 and learned per key (model, quantization, whatever doubles a step's work) by
weighted least squares with forgetting: each sample counts FORGETTING times as much as the one
after it, and is weighted with 1 / prediction^2, so that relative errors count. A ridge holds the
coefficients near a prior shape whose scale the first sample sets; more samples outweigh it.
Samples are winsorized: what is further from the prediction than OUTLIER_SIGMAS counts as just that
far (Huber 1964, "Robust estimation of a location parameter").

The scale follows the residuals log(measured / predicted) of whole tasks slowly, as a Kalman filter
of a random walk in its steady state does, and at once when a two-sided CUSUM test (Page 1954,
"Continuous inspection schemes") says that they have moved to one side.

Before anything was measured, the prior alone speaks, and says so (confidence "none"): one step is
about 2 FLOP per parameter and token, at 10 TFLOP/s (an Apple M2 Max at bf16).
"""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import combinations
from math import exp, log
from statistics import median

FORGETTING = 0.99
RIDGE = 0.02
"""Weight of the prior shape, in samples."""
OUTLIER_SIGMAS = 2.5
SIGMA_AT_FIRST = 0.3
SIGMA_LEAST = 0.02
"""Spread of log(measured / predicted) of a task's own work: assumed at first, and at the least."""
SCALE_GAIN = 0.05
"""Part of a residual by which the scale follows: random walk of 0.16 sigma a task."""
CUSUM_SLACK, CUSUM_LIMIT = 0.5, 5.0
"""In sigmas: a shift below the slack is left to the gain; the limit is reached by three residuals
of 2.2 sigmas on one side, not by two of any size."""
RESIDUAL_LIMIT = 2.9
SAMPLES_TO_TRUST = 3
FORECASTS_KEPT = 10_000
"""Until the next sample changes them all."""
LONGEST_S = 1e7
"""What is said to have taken longer has not been measured right."""
CACHED_TEXT = 0.02
"""Text encoding that took less than this part of its forecast came from mflux's prompt cache, and
says nothing about a new prompt."""
FIRST_STEP_EXTRA = 0.1
"""Of a step, on top of the first one, before that was measured."""
REFERENCE_TOKENS = 4096
TEXT_TOKENS = 512
PRIOR_FLOP_PER_S = 10e12
PRIOR_LOAD_BYTES_PER_S = 1e9
LIVE_STEP_WEIGHT = 0.7
"""Of the pace of a running task's own steps, against the learned one, from its second step on."""
OVERRUN = 0.1
"""What goes on for longer than forecast is forecast to go on for this part of its time so far."""
FEATURES = 7
"""Length of Work.features."""
TASKS_FEATURE = 6
"""The one that is 1 or more for each task."""


class Confidence(StrEnum):
    NONE = "none"  # nothing was measured for this model: only the prior speaks
    LOW = "low"  # fewer than SAMPLES_TO_TRUST tasks, or far from the sizes seen
    HIGH = "high"


@dataclass(frozen=True)
class Work:
    """What a task's time depends on."""

    model: str
    """Key: model and quantization, whatever shares one law of time."""
    parameters_b: float
    """Billions of parameters, for the prior."""
    tokens: int
    steps: int
    """Of each image."""
    format: str
    images: int = 1
    text_each: bool = False
    """Whether each image begins with what counts as text encoding: pictures are encoded there."""

    @property
    def x(self) -> float:
        return self.tokens / REFERENCE_TOKENS

    @property
    def features(self) -> tuple[float, ...]:
        """GPU seconds are linear in these: k (n, n x, n x^2, 1, x, x^2) for k images, and the times
        that text is encoded."""
        n, x, k = float(self.steps * self.images), self.x, float(self.images)
        return (n, n * x, n * x * x, k, k * x, k * x * x, k if self.text_each else 1.0)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Work":
        return Work(**json.loads(text))


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds of one task's own work, all >= 0."""

    text_encoding_s: float
    """Once a task, or with text_each of each image, like all that follow."""
    first_step_extra_s: float
    step_s: float
    """Of one step; an image has `steps` of them."""
    steps: int
    decoding_s: float
    image_encoding_s: float
    sigma: float
    """Spread of log(truth / forecast) of the whole."""
    confidence: Confidence
    images: int = 1
    text_each: bool = False
    before_s: float = 0.0
    """Of the stages before this one."""

    @property
    def denoising_s(self) -> float:
        return self.first_step_extra_s + self.steps * self.step_s

    @property
    def image_gpu_s(self) -> float:
        """Seconds of the GPU for one image, once the prompt is encoded."""
        return self.denoising_s + self.decoding_s

    @property
    def gpu_s(self) -> float:
        """Seconds for which the task keeps the GPU from the next one."""
        texts = self.images if self.text_each else 1
        return self.before_s + texts * self.text_encoding_s + self.images * self.image_gpu_s

    @property
    def total_s(self) -> float:
        return self.gpu_s + self.image_encoding_s


@dataclass(frozen=True)
class Measured:
    """Seconds that one image of a finished task really took."""

    text_encoding_s: float
    step_s: Sequence[float]
    """One value for each step that ran."""
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
    """Learns from finished tasks. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._laws: dict[str, _Law] = {}
        self._image_encoding: dict[str, _LinearLaw] = {}
        self._load_s: dict[str, float] = {}
        self._forecasts: dict[Work, Forecast] = {}

    def forecast(self, work: Work) -> Forecast:
        known = self._forecasts.get(work)
        if known is None:
            if len(self._forecasts) >= FORECASTS_KEPT:
                self._forecasts.clear()
            known = self._forecasts[work] = self._compute(work)
        return known

    def _compute(self, work: Work) -> Forecast:
        law = self._law(work.model, work.parameters_b)
        x, scale = work.x, law.scale
        return Forecast(
            text_encoding_s=scale * law.text_encoding.predict((1.0,)),
            first_step_extra_s=scale * law.first_step.predict((1.0, x, x * x)),
            step_s=scale * law.step.predict((1.0, x, x * x)),
            steps=work.steps,
            decoding_s=scale * law.decoding.predict((1.0, x)),
            image_encoding_s=self._image_encoding_law(work.format).predict((1.0, x)),
            sigma=law.sigma,
            confidence=law.confidence(x),
            images=work.images,
            text_each=work.text_each,
        )

    def gpu_s(self, model: str, parameters_b: float, feature_sums: Sequence[float]) -> float:
        """GPU seconds of many tasks of one model, from the sums of their features."""
        law = self._law(model, parameters_b)
        (text,) = law.text_encoding.coefficients
        first, first_x, first_xx = law.first_step.coefficients
        decoding, decoding_x = law.decoding.coefficients
        each = (first + decoding, first_x + decoding_x, first_xx)
        coefficients = (*law.step.coefficients, *each, text)
        return law.scale * sum(c * f for c, f in zip(coefficients, feature_sums, strict=True))

    def learn(self, work: Work, measured: Measured) -> None:
        """Take in an image that was made.

        One with a value that cannot be a duration (negative, NaN, LONGEST_S) teaches nothing.
        """
        seconds = [measured.text_encoding_s, *measured.step_s, measured.decoding_s]
        if not all(0.0 <= s < LONGEST_S for s in [*seconds, measured.image_encoding_s]):
            return
        if sum(seconds) > 0.0 and measured.step_s:
            forecast = self.forecast(work)
            predicted = forecast.image_gpu_s
            if not _text_was_kept(measured.text_encoding_s, forecast.text_encoding_s):
                predicted += forecast.text_encoding_s
            self._law(work.model, work.parameters_b).learn(work, measured, predicted)
        self._forecasts.clear()
        if measured.image_encoding_s <= 0.0:
            return  # a picture that was drawn to be enlarged: it was not encoded
        encoding = self._image_encoding_law(work.format)
        encoding.learn((1.0, work.x), measured.image_encoding_s, sigma=1.0)

    def remaining_s(self, forecast: Forecast, live: Live) -> float:
        """Seconds of GPU work that a running task still has, at the pace it is really going.

        The pace of its steps is the learned one after its first step, and from its second one on
        mostly (LIVE_STEP_WEIGHT) the median of its own, without the first. Decoding follows that
        pace where the law is well known: then it tells how fast the machine is now.
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
            if forecast.confidence is Confidence.HIGH:  # else it says more of the law than of now
                decoding_s *= pace
            steps_after = live.steps_total - live.steps_done - 1
            if steps_after < 0:
                return decoding_s + pace * after_s
            left_s = _left(now_s, live.step_elapsed_s)
            return left_s + steps_after * step_s + decoding_s + pace * after_s
        if live.phase == "decoding":
            return _left(forecast.decoding_s, live.phase_elapsed_s) + after_s
        return 0.0

    def forecast_load_s(self, model: str, parameters_b: float) -> float:
        """Seconds to load a model: as last measured, else 2 bytes per parameter at 1 GB/s."""
        prior = 2.0 + parameters_b * 2e9 / PRIOR_LOAD_BYTES_PER_S
        return self._load_s.get(model, prior)

    def learn_load(self, model: str, seconds: float) -> None:
        if 0.0 <= seconds < LONGEST_S:
            self._load_s[model] = seconds

    def samples(self, model: str) -> int:
        """Tasks of this key that were learned from."""
        return self._laws[model].step.samples if model in self._laws else 0

    def _law(self, model: str, parameters_b: float) -> "_Law":
        if model not in self._laws:
            self._laws[model] = _Law(parameters_b)
        return self._laws[model]

    def _image_encoding_law(self, image_format: str) -> "_LinearLaw":
        if image_format not in self._image_encoding:
            per_megapixel = 0.3 if image_format == "PNG" else 0.02
            self._image_encoding[image_format] = _LinearLaw((0.0, per_megapixel))
        return self._image_encoding[image_format]


class _Law:
    """The GPU phases of one key, and their common scale."""

    def __init__(self, parameters_b: float) -> None:
        per_token = 2 * parameters_b * 1e9 / PRIOR_FLOP_PER_S
        self.text_encoding = _LinearLaw((0.05 + 0.05 * parameters_b,))
        step = (
            per_token * TEXT_TOKENS,
            per_token * REFERENCE_TOKENS,
            0.1 * per_token * REFERENCE_TOKENS,
        )
        self.step = _LinearLaw(step)
        self.first_step = _LinearLaw(tuple(FIRST_STEP_EXTRA * c for c in step))
        self.decoding = _LinearLaw((0.05, 1.0))
        self.sigma = SIGMA_AT_FIRST
        self._log_scale = 0.0
        self._shifts = _Cusum()
        self._seen = (float("inf"), 0.0)

    @property
    def scale(self) -> float:
        return exp(self._log_scale)

    def confidence(self, x: float) -> Confidence:
        if self.step.samples == 0:
            return Confidence.NONE
        least, most = self._seen
        far = x < least / 2 or x > most * 2
        return Confidence.LOW if far or self.step.samples < SAMPLES_TO_TRUST else Confidence.HIGH

    def learn(self, work: Work, measured: Measured, predicted_gpu_s: float) -> None:
        x, steps = work.x, measured.step_s
        size = (1.0, x, x * x)
        if self.step.samples > 0 and predicted_gpu_s > 0.0:
            self._follow(log(max(measured.gpu_s, 1e-9) / predicted_gpu_s))
        scale = self.scale
        if len(steps) > 1:
            step_s = median(steps[1:]) / scale
            extra_s = max(steps[0] / scale - step_s, 0.0)
            self.first_step.learn(size, extra_s, sigma=self.sigma, unit=step_s)
        else:
            step_s, extra_s = self.step.predict(size), self.first_step.predict(size)
            step_s = steps[0] / scale * step_s / max(step_s + extra_s, 1e-12)
        text_s = measured.text_encoding_s / scale
        seen = self.text_encoding.samples > 0
        if not seen or not _text_was_kept(text_s, self.text_encoding.predict((1.0,))):
            self.text_encoding.learn((1.0,), text_s, sigma=self.sigma)
        self.step.learn(size, step_s, sigma=self.sigma)
        if self.first_step.samples == 0:
            extra = tuple(FIRST_STEP_EXTRA * c for c in self.step.coefficients)
            self.first_step.coefficients = extra
        self.decoding.learn((1.0, x), measured.decoding_s / scale, sigma=self.sigma)
        self._seen = (min(self._seen[0], x), max(self._seen[1], x))

    def _follow(self, residual: float) -> None:
        """The scale and the spread follow the residual of a task."""
        bounded = max(-RESIDUAL_LIMIT * self.sigma, min(residual, RESIDUAL_LIMIT * self.sigma))
        shift = self._shifts.add(residual, bounded / self.sigma)
        if shift is None:
            self._log_scale += SCALE_GAIN * bounded
            spread = 1.25 * abs(bounded)  # of a normal distribution, from its mean absolute value
            weight = max(1.0 / (self.step.samples + 1), 0.05)
            self.sigma = max(self.sigma + weight * (spread - self.sigma), SIGMA_LEAST)
        else:
            self._log_scale += shift


class _Cusum:
    """Tells when residuals have moved to one side."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums = {1: 0.0, -1: 0.0}
        self._since: dict[int, list[float]] = {1: [], -1: []}

    def add(self, residual: float, in_sigmas: float) -> float | None:
        """The median residual since they moved, or None if they have not."""
        for side in (1, -1):
            self._sums[side] += side * in_sigmas - CUSUM_SLACK
            self._since[side].append(residual)
            if self._sums[side] <= 0.0:
                self._sums[side] = 0.0
                self._since[side] = []
            elif self._sums[side] > CUSUM_LIMIT:
                shift = median(self._since[side])
                self._reset()
                return shift
        return None


@dataclass
class _LinearLaw:
    """y = sum of coefficient * feature, all coefficients >= 0, learned online."""

    coefficients: tuple[float, ...]
    samples: int = 0
    _normal: list[list[float]] = field(default_factory=list)
    _right: list[float] = field(default_factory=list)

    def predict(self, features: Sequence[float]) -> float:
        return sum(c * f for c, f in zip(self.coefficients, features, strict=True))

    def learn(
        self, features: Sequence[float], y: float, *, sigma: float, unit: float = 0.0
    ) -> None:
        """Take in one sample.

        Args:
            sigma: spread of y, in units.
            unit: what sigma and the weight of the sample refer to; 0: the prediction.
        """
        predicted = self.predict(features)
        if self.samples == 0:
            unit = unit or max(y, 1e-9)
            self._start_from(predicted, y, unit)
        else:
            unit = unit or max(predicted, 1e-9)
            if self.samples >= SAMPLES_TO_TRUST:
                band = max(OUTLIER_SIGMAS * sigma, 0.1) * unit
                y = min(max(y, predicted - band), predicted + band)
        weight = 1.0 / unit**2
        for row, f in enumerate(features):
            for column, g in enumerate(features):
                self._normal[row][column] = FORGETTING * self._normal[row][column] + weight * f * g
            self._right[row] = FORGETTING * self._right[row] + weight * f * y
        self.samples += 1
        self.coefficients = _non_negative_least_squares(self._normal, self._right)

    def _start_from(self, predicted: float, y: float, unit: float) -> None:
        """A ridge: as if each coefficient alone had been measured, with the weight RIDGE."""
        size = range(len(self.coefficients))
        ratio = y / predicted if predicted > 0.0 else 0.0
        prior = [c * ratio for c in self.coefficients]
        weight = RIDGE / max(sum(prior), unit) ** 2
        self._normal = [[weight if row == column else 0.0 for column in size] for row in size]
        self._right = [weight * c for c in prior]


def _non_negative_least_squares(normal: list[list[float]], right: list[float]) -> tuple[float, ...]:
    """Minimize c'Ac/2 - b'c over c >= 0, by trying every set of coefficients that may be above 0.

    At most three coefficients: seven small systems, exact (Lawson & Hanson 1974, ch. 23, says that
    the solution solves the equations of its own support).
    """
    best, least = (0.0,) * len(right), 0.0
    for count in range(1, len(right) + 1):
        for support in combinations(range(len(right)), count):
            solution = _solve(
                [[normal[i][j] for j in support] for i in support], [right[i] for i in support]
            )
            if solution is None or min(solution) < 0.0:
                continue
            value = -sum(c * right[i] for i, c in zip(support, solution, strict=True)) / 2
            if value < least:
                full = dict(zip(support, solution, strict=True))
                best, least = tuple(full.get(i, 0.0) for i in range(len(right))), value
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination of a small positive definite system; None if it is singular."""
    size = len(right)
    rows = [[*matrix[i], right[i]] for i in range(size)]
    for i in range(size):
        if rows[i][i] <= 1e-12 * max(matrix[i][i], 1e-300):
            return None
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][k] * solution[k] for k in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution


def _text_was_kept(text_s: float, forecast_s: float) -> bool:
    """Whether the embeddings of a prompt were still there, so that nothing was encoded."""
    return text_s < CACHED_TEXT * forecast_s


def _left(forecast_s: float, elapsed_s: float) -> float:
    """What is left of something, also when it takes longer than forecast."""
    return max(forecast_s - elapsed_s, OVERRUN * min(elapsed_s, forecast_s * 10))


@dataclass(frozen=True)
class Outcome:
    """What was forecast for a task when it was submitted, and what came."""

    urgent: bool
    forecast_s: float
    p90_s: float
    actual_s: float


class Spread:
    """How far waits were from their forecasts: turns a forecast into a p90, and tells its quality.

    The 90 % quantile of truth / forecast over the last tasks of the same level. It is empirical on
    purpose: it contains what no model of a single task can know, urgent tasks that overtake.
    """

    KEPT = 200
    AT_FIRST = (0.8, 1.0, 1.25, 1.6)
    """Ratios assumed before there are any; they count as long as few others are known."""
    QUANTILE = 0.92
    """A little over 0.9: neighbours in the queue share their fate, so the sample lags."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self._outcomes: dict[bool, deque[Outcome]] = {
            urgent: deque(maxlen=self.KEPT) for urgent in (False, True)
        }
        self._factors: dict[bool, float] = {}
        for outcome in outcomes:
            self.learn(outcome)

    def learn(self, outcome: Outcome) -> None:
        seconds = (outcome.forecast_s, outcome.actual_s, outcome.p90_s)
        if all(0.0 < s < LONGEST_S for s in seconds):
            self._outcomes[outcome.urgent].append(outcome)
            self._factors.pop(outcome.urgent, None)

    def p90_s(self, wait_s: float, *, urgent: bool) -> float:
        """The time within which nine of ten tasks with this forecast wait are done."""
        if urgent not in self._factors:
            known = self._outcomes[urgent]
            ratios = [o.actual_s / o.forecast_s for o in known]
            if len(ratios) < 30:
                ratios += self.AT_FIRST
            ratios.sort()
            position = self.QUANTILE * (len(ratios) - 1)
            below = int(position)
            above = min(below + 1, len(ratios) - 1)
            between = ratios[below] + (position - below) * (ratios[above] - ratios[below])
            self._factors[urgent] = max(between, 1.0)
        return wait_s * self._factors[urgent]

    @property
    def count(self) -> int:
        """Outcomes known."""
        return sum(map(len, self._outcomes.values()))

    def median_error(self) -> float | None:
        """Median of |forecast - truth| / truth over the outcomes known."""
        known = [o for level in self._outcomes.values() for o in level]
        return median(abs(o.forecast_s / o.actual_s - 1) for o in known) if known else None

    def share_inside_p90(self) -> float | None:
        known = [o for level in self._outcomes.values() for o in level]
        return sum(o.actual_s <= o.p90_s for o in known) / len(known) if known else None
