"""The scale of all phases of a key, which drifts: arithmetic only.

The scale follows the residuals log(measured / predicted) of images, like a Kalman filter of a
random walk in its steady state. How quickly the machine drifts is not known. So several gains run
side by side, and the one that has predicted best lately is used. A slow gain is preferred, because
it averages over more images. Residuals far outside the spread are outliers or a shift: the gains
ignore them, and a two-sided CUSUM test (Page 1954, "Continuous inspection schemes") finds shifts.
"""

from collections import deque
from copy import copy
from math import exp
from statistics import median

import numpy as np

from timing.corrections import Floats

SIGMA_AT_FIRST = 0.3
SIGMA_LEAST = 0.02
"""Spread of log(measured / predicted) of an image: the initial value, and the minimum."""
SCALE_GAINS = (0.05, 0.25, 0.8)
"""Parts of a residual by which the scale follows."""
LOSS_MEMORY = 0.95
WORTH = 0.85
"""A gain is preferred to a slower one if its loss is less than this part of the other's."""
NOT_NEAR = 0.6
"""Spread of log(measured / predicted) where nothing was measured."""
IN_GAINS, IN_SHIFTS = 2, 1
"""With which power of the samples nearby that spread falls. It falls slower in the search for
shifts: where the law jumps above a size, the machine seems to have become slower."""
IGNORED_SIGMAS = 5.0
RESIDUAL_LIMIT = 2.9
"""In sigmas; larger residuals count as this."""
CUSUM_SLACK, CUSUM_LIMIT = 0.5, 5.0
"""In sigmas. Shifts below the slack are followed by the gains only. Three residuals of 2.2 sigmas
on one side reach the limit; two of any size do not."""
IN_A_ROW, LATEST = 3, 5
"""So many of the latest residuals must be on one side: outliers among others are no shift. The
shift is the median of so many."""
SAMPLES_KEPT = 100
"""Of each key."""


