"""The tasks that wait and run, in memory: their order, their progress, the forecast of each.

Arithmetic over a state; no disk, no rules. Not thread-safe: the QueueManager calls it under its
lock.

The time of a waiting task is the sum of what comes before it: what the running task still needs,
the work of those ahead, and loading wherever a task finds its model not in memory.

A task may join the line further ahead, right behind another one of the same weights (or first, if
the GPU has them), so that clients with different models do not make it load for each task. Each
task it overtakes is delayed by its work, and lets that happen for `affinity_s` in all. So the line
is at any moment the order in which tasks run, and their forecasts tell it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from held_tasks import HeldTasks
from model_catalog import Weights
from task import Phase, Progress, Promise, Stage, Task, TaskStatus, Told
from task_view import Ahead, Lanes, Reason, TaskView, Wait
from timing_model import (
    Confidence,
    Forecast,
    Live,
    Measured,
    Outcome,
    Spread,
    TimingModel,
    Work,
)
from work_forecast import WorkForecast
from work_line import Recent, WorkLine

HOUR_S = 3600.0
P90_SIGMAS = 1.2816
"""The 90 % quantile of the standard normal distribution."""
P90_WITHOUT_KNOWLEDGE = 3.0
P90_OF_DOWNLOADS = 1.5
"""A download's 90 % quantile as a multiple of its forecast: networks keep no promises."""
STEADY_S, STEADY_PART = 1.0, 0.02
"""A forecast that moved back by no more than this is not told: the countdown goes on."""


