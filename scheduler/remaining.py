"""Seconds that the running tasks still need.

A function of machines, timing model and time; it changes none of them. Not thread-safe: the
scheduler calls it under its lock.
"""

from collections.abc import Callable
from dataclasses import replace

from scheduler.estimates import Estimates
from scheduler.machines import Machine, Run
from task import Phase
from timing_model import Live, TimingModel


class Remaining:
    """Args:
    monotonic: the clock, in seconds.
    """

    def __init__(
        self, estimates: Estimates, timing: TimingModel, monotonic: Callable[[], float]
    ) -> None:
        self._estimates = estimates
        self._timing = timing
        self._monotonic = monotonic

    def gpu_s(self, run: Run, machine: Machine) -> float:
        """For which a running task still needs the GPU, loading of its weights included."""
        return self._gpu_s(run, machine, self._live(run, machine)) if run.on_gpu else 0.0

    def after_next_step_s(self, run: Run, machine: Machine) -> float | None:
        """As gpu_s(), when its next step has ended; None: there is none."""
        live = self._live(run, machine)
        after = replace(
            live, phase=Phase.DENOISING, phase_elapsed_s=0.0, steps_done=1, step_s=(0.0,)
        )
        after = replace(after, steps_total=run.stage.params.steps_run, step_elapsed_s=0.0)
        if live.phase == Phase.DENOISING and live.steps_done < live.steps_total:
            after = replace(after, steps_done=live.steps_done + 1, step_s=live.step_s or (0.0,))
        elif live.phase != Phase.TEXT_ENCODING:
            if live.images_done + 1 >= run.stage.images_left:
                return None
            after = replace(after, images_done=live.images_done + 1)
        return self._gpu_s(run, machine, after)

    def before_runs_s(self, machine: Machine) -> float:
        """Until the running tasks are drawn: the rest of a load, and of what is being stopped."""
        return self._load_s(machine) + self._stopping_s(machine)

    def used_s(self, run: Run) -> float:
        """For which a running task has had the GPU."""
        return run.gpu_s(self._monotonic())

    def _gpu_s(self, run: Run, machine: Machine, live: Live) -> float:
        resident = machine.resident
        if machine.loading is not None:
            resident = resident.after(machine.loading)
        stages = run.task.stages[run.progress.stage :]
        needed, _ = resident.loads(stages)
        later_s = sum(self._estimates.durations(stage).gpu_s for stage in stages[1:])
        work_s = self._timing.remaining_s(self._estimates.durations(run.stage), live) + later_s
        return self._estimates.loads_s(needed) + work_s / machine.speed

    def _live(self, run: Run, machine: Machine) -> Live:
        progress, at = run.progress, run.until(self._monotonic())
        phase = progress.phase
        if machine.loading is not None or phase is Phase.LOADING:  # the task has not begun
            phase, at = Phase.TEXT_ENCODING, run.phase_started_at
        return Live(
            phase=phase,
            phase_elapsed_s=at - run.phase_started_at,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            step_s=run.step_s,
            step_elapsed_s=at - run.step_started_at,
            images_done=progress.image - run.stage.images_done,
        )

    def _load_s(self, machine: Machine) -> float:
        """Of the load that is running, or is due before anything can run."""
        if machine.loading is None:
            return 0.0
        load_s = self._estimates.load_s(machine.loading)
        if machine.load_started_at is None:
            return load_s
        return max(load_s - (self._monotonic() - machine.load_started_at), 0.0)

    def _stopping_s(self, machine: Machine) -> float:
        """Until the worker stops the cancelled task: the rest of its step, or of its decoding."""
        run = machine.stopping
        if run is None:
            return 0.0
        durations, at = self._estimates.durations(run.stage), self._monotonic()
        if run.progress.phase is Phase.DECODING:
            return max(durations.decoding_s / machine.speed - (at - run.phase_started_at), 0.0)
        step_s = durations.step_s
        if run.progress.phase is Phase.TEXT_ENCODING:
            step_s = durations.text_encoding_s
        elif not run.step_s:
            step_s += durations.first_step_extra_s
        return max(step_s / machine.speed - (at - run.step_started_at), 0.0)