class Scale:
    """The common scale of the phases of a key: drift."""

    def __init__(self) -> None:
        self._logs = [0.0] * len(SCALE_GAINS)
        self._losses = [0.0] * len(SCALE_GAINS)
        self._best = 0
        self._path: deque[float] = deque(maxlen=SAMPLES_KEPT)
        """log(scale) after each sample."""
        self._shifts = Cusum()
        self._spreads = {True: SIGMA_AT_FIRST, False: SIGMA_AT_FIRST}
        self._counts = {True: 0, False: 0}
        self._unsure = False
        """Whether the next residual decides, because the scale is another machine's."""

    def copy(self) -> "Scale":
        """A scale that follows without changing this one."""
        other = copy(self)
        other._logs, other._losses = self._logs.copy(), self._losses.copy()
        other._path, other._shifts = self._path.copy(), self._shifts.copy()
        other._spreads, other._counts = self._spreads.copy(), self._counts.copy()
        return other

    @property
    def value(self) -> float:
        return exp(self._logs[self._best])

    @property
    def drift(self) -> float:
        """How many times slower than in the middle of its latest samples the machine is now."""
        return exp(self._logs[self._best] - median(self._path)) if self._path else 1.0

    @property
    def spread(self) -> float:
        """Of log(measured / predicted) of pictures, lately."""
        both = zip(self._counts.values(), self._spreads.values(), strict=True)
        counts = max(sum(self._counts.values()), 1)
        return (
            sum(n * s for n, s in both) / counts if any(self._counts.values()) else SIGMA_AT_FIRST
        )

    def start(self) -> None:
        """Take in the first picture: the laws have its scale."""
        self._path.append(0.0)

    def move(self, by: float) -> None:
        """Start on another machine, which is about this much slower: log(seconds / seconds)."""
        self._logs = [at + by for at in self._logs]
        self._unsure = True

    def at_samples(self, count: int) -> Floats:
        """log(scale) at the latest samples, each from those beside it: the scale just after a
        sample contains a part of its own noise."""
        path = np.array(self._path)[-count:]
        before = np.concatenate((path[:1], path[:-1]))
        after = np.concatenate((path[1:], path[-1:]))
        between: Floats = 0.5 * (before + after)
        return between

    def follow(self, residual: float, *, seen: bool, near: float) -> None:
        """Take in log(measured / predicted) of a picture.

        Args:
            seen: whether its like was drawn before, so that only the scale can be wrong.
            near: how many samples were near it.
        """
        if self._unsure:
            self._logs = [at + residual for at in self._logs]
            self._path.append(self._logs[self._best])
            self._unsure = False
            return
        spread, doubt = self._spreads[seen], self._doubt(seen, near)
        unlike = self._doubt(seen, near, IN_SHIFTS)
        bounded = max(-RESIDUAL_LIMIT * spread, min(residual, RESIDUAL_LIMIT * spread))
        in_sigmas = max(-RESIDUAL_LIMIT, min(residual / unlike, RESIDUAL_LIMIT))
        shift = self._shifts.add(residual, in_sigmas)
        if shift is not None:
            by, since = shift
            self._logs = [at + by for at in self._logs]
            for sample in range(1, min(since, len(self._path) + 1)):
                self._path[-sample] += by
        else:
            self._follow(residual, doubt)
            self._counts[seen] += 1
            weight = max(1.0 / self._counts[seen], 0.05)
            own = spread + weight * (1.25 * abs(bounded) - spread)
            self._spreads[seen] = max(own, SIGMA_LEAST)
        self._path.append(self._logs[self._best])

    def foreseen(self, residual: float, *, seen: bool, near: float) -> float:
        """By what factor the scale would change if a picture with this residual ended now: the
        arguments are those of follow(). 1: it would be taken for an outlier, or for a shift."""
        doubt = self._doubt(seen, near)
        if self._unsure or abs(residual) >= IGNORED_SIGMAS * doubt:
            return 1.0
        bounded = max(-RESIDUAL_LIMIT * doubt, min(residual, RESIDUAL_LIMIT * doubt))
        return exp(SCALE_GAINS[self._best] * self._trust(doubt) * bounded)

    def _doubt(self, seen: bool, near: float, power: int = IN_GAINS) -> float:
        """How far a residual may be from the pace of the machine: near many samples, no further
        than those before it."""
        spread = self._spreads[seen]
        return spread if seen else (spread**2 + (NOT_NEAR / (1.0 + near) ** power) ** 2) ** 0.5

    def _trust(self, doubt: float) -> float:
        """Part of a gain with which a residual is followed."""
        return (min(self._spreads.values()) / doubt) ** 2

    def _follow(self, residual: float, spread: float) -> None:
        trust = self._trust(spread)
        now = self._logs[self._best]
        for i, gain in enumerate(SCALE_GAINS):
            error = now + residual - self._logs[i]
            bounded = max(-RESIDUAL_LIMIT * spread, min(error, RESIDUAL_LIMIT * spread))
            self._losses[i] = LOSS_MEMORY * self._losses[i] + abs(bounded) / spread * trust
            if abs(error) < IGNORED_SIGMAS * spread:  # else an outlier, or a shift
                self._logs[i] += gain * trust * bounded
        self._best = min(range(len(SCALE_GAINS)), key=lambda i: self._losses[i] * WORTH**-i)


class Cusum:
    """Detects that residuals have shifted to one side, and not only some of them."""

    def __init__(self) -> None:
        self._reset()

    def copy(self) -> "Cusum":
        other = copy(self)
        other._sums = self._sums.copy()
        other._since = {side: since.copy() for side, since in self._since.items()}
        return other

    def _reset(self) -> None:
        self._sums = {1: 0.0, -1: 0.0}
        self._since: dict[int, list[tuple[float, float]]] = {1: [], -1: []}

    def add(self, residual: float, in_sigmas: float) -> tuple[float, int] | None:
        """The median of the latest residuals since they moved, and how many they are; None if
        they have not moved."""
        for side in (1, -1):
            total = self._sums[side] + side * in_sigmas - CUSUM_SLACK
            self._sums[side] = min(max(total, 0.0), CUSUM_LIMIT + 1.0)
            since = self._since[side]
            since.append((residual, side * in_sigmas))
            if total <= 0.0:
                since.clear()
            elif total > CUSUM_LIMIT and all(s > CUSUM_SLACK for _, s in since[-IN_A_ROW:]):
                latest = [r for r, _ in since[-LATEST:]]
                self._reset()
                return median(latest), len(latest)
        return None
