"""The share of a running task's time that is over: arithmetic only."""

from bisect import bisect_right
from collections.abc import Callable

FIRST_POINT_S = 0.25
POINTS_RATIO = 1.5
CREEP = 0.05
"""How fast the share moves while it is ahead of the forecast, as a part of the speed with which it
would reach the end in time."""
MOST_SHOWN = 0.999


class ShownShare:
    """A share, 0 to 1, that never falls and moves until the task ends.

    After each report it follows spent / (spent + left), where `left` is forecast for that moment.
    Where this falls, because something takes longer than forecast, the share creeps on. It is
    computed at points of time that do not depend on when somebody asks, and moves evenly between.
    """

    def __init__(self) -> None:
        # One point more than anybody has asked for: what was seen does not change.
        self._times_s, self._shares = [0.0], [0.0]

    def reported(self, elapsed_s: float, done: float) -> None:
        """A report came, so many seconds after the one before: the share is this much, or what
        was seen last, if that is more."""
        seen = self._at(elapsed_s) if elapsed_s < self._times_s[-1] else self._shares[-1]
        self._times_s, self._shares = [0.0], [max(done, seen)]

    def after(self, elapsed_s: float, spent_s: float, left_s: Callable[[float], float]) -> float:
        """The share so many seconds after the report.

        Args:
            spent_s: seconds that the task had taken at the report.
            left_s: what is left so many seconds after the report.
        """
        while self._times_s[-1] <= elapsed_s:
            self._add_point(spent_s, left_s)
        return min(self._at(elapsed_s), MOST_SHOWN)

    def _at(self, elapsed_s: float) -> float:
        end = bisect_right(self._times_s, elapsed_s)
        begin_s, end_s = self._times_s[end - 1 : end + 1]
        before, after = self._shares[end - 1 : end + 1]
        return before + (after - before) * (elapsed_s - begin_s) / (end_s - begin_s)

    def _add_point(self, spent_s: float, left_s: Callable[[float], float]) -> None:
        before_s, before = self._times_s[-1], self._shares[-1]
        at_s = max(before_s * POINTS_RATIO, FIRST_POINT_S)
        left = max(left_s(at_s), FIRST_POINT_S)
        forecast = (spent_s + at_s) / (spent_s + at_s + left)
        creeping = before + (1.0 - before) * CREEP * min((at_s - before_s) / left, 1.0)
        self._times_s.append(at_s)
        self._shares.append(max(forecast, creeping))