class LiveQueue:
    """Args:
    monotonic: the clock, in seconds.
    """

    def __init__(
        self,
        timing: TimingModel,
        spread: Spread,
        monotonic: Callable[[], float],
        first: Weights,
        *,
        in_memory: int = 1,
        affinity_s: float = 0.0,
    ) -> None:
        self.timing = timing
        self.work = WorkForecast(timing)
        self.spread = spread
        self.resident: Recent = ()
        """Keys of the loaded weights, the latest used first."""
        self.loading: Weights | None = first
        """What is being loaded, or will be before anything else."""
        self._load_started_at: float | None = None
        self._monotonic = monotonic
        self._affinity_s = affinity_s
        self._started_at = monotonic()
        self._gpu_spans: deque[tuple[float, float]] = deque()  # end, seconds; of the last hour
        self._ends: deque[float] = deque()  # of finished tasks, in the last hour
        self._tasks: dict[str, Task] = {}
        self._running: dict[str, Task] = {}
        self._leaving: Task | None = None
        """Cancelled, but the worker is still at its step."""
        self._line = WorkLine(self.work.works, in_memory)
        self.held = HeldTasks(monotonic)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    @property
    def busy(self) -> bool:
        """Whether a task runs, or a cancelled one has not been left yet."""
        return bool(self._running) or self._leaving is not None

    @property
    def waiting(self) -> int:
        return len(self._line) + len(self.held)

    @property
    def running(self) -> list[Task]:
        """One on the GPU at most, and those before it whose images are being encoded."""
        return list(self._running.values())

    def get(self, task_id: str) -> Task | None:
        return self._tasks.get(task_id)

    def get_running(self, task_id: str) -> Task | None:
        return self._running.get(task_id)

    def first(self) -> Task | None:
        """The task that runs next."""
        return self._line.first()

    # -- changes --------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """A task joins the line of its level: behind all others, or behind those of its model."""
        overtaken = self._overtaken_by(task.stages, urgent=task.urgent)
        task.patience_s = self._affinity_s
        self._tasks[task.task_id] = task
        if not overtaken:
            self._line.append(task)
            return
        for other, delay_s in overtaken:
            other.patience_s -= delay_s
        self._line.insert(task, before=overtaken[-1][0])

    def hold(self, task: Task, missing: tuple[Weights, ...]) -> None:
        """A task waits until these weights are on this machine."""
        self._tasks[task.task_id] = task
        self.held.add(task, missing)

    def download_ended(self, weights: Weights) -> list[Task]:
        """Weights are on this machine: the tasks that lacked only these join the line now."""
        ready = self.held.end(weights.model)
        for task in ready:
            self.add(task)
        return ready

    def start(self, task: Task, *, started_at: float) -> None:
        self._leaving = None
        self._line.remove(task)
        self._running[task.task_id] = task
        task.status = TaskStatus.RUNNING
        task.attempts += 1
        task.started_at = started_at
        self._use(task.stages[0])
        at = self._monotonic()
        task.progress = Progress(
            Phase.TEXT_ENCODING, at, at, steps_total=task.params.steps_run, step_started_at=at
        )

    def put_back(self, task: Task) -> None:
        """A running task waits again, before all others of its level."""
        self._leave_gpu(task)
        del self._running[task.task_id]
        task.status = TaskStatus.WAITING
        task.progress = task.started_at = None
        self._line.insert(task)

    def remove(self, task: Task) -> None:
        """A task has ended."""
        self._leave_gpu(task)
        self._tasks.pop(task.task_id, None)
        self._running.pop(task.task_id, None)
        self.held.remove(task)
        if task in self._line:
            self._line.remove(task)

    def cancel(self, task: Task) -> None:
        """A task has ended by its client's wish; the worker leaves it at the end of its step."""
        progress = task.progress
        if progress is not None and progress.phase is not Phase.IMAGE_ENCODING:
            self._leaving = task
        self.remove(task)

    def gpu_is_free(self) -> None:
        """The worker has left the cancelled task."""
        self._leaving = None

    def finish(self, task: Task) -> Outcome | None:
        """A task is done. Returns how its forecast at submit compares with what came."""
        self._ends.append(self._monotonic())
        self.remove(task)
        promise = task.submitted
        if promise is None:
            return None
        actual_s = self._monotonic() - promise.at
        outcome = Outcome(task.urgent, promise.wait_s, promise.p90_s, actual_s)
        self.spread.learn(outcome)
        return outcome

    def report(self, task: Task, phase: Phase, steps_done: int, steps_total: int) -> None:
        """A running task has reached a phase or ended a step, at this moment."""
        progress, at = _progress_of(task), self._monotonic()
        if phase is Phase.IMAGE_ENCODING:
            self._leave_gpu(task)
        if phase is not progress.phase:
            progress.phase_s[progress.phase] = at - progress.phase_started_at
            progress.phase, progress.phase_started_at = phase, at
            progress.step_started_at = at
        if steps_done > progress.steps_done:
            progress.step_s.append(at - progress.step_started_at)
            progress.step_started_at = at
        progress.steps_done, progress.steps_total = steps_done, steps_total

    def next_image(self, task: Task, stage: int, index: int) -> None:
        """A running task has the picture before, and turns to this one of a stage."""
        progress, at = _progress_of(task), self._monotonic()
        progress.measured.append((self._work_of_image(task), self._measured(task)))
        progress.stage, progress.images_done = stage, index
        progress.phase, progress.phase_started_at = Phase.TEXT_ENCODING, at
        progress.step_started_at = at
        progress.phase_s, progress.step_s, progress.steps_done = {}, [], 0
        progress.steps_total = task.stages[stage].params.steps_run
        self._use(task.stages[stage])

    def load_started(self, weights: Weights) -> None:
        self.loading = weights
        self._load_started_at = self._monotonic()

    def load_finished(
        self,
        weights: Weights,
        bits: int | None,
        resident: Sequence[str],
        *,
        downloaded: bool = False,
    ) -> float:
        """Weights are ready; returns the seconds it took to load them.

        A task that was claimed before has lost no time of its own by it.

        Args:
            bits: what they are quantized to: what is stored wins over what was asked for.
            resident: keys of all that is in memory now.
        """
        expected = self._line.used(self.resident, weights.key)
        at = self._monotonic()
        seconds = at - (self._load_started_at if self._load_started_at is not None else at)
        if self.work.learn_bits(weights, bits):
            self._line.lay_out()
        self.now_resident(resident)
        if len(resident) < len(expected):  # memory does not hold as many as the operator allows
            self._line.hold(len(resident))
        if not downloaded:
            self.timing.learn_load(self.work.load_key(weights), seconds)
        for task in self._running.values():
            progress = _progress_of(task)
            if progress.phase is Phase.TEXT_ENCODING:
                progress.phase_started_at = progress.step_started_at = at
        return seconds

    def now_resident(self, resident: Sequence[str]) -> None:
        """Loading has ended, well or not, or weights were unloaded: this is in memory."""
        self.loading = self._load_started_at = None
        self.resident = tuple(resident)

    # -- forecasts ------------------------------------------------------------------------------

    def wait_of_new(
        self, stages: tuple[Stage, ...], *, urgent: bool, missing: tuple[Weights, ...] = ()
    ) -> Wait:
        """The forecast of a task that would be submitted now.

        Args:
            missing: the weights that it would have to wait for.
        """
        new = Task("", stages[0].params, urgent, stages, 0.0)
        if missing:
            waits = self._held_waits(self.held.waits((new, missing)))
            return next(wait for task, wait in waits if task is new)
        return self._wait_in_line(new)

    def _wait_in_line(self, new: Task) -> Wait:
        """The forecast of a task that would join the line now."""
        stages, urgent = new.stages, new.urgent
        overtaken = self._overtaken_by(stages, urgent=urgent)
        if overtaken:
            behind = overtaken[-1][0]
            ahead = self._ahead(new, self._line.before(behind), behind)
        else:
            ahead = self._ahead(new, self._line.last(urgent=urgent), None)
        return self._wait(self.work.forecast_of(stages), ahead, urgent=urgent)

    def wait_of(self, task: Task) -> Wait:
        """The forecast of a task that waits or runs."""
        if task.task_id in self._running:
            return next(wait for running, wait in self._lanes().waits if running is task)
        if task in self.held:
            waits = self._held_waits(self.held.waits())
            return next(wait for held, wait in waits if held is task)
        ahead = self._ahead(task, self._line.before(task), task)
        return self._wait(self.work.forecast_of(task.stages), ahead, urgent=task.urgent)

    def next_start_s(self) -> float:
        """Seconds until the GPU is free for the first waiting task."""
        return self._lanes().gpu_free_s

    def gpu_remaining_s(self, task: Task) -> float:
        """Seconds for which a running task still needs the GPU, loading of its model included."""
        progress, at = _progress_of(task), self._monotonic()
        if progress.phase is Phase.IMAGE_ENCODING:
            return 0.0
        forecast = self.timing.forecast(self.work.work(task.stages[progress.stage]))
        recent = self.resident
        if self.loading is not None:
            at = progress.phase_started_at  # loading is on: the task itself has not begun
            recent = self._line.used(recent, self.loading.key)
        needed, _ = self._line.loads(task.stages[progress.stage :], recent)
        live = Live(
            phase=progress.phase,
            phase_elapsed_s=at - progress.phase_started_at,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=progress.step_s,
            step_elapsed_s=at - progress.step_started_at,
            images_done=progress.images_done,
        )
        later = task.stages[progress.stage + 1 :]
        later_s = sum(self.timing.forecast(self.work.work(after)).gpu_s for after in later)
        load_s = sum(map(self.work.load_s, needed))
        return load_s + self.timing.remaining_s(forecast, live) + later_s

    def view(self, task: Task, *, telling: bool = False) -> TaskView:
        """A task as it stands.

        Args:
            telling: its client is told; what was told before is taken into account and kept.
        """
        wait = self.wait_of(task)
        return self._view(task, self._tell(task, wait) if telling else wait)

    def views_in_order(self, offset: int = 0) -> Iterator[TaskView]:
        """The tasks in the order in which they run, from the offset on, in one pass."""
        lanes = self._lanes()
        for task, wait in lanes.waits[offset:]:
            yield self._view(task, wait)
        start_s, switches, recent = lanes.gpu_free_s, 0, self._recent_after_running()
        skipped = max(offset - len(self._running), 0)
        for pos, task in enumerate(islice(self._line, skipped, None), skipped):
            if pos == skipped > 0:  # those passed over are known by their sums
                ahead = self._ahead(task, self._line.before(task), task, own=False)
                before = self._wait(self.work.forecast_of(task.stages), ahead, urgent=task.urgent)
                start_s, switches = before.start_s, before.switches
                recent = self._boundary(task.urgent, self._line.before(task), task)[2]
            loads, recent = self._line.loads(task.stages, recent)
            load_s = sum(map(self.work.load_s, loads))
            switches += len(loads)
            forecast = self.work.forecast_of(task.stages)
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
            yield self._view(task, wait)
            start_s = gpu_done_s
        held_before = max(offset - len(self._running) - len(self._line), 0)
        if held_before < len(self.held):
            for task, wait in islice(self._held_waits(self.held.waits()), held_before, None):
                yield self._view(task, wait)

    def measured(self, task: Task) -> list[tuple[Work, Measured]]:
        """The seconds of each image of a task that ends now, and the work that each was."""
        return [*_progress_of(task).measured, (self._work_of_image(task), self._measured(task))]

    def promise(self, task: Task) -> Wait:
        """The forecast of a task just added; kept, to learn how good it was. Of one that waits for
        a download it would say more of the network."""
        wait = self.wait_of(task)
        if task not in self.held:
            task.submitted = Promise(self._monotonic(), wait.end_s, wait.p90_s)
        return self._tell(task, wait)

    def last_hour(self) -> tuple[int, float]:
        """Tasks done in the last hour (or since the start), and the part of it the GPU worked."""
        now = self._monotonic()
        while self._ends and self._ends[0] < now - HOUR_S:
            self._ends.popleft()
        while self._gpu_spans and self._gpu_spans[0][0] < now - HOUR_S:
            self._gpu_spans.popleft()
        busy_s = sum(seconds for _, seconds in self._gpu_spans)
        busy_s += sum(
            now - _progress_of(task).claimed_at
            for task in self._running.values()
            if _progress_of(task).phase is not Phase.IMAGE_ENCODING
        )
        span_s = max(min(now - self._started_at, HOUR_S), 1e-9)
        return len(self._ends), min(busy_s / span_s, 1.0)

    def _use(self, stage: Stage) -> None:
        if stage.weights.key in self.resident:
            self.resident = self._line.used(self.resident, stage.weights.key)

    # -- inside -----------------------------------------------------------------------------------

    def _work_of_image(self, task: Task) -> Work:
        return replace(self.work.work(task.stages[_progress_of(task).stage]), images=1)

    def _measured(self, task: Task) -> Measured:
        """Of the image that a running task is at."""
        progress = _progress_of(task)
        seconds = dict(progress.phase_s)
        seconds[progress.phase] = self._monotonic() - progress.phase_started_at
        return Measured(
            text_encoding_s=seconds.get(Phase.TEXT_ENCODING, 0.0),
            step_s=tuple(progress.step_s),
            decoding_s=seconds.get(Phase.DECODING, 0.0),
            image_encoding_s=seconds.get(Phase.IMAGE_ENCODING, 0.0),
        )

    def _overtaken_by(self, stages: tuple[Stage, ...], *, urgent: bool) -> list[tuple[Task, float]]:
        """The tasks that a new one goes ahead of, because one before them has its weights, and the
        seconds by which it delays each; the last of the line first."""
        if self._affinity_s <= 0.0:
            return []
        key, work_s = stages[0].weights.key, self.work.forecast_of(stages).gpu_s
        overtaken: list[Task] = []
        task = self._line.last(urgent=urgent)
        if key in self._line.recent(task):
            return []  # in memory anyway when its turn comes
        while task is not None and task.stages[-1].weights.key != key:
            if task.patience_s < work_s:
                return []
            overtaken.append(task)
            task = self._line.before(task)
        if task is None:
            others_first = not urgent and self._line.urgent > 0
            if others_first or key not in self._recent_after_running():
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
        _, _, recent = self._boundary(urgent, self._line.before(first), first)
        loads, recent_with = self._line.loads(stages, recent)
        delay_s = work_s + sum(map(self.work.load_s, loads))
        delays = []
        for task in reversed(overtaken):
            without, recent = self._line.loads(task.stages, recent)
            loads, recent_with = self._line.loads(task.stages, recent_with)
            delay_s += sum(map(self.work.load_s, loads)) - sum(map(self.work.load_s, without))
            delays.append((task, max(delay_s, 0.0)))
        return delays[::-1]

    def _load_remaining_s(self) -> float:
        """Of the loading that is on, or due before anything can run."""
        if self.loading is None:
            return 0.0
        load_s = self.work.load_s(self.loading)
        if self._load_started_at is None:
            return load_s
        return max(load_s - (self._monotonic() - self._load_started_at), 0.0)

    def _leaving_s(self) -> float:
        """Until the worker leaves the cancelled task: the rest of its step, or of its decoding."""
        if self._leaving is None:
            return 0.0
        progress = _progress_of(self._leaving)
        stage = self._leaving.stages[progress.stage]
        forecast = self.timing.forecast(self.work.work(stage))
        at = self._monotonic()
        if progress.phase is Phase.DECODING:
            return max(forecast.decoding_s - (at - progress.phase_started_at), 0.0)
        first_s = 0.0 if progress.step_s else forecast.first_step_extra_s
        if progress.phase is Phase.TEXT_ENCODING:
            first_s = forecast.text_encoding_s - forecast.step_s
        return max(first_s + forecast.step_s - (at - progress.step_started_at), 0.0)

    def _recent_after_running(self) -> Recent:
        """What memory holds when the first waiting task starts."""
        recent = self.resident
        if self.loading is not None:
            recent = self._line.used(recent, self.loading.key)
        for task in self._running.values():
            if _progress_of(task).phase is not Phase.IMAGE_ENCODING:
                _, recent = self._line.loads(task.stages[_progress_of(task).stage :], recent)
        return recent

    def _boundary(
        self, urgent: bool, before: Task | None, behind: Task | None
    ) -> tuple[float, int, Recent]:
        """Loading for the first tasks of the levels up to this one.

        Args:
            before: the task of this level after which we look; None: none.
            behind: the task of this level before which we look; None: the end of the level.

        Returns:
            Its seconds, how often, and what memory holds after the task `before`.
        """
        seconds, loads, recent = 0.0, 0, self._recent_after_running()
        for level in (True,) if urgent else (True, False):
            openers = self._line.openers(urgent=level, behind=behind if level is urgent else None)
            for weights in openers:
                if weights.key not in recent:
                    seconds, loads = seconds + self.work.load_s(weights), loads + 1
                recent = self._line.used(recent, weights.key)
            last = before if level is urgent else self._line.last(urgent=level)
            for key in reversed(self._line.recent(last)):
                recent = self._line.used(recent, key)
        return seconds, loads, recent

    def _ahead(
        self, task: Task, before: Task | None, behind: Task | None, *, own: bool = True
    ) -> Ahead:
        """What comes before a task of the line, or a new one that would join it.

        Args:
            before, behind: as _boundary takes them.
            own: whether the loading for the task itself counts.
        """
        if behind is None:
            pos = self._line.urgent if task.urgent else len(self._line)
            works = self._line.total(urgent_only=task.urgent)
        else:
            pos, works = self._line.ahead_of(behind)
        seconds, loads, recent = self._boundary(task.urgent, before, behind)
        needed, _ = self._line.loads(task.stages, recent) if own else ([], recent)
        own_load_s = sum(map(self.work.load_s, needed))
        return Ahead(pos, works, seconds, loads, own_load_s, len(needed))

    def _wait(self, forecast: Forecast, ahead: Ahead, *, urgent: bool) -> Wait:
        """The GPU's work ahead and the task's own, then its image encoding, which also waits for
        the encoder to be through with the running tasks."""
        lanes = self._lanes()
        start_s, switches = lanes.gpu_free_s + ahead.load_s, ahead.loads + ahead.own_loads
        for work in ahead.works:
            start_s += self.timing.gpu_s(work.key, work.weights.model.parameters_b, work.features)
            start_s += work.loads * self.work.load_s(work.weights) if work.loads else 0.0
            switches += work.loads
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

    def _held_waits(self, held: list[tuple[Task, float]]) -> Iterator[tuple[Task, Wait]]:
        """The forecasts of tasks that join the line in this order, each after so many seconds at
        the earliest, behind what is in it by then."""
        ahead_s, known = 0.0, self.held.pace_known
        loaded: Weights | None = None
        for pos, (task, ready_s) in enumerate(held):
            wait = self._wait_in_line(task)
            own_s = wait.end_s - wait.start_s
            if loaded and loaded.key == task.stages[0].weights.key:
                own_s = max(own_s - self.work.load_s(loaded), 0.0)
            loaded = task.stages[-1].weights
            delay_s = max(ready_s - wait.start_s, 0.0) + ahead_s
            end_s = wait.start_s + delay_s + own_s
            p90_s = end_s * (P90_OF_DOWNLOADS if known else P90_WITHOUT_KNOWLEDGE)
            yield (
                task,
                Wait(
                    pos=wait.pos + pos,
                    start_s=wait.start_s + delay_s,
                    end_s=end_s,
                    p90_s=p90_s,
                    confidence=Confidence.LOW if known else Confidence.NONE,
                    switches=wait.switches,
                ),
            )
            ahead_s += own_s

    def _lanes(self) -> Lanes:
        """GPU and encoder, each one task at a time: the running tasks, first the one that is
        furthest, are one on the GPU, and those before it at the encoder."""
        gpu_free_s, encoder_free_s = self._load_remaining_s() + self._leaving_s(), 0.0
        waits = []
        for task in self._running.values():
            progress, forecast = _progress_of(task), self.work.forecast_of(task.stages)
            encoding_s = forecast.image_encoding_s
            if progress.phase is Phase.IMAGE_ENCODING:
                encoding_s = max(encoding_s - (self._monotonic() - progress.phase_started_at), 0.0)
            gpu_free_s += self.gpu_remaining_s(task)
            encoder_free_s = max(encoder_free_s, gpu_free_s) + encoding_s
            p90_s = encoder_free_s * (1.0 + P90_SIGMAS * forecast.sigma)
            waits.append((task, Wait(0, 0.0, encoder_free_s, p90_s, forecast.confidence)))
        return Lanes(gpu_free_s, encoder_free_s, waits)

    def _p90_s(self, wait_s: float, urgent: bool, forecast: Forecast) -> float:
        if forecast.confidence is Confidence.NONE:
            return P90_WITHOUT_KNOWLEDGE * wait_s
        return self.spread.p90_s(wait_s, urgent=urgent)

    def _tell(self, task: Task, wait: Wait) -> Wait:
        """What the client is told: the forecast, but a countdown that goes back only by more than
        a trifle, and then with the reason."""
        now, told = self._monotonic(), task.told
        end_at, reason = now + wait.end_s, None
        if told is not None and end_at > told.end_at:
            if end_at - told.end_at <= max(STEADY_S, STEADY_PART * wait.end_s):
                end_at = told.end_at
            elif wait.pos > told.pos:
                reason = Reason.OVERTAKEN
            elif wait.switches > told.switches:
                reason = Reason.MODEL_SWITCH
            else:
                reason = Reason.SLOWER
        task.told = Told(end_at, wait.pos, wait.switches)
        end_s = max(end_at - now, 0.0)
        start_s = min(wait.start_s, end_s)
        return replace(
            wait, start_s=start_s, end_s=end_s, p90_s=max(wait.p90_s, end_s), reason=reason
        )

    def _leave_gpu(self, task: Task) -> None:
        """Books the time that a task had the GPU; once."""
        progress = task.progress
        if progress is not None and progress.phase is not Phase.IMAGE_ENCODING:
            at = self._monotonic()
            self._gpu_spans.append((at, at - progress.claimed_at))

    def _view(self, task: Task, wait: Wait) -> TaskView:
        progress = task.progress
        shown = 0.0
        if progress is not None:
            spent_s = self._monotonic() - progress.claimed_at
            shown = spent_s / max(spent_s + wait.end_s, 1e-9)
            shown = progress.shown = min(max(shown, progress.shown), 0.999)
        return TaskView(
            task_id=task.task_id,
            status=task.status,
            params=task.params,
            urgent=task.urgent,
            created_at=task.created_at,
            started_at=task.started_at,
            ended_at=None,
            wait=wait,
            phase=progress.phase if progress else None,
            steps_done=progress.steps_done if progress else 0,
            steps_total=progress.steps_total if progress else task.params.steps_run,
            progress=shown,
            error_code=None,
            error=None,
            images_done=_images_done(task),
            held=task in self.held,
        )


def _images_done(task: Task) -> int:
    """Images to which nothing more is done than to encode them."""
    progress = task.progress
    last_stage = progress is not None and progress.stage == len(task.stages) - 1
    return progress.images_done if progress and last_stage else 0


def _progress_of(task: Task) -> Progress:
    assert task.progress is not None, "start() made it, and the task runs"
    return task.progress
