"""A waiting task preempts the running one between two steps: the rules, in virtual time."""

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for

from errors import StorageUnavailable
from models.model_catalog import Lora
from scheduler.limits import QueueLimits
from scheduler.policy import LEAST_LEFT_S, MOST_PAUSES, PAYS
from storage.task_store import TaskStore
from task import Encoded, Owner, Phase, Progress, Reason, Task, TaskStatus, Verdict
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
            TaskStore(None),
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


@pytest.fixture
def bench() -> Bench:
    return Bench()


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=0.5)


def test_an_urgent_task_is_drawn_at_the_next_step_and_the_paused_one_goes_on(bench: Bench) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    bench.at += 0.5
    urgent = bench.submit("urgent", priority=1)
    forecast = forecast_of(bench.queue.status(urgent))
    assert (forecast.pos, forecast.start_s) == (0, about(1.5))
    assert forecast.end_s == about(1.5 + 4 * STEP_S)
    assert bench.end_in_s(long) == about(44.75 * STEP_S + 4 * STEP_S)
    bench.at -= 0.5

    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) == urgent
    paused = bench.queue.status(long)
    assert (paused.status, paused.phase) == (TaskStatus.RUNNING, Phase.PAUSED)
    assert paused.steps_done == 6
    assert forecast_of(paused).end_s == about((44 + 4) * STEP_S)
    assert forecast_of(paused).reason is Reason.OVERTAKEN
    tasks, _ = bench.queue.unfinished(10, 0)
    assert [task.task_id for task in tasks] == [urgent, long], "in the order in which they end"

    bench.draw(urgent)
    assert bench.queue.status(urgent).status is TaskStatus.DONE
    assert bench.resume(long) is Verdict.CONTINUE
    assert bench.queue.status(long).phase is Phase.DENOISING
    assert bench.end_in_s(long) == about(44 * STEP_S)
    bench.draw(long)
    assert bench.queue.status(long).status is TaskStatus.DONE


def test_the_estimate_knows_that_the_task_will_preempt(bench: Bench) -> None:
    bench.begin(bench.submit("long", steps=50), 5)
    params = params_for("x", width=512, height=512, steps=4)
    expected, _ = bench.queue.estimate(params, priority=1)
    urgent = bench.submit("urgent", priority=1)
    assert expected.end_s == about(forecast_of(bench.queue.status(urgent)).end_s)
    assert expected.start_s == about(STEP_S)


RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same priority, same client": ({}, {}),
    "urgent over urgent": ({"priority": 1}, {"priority": 1}),
    "a normal task over a background one": ({"priority": -1}, {}),
    "another model": ({}, {"priority": 1, "model": "noise-flux2"}),
    "other weights": ({}, {"priority": 1, "quantize": 8}),
    "other LoRAs": ({}, {"priority": 1, "loras": (Lora("org/name"),)}),
    "it takes too long": ({}, {"priority": 1, "steps": int(45 / PAYS) + 1}),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_does_not_fit_the_rules_waits_for_the_whole_task(bench: Bench, rule: str) -> None:
    running, waiting = RULES[rule]
    long = bench.submit("long", steps=50, **running)
    bench.begin(long, 5)
    other = bench.submit("other", **waiting)
    assert forecast_of(bench.queue.status(other)).start_s >= 45 * STEP_S - 0.5
    assert bench.step(long) is Verdict.CONTINUE
    assert bench.preempt(long) is None
    assert bench.queue.status(other).status is TaskStatus.WAITING


def test_a_task_that_ends_soon_is_not_paused(bench: Bench) -> None:
    steps = 20
    long = bench.submit("long", steps=steps)
    last = int(LEAST_LEFT_S / STEP_S)
    bench.begin(long, steps - last - 1)
    bench.submit("urgent", priority=1, steps=1)
    assert bench.step(long) is Verdict.CONTINUE


def test_nothing_is_paused_where_the_operator_does_not_want_it() -> None:
    bench = Bench(preempt=False)
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", priority=1)
    assert forecast_of(bench.queue.status(urgent)).start_s == about(45 * STEP_S)
    assert bench.step(long) is Verdict.CONTINUE


