"""A waiting task preempts the running one between two steps: the rules, in virtual time."""

from typing import Any

import pytest
from conftest import forecast_of, params_for
from preempting import STEP_S, Bench, about

from models.model_catalog import Lora
from scheduler.policy import LEAST_LEFT_S, MOST_PAUSES, PAYS
from task import Owner, Phase, Reason, TaskStatus, Verdict


@pytest.fixture
def bench() -> Bench:
    return Bench()


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
