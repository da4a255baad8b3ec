"""Seconds that the running tasks still need.

A function of machines, timing model and time; it changes none of them. Not thread-safe: the
scheduler calls it under its lock.
"""

from dataclasses import replace

from scheduler.estimates import Estimates
from scheduler.machines import Machine, Run
from task import Phase
from timing.live import phase_left_s, remaining_s
from timing.survival import remaining
from timing_model import Live

SHARE_TO_TRUST = 0.25
"""From this share of its weights on, the rest of a load is forecast from its own pace alone."""
SHARE_SIGMA = 0.2
"""Spread of log(truth / forecast) of the rest by that pace."""

PACE_STEPS = 3
"""Steps of a picture, the first one included, after which its pace says something about others."""


class Remaining:
    """All figures are seconds from `at`, a reading of the monotonic clock."""

    def __init__(self, estimates: Estimates) -> None:
        self._estimates = estimates
        self._paces: dict[str, tuple[object, float]] = {}
        """By machine, the latest pace(), and what it was made of."""

    def left_s(self, run: Run, at: float) -> float:
        """Seconds until a running task is done, as forecast now if no report comes until `at`.
        Other tasks are not counted."""
        left_s = self.encoding_s(run, at)
        if run.on_gpu:
            left_s += self._load_s(run.machine, at) + self._gpu_s(run, self._live(run, at))
        return left_s

    def encoding_s(self, run: Run, at: float) -> float:
        """Seconds for which the last image of a running task is still encoded off the GPU."""
        durations = self._estimates.durations(run.stage)
        elapsed_s = 0.0 if run.on_gpu else at - run.phase_started_at
        return remaining(durations.image_encoding_s, elapsed_s, durations.sigma)

    def gpu_s(self, run: Run, at: float) -> float:
        """Seconds for which a running task still needs the GPU, including loading of weights."""
        return self._gpu_s(run, self._live(run, run.until(at))) if run.on_gpu else 0.0

    def pace(self, machine: Machine) -> float:
        """Factor on the forecasts of waiting tasks, by the steps of the latest running task that
        has drawn some. Rounded, so that it changes seldom."""
        runs = reversed(machine.in_order)
        run = next((run for run in runs if len(run.step_s) >= PACE_STEPS), None)
        if run is None:
            return 1.0
        state = run.task.task_id, run.progress, self._estimates.version
        known, pace = self._paces.get(machine.name, (None, 1.0))
        if known != state:
            step_s = [step_s * machine.speed for step_s in run.step_s]
            work = self._estimates.work(run.stage)
            pace = round(self._estimates.timing.pace(work, step_s), 2)
            self._paces[machine.name] = state, pace
        return pace

    def after_next_step_s(self, run: Run, at: float) -> float | None:
        """As gpu_s(), when its next step has ended; None: there is none."""
        live = self._live(run, run.until(at))
        durations = self._estimates.durations(run.stage)
        first_s = (durations.step_s + durations.first_step_extra_s,)
        after = live._replace(
            phase=Phase.DENOISING,
            phase_elapsed_s=0.0,
            steps_done=1,
            steps_total=run.stage.params.steps_run,
            step_s=first_s,
            step_elapsed_s=0.0,
        )
        if live.phase == Phase.DENOISING and live.steps_done < live.steps_total:
            after = after._replace(steps_done=live.steps_done + 1, step_s=live.step_s or first_s)
        elif live.phase != Phase.TEXT_ENCODING:
            if live.images_done + 1 >= run.stage.images_left:
                return None
            after = after._replace(images_done=live.images_done + 1)
        return self._gpu_s(run, after)

    def before_runs_s(self, machine: Machine, at: float) -> float:
        """Seconds until running tasks are drawn: the rest of a load, and of what is stopped."""
        stopping_s = 0.0
        if machine.stopping is not None and machine.loading is None:
            stopping_s = self.phase_s(machine.stopping, at)
        return self._load_s(machine, at) + stopping_s

    def until_drawn_s(self, run: Run, at: float) -> float:
        """Seconds until a running task is drawn, including the rest of its load."""
        return self._load_s(run.machine, at) + self.gpu_s(run, at)

    def until_image_s(self, run: Run, at: float) -> float:
        """Seconds until the present image of a running task is drawn, including the rest of its
        load."""
        live = self._live(run, run.until(at))
        one = replace(self._estimates.durations(run.stage), images=1)
        work_s = remaining_s(one, live._replace(images_done=0)) / run.machine.speed
        return self._load_s(run.machine, at) + work_s

    def load_part_s(self, machine: Machine, at: float) -> float:
        """Seconds until a load can be stopped: between two of its parts. Before the first report
        it is not known how long a part takes."""
        left_s = self._load_s(machine, at)
        return min(left_s, machine.load_part_s) if machine.load_share else left_s

    def phase_s(self, run: Run, at: float) -> float:
        """Seconds until the present step of a running task ends, or its phase if that has no
        steps."""
        live = self._live(run, run.until(at))
        return phase_left_s(self._estimates.durations(run.stage), live) / run.machine.speed

    def _gpu_s(self, run: Run, live: Live) -> float:
        machine = run.machine
        resident = machine.resident
        if machine.loading is not None:
            resident = resident.after(machine.loading)
        stages = run.task.stages[run.progress.stage :]
        needed, _ = resident.loads(stages)
        work_s = remaining_s(self._estimates.durations(stages[0]), live)
        work_s += sum(self._estimates.durations(stage).gpu_s for stage in stages[1:])
        return self._estimates.loads_s(needed) + work_s / machine.speed

    def _live(self, run: Run, at: float) -> Live:
        machine, progress = run.machine, run.progress
        phase = progress.phase
        if machine.loading is not None or phase is Phase.LOADING:  # the task has not begun
            phase, at = Phase.TEXT_ENCODING, run.phase_started_at
        return Live(
            phase=phase,
            phase_elapsed_s=(at - run.phase_started_at) * machine.speed,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=[step_s * machine.speed for step_s in run.step_s],
            step_elapsed_s=(at - run.step_started_at) * machine.speed,
            images_done=progress.image - run.stage.images_done,
            text_s=run.text_s * machine.speed,
        )

    def _load_s(self, machine: Machine, at: float) -> float:
        """Seconds of the load that is running, or is due before anything can run."""
        spec = machine.loading
        if spec is None:
            return 0.0
        load_s = self._estimates.load_s(spec)
        if machine.load_started_at is None:
            return load_s
        elapsed_s = at - machine.load_started_at
        left_s = remaining(load_s, elapsed_s, self._estimates.load_sigma(spec))
        share = machine.load_share
        if share <= 0.0:
            return left_s
        since_s = at - machine.load_reported_at
        by_share_s = remaining((elapsed_s - since_s) * (1.0 - share) / share, since_s, SHARE_SIGMA)
        weight = min(share / SHARE_TO_TRUST, 1.0)
        return weight * by_share_s + (1.0 - weight) * left_s
