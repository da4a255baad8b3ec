"""When each task will be done: the time of a waiting task is the sum of what comes before it - what
the running task still needs, the work of those ahead, and loading wherever a task finds its model
not in memory - and its own work.

Arithmetic over a LiveState, which it does not change.
"""

from collections.abc import Iterator
from itertools import islice

from models.model_catalog import Weights
from queueing.affinity import Affinity
from queueing.held_tasks import Held
from queueing.live_state import LiveState, progress_of
from queueing.task_view import Ahead, Lanes, Wait
from queueing.work_line import WorkOfKey
from task import Phase, Stage, Task
from timing_model import Confidence, Forecast

P90_SIGMAS = 1.2816
"""The 90 % quantile of the standard normal distribution."""
P90_WITHOUT_KNOWLEDGE = 3.0
P90_OF_DOWNLOADS = 1.5
"""A download's 90 % quantile as a multiple of its forecast: networks keep no promises."""


class WaitForecast:
    def __init__(self, state: LiveState, affinity: Affinity) -> None:
        self._state = state
        self._affinity = affinity

    def of_new(
        self, stages: tuple[Stage, ...], *, urgent: bool, missing: tuple[Weights, ...] = ()
    ) -> Wait:
        """The forecast of a task that would be submitted now.

        Args:
            missing: the weights that it would have to wait for.
        """
        new = Task("", stages[0].params, urgent, stages, 0.0)
        if missing:
            held = Held(new, missing, *self._state.load_and_work_s(stages))
            return next(wait for task, wait in self._held_waits(held) if task is new)
        return self._wait_in_line(new)

    def of(self, task: Task) -> Wait:
        """The forecast of a task that waits or runs."""
        if task.task_id in self._state.running:
            return next(wait for running, wait in self._lanes().waits if running is task)
        if task in self._state.held:
            return next(wait for held, wait in self._held_waits() if held is task)
        ahead = self._ahead(task, self._state.line.before(task), task)
        return self._wait(self._state.work.forecast_of(task.stages), ahead, urgent=task.urgent)

    def next_start_s(self) -> float:
        """Seconds until the GPU is free for the first waiting task."""
        free_s = self._lanes().gpu_free_s
        return free_s if len(self._state.line) else max(free_s, self._state.held.first_ready_s())

    def in_order(self, offset: int = 0) -> Iterator[tuple[Task, Wait]]:
        """The tasks in the order in which they run, from the offset on, in one pass."""
        lanes = self._lanes()
        for task, wait in lanes.waits[offset:]:
            yield task, wait
        start_s, switches, recent = lanes.gpu_free_s, 0, self._state.recent_after_running()
        skipped = max(offset - len(self._state.running), 0)
        for pos, task in enumerate(islice(self._state.line, skipped, None), skipped):
            if pos == skipped > 0:  # those passed over are known by their sums
                ahead = self._ahead(task, self._state.line.before(task), task, own=False)
                before = self._wait(
                    self._state.work.forecast_of(task.stages), ahead, urgent=task.urgent
                )
                start_s, switches = before.start_s, before.switches
                recent = self._state.boundary(task.urgent, self._state.line.before(task), task)[2]
            loads, recent = self._state.line.loads(task.stages, recent)
            load_s = self._state.work.loads_s(loads)
            switches += len(loads)
            forecast = self._state.work.forecast_of(task.stages)
            gpu_done_s = start_s + load_s + forecast.gpu_s
            end_s = max(gpu_done_s, lanes.encoder_free_s) + forecast.image_encoding_s
            wait = Wait(
                pos=pos,
                start_s=start_s,
                end_s=end_s,
                p90_s=self._p90_s(end_s, task.urgent, forecast),
                confidence=forecast.confidence,
                switches=switches,
            )
            yield task, wait
            start_s = gpu_done_s
        held_before = max(offset - len(self._state.running) - len(self._state.line), 0)
        if held_before < len(self._state.held):
            yield from islice(self._held_waits(), held_before, None)

    def _wait_in_line(self, new: Task) -> Wait:
        """The forecast of a task that would join the line now."""
        stages, urgent = new.stages, new.urgent
        overtaken = self._affinity.overtaken_by(stages, urgent=urgent)
        if overtaken:
            behind = overtaken[-1][0]
            ahead = self._ahead(new, self._state.line.before(behind), behind)
        else:
            ahead = self._ahead(new, self._state.line.last(urgent=urgent), None)
        return self._wait(self._state.work.forecast_of(stages), ahead, urgent=urgent)

    def _ahead(
        self, task: Task, before: Task | None, behind: Task | None, *, own: bool = True
    ) -> Ahead:
        """What comes before a task of the line, or a new one that would join it.

        Args:
            before, behind: as LiveState.boundary takes them.
            own: whether the loading for the task itself counts.
        """
        if behind is None:
            pos = self._state.line.urgent if task.urgent else len(self._state.line)
            works = self._state.line.total(urgent_only=task.urgent)
        else:
            pos, works = self._state.line.ahead_of(behind)
        seconds, loads, recent = self._state.boundary(task.urgent, before, behind)
        needed, _ = self._state.line.loads(task.stages, recent) if own else ([], recent)
        own_load_s = self._state.work.loads_s(needed)
        return Ahead(pos, works, seconds, loads, own_load_s, len(needed))

    def _wait(self, forecast: Forecast, ahead: Ahead, *, urgent: bool) -> Wait:
        """The GPU's work ahead and the task's own, then its image encoding, which also waits for
        the encoder to be through with the running tasks."""
        lanes = self._lanes()
        start_s, switches = lanes.gpu_free_s + ahead.load_s, ahead.loads + ahead.own_loads
        start_s += self._work_s(ahead.works)
        switches += sum(work.loads for work in ahead.works)
        gpu_done_s = start_s + ahead.own_load_s + forecast.gpu_s
        end_s = max(gpu_done_s, lanes.encoder_free_s) + forecast.image_encoding_s
        return Wait(
            pos=ahead.pos,
            start_s=start_s,
            end_s=end_s,
            p90_s=self._p90_s(end_s, urgent, forecast),
            confidence=forecast.confidence,
            switches=switches,
        )

    def _held_waits(self, *new: Held) -> Iterator[tuple[Task, Wait]]:
        """The forecasts of the tasks that wait for a download, in the order in which they will run;
        among them perhaps a new one."""
        line = self._state.line
        lanes = {urgent: self._wait_of_next(urgent=urgent) for urgent in (True, False)}
        before = {True: line.urgent, False: len(line)}
        known = self._state.held.pace_known
        for held in self._state.held.waits(lanes, *new):
            p90_s = held.end_s * (P90_OF_DOWNLOADS if known else P90_WITHOUT_KNOWLEDGE)
            confidence = Confidence.LOW if known else Confidence.NONE
            pos = before[held.task.urgent] + held.pos
            yield held.task, Wait(pos, held.start_s, held.end_s, p90_s, confidence)

    def _wait_of_next(self, *, urgent: bool) -> float:
        """Seconds until a task starts that joins its level now, at the end."""
        works = self._state.line.total(urgent_only=urgent)
        last = self._state.line.last(urgent=urgent)
        seconds, _, _ = self._state.boundary(urgent, last, None)
        return self._lanes().gpu_free_s + seconds + self._work_s(works)

    def _work_s(self, works: list[WorkOfKey]) -> float:
        """Of tasks in the line, with the loading between them."""
        timing, load_s = self._state.timing, self._state.work.load_s
        return sum(
            timing.gpu_s(work.key, work.weights.model.parameters_b, work.features)
            + (work.loads * load_s(work.weights) if work.loads else 0.0)
            for work in works
        )

    def _lanes(self) -> Lanes:
        """GPU and encoder, each one task at a time: the running tasks, first the one that is
        furthest, are one on the GPU, and those before it at the encoder."""
        gpu_free_s, encoder_free_s = self._state.load_remaining_s() + self._state.leaving_s(), 0.0
        waits = []
        for task in self._state.running.values():
            progress, forecast = progress_of(task), self._state.work.forecast_of(task.stages)
            encoding_s = forecast.image_encoding_s
            if progress.phase is Phase.IMAGE_ENCODING:
                encoding_s = max(
                    encoding_s - (self._state.monotonic() - progress.phase_started_at), 0.0
                )
            gpu_free_s += self._state.gpu_remaining_s(task)
            encoder_free_s = max(encoder_free_s, gpu_free_s) + encoding_s
            p90_s = encoder_free_s * (1.0 + P90_SIGMAS * forecast.sigma)
            waits.append((task, Wait(0, 0.0, encoder_free_s, p90_s, forecast.confidence)))
        return Lanes(gpu_free_s, encoder_free_s, waits)

    def _p90_s(self, wait_s: float, urgent: bool, forecast: Forecast) -> float:
        if forecast.confidence is Confidence.NONE:
            return P90_WITHOUT_KNOWLEDGE * wait_s
        return self._state.spread.p90_s(wait_s, urgent=urgent)
