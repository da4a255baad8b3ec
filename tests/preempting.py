"""A queue in which tasks preempt others. The test is the worker, and moves the clock."""

from typing import Any

import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for
from memory_stores import memory_store

from scheduler.limits import QueueLimits
from task import Encoded, Owner, Phase, Progress, Task, Verdict
from timing_model import Measured, TimingModel

STEP_S = 2.0
"""Of every task; nothing else takes time."""


class Bench:
    """A queue whose worker and clock the test moves. All forecasts are right."""

    def __init__(self, **limits: Any) -> None:
        self.at = 1000.0
        self.queue = PlayedQueue(
            allow("noise-flux1", "noise-flux2", allow_lora_repos=True),
            TimingModel(),
            memory_store(),
            QueueLimits(**{"preempt": True, **limits}),
            monotonic=self.clock,
            now=self.clock,
        )
        self.worker = self.queue.worker
        self.queue.load()
        self.claimed: dict[str, Task] = {}
        for _ in range(10):
            self.draw(self.claim(self.submit("taught", steps=4)))

    def clock(self) -> float:
        return self.at

    def submit(
        self, name: str, client: str = "", *, priority: int = 0, steps: int = 4, **more: Any
    ) -> str:
        weight = more.pop("weight", 1.0)
        params = params_for(name, **{"width": 512, "height": 512, "steps": steps, **more})
        owner = Owner(client, "", weight)
        return self.queue.submit(params, priority=priority, owner=owner)[0].task_id

    def claim(self, expected: str) -> str:
        task = self.worker.claim(0)
        assert task
        assert task.task_id == expected
        self.claimed[task.task_id] = task
        return task.task_id

    def report(self, task_id: str, steps_done: int, phase: Phase = Phase.DENOISING) -> Verdict:
        task = self.claimed[task_id]
        progress = Progress(phase, steps_done, task.params.steps)
        return self.worker.report(task_id, task.attempt, progress)

    def step(self, task_id: str, steps: int = 1) -> Verdict:
        """The task makes so many steps; the answer to the last one."""
        verdict = Verdict.CONTINUE
        for _ in range(steps):
            done = self.queue.status(task_id).steps_done
            self.at += STEP_S
            verdict = self.report(task_id, done + 1)
        return verdict

    def begin(self, task_id: str, steps: int = 0) -> Verdict:
        """The task is claimed and makes so many steps."""
        self.claim(task_id)
        self.report(task_id, 0)
        return self.step(task_id, steps)

    def preempt(self, task_id: str) -> str | None:
        """The worker has got PAUSE. Returns the task that it then draws."""
        task = self.worker.claim_preempting(task_id, self.claimed[task_id].attempt)
        if task:
            self.claimed[task.task_id] = task
            self.report(task.task_id, 0)
        return task.task_id if task else None

    def resume(self, task_id: str) -> Verdict:
        return self.report(task_id, self.queue.scheduler.machine.runs[task_id].progress.steps_done)

    def draw(self, task_id: str) -> None:
        """The rest of a claimed task."""
        task = self.claimed[task_id]
        done = self.queue.status(task_id).steps_done
        for step in range(done, task.params.steps + 1):
            self.at += STEP_S if step > done else 0.0
            self.report(task_id, step)
        self.report(task_id, task.params.steps, Phase.DECODING)
        self.report(task_id, task.params.steps, Phase.IMAGE_ENCODING)
        measured = Measured(0.0, (STEP_S,) * task.params.steps, 0.0, 0.0)
        self.worker.finish(task_id, task.attempt, Encoded(b"image", 0, ((0, measured),)))

    def end_in_s(self, task_id: str) -> float:
        return forecast_of(self.queue.status(task_id)).end_s


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=0.5)
