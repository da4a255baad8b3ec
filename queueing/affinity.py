"""Which tasks a new one may go ahead of, because the GPU has its weights then.

A task may join the line further ahead, right behind another one of the same weights (or first, if
the GPU has them), so that clients with different models do not make it load for each task. Each
task it overtakes is delayed by its work, and lets that happen for `affinity_s` in all.
"""

from queueing.live_state import LiveState
from task import Stage, Task


class Affinity:
    def __init__(self, state: LiveState, affinity_s: float) -> None:
        self.affinity_s = affinity_s
        """Seconds of patience that each task begins with."""
        self._state = state

    def overtaken_by(self, stages: tuple[Stage, ...], *, urgent: bool) -> list[tuple[Task, float]]:
        """The tasks that a new one goes ahead of, because one before them has its weights, and the
        seconds by which it delays each; the last of the line first."""
        if self.affinity_s <= 0.0:
            return []
        key, work_s = stages[0].weights.key, self._state.work.forecast_of(stages).gpu_s
        overtaken: list[Task] = []
        task = self._state.line.last(urgent=urgent)
        if key in self._state.line.recent(task):
            return []  # in memory anyway when its turn comes
        while task is not None and task.stages[-1].weights.key != key:
            if task.patience_s < work_s:
                return []
            overtaken.append(task)
            task = self._state.line.before(task)
        if task is None:
            others_first = not urgent and self._state.line.urgent > 0
            if others_first or key not in self._state.recent_after_running():
                return []
        delays = self._delays(stages, work_s, overtaken, urgent=urgent)
        if any(other.patience_s < delay_s for other, delay_s in delays):
            return []
        return delays

    def _delays(
        self, stages: tuple[Stage, ...], work_s: float, overtaken: list[Task], *, urgent: bool
    ) -> list[tuple[Task, float]]:
        """Seconds by which each of these would be delayed by a new task that goes ahead of them:
        its work, its loading, and theirs as far as it leaves them other weights in memory."""
        if not overtaken:
            return []
        first = overtaken[-1]
        _, _, recent = self._state.boundary(urgent, self._state.line.before(first), first)
        loads, recent_with = self._state.line.loads(stages, recent)
        delay_s = work_s + self._state.work.loads_s(loads)
        delays = []
        for task in reversed(overtaken):
            without, recent = self._state.line.loads(task.stages, recent)
            loads, recent_with = self._state.line.loads(task.stages, recent_with)
            delay_s += self._state.work.loads_s(loads) - self._state.work.loads_s(without)
            delays.append((task, max(delay_s, 0.0)))
        return delays[::-1]
