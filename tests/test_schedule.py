"""The forecasts of all waiting tasks, against plain simulations of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asked_tasks import EXAMPLES, Asked, requests
from bench import BASE, KLEIN, MODELS, SCHNELL, UPSCALER, Bench, spec_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.model_catalog import LoadSpec
from scheduler.machines import Machine
from scheduler.plan import PASS_EVERY_S, Planner
from scheduler.resident import Resident, Sizes
from scheduler.walk import Kinds
from task import Phase, Progress, Task


def order(task: Task) -> tuple[int, bool, float, int, int]:
    return -task.priority, task.attempt == task.retried_after, task.turn, task.group, task.sequence


def kept_beside(loaded: LoadSpec, memory: list[str], machine: Machine) -> list[str]:
    """What stays in memory when these weights are loaded: the oldest make room."""
    specs = {spec_of(model).key: spec_of(model) for model in (*MODELS, UPSCALER)}
    kept = list(memory)
    while kept and (
        len(kept) >= machine.resident.most
        or sum(specs[key].expected_bytes for key in (*kept, loaded.key))
        > machine.resident.sizes.room_bytes
    ):
        kept.pop()
    return kept


def simulated(bench: Bench) -> dict[str, tuple[float, float, int]]:
    """When each waiting task starts and ends, and the loads on its machine up to then, by walking
    through them one by one."""
    free: list[float] = []
    resident: list[tuple[str, ...]] = []
    loads: list[int] = []
    for machine in bench.machines:
        left = 0.0
        if machine.loading:
            left += bench.estimates.load_s(machine.loading)
        for run in machine.runs.values():
            left += bench.forecaster.remaining.gpu_s(run, bench.at)
        free.append(left)
        resident.append(machine.resident_after_runs().keys)
        loads.append(0)
    found = {}
    for task in sorted(bench.schedule, key=order):
        ends = []
        for number, machine in enumerate(bench.machines):
            at, loaded, memory = free[number], loads[number], list(resident[number])
            for stage in task.stages:
                if stage.load_spec.key not in memory:
                    at += bench.estimates.load_s(stage.load_spec)
                    loaded += 1
                    memory = kept_beside(stage.load_spec, memory, machine)
                else:
                    memory.remove(stage.load_spec.key)
                memory.insert(0, stage.load_spec.key)
            work = [bench.timing.durations(bench.estimates.work(stage)) for stage in task.stages]
            at += sum(durations.gpu_s for durations in work) / machine.speed
            ends.append((at, number, loaded, tuple(memory), work[-1].image_encoding_s))
        end, number, loads_then, memory_then, encoding = min(ends, key=lambda e: (e[0], e[1]))
        start = free[number]
        free[number], resident[number], loads[number] = end, memory_then, loads_then
        found[task.task_id] = (start, end + encoding, loads_then)
    return found


def assume_no_tie(start_s: float, end_s: float, other_start_s: float, other_end_s: float) -> None:
    """Two machines would end a task at the same moment, but for rounding: either may be chosen."""
    if end_s == pytest.approx(other_end_s, rel=1e-9):
        assume(start_s == pytest.approx(other_start_s))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_forecast_of_each_task_equals_a_plain_list_scheduling_simulation(examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(
        requests,
        st.integers(1, 4),
        st.tuples(st.integers(1, 3), st.sampled_from([0, 45_000_000_000, 60_000_000_000])),
        st.sampled_from([0.0, 40.0, 1000.0]),
        st.lists(st.sampled_from(["start", "remove", "release", "end", "idle"]), max_size=8),
    )
    def check(
        asked: list[Asked],
        machines: int,
        memory: tuple[int, int],
        max_delay_s: float,
        changes: list[str],
    ) -> None:
        models_in_memory, room_bytes = memory
        bench = Bench(machines=machines, models_in_memory=models_in_memory, max_delay_s=max_delay_s)
        for machine in bench.machines:
            machine.resident = Resident(most=models_in_memory, sizes=Sizes(room_bytes))
        bench.load(SCHNELL)
        for number, one in enumerate(asked):
            assert_the_answer_is_what_was_promised(bench, one.task(bench, str(number)))
        assert_all_forecasts_equal_the_simulation(bench, changed(bench, changes))

    check()


def assert_the_answer_is_what_was_promised(bench: Bench, task: Task) -> None:
    promised = bench.join(task)
    answer = bench.forecaster.of(task)
    assume_no_tie(promised.start_s, promised.end_s, answer.start_s, answer.end_s)
    assert (promised.pos, promised.switches) == (answer.pos, answer.switches)
    assert promised.start_s == pytest.approx(answer.start_s)
    assert promised.end_s == pytest.approx(answer.end_s)
    assert promised.p90_s == pytest.approx(answer.p90_s)


def assert_all_forecasts_equal_the_simulation(bench: Bench, started: list[Task]) -> None:
    expected = simulated(bench)
    whole = bench.in_order()
    waiting = whole[len(started) :]
    assert [task for task, _ in whole[: len(started)]] == started
    assert [task.task_id for task, _ in waiting] == bench.ids()
    for pos, (task, forecast) in enumerate(waiting):
        start, end, loads = expected[task.task_id]
        assume_no_tie(start, end, forecast.start_s, forecast.end_s)
        assert forecast == bench.forecaster.of(task)
        assert (forecast.pos, forecast.switches) == (pos, loads)
        assert forecast.start_s == pytest.approx(start)
        assert forecast.end_s == pytest.approx(end, abs=0.1)  # the encoder may be busy before
        assert forecast.p90_s >= forecast.end_s
    for offset in range(len(whole) + 1):
        assert bench.in_order(offset) == whole[offset:]

    def is_even(task: Task) -> bool:
        return int(task.task_id) % 2 == 0

    even = [(task, forecast) for task, forecast in whole if is_even(task)]
    assert bench.forecaster.in_order(bench.forecaster.lanes(), 0, 1, is_even)[1] == len(even)
    for offset in range(len(even) + 1):
        assert bench.in_order(offset, 2, is_even) == even[offset : offset + 2]


def changed(bench: Bench, changes: list[str]) -> list[Task]:
    """Claims, releases, ends, cancels, and frees memory. Returns the tasks that run, by machine."""
    for number, change in enumerate(changes):
        first = bench.schedule.first()
        machine = bench.machines[number % len(bench.machines)]
        if change == "remove" and first:
            bench.policy.leave(bench.schedule[len(bench.schedule) // 2])
        elif change == "start" and first and not machine.runs:
            bench.start(first, machine)
        elif change in ("release", "end") and machine.runs:
            (run,) = machine.runs.values()
            machine.end(run, bench.at)
            if change == "release":
                bench.policy.release(run.task, 0.0, bench.gpu_s(run.task))
            else:  # its weights are in memory now
                _, resident = machine.resident.loads(run.task.stages)
                machine.now_resident(resident.keys)
        elif change == "idle" and not machine.runs:
            machine.now_resident(())
    return [run.task for machine in bench.machines for run in machine.runs.values()]


@pytest.mark.parametrize("machines", [1, 3])
def test_a_question_walks_through_the_schedule_only_after_a_change(
    machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(machines=machines)
    bench.load(SCHNELL)
    for number in range(20):
        bench.join(bench.task(str(number), MODELS[number % 3], steps=10 + number))
    runs = [bench.start(bench.schedule[0], machine) for machine in bench.machines]
    walker, name = (Kinds, "walk") if machines == 1 else (Planner, "_computed")
    computed, walks = getattr(walker, name), []

    def count(*arguments: Any) -> Any:
        walks.append(arguments)
        return computed(*arguments)

    monkeypatch.setattr(walker, name, count)

    def ask_everything() -> int:
        for task in bench.schedule:
            bench.forecaster.of(task)
        bench.in_order()
        bench.forecaster.of_new(bench.task("new", KLEIN))
        return len(walks)

    asked = ask_everything()
    assert asked <= 1, "with one machine, the walk goes on behind the task that was claimed"
    starts = [forecast.start_s for _, forecast in bench.in_order(machines)]
    bench.at += 1.0
    for run, machine in zip(runs, bench.machines, strict=True):
        machine.report(run, Progress(Phase.DENOISING, 1, 10), bench.at)
    assert ask_everything() == asked
    later = [forecast.start_s for _, forecast in bench.in_order(machines)]
    assert later != starts, "the start follows the running task all the same"
    bench.policy.leave(bench.schedule[5])
    assert ask_everything() == asked + 1
    bench.machine.end(runs[0], bench.at)
    ended = asked + 1 + (machines > 1)
    assert ask_everything() == ended
    relearn(bench)
    assert ask_everything() == ended + 1


def test_a_task_that_takes_long_delays_the_tasks_of_its_own_machine_alone() -> None:
    bench = Bench(machines=2)
    for machine in bench.machines:
        machine.now_resident((spec_of(SCHNELL).key,))
        machine.speed = 1.0
    for number in range(6):
        bench.join(bench.task(str(number)))
    runs = [bench.start(bench.schedule[0], machine) for machine in bench.machines]
    before = [forecast.start_s for _, forecast in bench.in_order(2)]
    bench.at += 100.0
    bench.machine.report(runs[0], Progress(Phase.DECODING, 4, 4), bench.at)
    late_s, other_s = (bench.forecaster.remaining.gpu_s(run, bench.at) for run in runs)
    after = [forecast.start_s for _, forecast in bench.in_order(2)]
    own_s = bench.estimates.durations(*bench.task("x").stages).gpu_s
    assert before == pytest.approx([own_s, own_s, 2 * own_s, 2 * own_s])
    assert after == pytest.approx([late_s, other_s, late_s + own_s, other_s + own_s])


def test_with_one_machine_the_prefix_sums_equal_the_simulation_of_several() -> None:
    one, two = Bench(models_in_memory=2), Bench(machines=2, models_in_memory=2)
    two.machines[1].speed = 1e-9
    for bench in (one, two):
        for number in range(12):
            bench.join(bench.task(str(number), MODELS[number * 7 % 4], steps=1 + number))
    assert [f.end_s for _, f in one.in_order()] == pytest.approx(
        [f.end_s for _, f in two.in_order()]
    )


def test_the_order_follows_turns_that_change() -> None:
    """As those of a rule that is fair to clients would."""
    bench = Bench()
    for name in "abcd":
        bench.join(bench.task(name, MODELS[ord(name) % 2], steps=1 + ord(name) % 3))
    turns = np.array([2.5, 0.5, 2.5, 1.0])
    bench.schedule.set_turns(turns, turns)
    assert bench.ids() == ["b", "d", "a", "c"]
    expected = simulated(bench)
    for task, forecast in bench.in_order():
        assert forecast.start_s == pytest.approx(expected[task.task_id][0])


def relearn(bench: Bench) -> None:
    for model in MODELS:
        bench.timing.learn_load(model.name, 70.0)


def store_quantized(bench: Bench) -> None:
    """The weights turn out to be quantized, and then load in 3 s."""
    (stage,) = bench.task("x").stages
    assert bench.estimates.learn_bits(stage.load_spec, 8)
    bench.schedule.rebuild()
    bench.timing.learn_load("schnell/q8", 3.0)


def free_memory(bench: Bench) -> None:
    bench.machine.now_resident(())


def two_in_memory(bench: Bench) -> None:
    for machine in bench.machines:
        machine.resident = machine.resident._replace(most=2)


@pytest.mark.parametrize("change", [relearn, store_quantized, free_memory, two_in_memory])
@pytest.mark.parametrize("machines", [1, 2])
def test_forecasts_follow_what_was_learned_and_what_is_in_memory(
    change: Callable[[Bench], None], machines: int
) -> None:
    bench = Bench(machines=machines)
    bench.load(SCHNELL)
    for number, model in enumerate((SCHNELL, KLEIN, SCHNELL, BASE) * 2):
        bench.join(bench.task(str(number), model))
    before = simulated(bench)
    assert ends_of(bench) == pytest.approx([end for _, end, _ in before.values()])
    change(bench)
    after = simulated(bench)
    assert after != before
    assert ends_of(bench) == pytest.approx([end for _, end, _ in after.values()])


def ends_of(bench: Bench) -> list[float]:
    return [forecast.end_s for _, forecast in bench.in_order()]


@pytest.mark.parametrize("machines", [2, 5])
def test_a_pass_assigns_the_tasks_behind_the_first_ones_as_list_scheduling_does(
    machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.plan.AT_ONCE", 4)
    monkeypatch.setattr("scheduler.plan.PART", 3)
    bench = Bench(machines=machines)
    bench.load(SCHNELL)
    for number in range(40):
        bench.join(bench.task(str(number), MODELS[number * 7 % 3], steps=3 + number * 11 % 17))
    bench.in_order()  # the tasks behind the first ones have a machine before the first pass
    run_a_pass(bench)
    assert ends_of(bench) == pytest.approx([end for _, end, _ in simulated(bench).values()])
    assert not bench.forecaster.continue_plan(), "nothing has changed"
    bench.policy.leave(bench.schedule[30])
    bench.join(bench.task("urgent", KLEIN, priority=1, steps=50))
    assert not bench.forecaster.continue_plan(), "the latest pass has just begun"
    first = [end for _, end, _ in simulated(bench).values()][:4]
    assert ends_of(bench)[:4] == pytest.approx(first)
    bench.at += PASS_EVERY_S
    run_a_pass(bench)
    assert ends_of(bench) == pytest.approx([end for _, end, _ in simulated(bench).values()])


def run_a_pass(bench: Bench) -> None:
    assert bench.forecaster.continue_plan()
    for _ in range(len(bench.schedule)):
        if not bench.forecaster.continue_plan():
            return
    raise AssertionError("the pass does not end")


def test_tasks_and_machines_may_come_and_go_during_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.plan.AT_ONCE", 4)
    monkeypatch.setattr("scheduler.plan.PART", 3)
    bench = Bench(machines=3)
    bench.load(SCHNELL)
    for number in range(30):
        bench.join(bench.task(str(number), MODELS[number % 3], steps=3 + number % 5))
    assert bench.forecaster.continue_plan()
    for number in range(10):
        bench.policy.leave(bench.schedule[number])
    bench.join(bench.task("urgent", priority=1))
    assert bench.forecaster.continue_plan()
    del bench.machines[1]
    assert len(ends_of(bench)) == 21
    bench.at += PASS_EVERY_S
    run_a_pass(bench)
    assert ends_of(bench) == pytest.approx([end for _, end, _ in simulated(bench).values()])
