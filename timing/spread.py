"""How far waits were from their forecasts: arithmetic only."""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

LONGEST_S = 1e7
"""Seconds. Longer durations are discarded as measurement errors."""


@dataclass(frozen=True)
class Outcome:
    """The forecast of a task at submit, and the true duration."""

    priority: int
    forecast_s: float
    p90_s: float
    actual_s: float


class Spread:
    """The distribution of truth / forecast: gives the p90 and the accuracy of the forecasts.

    The p90 is a quantile of truth / forecast over the last tasks of the same level (split
    conformal prediction: Vovk et al. 2005). It is empirical on purpose: it contains what no model
    of a single task can know, urgent tasks that overtake. Which quantile is adapted to how many
    tasks ended inside their p90 (Gibbs & Candes 2021, "Adaptive conformal inference"). Outcomes of
    forecasts that were guesses (confidence "none") must not be learned.
    """

    KEPT = 200
    COVERAGE = 0.9
    FIRST_QUANTILE = 0.92
    """A little over COVERAGE: neighbours in the queue share their fate, so the sample lags."""
    QUANTILES = (0.8, 0.98)
    """Range of the adapted quantile."""
    ADAPTATION = 0.01
    AT_FIRST = tuple(1.0 + sign * 0.04 * step for step in range(10, 0, -1) for sign in (1, -1))
    """Ratios assumed before there are any; each outcome replaces one of them."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self._outcomes: defaultdict[int, deque[Outcome]] = defaultdict(
            lambda: deque(maxlen=self.KEPT)
        )
        self._quantiles: dict[int, float] = {}
        self._factors: dict[int, float] = {}
        for outcome in outcomes:
            self.learn(outcome)

    def learn(self, outcome: Outcome) -> None:
        level, seconds = outcome.priority, (outcome.forecast_s, outcome.actual_s, outcome.p90_s)
        if all(0.0 < s < LONGEST_S for s in seconds):
            self._outcomes[level].append(outcome)
            inside = outcome.actual_s <= outcome.p90_s
            quantile = self._quantiles.get(level, self.FIRST_QUANTILE)
            quantile += self.ADAPTATION * (self.COVERAGE - inside)
            self._quantiles[level] = min(max(quantile, self.QUANTILES[0]), self.QUANTILES[1])
            self._factors.pop(level, None)

    def p90_factor(self, priority: int) -> float:
        """Returns the 90 % bound as a multiple of the forecast."""
        if priority not in self._factors:
            ratios = [o.actual_s / o.forecast_s for o in self._outcomes[priority]]
            ratios += self.AT_FIRST[len(ratios) :]
            quantile = self._quantiles.get(priority, self.FIRST_QUANTILE)
            self._factors[priority] = max(_quantile(sorted(ratios), quantile), 1.0)
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


def _quantile(ordered: Sequence[float], quantile: float) -> float:
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
