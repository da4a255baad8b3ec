"""The forecast of the whole queue: against a plain simulation, and on the wire."""

import random
import time
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from conftest import ServerProcess, offer_of, params_for
from hypothesis import given, settings
from hypothesis import strategies as st

from api.server_answers import StatsAnswer
from api.task_answers import EstimateAnswer
from models.model_catalog import Model, Weights
from queueing.live_queue import LiveQueue
from queueing.task_view import Reason
from task import GenerationParams, Phase, Stage, Task
from timing_model import Measured, Spread, TimingModel

SCHNELL, KLEIN, BASE = offer_of("schnell", "flux2-klein-4b", "flux2-klein-base-4b").models
MIXED = offer_of("schnell", "flux2-klein-4b", "flux2-klein-base-4b", "z-image", "seedvr2-3b")
"""Models of which one enlarges the pictures of the others."""
LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}


class Clock:
    at = 0.0

    def __call__(self) -> float:
        return self.at


def params(side: int = 1024, steps: int = 4, guidance: float | None = None) -> GenerationParams:
    return params_for(width=side, height=side, steps=steps, guidance=guidance, format="JPEG")


def weights_of(model: Model) -> Weights:
    return Weights(model, model.pipelines[0], None)


def stages_of(asked: GenerationParams, model: Model) -> tuple[Stage, ...]:
    return (Stage(weights_of(model), asked),)


def task_of(task_id: str, asked: GenerationParams, urgent: bool, model: Model) -> Task:
    return Task(task_id, asked, urgent, stages_of(asked, model), created_at=0.0)


def live_queue(timing: TimingModel, clock: Clock, **options: Any) -> LiveQueue:
    return LiveQueue(timing, Spread(), clock, weights_of(SCHNELL), **options)


def load(live: LiveQueue, model: Model, clock: Clock | None = None, seconds: float = 0.0) -> None:
    live.load_started(weights_of(model))
    if clock:
        clock.at += seconds
    live.load_finished(weights_of(model), None, [weights_of(model).key])


def learned(*models: Any) -> TimingModel:
    """Each model with another law: loading too."""
    timing = TimingModel()
    live = live_queue(timing, Clock())
    for number, model in enumerate(models, 1):
        for side, steps in ((512, 4), (1024, 10), (1536, 1)):
            asked = params(side, steps)
            x = asked.tokens / 4096
            measured = Measured(0.5, [number * (0.2 + x)] * steps, x, 0.01)
            timing.learn(live.state.work.work(stages_of(asked, model)[0]), measured)
        timing.learn_load(live.state.work.load_key(weights_of(model)), 7.0 * number)
    return timing


tasks = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from([SCHNELL, KLEIN, BASE]),
        st.sampled_from([256, 512, 1024]),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=150)
@given(tasks, st.integers(0, 2**32), st.integers(0, 3))
def test_the_forecast_of_each_task_equals_a_plain_simulation_of_the_queue(
    asked: list[tuple[bool, Any, int, int]], seed: int, changes: int
) -> None:
    clock, dice = Clock(), random.Random(seed)
    timing = learned(SCHNELL, KLEIN, BASE)
    live = live_queue(timing, clock)
    load(live, SCHNELL, clock, 7.0)
    for number, (urgent, model, side, steps) in enumerate(asked):
        guidance = 4.0 if model is BASE and steps % 2 else None
        live.add(task_of(str(number), params(side, steps, guidance), urgent, model))
    for _ in range(changes):  # the line is not only appended to
        first = live.first()
        if first is None:
            break
        live.start(first, started_at=0.0)
        (live.put_back if dice.random() < 0.5 else live.remove)(first)
        if (waiting := live.first()) and dice.random() < 0.5:
            live.remove(waiting)

    at, model, expected = 0.0, SCHNELL, []
    for urgent in (True, False):
        for view in live.views_in_order():
            task = live.get(view.task_id)
            assert task
            if task.urgent is not urgent:
                continue
            (stage,) = task.stages
            if stage.weights.model is not model:
                at += live.state.work.load_s(stage.weights)
                model = stage.weights.model
            forecast = timing.forecast(live.state.work.work(stage))
            at += forecast.gpu_s
            expected.append((task.task_id, at + forecast.image_encoding_s))

    one_pass = [(view.task_id, view.wait_s) for view in live.views_in_order()]
    assert [task_id for task_id, _ in one_pass] == [task_id for task_id, _ in expected]
    for (task_id, wait_s), (_, in_one_pass) in zip(expected, one_pass, strict=True):
        task = live.get(task_id)
        assert task
        assert in_one_pass == pytest.approx(wait_s)
        assert live.forecast.of(task).end_s == pytest.approx(wait_s)
    for offset in range(len(one_pass) + 1):
        page = [(view.task_id, view.wait_s) for view in live.views_in_order(offset)]
        assert [task_id for task_id, _ in page] == [task_id for task_id, _ in one_pass[offset:]]
        waits = [wait_s for _, wait_s in one_pass[offset:]]
        assert [wait_s for _, wait_s in page] == pytest.approx(waits)
    for urgent in (True, False):
        new = task_of("new", params(512, 3), urgent, KLEIN)
        estimate = live.forecast.of_new(new.stages, urgent=urgent)
        live.add(new)
        assert live.forecast.of(new).end_s == pytest.approx(estimate.end_s)
        assert live.forecast.of(new).pos == estimate.pos
        live.remove(new)


