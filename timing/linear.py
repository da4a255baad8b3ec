"""Laws that are linear in features, fitted to samples: arithmetic only.

Coefficients are >= 0 and found by weighted least squares. Each sample counts FORGETTING times as
much as the one after it, and is weighted with 1 / prediction^2, so that relative errors count. A
ridge keeps the coefficients near a prior shape, whose scale the samples set; more samples outweigh
it. A deviation of more than HUBER spreads has less weight (Huber 1964, "Robust estimation of a
location parameter"). A jump is searched for like a change point: each place between two sizes is
tried, and kept if it explains most of what the smooth law leaves over.
"""

from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import log

import numpy as np

from timing.corrections import Floats
from timing.drift import SAMPLES_KEPT, SIGMA_LEAST

FORGETTING = 0.99
RIDGE = 0.02
"""Weight of the prior shape, in samples."""
FITS = 2
"""Rounds of reweighting."""
HUBER = 2.0
JUMP_LOSS, JUMP_GAIN = 0.06, 0.5
"""A jump is looked for if the smooth law is wrong by more than this, and believed if it leaves less
than this part of it."""
JUMP_LEAST = 1.2
JUMP_SAMPLES = 4
"""Of fewer samples any law explains three. Of more, a single one on a side is no jump: it may be an
outlier."""
JUMPS_TRIED = 12
RIGHT = 0.02
"""A sample that is predicted this well, as a logarithm, alone is no reason to fit again."""
STALE = 0.2
"""Part of the samples that may be missing in a fit."""
LEAST_S = 1e-6
"""Seconds; less counts as this, because logarithms are taken."""


@dataclass(frozen=True)
class Jump:
    """Above a size everything takes longer by this factor: memory that is swapped, another
    algorithm."""

    above: float
    """Of the second feature."""
    factor: float

    def factors(self, sizes: Floats) -> Floats:
        return np.where(sizes > self.above, self.factor, 1.0)


class LinearLaw:
    """y = sum of coefficient * feature, all coefficients >= 0; perhaps with a jump.

    Args:
        prior: coefficients; they tell the shape, the samples the scale.
    """

    def __init__(self, prior: tuple[float, ...]) -> None:
        self.coefficients = prior
        self.jump: Jump | None = None
        self._prior = prior

    def predict(self, features: Sequence[float]) -> float:
        smooth = sum(c * f for c, f in zip(self.coefficients, features, strict=True))
        jump = self.jump
        return smooth * jump.factor if jump and features[1] > jump.above else smooth

    def fit(
        self,
        features: Floats,
        y: Floats,
        unit: Floats | None = None,
        *,
        may_jump: bool = False,
    ) -> None:
        """Fit to samples, the oldest first; a y that is NaN is none.

        Args:
            unit: what errors are relative to, by sample; None: the prediction.
            may_jump: look for a jump in the second feature.
        """
        known = ~np.isnan(y)
        if not known.any():
            return
        features, y = features[known], y[known]
        self.jump = None
        self.coefficients = self._fitted(features, y, None if unit is None else unit[known])
        if may_jump and len(y) >= JUMP_SAMPLES:
            self._find_jump(features, y)

    def _fitted(self, features: Floats, y: Floats, unit: Floats | None) -> tuple[float, ...]:
        ageing = FORGETTING ** np.arange(len(y) - 1, -1, -1.0)
        by_prior = np.maximum(features @ np.array(self._prior), LEAST_S)
        ratio = float(np.median(y / by_prior))
        prior = [c * ratio for c in self._prior]
        predicted, coefficients = by_prior * ratio, tuple(prior)
        for _ in range(FITS):
            units = np.maximum(predicted if unit is None else unit, LEAST_S)
            off = np.abs(y - predicted) / units
            spread = max(1.4826 * float(np.median(off)), SIGMA_LEAST)
            weights = ageing * np.minimum(1.0, HUBER * spread / np.maximum(off, 1e-12)) / units**2
            ridge = RIDGE / max(sum(prior), float(np.median(units))) ** 2
            normal = (features * weights[:, None]).T @ features + ridge * np.eye(len(prior))
            right = (features * weights[:, None]).T @ y + ridge * np.array(prior)
            coefficients = _non_negative_least_squares(normal.tolist(), right.tolist())
            predicted = features @ np.array(coefficients)
        return coefficients

    def _find_jump(self, features: Floats, y: Floats) -> None:
        """Keep the jump that explains most of what the smooth law gets wrong, if it is clear."""
        logs = np.log(np.maximum(y, LEAST_S))
        best = JUMP_GAIN * self._loss(features, logs)
        if best < JUMP_GAIN * JUMP_LOSS:
            return
        found = None
        for above in _between(features[:, 1], 1 if len(y) == JUMP_SAMPLES else 2):
            jump, coefficients = self._with_jump(features, logs, above)
            loss = float(np.abs(_off(features, logs, coefficients, jump)).clip(0.0, 0.5).mean())
            if loss < best and jump.factor > JUMP_LEAST:
                best, found = loss, (jump, coefficients)
        if found:
            self.jump, self.coefficients = found

    def _loss(self, features: Floats, logs: Floats) -> float:
        off = _off(features, logs, self.coefficients, Jump(0.0, 1.0))
        return float(np.abs(off).clip(0.0, 0.5).mean())

    def _with_jump(
        self, features: Floats, logs: Floats, above: float
    ) -> tuple[Jump, tuple[float, ...]]:
        large = features[:, 1] > above
        jump, coefficients = Jump(above, 1.0), self._prior
        for _ in range(FITS):
            off = _off(features, logs, coefficients, jump)
            by = float(np.median(off[large]) - np.median(off[~large]))
            jump = Jump(above, jump.factor * float(np.exp(by)))
            smooth = np.exp(logs) / jump.factors(features[:, 1])
            coefficients = self._fitted(features, smooth, None)
        return jump, coefficients


def _off(features: Floats, logs: Floats, coefficients: tuple[float, ...], jump: Jump) -> Floats:
    """log(y / law)."""
    predicted = features @ np.array(coefficients) * jump.factors(features[:, 1])
    off: Floats = logs - np.log(np.maximum(predicted, LEAST_S))
    return off


def _between(sizes: Floats, least: int) -> list[float]:
    """Places between neighbouring sizes, with at least so many samples on each side."""
    ordered = np.sort(sizes)[least - 1 : len(sizes) - least + 1]
    places = [float(a * b) ** 0.5 for a, b in pairwise(ordered) if b > 1.02 * a]
    return places[:: len(places) // JUMPS_TRIED + 1]


class OneLaw:
    """A law of one phase by itself, with the samples that it was fitted to."""

    def __init__(self, prior: tuple[float, ...]) -> None:
        self._law = LinearLaw(prior)
        self._samples: deque[tuple[tuple[float, ...], float]] = deque(maxlen=SAMPLES_KEPT)
        self._unfitted = 0

    def predict(self, features: Sequence[float]) -> float:
        return self._law.predict(features)

    def learned(self, features: tuple[float, ...], y: float) -> "OneLaw":
        """This law and one sample more."""
        other = copy(self)
        other._samples = self._samples.copy()
        other._samples.append((features, y))
        other._unfitted += 1
        is_right = abs(log(max(y, LEAST_S) / max(self.predict(features), LEAST_S))) <= RIGHT
        if not is_right or other._unfitted > STALE * len(other._samples):
            other._law, other._unfitted = copy(self._law), 0
            rows, values = zip(*other._samples, strict=True)
            other._law.fit(np.array(rows), np.array(values))
        return other


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
