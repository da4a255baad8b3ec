"""What a law of time gets wrong near a place, learned from samples: arithmetic only.

A place is a size and a number of steps. The residual of a sample is log(measured / law). A
correction is the sum of levels, each learned from what the levels before it have left over:

    near     what was left over near the place, for several widths of "near" (WIDTHS; the first two
             are near in the steps, whatever the size): the median of the samples, weighted with a
             Gaussian kernel of their distance in log(size), log(steps) and log(width / height)
    exactly  what was left over at exactly this place: the mean of its runs, without outliers

Medians make thresholds stay sharp, and single outliers harmless (robust local regression:
Cleveland 1979, "Robust locally weighted regression"). Each level is shrunk by what was seen: m from
samples of weight w and spread sigma counts as m (1 - sigma^2 / (w m^2)), or not at all where that
is negative (positive-part shrinkage: James & Stein 1961). So a correction is 0 where the law is
right within the noise, and fades where nothing was seen. The spread of a level, and whether it is
used at all, come from leaving out each sample and predicting it from the others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.intp]]

WIDTHS = ((9.0, 0.35, 9.0), (9.0, 0.08, 9.0), (0.3, 0.5, 9.0), (0.06, 1.0, 9.0), (0.06, 1.0, 0.12))
"""Standard deviations of the kernels in log(size), log(steps) and log(width / height)."""
EXPONENTS = -0.5 / np.square(WIDTHS).T
NEAR = 2
"""The width that is widest in all that is compared."""
OUTLIER_SIGMAS = 3.0
LEAST_SEEN = 0.5
SPREAD_LEAST = 0.02
REPEAT_SPREAD, REPEAT_WEIGHT = 0.04, 3.0
"""Spread of the runs of one request before it was measured, and as how many runs that counts."""
LAW_WEIGHT = 1.2
"""In each median, what is predicted without it counts as so many samples: a single neighbour may
have been an outlier."""
SINGLE_SIGMAS = 2.5
SINGLE_LEAST = 0.1
"""A place with one run is corrected by this much at the most, in sigmas or absolutely: it may have
been an outlier. Two runs that agree are believed."""
AGREE_SIGMAS, AGREE_LEAST = 4.0, 0.1
AGEING = 0.85
"""Weight of a run against the one after it."""


class Corrections:
    """log(truth / law) of several phases, by place.

    Args:
        places: (samples, 3): log(size), log(steps), log(width / height); the oldest first.
        exact: number of the place of each sample.
        residuals: (phases, samples): log(measured / law); NaN: not measured.
    """

    def __init__(self, places: Floats, exact: Ints, residuals: Floats) -> None:
        self._places = places
        self._numbers = frozenset(exact.tolist())
        kernels = _kernels(places, places)
        others = [np.where(exact[:, None] == exact[None, :], 0.0, kernel) for kernel in kernels]
        self._phases = [_Phase(kernels, others, exact, left) for left in residuals]

    def knows(self, number: int) -> bool:
        """Whether exactly this place was measured."""
        return number in self._numbers

    def near(self, places: Floats) -> Floats:
        """How many samples are near these places, in the widest sense."""
        total: Floats = _kernels(places, self._places)[NEAR].sum(axis=1)
        return total

    def at(self, places: Floats, exact: Ints) -> Floats:
        """(phases, places): corrections; exact: numbers of the places, -1: never seen."""
        kernels = _kernels(places, self._places)
        return np.array([phase.at(kernels, exact) for phase in self._phases])


class _Phase:
    def __init__(
        self, kernels: Floats, others: list[Floats], exact: Ints, residuals: Floats
    ) -> None:
        known = np.flatnonzero(~np.isnan(residuals))
        self._residuals = residuals[known]
        order = np.argsort(self._residuals)
        self._ordered, self._columns = self._residuals[order], known[order]
        """The residuals in ascending order, and the numbers of their samples."""
        self._spreads: list[float | None] = []
        without, whole = np.zeros((2, len(self._residuals)))  # corrections without and with itself
        for kernel, other in zip(kernels, others, strict=True):
            spread = None
            if len(self._residuals) > 1:
                weights = other[np.ix_(known, self._columns)]
                median, seen = _weighted_median(weights, self._ordered, without)
                spread = _spread((self._residuals - median)[seen > LEAST_SEEN])
                better = without + _shrunk(median - without, seen, spread)
                most = OUTLIER_SIGMAS * _spread(self._residuals - without)
                if self._loss(better, most) < self._loss(without, most):
                    without = better
                    weights = kernel[np.ix_(known, self._columns)]
                    median, seen = _weighted_median(weights, self._ordered, whole)
                    whole = whole + _shrunk(median - whole, seen, spread)
                else:
                    spread = None
            self._spreads.append(spread)
        self.spread = _spread(self._residuals - without)
        """Of what is left over at places that were never seen."""
        self._exact = _exact_corrections(exact[known], self._residuals, self.spread)

    def _loss(self, corrections: Floats, most: float) -> float:
        return float(np.minimum(np.abs(self._residuals - corrections), most).mean())

    def at(self, kernels: Floats, exact: Ints) -> Floats:
        total = np.zeros(len(exact))
        for kernel, spread in zip(kernels, self._spreads, strict=True):
            if spread is not None:
                median, seen = _weighted_median(kernel[:, self._columns], self._ordered, total)
                total += _shrunk(median - total, seen, spread)
        for place, number in enumerate(exact.tolist()):
            if number in self._exact:
                total[place] += self._exact[number].off(total[place])
        return total


def _kernels(places: Floats, samples: Floats) -> Floats:
    """(widths, places, samples): the weight of each sample at each place, for each of WIDTHS."""
    squared = (places[:, None, :] - samples[None, :, :]) ** 2
    weights: Floats = np.exp(squared @ EXPONENTS).transpose(2, 0, 1)
    return weights


def _weighted_median(weights: Floats, values: Floats, without: Floats) -> tuple[Floats, Floats]:
    """Of the values and, with LAW_WEIGHT, what is predicted without them, for each row of weights;
    and the sum of the row, fewer if a few count most (Kish 1965: effective sample size).

    Args:
        values: in ascending order.
    """
    summed = np.cumsum(weights, axis=1)
    total = summed[:, -1]
    ordered = np.concatenate((values, [np.inf]))
    lower = (summed >= 0.5 * (total - LAW_WEIGHT)[:, None]).argmax(axis=1)
    least = np.where(total > LAW_WEIGHT, ordered[lower], -np.inf)
    above = summed >= 0.5 * (total + LAW_WEIGHT)[:, None]
    most = ordered[np.where(above.any(axis=1), above.argmax(axis=1), len(values))]
    effective = total**2 / np.maximum((weights**2).sum(axis=1), 1e-300)
    return np.clip(without, least, most), np.minimum(total, effective)


def _shrunk(values: Floats, weights: Floats, spread: float) -> Floats:
    noise = spread**2 / np.maximum(weights * values**2, 1e-12)
    shrunk: Floats = values * np.maximum(1.0 - noise, 0.0)
    return shrunk


def _spread(values: Floats) -> float:
    """Robust standard deviation around 0: from the median (Hampel 1974)."""
    if not len(values):
        return 1.0
    return max(1.4826 * float(np.median(np.abs(values))), SPREAD_LEAST)


@dataclass(frozen=True)
class _Runs:
    """Runs of one place."""

    mean: float
    """Of their residuals."""
    noise: float
    """Variance of the mean."""
    most: float
    """That it may differ from what its neighbours say."""

    def off(self, expected: float) -> float:
        """What to add to the correction that is expected from its neighbours."""
        off = min(max(self.mean - expected, -self.most), self.most)
        return off * max(1.0 - self.noise / max(off * off, 1e-12), 0.0)


def _exact_corrections(exact: Ints, residuals: Floats, spread: float) -> dict[int, _Runs]:
    runs: dict[int, list[float]] = {}
    for number, value in zip(exact.tolist(), residuals.tolist(), strict=True):
        runs.setdefault(number, []).append(value)
    around = [
        (abs(v - _low_median(values)), len(values)) for values in runs.values() for v in values
    ]
    deviations = [min(d, 0.3) * (k / (k - 1)) ** 0.5 for d, k in around if k > 1]
    summed = REPEAT_WEIGHT * REPEAT_SPREAD + 1.25 * sum(deviations)
    repeat_spread = max(summed / (REPEAT_WEIGHT + len(deviations)), SPREAD_LEAST / 2)
    found = {}
    for number, values in runs.items():
        mean, weight = _mean_of_runs(values, max(AGREE_SIGMAS * repeat_spread, AGREE_LEAST))
        most = max(SINGLE_SIGMAS * spread, SINGLE_LEAST) if len(values) == 1 else np.inf
        found[number] = _Runs(mean, repeat_spread**2 / weight, most)
    return found


def _mean_of_runs(values: list[float], agree: float) -> tuple[float, float]:
    """Of the runs that agree with most of them, the latest ones counting most, and its weight."""
    middle = _low_median(values)
    total = weight = 0.0
    for age, value in enumerate(reversed(values)):
        if abs(value - middle) <= agree:
            total += AGEING**age * value
            weight += AGEING**age
    return total / weight, weight


def _low_median(values: list[float]) -> float:
    """Of two in the middle the lower one: what goes wrong takes longer, not shorter."""
    return sorted(values)[(len(values) - 1) // 2]