@dataclass(frozen=True)
class Asked:
    """A task of the tests that follow; kwargs of `params`, and how its stages are chosen."""

    urgent: bool
    model: str
    side: int
    steps: int
    count: int
    upscale: float | None

    def task(self, task_id: str) -> Task:
        wanted = params(self.side, self.steps).model_copy(
            update={
                "model": self.model,
                "count": self.count,
                "upscale": self.upscale,
                "upscaler": "seedvr2-3b" if self.upscale else None,
            }
        )
        return Task(task_id, wanted, self.urgent, MIXED.stages(wanted), created_at=0.0)


mixed_tasks = st.lists(
    st.builds(
        Asked,
        urgent=st.sampled_from([False, False, True]),
        model=st.sampled_from(["schnell", "flux2-klein-4b", "flux2-klein-base-4b", "z-image"]),
        side=st.sampled_from([256, 512, 1024]),
        steps=st.integers(1, 20),
        count=st.integers(1, 4),
        upscale=st.sampled_from([None, None, None, 2.0]),
    ),
    min_size=1,
    max_size=25,
)


def memory_after(
    memory: tuple[str, ...], task: Task, in_memory: int
) -> tuple[list[Weights], tuple[str, ...]]:
    """What a task loads, and what is in memory then, the latest used first."""
    loads = []
    for stage in task.stages:
        key = stage.weights.key
        if key not in memory:
            loads.append(stage.weights)
        memory = (key, *(other for other in memory if other != key))[:in_memory]
    return loads, memory


def simulated(live: LiveQueue, in_memory: int) -> dict[str, tuple[float, int]]:
    """By id, when each waiting task ends, and the switches up to then, one after the other; the GPU
    is free and the memory as it stands."""
    at, switches, memory, expected = 0.0, 0, live.state.resident, {}
    timing, work = live.state.timing, live.state.work
    for view in live.views_in_order():
        task = live.get(view.task_id)
        assert task
        loads, memory = memory_after(memory, task, in_memory)
        switches += len(loads)
        at += work.loads_s(loads)
        forecasts = [timing.forecast(work.work(stage)) for stage in task.stages]
        at += sum(forecast.gpu_s for forecast in forecasts)
        expected[task.task_id] = (at + forecasts[-1].image_encoding_s, switches)
    return expected


@settings(deadline=None, max_examples=300)
@given(
    mixed_tasks,
    st.integers(1, 3),
    st.sampled_from([0.0, 30.0, 300.0, 3000.0]),
    st.lists(st.tuples(st.sampled_from(["runs", "leaves", "ends", "idle"]), st.integers(0, 24))),
)
def test_with_affinity_several_models_stages_and_images_it_equals_a_plain_simulation_too(
    asked: list[Asked], in_memory: int, affinity_s: float, changes: list[tuple[str, int]]
) -> None:
    live = live_queue(
        learned(SCHNELL, KLEIN, BASE), Clock(), in_memory=in_memory, affinity_s=affinity_s
    )
    load(live, SCHNELL)
    for number, wanted in enumerate(asked):
        task = wanted.task(str(number))
        estimate = live.forecast.of_new(task.stages, urgent=task.urgent)
        live.add(task)
        assert live.forecast.of(task).end_s == pytest.approx(estimate.end_s)
        assert live.forecast.of(task).pos == estimate.pos
        assert live.forecast.of(task).switches == estimate.switches
    for change, number in changes:
        task_ = live.get(str(number))
        if change == "idle":
            live.now_resident(())
        elif change == "leaves" and task_:
            live.remove(task_)
        elif first := live.first():
            live.start(first, started_at=0.0)
            if change == "ends":
                live.now_resident(memory_after(live.state.resident, first, in_memory)[1])
                live.remove(first)
            else:
                live.put_back(first)
    expected = simulated(live, in_memory)
    views = list(live.views_in_order())
    assert [view.task_id for view in views] == list(expected)
    for pos, view in enumerate(views):
        assert view.wait
        end_s, switches = expected[view.task_id]
        task_ = live.get(view.task_id)
        assert task_
        for wait in (view.wait, live.forecast.of(task_)):
            assert (wait.pos, wait.switches) == (pos, switches)
            assert wait.end_s == pytest.approx(end_s)
    for offset in range(len(views)):
        page = [view.wait for view in live.views_in_order(offset)]
        assert [wait and wait.end_s for wait in page] == pytest.approx(
            [view.wait and view.wait.end_s for view in views[offset:]]
        )
        assert [wait and wait.switches for wait in page] == [
            view.wait and view.wait.switches for view in views[offset:]
        ]


