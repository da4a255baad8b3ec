"""How far waits were from their forecasts: arithmetic only."""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

NORMAL = NormalDist()
LONGEST_S = 1e7
"""Seconds. Longer durations are discarded as measurement errors."""


@dataclass(frozen=True)
class Outcome:
    """The forecast of a task at submit, and the true duration."""

    priority: int
    forecast_s: float
    p90_s: float
    actual_s: float
    model: str = ""
    """Name of its model; empty: not known, as the next two."""
    machine: str = ""
    """Where it was drawn."""
    ended_at: float = 0.0
    """Unix seconds."""


class Spread:
    """The distribution of truth / forecast: gives the p90 and the accuracy of the forecasts.

    The p90 is a quantile of truth / forecast over the last tasks of the same priority (split
    conformal prediction: Vovk et al. 2005). It is empirical on purpose: it contains what no model
    of a single task can know, urgent tasks that overtake.

    Neighbours in the queue have the same fate, so a few hundred tasks say as much as a few dozen
    independent ones, and what was enough for the last tasks is not for the next. Therefore the
    level of the quantile rises after each task that took longer than its p90, and falls after each
    other one (Gibbs & Candes 2021, "Adaptive conformal inference"). Tasks that have not ended count
    as they are forecast now: else the level would rise when the last of a late row ends, and not
    when its first one is late. It is kept as a normal score (1.28 is the 90 % quantile), and above
    BEYOND the quantile is extrapolated: no task may have taken that long yet. Outcomes of guesses
    (confidence "none") must not be learned.
    """

    KEPT = 200
    MISSED = 0.1
    """Part of the tasks that may take longer than their p90."""
    FIRST_LEVEL = 1.4
    LEVELS = (0.0, 4.0)
    ADAPTATION = 0.35
    """How far the level rises after a task that took longer. The fewer tasks, the further the part
    inside is from nine tenths: by the range of the levels / (ADAPTATION * tasks) at most. With more
    the level overshoots. Chosen by replays of 78 laws."""
    BEYOND = 2.0
    AT_FIRST = tuple(1.0 + sign * 0.04 * step for step in range(10, 0, -1) for sign in (1, -1))
    """Ratios assumed before there are any; each outcome replaces one of them."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self._outcomes: defaultdict[int, deque[Outcome]] = defaultdict(
            lambda: deque(maxlen=self.KEPT)
        )
        self._levels: dict[int, float] = {}
        self._factors: dict[int, float] = {}
        self._expected: Mapping[int, list[bool]] = {}
        for outcome in outcomes:
            self.learn(outcome)

    def learn(self, outcome: Outcome) -> None:
        priority, seconds = outcome.priority, (outcome.forecast_s, outcome.actual_s, outcome.p90_s)
        if all(0.0 < s < LONGEST_S for s in seconds):
            self._outcomes[priority].append(outcome)
            level = self._levels.get(priority, self.FIRST_LEVEL)
            self._levels[priority] = self._moved(level, outcome.actual_s > outcome.p90_s)
            self._factors.pop(priority, None)

    def expect(self, late: Mapping[int, list[bool]]) -> None:
        """Outcomes that are to be expected next, instead of those expected before.

        Args:
            late: by priority, whether each task is forecast to take longer than its p90.
        """
        if late != self._expected:
            self._expected = late
            self._factors.clear()

    def p90_factor(self, priority: int) -> float:
        """Returns the 90 % bound as a multiple of the forecast."""
        if priority not in self._factors:
            ratios = [o.actual_s / o.forecast_s for o in self._outcomes[priority]]
            ratios += self.AT_FIRST[len(ratios) :]
            level = self._levels.get(priority, self.FIRST_LEVEL)
            for late in self._expected.get(priority, ()):
                level = self._moved(level, late)
            self._factors[priority] = max(self._quantile(sorted(ratios), level), 1.0)
        return self._factors[priority]

    def _moved(self, level: float, missed: bool) -> float:
        level += self.ADAPTATION * (missed - self.MISSED)
        return min(max(level, self.LEVELS[0]), self.LEVELS[1])

    def _quantile(self, ratios: list[float], level: float) -> float:
        """The quantile of this normal score, of ratios in ascending order."""
        known = _quantile(ratios, NORMAL.cdf(min(level, self.BEYOND)))
        middle = _quantile(ratios, 0.5)
        if level <= self.BEYOND or known <= middle:
            return known
        return float(known * (known / middle) ** (level / self.BEYOND - 1.0))

    @property
    def count(self) -> int:
        """Number of known outcomes."""
        return sum(map(len, self._outcomes.values()))

    def latest(self, count: int) -> list[Outcome]:
        """The latest outcomes of all priorities, oldest first."""
        known = [o for level in self._outcomes.values() for o in level]
        return sorted(known, key=lambda o: o.ended_at)[-count:]

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
