"""Several machines: each has its own laws of time, and starts with those of the others."""

import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
from conftest import PlayedQueue, allow, params_for
from memory_stores import memory_store
from store_bench import MEASURED, WORK

from scheduler.machines import Machine
from scheduler.worker_api import WorkerApi
from storage import timing_store
from storage.task_store import TaskStore
from task import Encoded
from timing.speeds import Product
from timing_model import LOCAL, Confidence, Measured, TimingModel, Work


def work(side: int = 1024, steps: int = 4, model: str = "m") -> Work:
    return Work(model, 12.0, (side // 16) ** 2, steps, "JPEG")


def law(work: Work, slower: float = 1.0, noise: float = 1.0) -> Measured:
    x = work.tokens / 4096
    step = (0.3 + 2.0 * x + 0.7 * x * x) * slower * noise
    if work.tokens > 5000:
        step *= 2.5
    return Measured(0.8 * slower, [step * 1.5] + [step] * (work.steps - 1), 1.1 * x * slower, 0.01)


def teach(timing: TimingModel, model: str, slower: float, tasks: int = 40, seed: int = 1) -> None:
    dice = random.Random(seed)
    for _ in range(tasks):
        seen = work(dice.randrange(512, 1537, 64), dice.randint(1, 30), model)
        timing.learn(seen, law(seen, slower, dice.lognormvariate(0.0, 0.03)))


UNSEEN = [(side, steps) for side in (576, 832, 1088, 1472) for steps in (3, 20)]


def errors(timing: TimingModel, model: str, slower: float) -> list[float]:
    works = [work(side, steps, model) for side, steps in UNSEEN]
    return [abs(timing.durations(w).gpu_s / law(w, slower).gpu_s - 1) for w in works]


def test_machines_learn_apart_and_the_local_one_is_the_model_itself() -> None:
    timing = TimingModel()
    assert timing.of("local") is timing
    assert timing.of("mini") is timing.of("mini") is timing.of("studio").of("mini")
    teach(timing, "m", 1.0)
    teach(timing.of("mini"), "m", 3.0)
    assert median(errors(timing, "m", 1.0)) < 0.05
    assert median(errors(timing.of("mini"), "m", 3.0)) < 0.05


def test_a_machine_that_never_ran_a_model_has_the_others_figures_at_its_speed_on_shared_ones() -> (
    None
):
    timing = TimingModel()
    mini = timing.of("mini")
    teach(timing, "shared", 1.0)
    teach(timing, "new", 1.7)
    teach(mini, "shared", 3.0)
    assert median(errors(mini, "new", 5.1)) < 0.07
    forecast = mini.durations(work(model="new"))
    assert forecast.confidence is Confidence.LOW
    assert mini.samples("new") == 0


def test_the_speed_of_a_machine_beside_another_is_that_on_what_both_have_run() -> None:
    timing = TimingModel()
    mini = timing.of("mini")
    assert mini.relative_speed(timing) == 1.0
    teach(timing, "m", 1.0)
    teach(mini, "m", 4.0, seed=2)
    assert mini.relative_speed(timing) == pytest.approx(0.25, rel=0.05)
    assert timing.relative_speed(mini) == pytest.approx(4.0, rel=0.05)


def test_two_machines_are_compared_through_a_third_one_that_draws_nothing() -> None:
    head = TimingModel()
    teach(head.of("a"), "m", 1.0)
    teach(head.of("b"), "m", 3.0, tasks=20, seed=2)
    a, b = (head.of(name).relative_speed(head) for name in "ab")
    assert a == pytest.approx(1.0, rel=0.05)
    assert b == pytest.approx(1 / 3, rel=0.05)
    seconds = law(work(), 3.0).gpu_s
    assert head.durations(work()).gpu_s / b == pytest.approx(seconds, rel=0.1)


def test_without_shared_models_the_measured_speed_decides() -> None:
    timing = TimingModel()
    timing.calibrate({Product.BF16: 10e12})
    teach(timing, "m", 1.0)
    mini = timing.of("mini")
    mini.calibrate({Product.BF16: 2e12})
    there = 5 * timing.durations(work()).gpu_s
    assert mini.durations(work()).gpu_s == pytest.approx(there, rel=1e-3)


def test_the_first_sample_of_its_own_sets_the_speed_and_later_ones_replace_the_others() -> None:
    timing = TimingModel()
    teach(timing, "m", 1.0)
    mini = timing.of("mini")
    mini.learn(work(), law(work(), 4.0))
    assert median(errors(mini, "m", 4.0)) < 0.07
    assert mini.samples("m") == 1
    teach(mini, "m", 4.0, seed=2)
    assert median(errors(mini, "m", 4.0)) < 0.05
    assert median(errors(timing, "m", 1.0)) < 0.05


def test_what_a_machine_learns_changes_the_forecasts_of_one_that_borrows_them() -> None:
    timing = TimingModel()
    mini = timing.of("mini")
    guess, version = mini.durations(work()), mini.version_of("m")
    timing.take(timing.learned([(work(), law(work()))]))
    borrowed = mini.durations(work())
    assert borrowed != guess
    assert mini.version_of("m") != version
    assert mini.version == timing.version
    mini.take(mini.learned([(work(), law(work(), 2.0))]))
    assert mini.durations(work()).gpu_s == pytest.approx(law(work(), 2.0).gpu_s, rel=0.05)
    assert timing.durations(work()).gpu_s == pytest.approx(law(work()).gpu_s, rel=0.05)


def test_a_measured_speed_is_the_prior_of_what_was_not_learned_yet_only() -> None:
    timing = TimingModel()
    teach(timing, "known", 1.0)
    known, guess = timing.durations(work(model="known")), timing.durations(work(model="new"))
    timing.calibrate({Product.BF16: 1e12})
    assert timing.durations(work(model="known")) == known
    assert timing.durations(work(model="new")).step_s == pytest.approx(10 * guess.step_s)


def test_loading_takes_as_long_as_it_did_elsewhere_until_it_was_measured_here() -> None:
    timing = TimingModel()
    timing.learn_load("m", 40.0)
    mini = timing.of("mini")
    assert mini.load_s("m", 12.0) == 40.0
    mini.learn_load("m", 90.0)
    assert (timing.load_s("m", 12.0), mini.load_s("m", 12.0)) == (40.0, 90.0)


def test_samples_loads_and_speeds_are_kept_by_machine(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    timings = store.timings
    assert timings.machines() == []
    timings.keep_samples([(WORK, MEASURED)], "mini")
    timings.keep_samples([(WORK, MEASURED), (WORK, MEASURED)])
    timings.keep_load("noise-flux1", 2.0, "mini")
    timings.keep_speeds({Product.BF16: 3e12}, "1.0", "studio")
    store.close()
    timings = TaskStore(tmp_path).timings
    assert sorted(timings.machines()) == ["local", "mini", "studio"]
    assert [len(timings.samples(name)) for name in ("local", "mini", "studio")] == [2, 1, 0]
    assert (timings.loads(), timings.loads("mini")) == ({}, {"noise-flux1": 2.0})
    assert (timings.speeds(), timings.speeds("studio")) == ({}, {Product.BF16: 3e12})


@pytest.mark.parametrize(
    ("platform", "learned"),
    [("linux", ["m", "m/q4/guided", "m/q4"]), ("darwin", ["m", "m/q4", "m/q4/guided", "m/q4"])],
)
def test_quantized_weights_of_version_1_are_not_learned_where_their_products_were_slow(
    monkeypatch: pytest.MonkeyPatch, platform: str, learned: list[str]
) -> None:
    monkeypatch.setattr(timing_store, "sys", SimpleNamespace(platform=platform))
    store = memory_store()
    now = [replace(WORK, model="m/q4/guided"), replace(WORK, model="m/q4")]
    for model, machine in (("m", LOCAL), ("m/q4", LOCAL), ("m/q4", "mini")):
        store.timings.keep_samples([(replace(WORK, model=model), MEASURED)], machine)
    with store._database.transaction() as connection:  # as version 1 wrote them
        connection.execute("UPDATE samples SET work = json_remove(work, '$.product')")
    store.timings.keep_samples([(work, MEASURED) for work in now])
    assert [work.model for work, _ in store.timings.samples()] == learned
    assert [work.model for work, _ in store.timings.samples("mini")] == ["m/q4"]


def test_each_machine_has_laws_of_its_own() -> None:
    timing = TimingModel()
    mini = timing.of("mini")
    teach(timing, "m", 1.0)
    teach(mini, "m", 3.0)
    (here,), (there,) = timing.gpu_s([work()]), mini.gpu_s([work()])
    assert there == pytest.approx(3 * here, rel=0.1)
    assert timing.version_of("m") == mini.version_of("m") == 40


def test_what_a_worker_elsewhere_draws_and_loads_is_learned_for_its_machine_and_its_speed(
    tmp_path: Path,
) -> None:
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), TaskStore(tmp_path))
    queue.load()
    scheduler, mini = queue.scheduler, Machine("mini")
    with scheduler.lock:
        scheduler.machines.join(mini)
    seconds = {"local": Measured(0.1, [1.0, 1.0], 0.5, 0.0)}
    seconds["mini"] = Measured(0.4, [4.0, 4.0], 2.0, 0.0)
    workers = {"local": queue.worker, "mini": WorkerApi(scheduler, mini)}
    spec = scheduler.allowed.first_spec
    workers["mini"].load_started(spec)
    workers["mini"].load_finished(spec, None, [spec.key])
    for _ in range(40):  # so that the slow machine is worth its time
        queue.submit(params_for(steps=2), priority=0)
    for _ in range(3):
        for name, worker in workers.items():
            task = worker.claim(0.0)
            assert task is not None
            encoded = Encoded(b"image", 0, ((0, seconds[name]),))
            assert worker.finish(task.task_id, task.attempt, encoded)
    timings = scheduler.store.timings
    assert [len(timings.samples(name)) for name in workers] == [3, 3]
    assert [list(timings.loads(name)) for name in workers] == [["noise-flux1"], ["noise-flux1"]]
    assert mini.speed == pytest.approx(0.25, rel=0.05)
