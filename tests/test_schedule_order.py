"""The order of the waiting tasks: priority, affinity and its limits."""

import pytest
from asked_tasks import EXAMPLES, Asked, requests
from bench import KLEIN, MODELS, SCHNELL, Bench
from hypothesis import given, settings
from hypothesis import strategies as st


def test_tasks_run_by_priority_then_first_come_first_served() -> None:
    bench = Bench()
    for name, priority in (("a", 0), ("b", 1), ("c", -1), ("d", 0), ("e", 1)):
        bench.join(bench.task(name, priority=priority))
    assert bench.ids() == ["b", "e", "a", "d", "c"]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_no_task_is_delayed_by_those_that_overtake_it_by_more_than_max_delay_s(
    examples: int,
) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(requests, st.integers(1, 3), st.sampled_from([0.0, 30.0, 300.0]))
    def check(asked: list[Asked], models_in_memory: int, max_delay_s: float) -> None:
        bench = Bench(models_in_memory=models_in_memory, max_delay_s=max_delay_s)
        bench.load(SCHNELL)
        delayed: dict[str, float] = {}
        for number, one in enumerate(asked):
            before = {task.task_id: forecast.end_s for task, forecast in bench.in_order()}
            bench.join(one.task(bench, str(number)))
            delayed[str(number)] = 0.0
            for task, forecast in bench.in_order():
                if task.task_id in before and task.priority == one.priority:
                    delayed[task.task_id] += max(forecast.end_s - before[task.task_id], 0.0)
            priorities = [-task.priority for task in bench.schedule]
            assert priorities == sorted(priorities)
        assert max(delayed.values()) <= max_delay_s + 1e-6
        if max_delay_s == 0.0:
            first_come = sorted(range(len(asked)), key=lambda number: -asked[number].priority)
            assert bench.ids() == [str(number) for number in first_come]

    check()


def test_a_task_joins_the_last_one_that_shares_its_weights() -> None:
    bench = Bench(max_delay_s=1e6)
    for name, model in (("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 2), ("f", 0)):
        bench.join(bench.task(name, MODELS[model]))
    assert bench.ids() == ["a", "c", "f", "b", "d", "e"]


@pytest.mark.parametrize(("max_delay_s", "switches"), [(0.0, 9), (1e6, 1)])
def test_two_clients_that_alternate_between_models_are_grouped(
    max_delay_s: float, switches: int
) -> None:
    bench = Bench(max_delay_s=max_delay_s)
    bench.load(SCHNELL)
    for number in range(10):
        bench.join(bench.task(str(number), (SCHNELL, KLEIN)[number % 2]))
    _, last = bench.in_order()[-1]
    assert last.switches == switches
    grouped = [str(number) for number in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]
    assert bench.ids() == (grouped if max_delay_s else sorted(grouped))


def test_no_group_grows_further_than_max_delay_s_allows() -> None:
    own_s = Bench().estimates.durations(*Bench().task("x").stages).gpu_s
    bench = Bench(max_delay_s=2.5 * own_s)
    for name, model in (("a", 0), ("b", 1), ("c", 0), ("d", 0), ("e", 0), ("f", 0)):
        bench.join(bench.task(name, MODELS[model]))
    assert bench.ids() == ["a", "c", "d", "b", "e", "f"]


def test_a_group_at_the_head_grows_while_its_model_is_loaded_until_max_delay_s_is_used_up() -> None:
    bench = Bench(max_delay_s=20.0)
    bench.load(SCHNELL)
    own_s = bench.estimates.durations(*bench.task("x").stages).gpu_s
    bench.join(bench.task("klein", KLEIN))
    for number in range(40):
        bench.join(bench.task(str(number)))
    ahead = bench.ids().index("klein")
    assert ahead == int(20.0 / own_s) > 0
    assert bench.ids()[ahead + 1 :] == [str(number) for number in range(ahead, 40)]


def test_a_task_joins_first_if_the_machine_has_its_weights() -> None:
    bench = Bench(max_delay_s=1e6)
    bench.load(SCHNELL)
    running = bench.task("running")
    bench.join(running)
    run = bench.start(running)
    for name, model in (("b", KLEIN), ("c", SCHNELL)):
        bench.join(bench.task(name, model))
    assert bench.ids() == ["c", "b"]
    bench.release(run)
    assert bench.ids() == ["running", "c", "b"]


def test_a_released_task_runs_before_one_that_went_first_by_affinity() -> None:
    bench = Bench(max_delay_s=1e6)
    bench.load(SCHNELL)
    running = bench.task("running")
    bench.join(running)
    bench.join(bench.task("klein", KLEIN))
    bench.join(bench.task("enlarged", upscale=2.0))
    assert bench.ids() == ["running", "enlarged", "klein"], "of one turn"
    run = bench.start(running)
    bench.join(bench.task("first"))
    assert bench.ids() == ["first", "enlarged", "klein"]
    bench.release(run)
    assert bench.ids() == ["running", "first", "enlarged", "klein"]
    bench.join(bench.task("urgent", KLEIN, priority=1))
    assert bench.ids()[:2] == ["urgent", "running"]
