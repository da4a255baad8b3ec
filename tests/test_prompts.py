"""Which prompts are forecast as encoded already: it follows from the order of the waiting tasks."""

import random
from itertools import count

import numpy as np
import pytest
from bench import SCHNELL, Bench
from conftest import PlayedQueue, allow, params_for
from memory_stores import memory_store

from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
from scheduler.prompts import TOKENS_KEPT, Prompts
from scheduler.walk import REPEATED
from task import Forecast, Stage, Task
from timing_model import TimingModel

TEXT_S = 0.5
"""Seconds of text encoding in the laws of Bench."""


def bench_that_keeps_embeddings() -> Bench:
    bench = Bench()
    stage = bench.task("x").stages[0]
    key = bench.estimates.timing_key(stage)
    bench.timing._laws[key].learn_repeated_text(0.0)  # as learned from repeated prompts
    bench.load()
    return bench


def own_s(bench: Bench, task: Task) -> float:
    forecast = bench.forecaster.of(task)
    return forecast.end_s - forecast.start_s


def repeated(bench: Bench) -> list[bool]:
    positions = range(len(bench.schedule))
    return [bool(bench.schedule.kinds(position)[0] % 2 == REPEATED) for position in positions]


def test_when_the_first_of_two_equal_prompts_is_cancelled_the_second_is_new() -> None:
    bench = bench_that_keeps_embeddings()
    first, second = bench.task("a", prompt="cat"), bench.task("b", prompt="cat")
    bench.join(first)
    bench.join(second)
    new_s = own_s(bench, first)
    assert own_s(bench, second) == pytest.approx(new_s - TEXT_S, abs=0.1)
    bench.policy.leave(first)
    assert own_s(bench, second) == pytest.approx(new_s)
    assert bench.forecaster.of(second).start_s == pytest.approx(0.0)


def test_of_two_equal_prompts_the_one_that_runs_first_is_new() -> None:
    bench = bench_that_keeps_embeddings()
    usual, urgent = bench.task("a", prompt="cat"), bench.task("b", prompt="cat", priority=1)
    bench.join(usual)
    bench.join(urgent)
    assert bench.schedule.first() is urgent
    assert own_s(bench, usual) == pytest.approx(own_s(bench, urgent) - TEXT_S, abs=0.1)


def test_a_prompt_stays_in_memory_for_those_behind_the_task_that_encodes_it() -> None:
    bench = bench_that_keeps_embeddings()
    first, second = bench.task("a", prompt="cat"), bench.task("b", prompt="cat")
    bench.join(first)
    bench.join(second)
    run = bench.start(first)
    encoding_s = bench.estimates.durations(run.stage).text_encoding_s
    assert encoding_s == pytest.approx(TEXT_S, abs=0.1)
    assert repeated(bench) == [True]
    third = bench.task("c", prompt="cat")
    bench.join(third)
    assert repeated(bench) == [True, True]
    bench.release(run)
    assert repeated(bench) == [True, True, True]


@pytest.mark.parametrize("prompt", ["cat", "dog"])
def test_an_estimate_knows_the_prompts_that_wait(prompt: str) -> None:
    bench = bench_that_keeps_embeddings()
    bench.join(bench.task("a", prompt="cat"))
    task = bench.task("b", prompt=prompt)
    promised: Forecast = bench.join(task)
    assert bench.forecaster.of(task).end_s == pytest.approx(promised.end_s)
    assert repeated(bench) == [False, prompt == "cat"]


@pytest.mark.parametrize("seed", range(5))
def test_after_any_changes_a_prompt_is_repeated_if_a_task_before_it_has_it(seed: int) -> None:
    bench, dice, names = bench_that_keeps_embeddings(), random.Random(seed), count()
    encoded: set[str] = set()
    for _ in range(60):
        waiting = list(bench.schedule)
        change = dice.choice(("join", "join", "leave", "start", "front", "forget"))
        if change == "join" or not waiting:
            prompt, priority = dice.choice("abcdef"), dice.choice((0, 0, 1))
            task = bench.task(str(next(names)), prompt=prompt, priority=priority)
            bench.join(task)
        elif change == "leave":
            bench.policy.leave(dice.choice(waiting))
        elif change == "start":
            bench.machine.end(bench.start(waiting[0]), bench.at)
            encoded.add(waiting[0].params.prompt)
        elif change == "front":
            group = bench.policy.front_group
            bench.policy.move_to_front(dice.choice(waiting), sequence=next(names), group=group)
        elif dice.random() < 0.3:
            bench.schedule.forget_prompts((), ())
            encoded.clear()
        prompts = [task.params.prompt for task in bench.schedule]
        before = [encoded | set(prompts[:position]) for position in range(len(prompts))]
        assert repeated(bench) == [p in own for p, own in zip(prompts, before, strict=True)]