def test_a_preempting_task_is_not_preempted_and_a_task_is_paused_a_few_times_only(
    bench: Bench,
) -> None:
    long = bench.submit("long", steps=100)
    bench.begin(long, 5)
    urgent = [bench.submit(f"urgent {n}", priority=1) for n in range(MOST_PAUSES + 2)]
    starts = [forecast_of(bench.queue.status(task_id)).start_s for task_id in urgent]
    in_time = [STEP_S + 4 * STEP_S * n for n in range(MOST_PAUSES)]
    assert starts[:MOST_PAUSES] == [about(s) for s in in_time]
    assert starts[MOST_PAUSES] == about(95 * STEP_S + 4 * STEP_S * MOST_PAUSES)
    assert bench.step(long) is Verdict.PAUSE
    for task_id in urgent[:MOST_PAUSES]:
        assert bench.preempt(long) == task_id
        assert bench.step(task_id) is Verdict.CONTINUE, "one level deep"
        assert bench.preempt(task_id) is None
        bench.draw(task_id)
        verdict = bench.resume(long)
    assert verdict is Verdict.CONTINUE
    assert bench.preempt(long) is None


def test_a_client_far_below_its_share_does_not_wait_for_a_long_picture(bench: Bench) -> None:
    """It is behind by PAYS times its task when the other client has had that much."""
    long = bench.submit("long", "alice", steps=100)
    bench.begin(long)
    bench.at += STEP_S / 2  # the first step is slower
    bench.step(long)
    short = bench.submit("short", "bob", steps=4)
    due_s = PAYS * 4 * STEP_S
    forecast = forecast_of(bench.queue.status(short))
    assert forecast.start_s == about(due_s - 1.5 * STEP_S)
    assert bench.step(long, int(due_s / STEP_S) - 2) is Verdict.CONTINUE
    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) == short
    bench.draw(short)
    assert bench.resume(long) is Verdict.CONTINUE


def test_a_client_with_a_greater_weight_waits_less_and_one_that_has_had_much_waits(
    bench: Bench,
) -> None:
    bench.begin(bench.submit("long", "alice", steps=100), 1)
    short = bench.submit("short", "bob", steps=4, weight=4.0)
    assert forecast_of(bench.queue.status(short)).start_s == about(PAYS * 4 * STEP_S / 4 - STEP_S)

    bench = Bench()
    bob = bench.submit("bob's", "bob", steps=30)
    long = bench.submit("long", "alice", steps=100)
    again = bench.submit("bob's", "bob", steps=4)
    bench.begin(bob)
    bench.draw(bob)
    bench.begin(long, 30)
    assert bench.step(long) is Verdict.CONTINUE, "alice has had as much as bob only now"
    start_s = (30 + PAYS * 4 - 31) * STEP_S
    assert forecast_of(bench.queue.status(again)).start_s == about(start_s)


def test_gpu_seconds_are_charged_to_the_client_that_used_them(bench: Bench) -> None:
    """The paused task is charged as if nobody had come between."""
    long = bench.submit("long", "alice", steps=50)
    rest = [bench.submit("next", name, steps=40) for name in ("alice", "bob")]
    bench.begin(long, 5)
    urgent = bench.submit("urgent", "bob", priority=1, steps=20)
    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) == urgent
    bench.draw(urgent)
    machine, shares = bench.queue.scheduler.machine, vars(bench.queue.scheduler.policy)["_shares"]
    bench.resume(long)
    assert machine.runs[long].gpu_s(bench.at) == about(6 * STEP_S)
    bench.draw(long)
    had = [shares.had(Owner(name)) - shares.virtual for name in ("alice", "bob")]
    assert had[0] - had[1] == about(30 * STEP_S)
    assert bench.worker.claim(0).task_id == rest[1]  # type: ignore[union-attr]
    _, busy = machine.last_hour(bench.at)
    assert busy == pytest.approx(1.0, abs=0.01)


def test_the_pause_is_learned_neither_as_a_step_nor_as_progress(bench: Bench) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", priority=1, steps=20)
    bench.step(long)
    bench.preempt(long)
    before = bench.queue.status(long).share_done
    for _ in range(20):
        bench.step(urgent)
        assert bench.queue.status(long).share_done == before
    bench.draw(urgent)
    bench.resume(long)
    bench.step(long)
    assert bench.queue.scheduler.machine.runs[long].step_s == [STEP_S] * 7
    assert bench.queue.status(long).share_done > before


# -- what else happens while a task is paused -----------------------------------------------------