@settings(deadline=None, max_examples=300)
@given(mixed_tasks, st.integers(1, 3), st.sampled_from([0.0, 30.0, 300.0]))
def test_nobody_is_delayed_by_those_that_join_ahead_by_more_than_the_affinity_allows(
    asked: list[Asked], in_memory: int, affinity_s: float
) -> None:
    live = live_queue(
        learned(SCHNELL, KLEIN, BASE), Clock(), in_memory=in_memory, affinity_s=affinity_s
    )
    load(live, SCHNELL)
    delayed: dict[str, float] = {}
    for number, wanted in enumerate(asked):
        before = {view.task_id: view.wait_s or 0.0 for view in live.views_in_order()}
        live.add(wanted.task(str(number)))
        delayed[str(number)] = 0.0
        urgent_first = []
        for view in live.views_in_order():
            urgent_first.append(view.urgent)
            if view.task_id in before and view.urgent == wanted.urgent:
                later_s = (view.wait_s or 0.0) - before[view.task_id]
                delayed[view.task_id] += max(later_s, 0.0)
        assert urgent_first == sorted(urgent_first, reverse=True)
    assert max(delayed.values()) <= affinity_s + 1e-6
    if affinity_s == 0.0:
        order = [view.task_id for view in live.views_in_order()]
        first_come = sorted(range(len(asked)), key=lambda number: not asked[number].urgent)
        assert order == [str(number) for number in first_come]


def test_two_clients_that_alternate_between_models_are_grouped() -> None:
    models = ["schnell", "flux2-klein-4b"] * 5
    for affinity_s, switches in ((0.0, 9), (1e6, 1)):
        live = live_queue(learned(SCHNELL, KLEIN), Clock(), affinity_s=affinity_s)
        load(live, SCHNELL)
        for number, model in enumerate(models):
            live.add(Asked(False, model, 512, 4, 1, None).task(str(number)))
        views = list(live.views_in_order())
        assert views[-1].wait
        assert views[-1].wait.switches == switches
        if affinity_s:
            assert [view.params.model for view in views] == sorted(models, reverse=True)
            for model in set(models):
                own = [int(view.task_id) for view in views if view.params.model == model]
                assert own == sorted(own), "first come, first served among its own"


def test_a_group_at_the_head_grows_while_its_model_is_loaded_until_patience_ends() -> None:
    live = live_queue(learned(SCHNELL, KLEIN), Clock(), affinity_s=20.0)
    load(live, SCHNELL)
    asked = Asked(False, "schnell", 512, 4, 1, None)
    one_s = live.state.work.forecast_of(asked.task("x").stages).gpu_s
    live.add(Asked(False, "flux2-klein-4b", 512, 4, 1, None).task("klein"))
    for number in range(40):
        live.add(asked.task(str(number)))
    order = [view.task_id for view in live.views_in_order()]
    ahead = order.index("klein")
    assert ahead == int(20.0 / one_s) > 0
    assert order[ahead + 1 :] == [str(number) for number in range(ahead, 40)]


