"""How the seconds of a step depend on its number and on how many there are: arithmetic only.

Every fourth step may compute what the others reuse; the first ones may be slow until the GPU's
clock has risen, and the late ones because the machine is hot. So each step has a factor (Course).
And each step may take longer in pictures of many steps (Growth). Both are 1 unless the samples show
otherwise.
"""

from collections.abc import Sequence
from copy import copy
from math import exp, log
from statistics import fmean, median

import numpy as np

from timing.corrections import Floats
from timing.drift import SIGMA_LEAST

LEAST_S = 1e-6
MOST_STEPS = 200
"""Later steps take as long as the last half of these in the mean."""
LEAST_GAIN = 0.05
"""Part of a deviation by which the course follows, at the least: it forgets slowly."""
SPREAD_GAIN = 0.01
PRIOR_SPREAD, PRIOR_COUNT = 0.2, 3
"""Before anything is known steps are expected to deviate by this, as if so many had."""
LONG = 8
"""A picture of fewer later steps shows no factor by itself: one late step may be an accident."""
LEAST_STEPS = 3
"""The level of fewer steps follows each of them, so they say nothing about the spread."""
MOST_OFF = 1.0
"""A step is followed no further than this at once, as a logarithm."""
GAP_STEPS = 10.0
"""A step that takes more than this many times as long as usual contains a gap, and is no lesson."""
ALIKE = 0.02
"""Factors that differ by less are not worth a sum over the steps."""
GROWTH_SAMPLES = 6
SURE = 2.5
"""Standard errors by which a power must differ from 0."""
POWERS = (-0.9, 1.5)
ROUNDS, HUBER = 3, 2.0
RIDGE = 1e-9


class Course:
    """Factors of the steps of a picture after the first one, which has a law of its own.

        log(seconds of step i of picture j) = level_j + log(factor_i)

    The level of a picture is the median of what its steps say (median polish: Tukey 1977,
    "Exploratory Data Analysis", ch. 11); a factor is the mean of what the pictures say, shrunk by
    their number and spread (James & Stein 1961).
    """

    def __init__(self) -> None:
        self._logs: list[float] = []
        self._counts: list[int] = []
        self._spread = PRIOR_SPREAD
        self._known = PRIOR_COUNT
        """Deviations that the spread was learned from."""
        self._factors: list[float] = []
        self._sums = [0.0]
        self._last = 1.0
        """Factor of steps that were never seen."""

    def copy(self) -> "Course":
        other = copy(self)
        other._logs, other._counts = self._logs.copy(), self._counts.copy()
        return other

    def learn(self, later_s: Sequence[float]) -> None:
        """Take in the seconds of the steps of a picture after its first one."""
        logs = [log(max(s, LEAST_S)) for s in later_s[:MOST_STEPS]]
        both = list(zip(logs, self._logs, strict=False))
        level = median(own - usual for own, usual in both) if both else median(logs or [0.0])
        for i, (own, usual) in enumerate(both):
            off = own - level - usual
            if off > log(GAP_STEPS):
                continue
            off = max(-MOST_OFF, min(off, MOST_OFF))
            self._counts[i] += 1
            self._logs[i] += max(1.0 / self._counts[i], LEAST_GAIN) * off
            if len(both) >= LEAST_STEPS:
                gain = max(1.0 / (self._known + 1), SPREAD_GAIN)
                self._spread += gain * (1.25 * abs(off) - self._spread)
                self._known += 1
        more = [own - level for own in logs[len(both) :]]
        self._logs += [min(off, MOST_OFF) if off <= log(GAP_STEPS) else 0.0 for off in more]
        self._counts += [int(len(logs) >= LONG)] * len(more)

    def settle(self) -> None:
        """Use what was learned: until then the factors stay, as the laws do."""
        usual = median(self._logs) if self._logs else 0.0
        self._factors, self._sums = [], [0.0]
        for own, count in zip(self._logs, self._counts, strict=True):
            off = own - usual
            noise = self._spread**2 / max(count, 1)
            kept = max(1.0 - noise / max(off * off, 1e-12), 0.0)
            factor = exp(off * kept) if count else 1.0
            self._factors.append(factor)
            self._sums.append(self._sums[-1] + factor)
        if self._factors:
            self._last = fmean(self._factors[len(self._factors) // 2 :])

    def relative(self, steps: int) -> tuple[float, ...]:
        """Of the steps of a picture after the first one, seconds / their mean; empty: all are about
        alike."""
        factors = self._factors[: steps - 1]
        if not factors or max(factors) - min(factors) < ALIKE or steps > MOST_STEPS:
            return ()
        factors += [self._last] * (steps - 1 - len(factors))
        mean = self.mean(steps)
        return tuple(factor / mean for factor in factors)

    def mean(self, steps: int) -> float:
        """Mean seconds of the steps of a picture after the first one / usual seconds."""
        later = steps - 1
        if later <= 0:
            return 1.0
        known = min(later, len(self._factors))
        return (self._sums[known] + (later - known) * self._last) / later


class Growth:
    """Each step takes n ** power times as long in a picture of n steps.

    The power is found by least squares in logarithms, with less weight for what deviates (Huber
    1964), and shrunk by its standard error. One request cannot decide it: it is the least power
    with and without the one of the most, and the one of the fewest steps.
    """

    def __init__(self) -> None:
        self.power = 0.0

    def at(self, steps: Floats) -> Floats:
        factors: Floats = steps**self.power
        return factors

    def fit(self, steps: Floats, off: Floats) -> None:
        """Args: off: log(seconds of a step / law without growth), not NaN, by sample."""
        self.power = 0.0
        if len(off) < GROWTH_SAMPLES:
            return
        powers = [_power(steps, off)]
        if not powers[0]:
            return
        for extreme in (int(np.argmax(steps)), int(np.argmin(steps))):
            powers.append(_power(np.delete(steps, extreme), np.delete(off, extreme)))
        if min(powers) * max(powers) > 0:
            self.power = min(max(min(powers, key=abs), POWERS[0]), POWERS[1])


def _power(steps: Floats, off: Floats) -> float:
    rows = np.stack((np.ones(len(off)), np.log(steps)), axis=1)
    weights = np.ones(len(off))
    for _ in range(ROUNDS):
        weighted = rows * weights[:, None]
        inverse = np.linalg.inv(weighted.T @ rows + RIDGE * np.eye(2))
        found = inverse @ (weighted.T @ off)
        left = np.abs(off - rows @ found)
        spread = max(1.4826 * float(np.median(left)), SIGMA_LEAST)
        weights = np.minimum(1.0, HUBER * spread / np.maximum(left, 1e-12))
    power, error = float(found[1]), spread * float(inverse[1, 1]) ** 0.5
    kept: float = max(1.0 - (SURE * error / max(abs(power), 1e-12)) ** 2, 0.0)
    return power * kept