@pytest.fixture
def paused(bench: Bench) -> Iterator[tuple[Bench, str, str]]:
    """A paused task, and the one that preempts it. At the end nothing is remembered of them."""
    long = bench.submit("long", "alice", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", "bob", priority=1)
    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) == urgent
    bench.step(urgent)
    yield bench, long, urgent
    scheduler = bench.queue.scheduler
    assert len(scheduler) == 0
    assert scheduler.machine.runs == {}
    assert vars(scheduler.policy)["_shares"]._clients == {}


def test_the_paused_task_is_cancelled(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    bench.queue.delete(long)
    assert bench.queue.status(long).status is TaskStatus.CANCELLED
    waiting = bench.submit("next")
    assert forecast_of(bench.queue.status(waiting)).start_s == about(3 * STEP_S)
    bench.draw(urgent)
    assert bench.queue.status(urgent).status is TaskStatus.DONE
    assert bench.report(long, 6) is Verdict.STOP
    assert not bench.worker.release(long, 1)
    bench.worker.left(long)
    bench.begin(waiting)
    bench.draw(waiting)


def test_the_preempting_task_is_cancelled(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    bench.queue.delete(urgent)
    assert bench.end_in_s(long) == about((44 + 1) * STEP_S), "after the step that it is at"
    assert bench.report(urgent, 2) is Verdict.STOP
    assert bench.resume(long) is Verdict.CONTINUE
    bench.draw(long)
    assert bench.queue.status(long).status is TaskStatus.DONE


def test_the_preempting_task_fails(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    assert bench.worker.fail(urgent, 1, "task_failed", "no room")
    assert bench.resume(long) is Verdict.CONTINUE
    assert bench.end_in_s(long) == about(44 * STEP_S)
    bench.draw(long)
    assert bench.queue.status(urgent).status is TaskStatus.FAILED
    assert bench.queue.status(long).status is TaskStatus.DONE


def test_both_wait_again_when_the_server_stops(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    bench.worker.stop()
    assert bench.step(urgent) is Verdict.STOP
    assert bench.worker.release(urgent, 1)
    assert bench.resume(long) is Verdict.STOP
    assert bench.worker.release(long, 1)
    tasks, _ = bench.queue.unfinished(10, 0)
    assert [(task.task_id, task.status) for task in tasks] == [
        (urgent, TaskStatus.WAITING),
        (long, TaskStatus.WAITING),
    ]
    assert [task.interruptions for task in tasks] == [0, 0]
    bench.queue.delete(urgent)
    bench.queue.delete(long)


def test_while_the_server_drains_nothing_is_paused_and_what_fits_is_finished(
    paused: tuple[Bench, str, str],
) -> None:
    bench, long, urgent = paused
    bench.submit("urgent 2", priority=1)
    bench.worker.stop(drain_s=5 * STEP_S)
    bench.draw(urgent)
    assert bench.queue.status(urgent).status is TaskStatus.DONE
    assert bench.resume(long) is Verdict.STOP
    assert bench.worker.release(long, 1)
    for task in bench.queue.unfinished(10, 0)[0]:
        bench.queue.delete(task.task_id)


def test_a_queue_that_the_operator_has_paused_preempts_nothing(bench: Bench) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    bench.submit("urgent", priority=1)
    bench.queue.scheduler.paused = True
    assert bench.step(long) is Verdict.CONTINUE
    bench.queue.scheduler.paused = False
    assert bench.step(long) is Verdict.PAUSE


def test_no_task_is_paused_for_one_whose_time_is_up(bench: Bench) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", priority=1, max_age_s=1.0)
    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) is None
    assert bench.queue.status(urgent).status is TaskStatus.CANCELLED
    assert bench.resume(long) is Verdict.CONTINUE


def test_no_task_is_paused_for_one_that_cannot_be_claimed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", priority=1)
    assert bench.step(long) is Verdict.PAUSE
    with monkeypatch.context() as patched:
        patched.setattr(bench.queue.scheduler.store, "claim", lambda *_, **__: False)
        with pytest.raises(StorageUnavailable):
            bench.preempt(long)
    assert bench.queue.status(long).phase is Phase.DENOISING
    bench.queue.delete(urgent)
    assert bench.preempt(long) is None
    assert bench.step(long) is Verdict.CONTINUE