def test_the_second_stage_of_a_running_task_is_forecast_with_its_loading_once() -> None:
    clock = Clock()
    live = live_queue(learned(SCHNELL), clock)
    load(live, SCHNELL)
    task = Asked(False, "schnell", 512, 2, 2, 2.0).task("two")
    _, enlarge = task.stages
    timing, work = live.state.timing, live.state.work
    timing.learn_load(work.load_key(enlarge.weights), 40.0)
    live.add(task)
    whole_s = sum(timing.forecast(work.work(stage)).gpu_s for stage in task.stages)
    assert live.forecast.of(task).end_s == pytest.approx(
        whole_s + 40.0 + timing.forecast(work.work(enlarge)).image_encoding_s
    )
    live.start(task, started_at=0.0)
    assert live.state.gpu_remaining_s(task) == pytest.approx(whole_s + 40.0)
    live.report(task, Phase.DENOISING, 0, 2)
    live.next_image(task, 0, 1)
    live.next_image(task, 1, 0)
    enlarging_s = timing.forecast(work.work(enlarge)).gpu_s
    assert live.state.gpu_remaining_s(task) == pytest.approx(enlarging_s + 40.0)
    live.load_started(enlarge.weights)
    clock.at += 30.0
    assert live.forecast.next_start_s() == pytest.approx(enlarging_s + 10.0)
    assert live.view(task).images_done == 0
    clock.at += 10.0
    live.load_finished(enlarge.weights, None, [enlarge.weights.key])
    assert live.forecast.next_start_s() == pytest.approx(enlarging_s)
    live.next_image(task, 1, 1)
    assert live.view(task).images_done == 1


def test_loading_that_makes_the_upscaler_leave_memory_is_seen_ahead() -> None:
    live = live_queue(learned(SCHNELL), Clock(), in_memory=2)
    load(live, SCHNELL)
    task = Asked(False, "z-image", 512, 2, 1, 2.0).task("two")
    draw, enlarge = task.stages
    live.now_resident(["schnell", enlarge.weights.key])
    live.add(task)
    live.start(task, started_at=0.0)
    live.load_started(draw.weights)
    timing, work = live.state.timing, live.state.work
    works = sum(timing.forecast(work.work(stage)).gpu_s for stage in task.stages)
    loads = live.state.work.load_s(draw.weights) + live.state.work.load_s(enlarge.weights)
    assert live.forecast.next_start_s() == pytest.approx(works + loads)


def test_a_picture_that_is_drawn_to_be_enlarged_teaches_nothing_about_encoding() -> None:
    timing = learned(SCHNELL)
    live = live_queue(timing, Clock())
    stages = Asked(False, "schnell", 1024, 10, 1, 2.0).task("x").stages
    before = timing.forecast(live.state.work.work(stages[-1])).image_encoding_s
    assert before > 0
    for _ in range(20):
        timing.learn(live.state.work.work(stages[0]), Measured(0.5, [1.0] * 10, 1.0, 0.0))
    assert timing.forecast(live.state.work.work(stages[-1])).image_encoding_s == before


def test_weights_stored_quantized_are_forecast_under_their_own_key_from_then_on() -> None:
    live = live_queue(learned(SCHNELL, KLEIN), Clock())
    load(live, SCHNELL)
    for number, model in enumerate(("schnell", "flux2-klein-4b", "schnell")):
        live.add(Asked(False, model, 512, 4, 1, None).task(str(number)))
    live.state.timing.learn_load("schnell/q8", 3.0)
    live.load_finished(weights_of(SCHNELL), 8, [weights_of(SCHNELL).key])
    ends = simulated(live, 1)
    for view in live.views_in_order():
        assert view.wait_s == pytest.approx(ends[view.task_id][0])
        task = live.get(view.task_id)
        assert task
        assert live.forecast.of(task).end_s == pytest.approx(view.wait_s)


def start_running(live: LiveQueue, clock: Clock, task: Task) -> None:
    live.start(task, started_at=0.0)
    clock.at += 0.5
    live.report(task, Phase.DENOISING, 0, task.params.steps)


def test_a_wait_that_grows_says_why() -> None:
    clock = Clock()
    live = live_queue(learned(SCHNELL, KLEIN), clock)
    load(live, SCHNELL)
    running = task_of("running", params(1024, 10), False, SCHNELL)
    waiting = task_of("waiting", params(1024, 10), False, SCHNELL)
    for task in (running, waiting):
        live.add(task)
        live.promise(task)
    start_running(live, clock, running)
    assert _reason(live, waiting) is None

    live.add(task_of("urgent", params(1024, 10), True, SCHNELL))
    assert _reason(live, waiting) is Reason.OVERTAKEN
    assert _reason(live, waiting) is None, "it is said once"

    clock.at += 60.0  # the first step does not end
    assert _reason(live, waiting) is Reason.SLOWER
    assert _reason(live, running) is Reason.SLOWER

    live.remove(running)
    load(live, KLEIN)
    live.remove(live.get("urgent") or waiting)
    assert _reason(live, waiting) is None, "the urgent task has gone"


