"""Laws of time, learned from samples: arithmetic only, no clock, no files, no threads.

Coefficients are >= 0 and learned by weighted least squares with forgetting: each sample counts
FORGETTING times as much as the one after it, and is weighted with 1 / prediction^2, so that
relative errors count. A ridge keeps the coefficients near a prior shape; the first sample sets its
scale, and more samples outweigh it. Samples are winsorized: a deviation from the prediction of more
than OUTLIER_SIGMAS counts as OUTLIER_SIGMAS (Huber 1964, "Robust estimation of a location
parameter").

The scale follows the residuals log(measured / predicted) of whole tasks: slowly, like a Kalman
filter of a random walk in its steady state, and at once if a two-sided CUSUM test (Page 1954,
"Continuous inspection schemes") detects a shift.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import exp, log
from statistics import median

FORGETTING = 0.99
RIDGE = 0.02
"""Weight of the prior shape, in samples."""
OUTLIER_SIGMAS = 2.5
SIGMA_AT_FIRST = 0.3
SIGMA_LEAST = 0.02
"""Spread of log(measured / predicted) of a task's own work: the initial value, and the minimum."""
SCALE_GAIN = 0.05
"""Kalman gain of the scale, for a random walk of 0.16 sigma per task."""
CUSUM_SLACK, CUSUM_LIMIT = 0.5, 5.0
"""In sigmas. Shifts below the slack are followed by the gain only. Three residuals of 2.2 sigmas on
one side reach the limit; two of any size do not."""
RESIDUAL_LIMIT = 2.9
SAMPLES_TO_TRUST = 3
CACHED_TEXT = 0.02
"""If text encoding took less than this part of its forecast, the embeddings were cached, and the
sample is not learned."""
FIRST_STEP_EXTRA = 0.1
"""Extra time of the first step, in steps, before it was measured."""
REFERENCE_TOKENS = 4096
TEXT_TOKENS = 512
PRIOR_FLOP_PER_S = 10e12


class GpuLaws:
    """The GPU phases of one key and their common scale (formulas: timing_model.py)."""

    def __init__(self, parameters_b: float) -> None:
        per_token = 2 * parameters_b * 1e9 / PRIOR_FLOP_PER_S
        self.text_encoding = LinearLaw((0.05 + 0.05 * parameters_b,))
        step = (
            per_token * TEXT_TOKENS,
            per_token * REFERENCE_TOKENS,
            0.1 * per_token * REFERENCE_TOKENS,
        )
        self.step = LinearLaw(step)
        self.first_step = LinearLaw(tuple(FIRST_STEP_EXTRA * c for c in step))
        self.decoding = LinearLaw((0.05, 1.0))
        self.sigma = SIGMA_AT_FIRST
        self._log_scale = 0.0
        self._shifts = Cusum()
        self._seen = (float("inf"), 0.0)

    @property
    def scale(self) -> float:
        return exp(self._log_scale)

    @property
    def samples(self) -> int:
        return self.step.samples

    def is_far(self, x: float) -> bool:
        """Whether a size is far from all measured sizes."""
        least, most = self._seen
        return x < least / 2 or x > most * 2

    def learn(
        self,
        x: float,
        *,
        text_s: float,
        step_s: Sequence[float],
        decoding_s: float,
        predicted_s: float,
    ) -> None:
        """Learns from the durations of one image.

        Args:
            step_s: seconds of each step, at least one.
            predicted_s: predicted seconds of the whole image.
        """
        size = (1.0, x, x * x)
        if self.samples > 0 and predicted_s > 0.0:
            measured_s = text_s + sum(step_s) + decoding_s
            self._follow(log(max(measured_s, 1e-9) / predicted_s))
        scale = self.scale
        if len(step_s) > 1:
            later_s = median(step_s[1:]) / scale
            extra_s = max(step_s[0] / scale - later_s, 0.0)
            self.first_step.learn(size, extra_s, sigma=self.sigma, unit=later_s)
        else:
            later_s, extra_s = self.step.predict(size), self.first_step.predict(size)
            later_s = step_s[0] / scale * later_s / max(later_s + extra_s, 1e-12)
        text_s = text_s / scale
        seen = self.text_encoding.samples > 0
        if not seen or not text_was_kept(text_s, self.text_encoding.predict((1.0,))):
            self.text_encoding.learn((1.0,), text_s, sigma=self.sigma)
        self.step.learn(size, later_s, sigma=self.sigma)
        if self.first_step.samples == 0:
            extra = tuple(FIRST_STEP_EXTRA * c for c in self.step.coefficients)
            self.first_step.coefficients = extra
        self.decoding.learn((1.0, x), decoding_s / scale, sigma=self.sigma)
        self._seen = (min(self._seen[0], x), max(self._seen[1], x))

    def _follow(self, residual: float) -> None:
        """Updates scale and spread with the residual of a task."""
        bounded = max(-RESIDUAL_LIMIT * self.sigma, min(residual, RESIDUAL_LIMIT * self.sigma))
        shift = self._shifts.add(residual, bounded / self.sigma)
        if shift is None:
            self._log_scale += SCALE_GAIN * bounded
            spread = 1.25 * abs(bounded)  # of a normal distribution, from its mean absolute value
            weight = max(1.0 / (self.step.samples + 1), 0.05)
            self.sigma = max(self.sigma + weight * (spread - self.sigma), SIGMA_LEAST)
        else:
            self._log_scale += shift


@dataclass
class LinearLaw:
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
        """Learns from one sample.

        Args:
            sigma: spread of y, in units.
            unit: reference of sigma and of the weight; 0: the prediction.
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
        """Adds the ridge: one measurement of each coefficient, with the weight RIDGE."""
        size = range(len(self.coefficients))
        ratio = y / predicted if predicted > 0.0 else 0.0
        prior = [c * ratio for c in self.coefficients]
        weight = RIDGE / max(sum(prior), unit) ** 2
        self._normal = [[weight if row == column else 0.0 for column in size] for row in size]
        self._right = [weight * c for c in prior]


def _non_negative_least_squares(normal: list[list[float]], right: list[float]) -> tuple[float, ...]:
    """Minimizes c'Ac/2 - b'c over c >= 0 by trying each set of positive coefficients.

    There are at most three coefficients, so seven small systems; the result is exact, because the
    solution solves the equations of its own support (Lawson & Hanson 1974, ch. 23).
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


class Cusum:
    """Detects that residuals have shifted to one side."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums = {1: 0.0, -1: 0.0}
        self._since: dict[int, list[float]] = {1: [], -1: []}

    def add(self, residual: float, in_sigmas: float) -> float | None:
        """Adds a residual. Returns the median since the shift, or None without a shift."""
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


def text_was_kept(text_s: float, forecast_s: float) -> bool:
    """Whether the embeddings were cached, so that no text was encoded."""
    return text_s < CACHED_TEXT * forecast_s
