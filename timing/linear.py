"""Laws that are linear in features, fitted to samples: arithmetic only.

Coefficients are >= 0 and found by weighted least squares. Each sample counts FORGETTING times as
much as the one after it, and is weighted with 1 / prediction^2, so that relative errors count. A
ridge keeps the coefficients near a prior shape, whose scale the samples set; more samples outweigh
it. A deviation of more than HUBER spreads has less weight (Huber 1964, "Robust estimation of a
location parameter"). If a law by pixels is clearly wrong, others are tried (timing/shapes.py), and
the best is used if it leaves much less over: all of them roughly, the best three as above. Then the
same with each factor that may come in addition, one after the other (forward selection: Draper &
Smith 1966, "Applied Regression Analysis", ch. 6).
"""

from collections import deque
from collections.abc import Sequence
from copy import copy
from itertools import combinations
from math import log

import numpy as np

from timing.corrections import Floats
from timing.drift import SAMPLES_KEPT, SIGMA_LEAST
from timing.shapes import SMOOTH, Shape, candidates, jumps

FORGETTING = 0.99
RIDGE = 0.005
"""Weight of the prior shape, in samples."""
FITS, JUMP_FITS = 2, 5
"""Rounds of reweighting; rounds of fitting the factors of steps and the rest."""
HUBER = 2.0
FEW_LOSS, FEW_GAIN = 0.06, 0.5
"""Another shape is looked for if the smooth law is wrong by more than this, and believed if it
leaves less than this part of it. This is for few samples,"""
MANY_LOSS, MANY_GAIN, GAIN_SAMPLES = 0.03, 0.8, 3.0
"""and this for many: MANY_GAIN - GAIN_SAMPLES / their number."""
JUMP_LEAST = 1.2
JUMP_SAMPLES, SHAPE_SAMPLES = 4, 8
"""Of fewer samples any law explains three. Of more, a single one on a side is no jump: it may be an
outlier."""
SHAPES, FITTED = 3, 3
"""So many shapes, one of x and factors, are used at the most, one for each SHAPE_SAMPLES; and so
many are fitted, after all were compared roughly."""
OUTLIER = 6.0
"""Times the median deviation: more counts as this."""
RIGHT = 0.02
"""A sample that is predicted this well, as a logarithm, alone is no reason to fit again."""
STALE = 0.2
"""Part of the samples that may be missing in a fit."""
LEAST_S = 1e-6
"""Seconds; less counts as this, because logarithms are taken."""


class LinearLaw:
    """y = sum of coefficient * feature, all coefficients >= 0.

    Args:
        prior: coefficients; they tell the shape, the samples the scale.
    """

    def __init__(self, prior: tuple[float, ...]) -> None:
        self.coefficients = prior
        self.prior = prior

    def at(self, features: Floats) -> Floats:
        """Of each row of features."""
        found: Floats = features @ np.array(self.coefficients)
        return found

    def fit(self, features: Floats, y: Floats, unit: Floats | None = None) -> None:
        """Fit to samples, the oldest first; a y that is NaN is none.

        Args:
            unit: what errors are relative to, by sample; None: the prediction.
        """
        known = ~np.isnan(y)
        if known.any():
            own_unit = None if unit is None else unit[known]
            self.coefficients = self._fitted(features[known], y[known], own_unit)

    def _fitted(self, features: Floats, y: Floats, unit: Floats | None) -> tuple[float, ...]:
        ageing = FORGETTING ** np.arange(len(y) - 1, -1, -1.0)
        by_prior = np.maximum(features @ np.array(self.prior), LEAST_S)
        ratio = float(np.median(y / by_prior))
        prior = [c * ratio for c in self.prior]
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