def test_prompts_that_memory_cannot_hold_are_new_again() -> None:
    bench = bench_that_keeps_embeddings()
    for number in range(2 * TOKENS_KEPT // 256):  # schnell fills prompts up to 256 tokens
        bench.join(bench.task(f"{number}", prompt=str(number)))
    for number in range(4):
        bench.join(bench.task(f"again {number}", prompt=str(number)))
    assert repeated(bench)[-4:] == [False] * 4
    for _ in range(1 + TOKENS_KEPT // 256):
        bench.start(bench.schedule[0])
    assert not bench.estimates.prompts.is_encoded(bench.task("x", SCHNELL, prompt="0").stages[0])


def test_prompts_that_wait_for_a_load_are_counted_when_it_ends_and_without_the_lock() -> None:
    allowed = allow("krea-2", "noise-flux1")
    queue = PlayedQueue(allowed, TimingModel(), memory_store())
    scheduler, counted = queue.scheduler, list[tuple[str, bool]]()

    def count(model: str, prompt: str) -> int:
        counted.append((prompt, scheduler.lock.locked()))
        return len(prompt)

    def rows() -> list[int]:
        works = [scheduler.estimates.work(task.stages[0]) for task in scheduler.schedule]
        return [work.prompt_tokens for work in works]

    for text in ("a" * 400, "b" * 800, "b" * 800):
        queue.submit(params_for(prompt=text, model="krea-2"))
    before_s = [scheduler.schedule.durations(n).text_encoding_s for n in range(3)]
    assert rows() == [112, 208, 208]
    scheduler.estimates.count_tokens = count
    queue.loaded(scheduler.schedule[0].stages[0].load_spec)
    assert sorted(counted) == [("a" * 400, False), ("b" * 800, False)]
    after_s = [scheduler.schedule.durations(n).text_encoding_s for n in range(3)]
    assert all(after > before for after, before in zip(after_s, before_s, strict=True))
    assert rows() == [400, 800, 800]
    queue.loaded(scheduler.schedule[0].stages[0].load_spec)


def test_another_negative_prompt_is_encoded_again_and_the_same_one_is_not() -> None:
    model = find_model("qwen-image")
    assert model
    spec = LoadSpec(model, model.pipelines[0], None)
    first, again, other = (
        Stage(spec, params_for(prompt="a cat", model=model.name, negative_prompt=negative))
        for negative in ("blurred", "blurred", "dark")
    )
    prompts = Prompts()
    numbers = np.array([prompts.joins(stage) for stage in (first, again, other)])
    assert prompts.repeated(numbers, np.full(3, 16)).tolist() == [False, True, False]


def test_long_prompts_push_the_embeddings_of_earlier_ones_out_sooner() -> None:
    prompts, tokens = Prompts(), np.array([16, 16, *[TOKENS_KEPT // 5] * 5, 16])
    model = find_model("anima-base")
    assert model
    spec = LoadSpec(model, model.pipelines[0], None)
    texts = ["a cat", "a cat", *(f"{n} ".ljust(20_000, "x") for n in range(5)), "a cat"]
    stages = [Stage(spec, params_for(prompt=text, model=model.name)) for text in texts]
    numbers = np.array([prompts.joins(stage) for stage in stages])
    repeated = prompts.repeated(numbers, tokens).tolist()
    assert repeated == [False, True, *[False] * 5, False]
    assert prompts.repeated(numbers, tokens // 2).tolist()[-1]
    for stage, own in zip(stages[:2], tokens.tolist(), strict=False):
        assert not prompts.starts(stage, own)
    assert prompts.repeated(numbers[1:], tokens[1:]).tolist() == [True, *[False] * 6]