def test_a_wait_that_grows_by_a_model_switch_says_so() -> None:
    clock = Clock()
    live = live_queue(learned(SCHNELL, KLEIN), clock)
    load(live, SCHNELL, clock, 7.0)
    waiting = task_of("waiting", params(512, 4), False, SCHNELL)
    live.add(waiting)
    live.promise(waiting)
    assert _reason(live, waiting) is None
    load(live, KLEIN)
    assert _reason(live, waiting) is Reason.MODEL_SWITCH


def _reason(live: LiveQueue, task: Task) -> Reason | None:
    wait = live.view(task, telling=True).wait
    assert wait
    return wait.reason


def test_the_countdown_never_goes_back_without_a_reason_and_progress_never_at_all() -> None:
    clock, dice = Clock(), random.Random(7)
    live = live_queue(learned(SCHNELL), clock)
    load(live, SCHNELL)
    task = task_of("task", params(1024, 20), False, SCHNELL)
    live.add(task)
    live.promise(task)
    start_running(live, clock, task)
    end_at, shown = float("inf"), 0.0
    for step in range(1, 21):
        for _ in range(4):
            clock.at += 0.3 * dice.lognormvariate(0, 0.5)
            view = live.view(task, telling=True)
            assert view.wait
            if view.wait.reason is None:
                assert clock.at + view.wait.end_s <= end_at + 1e-6
            end_at = clock.at + view.wait.end_s
            assert shown <= view.progress < 1
            shown = view.progress
        live.report(task, Phase.DENOISING, step, 20)
    assert shown > 0.8


def test_every_field_of_the_forecast_is_told_while_a_real_task_runs(server: ServerProcess) -> None:
    server.wait_until_ended(server.submit(width=1024, height=1024, steps=20)["task_id"])
    before = time.time()
    accepted = server.submit(**LONG)
    assert accepted["expected_end_at"] >= before + accepted["expected_time_seconds"] - 1e-3
    assert accepted["wait_p90_s"] >= accepted["expected_time_seconds"]
    assert accepted["confidence"] in ("low", "high")
    running = accepted["task_id"]
    waiting = server.submit()["task_id"]
    seen: list[float] = []

    def some_steps_done(status: dict[str, Any]) -> bool:
        seen.append(status["progress"])
        return bool(status["steps_done"] >= 5)

    status = server.wait_for(running, some_steps_done)
    assert seen == sorted(seen)
    assert 0 < status["progress"] < 1
    assert (status["phase"], status["steps_total"]) == ("denoising", 100)
    assert status["expected_end_at"] > time.time()
    assert status["wait_p90_s"] >= 1
    assert 1 <= status["poll_after_s"] <= 10
    assert "expected_start_at" not in status

    status = server.get("/status", task_id=waiting).json()
    assert before < status["expected_start_at"] <= status["expected_end_at"]
    assert status["progress"] == 0
    for task_id in (running, waiting):
        requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)


def test_an_estimate_is_what_generate_would_answer_and_submits_nothing(
    server: ServerProcess,
) -> None:
    server.wait_until_ended(server.submit(width=512, height=512)["task_id"])
    body = {"prompt": "x", "width": 512, "height": 500, "guidance": 2}
    answer = requests.post(server.url + "/estimate", json=body, timeout=60)
    estimate = answer.json()
    EstimateAnswer.model_validate(estimate)
    assert "task_id" not in estimate
    assert estimate["params"]["height"] == 496
    assert estimate["ignored_fields"] == ["guidance"]
    assert server.get("/queue").json()["length"] == 0
    accepted = requests.post(server.url + "/generate", json=body, timeout=60).json()
    ratio = accepted["expected_time_seconds"] / estimate["expected_time_seconds"]
    assert 0.5 < ratio < 2
    server.wait_until_ended(accepted["task_id"])
    bad = requests.post(server.url + "/estimate", json={"prompt": "x", "steps": 0}, timeout=60)
    assert (bad.status_code, bad.json()["error"]["field"]) == (400, "steps")


def test_stats_tell_what_was_learned_and_how_good_it_is(server: ServerProcess) -> None:
    for _ in range(3):
        server.wait_until_ended(server.submit(width=512, height=512)["task_id"])
    stats = server.get("/stats").json()
    StatsAnswer.model_validate(stats)
    assert stats["model"] == "tiny"
    assert stats["tasks_learned_from"] >= 3
    assert [size["width"] for size in stats["sizes"]] == [512, 768, 1024, 1536]
    assert all(size["step_s"] > 0 for size in stats["sizes"])
    assert stats["forecasts_compared"] >= 3
    assert stats["median_error"] >= 0
    assert 0 <= stats["share_inside_p90"] <= 1
    assert stats["tasks_last_hour"] >= 3
    assert 0 < stats["busy_share"] <= 1