class SizeLaw:
    """y = (a + b x + c x^2) * factors: x is the size of a picture, by its shape.

    Args:
        prior: a, b, c.
    """

    def __init__(self, prior: tuple[float, float, float]) -> None:
        self.shape = SMOOTH
        """What x is."""
        self.factors: tuple[Shape, ...] = ()
        self._law = LinearLaw(prior)

    def at(self, sides: Floats) -> Floats:
        """Of pictures with these sides: (n, 2), in 1024 pixels."""
        return self._law.at(_features(self.shape, sides)) * self._all_factors(sides)

    def fit(self, sides: Floats, y: Floats) -> None:
        """As LinearLaw.fit()."""
        known = ~np.isnan(y)
        if not known.any():
            return
        sides, y = sides[known], y[known]
        self.shape, self.factors = SMOOTH, ()
        self._fit(sides, y)
        count = len(y)
        if JUMP_SAMPLES <= count < SHAPE_SAMPLES and self._left_over(sides, y) >= FEW_LOSS:
            self._improve(jumps(sides, 1 if count == JUMP_SAMPLES else 2), FEW_GAIN, sides, y)
        for _ in range(min(count // SHAPE_SAMPLES, SHAPES)):
            if self._left_over(sides, y) < MANY_LOSS:
                return
            tried = self._most_likely([*candidates(sides), *jumps(sides, 2)], sides, y)
            if not self._improve(tried, MANY_GAIN - GAIN_SAMPLES / count, sides, y):
                return

    def _left_over(self, sides: Floats, y: Floats) -> float:
        """Mean of |log(y / law)|; an outlier counts as OUTLIER times the median."""
        off = self._off(sides, y)
        return float(off.clip(0.0, _most(off)).mean())

    def _improve(self, shapes: list[Shape], gain: float, sides: Floats, y: Floats) -> bool:
        """Add the best of these shapes, if it leaves less than `gain` times as much over. Returns
        whether it was added."""
        off = self._off(sides, y)
        best, found = np.inf, self
        for shape in shapes:
            other = self._with(shape)
            other._fit(sides, y)
            own = other._off(sides, y)
            most = _most(own)
            relative = float(own.clip(0.0, most).mean() / off.clip(0.0, most).mean())
            if relative < best and all(f.factor > JUMP_LEAST for f in other.factors if f.is_step):
                best, found = relative, other
        if best >= gain:
            return False
        self.shape, self.factors, self._law = found.shape, found.factors, found._law
        return True

    def _with(self, shape: Shape) -> "SizeLaw":
        other = copy(self)
        if shape.is_factor:
            other.factors = (*self.factors, shape)
        else:
            other.shape = shape
        return other

    def _off(self, sides: Floats, y: Floats) -> Floats:
        """|log(y / law)|."""
        both = np.maximum(y, LEAST_S) / np.maximum(self.at(sides), LEAST_S)
        off: Floats = np.abs(np.log(both))
        return off

    def _all_factors(self, sides: Floats) -> Floats:
        total = np.ones(len(sides))
        for one in self.factors:
            total *= one.factors(sides)
        return total

    def _fit(self, sides: Floats, y: Floats) -> None:
        """Fit with these shapes; of a step, find the factor, too."""
        self._law = copy(self._law)
        features = _features(self.shape, sides)
        steps = [(n, one.applies(sides)) for n, one in enumerate(self.factors) if one.is_step]
        if not steps:
            self._law.fit(features, y / self._all_factors(sides))
            return
        self._law.coefficients = self._law.prior
        for _ in range(JUMP_FITS):
            for number, where in steps:
                off = np.log(np.maximum(y, LEAST_S) / np.maximum(self.at(sides), LEAST_S))
                by = float(np.exp(np.median(off[where]) - np.median(off[~where])))
                one = self.factors[number]
                one = one._replace(factor=one.factor * by)
                self.factors = (*self.factors[:number], one, *self.factors[number + 1 :])
            self._law.fit(features, y / self._all_factors(sides))

    def _most_likely(self, shapes: list[Shape], sides: Floats, y: Floats) -> list[Shape]:
        """The best FITTED shapes to add, by rough fits of all at once: without bounds, and of a
        step with two lines."""
        one, rows, x = np.ones(len(y)), list[Floats](), self.shape.sizes(sides)
        factors = self._all_factors(sides)
        if self.shape is not SMOOTH:
            shapes = [shape for shape in shapes if shape.is_factor]
        for shape in shapes:
            if shape.is_step:
                where = shape.applies(sides)
                rows.append(np.array((where, where * x, ~where, ~where * x), float) * factors)
            else:
                size = x if shape.is_factor else shape.sizes(sides)
                row = np.array((one, size, size * size, 0.0 * one))
                rows.append(row * (factors * shape.factors(sides)))
        y = np.maximum(y, LEAST_S)
        features = np.array(rows).transpose(0, 2, 1) / y[:, None]
        ageing = FORGETTING ** np.arange(len(y) - 1, -1, -1.0)
        weights = np.broadcast_to(ageing, features.shape[:2])
        for _ in range(FITS):
            weighted = features * weights[:, :, None]
            normal = weighted.transpose(0, 2, 1) @ features
            size = np.trace(normal, axis1=1, axis2=2)[:, None, None]
            right = weighted.sum(axis=1)[:, :, None]
            found = np.linalg.solve(normal + 1e-7 * size * np.eye(4), right)
            off = np.abs((features @ found)[:, :, 0] - 1.0)
            spread = np.maximum(1.4826 * np.median(off, axis=1, keepdims=True), SIGMA_LEAST)
            weights = ageing * np.minimum(1.0, HUBER * spread / np.maximum(off, 1e-12))
        losses = np.minimum(off, np.maximum(4 * spread, 0.1)).mean(axis=1)
        return [shapes[number] for number in np.argsort(losses)[:FITTED]]


def _most(off: Floats) -> float:
    """A larger deviation counts as this."""
    return max(OUTLIER * float(np.median(off)), 0.1)


def _features(shape: Shape, sides: Floats) -> Floats:
    x = shape.sizes(sides)
    return np.array((np.ones(len(x)), x, x * x)).T


class OneLaw:
    """A law of one phase by itself, with the samples that it was fitted to."""

    def __init__(self, prior: tuple[float, ...]) -> None:
        self._law = LinearLaw(prior)
        self._samples: deque[tuple[tuple[float, ...], float]] = deque(maxlen=SAMPLES_KEPT)
        self._unfitted = 0

    def predict(self, features: Sequence[float]) -> float:
        return float(self._law.at(np.array([features]))[0])

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
