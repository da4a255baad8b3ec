"""Switching between models: the queue and the worker with a clock and a generator of the test."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for
from studio import OFFER, Gpu, StudioOf

from errors import NoWorker
from models.model_catalog import LoadSpec
from scheduler.health import ServerState
from storage.task_store import TaskStore
from task import Memory, Task, TaskStatus
from timing_model import TimingModel


def test_without_affinity_tasks_run_first_come_first_served(studio_of: StudioOf) -> None:
    studio = studio_of(max_delay_s=0)
    for number in range(6):
        studio.submit(("noise-flux1", "noise-flux2")[number % 2], str(number))
    studio.run_all()
    assert studio.order == list("012345")
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2"] * 3


def test_with_affinity_tasks_of_a_model_run_together_level_by_level(studio_of: StudioOf) -> None:
    studio = studio_of(max_delay_s=3600)
    for number in range(6):
        studio.submit(("noise-flux1", "noise-flux2")[number % 2], str(number))
    for number in range(4):
        studio.submit(("noise-qwen", "noise-flux2")[number % 2], f"u{number}", priority=1)
    studio.run_all()
    assert studio.order == ["u0", "u2", "u1", "u3", "0", "2", "4", "1", "3", "5"]
    assert len(studio.gpu.loads) == 5


def test_two_models_in_memory_are_not_loaded_again_and_the_oldest_makes_room(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=2)
    for model in ("noise-flux1", "noise-flux2") * 3:
        studio.submit(model)
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2"]
    for model in ("noise-flux1", "noise-qwen", "noise-flux1", "noise-flux2"):
        studio.submit(model)
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2", "noise-qwen", "noise-flux2"]
    assert [w.key for w in studio.queue.health().loaded] == ["noise-flux2", "noise-flux1"]


def test_a_large_model_that_made_others_room_does_not_make_memory_smaller_for_good(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=3)
    studio.gpu.memory = Memory(room_bytes=10)
    studio.gpu.bytes_of = {"noise-flux1": 3, "noise-flux2": 3, "noise-qwen": 9}
    studio.submit("noise-qwen")
    studio.run_all()
    assert [w.key for w in studio.queue.health().loaded] == ["noise-qwen"]
    for model in ("noise-flux1", "noise-flux2"):
        studio.submit(model)
    studio.run_all()
    assert [w.key for w in studio.queue.health().loaded] == ["noise-flux2", "noise-flux1"]
    for model in ("noise-flux1", "noise-flux2") * 2:
        assert forecast_of(studio.submit(model)).switches == 0
    behind_the_large_one = [studio.submit(model) for model in ("noise-qwen", "noise-flux1")]
    assert [forecast_of(task).switches for task in behind_the_large_one] == [1, 2]
    before = len(studio.gpu.loads)
    studio.run_all()
    assert studio.gpu.loads[before:] == ["noise-qwen", "noise-flux1"]


@pytest.mark.parametrize("room_bytes", [0, 10])
@pytest.mark.parametrize("in_memory", [1, 2, 3])
@pytest.mark.parametrize("max_delay_s", [0.0, 3600.0])
def test_what_is_forecast_at_submit_comes_true_where_the_work_is_as_learned(
    studio_of: StudioOf, in_memory: int, max_delay_s: float, room_bytes: int
) -> None:
    studio = studio_of(in_memory=in_memory, max_delay_s=max_delay_s)
    studio.gpu.memory = Memory(room_bytes=room_bytes)
    studio.gpu.bytes_of = {"noise-flux1": 3, "noise-flux2": 4, "noise-qwen": 6, "noise-seedvr2": 2}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("noise-flux1", {}),
        ("noise-flux2", {"count": 3}),
        ("noise-qwen", {"upscale": 2.0, "upscaler": "noise-seedvr2"}),
        ("noise-flux1", {"count": 2, "upscale": 2.0, "upscaler": "noise-seedvr2"}),
        ("noise-qwen", {}),
        ("noise-flux2", {}),
    ]
    for _ in range(8):  # until it is learned
        for model, fields in asked:
            studio.submit(model, **fields)
            studio.run_all()
    for _ in range(3):
        views = [studio.submit(model, **fields) for model, fields in asked]
        forecast = {
            view.task_id: studio.clock.at + (forecast_of(studio.status(view.task_id)).end_s)
            for view in views
        }
        listed, length = studio.queue.unfinished(100, 0)
        assert length == len(asked)
        for view in listed:
            now = studio.status(view.task_id)
            assert forecast_of(view).end_s == pytest.approx(forecast_of(now).end_s)
        for _ in asked:
            assert studio.run_one()
        for task_id, end_at in forecast.items():
            view = studio.status(task_id)
            assert view.status is TaskStatus.DONE
            assert view.ended_at == pytest.approx(end_at, abs=0.1)


def test_the_weights_are_freed_when_nothing_comes_and_their_loading_is_forecast(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(unload_after_s=60)
    studio.submit("noise-flux1")
    studio.run_all()
    before = studio.queue.health()
    assert [w.key for w in before.loaded] == ["noise-flux1"]
    studio.clock.at += 59
    studio.worker.unload_if_idle()
    assert studio.queue.health().loaded == before.loaded
    params = params_for(model="noise-flux1")
    loaded_s = studio.queue.estimate(params, priority=0)[0].end_s
    studio.clock.at += 1
    studio.worker.unload_if_idle()
    assert studio.gpu.resident == ()
    health = studio.queue.health()
    assert (health.loaded, health.loading, health.state) == ((), None, ServerState.READY)
    cold = studio.queue.estimate(params, priority=0)[0]
    assert cold.end_s == pytest.approx(loaded_s + Gpu.LOAD_S)
    assert cold.switches == 1
    studio.submit("noise-flux1")
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux1"]


def test_weights_that_cannot_be_loaded_fail_their_task_and_leave_the_others(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=2)
    studio.gpu.broken.add("noise-qwen")
    tasks = [studio.submit(model).task_id for model in ("noise-flux2", "noise-qwen", "noise-flux1")]
    studio.run_all()
    views = [studio.status(task_id) for task_id in tasks]
    assert [view.status for view in views] == [
        TaskStatus.DONE,
        TaskStatus.FAILED,
        TaskStatus.DONE,
    ]
    assert (views[1].error_code, views[1].error) == (
        "model_load_failed",
        "There are no weights of noise-qwen.",
    )
    health = studio.queue.health()
    assert (health.state, health.loading) == (ServerState.READY, None)
    assert health.last_error is None  # a later task is done
    assert studio.failures == []


def test_a_load_ordered_by_the_operator_runs_once_between_two_tasks(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=2)
    qwen = OFFER.model("noise-qwen")
    weights = LoadSpec(qwen, qwen.pipelines[0], None)
    studio.submit("noise-flux1", "first")
    studio.submit("noise-flux1", "second")
    assert studio.run_one()
    for _ in range(3):
        studio.queue.control.order_load(weights)
    assert studio.queue.claim(0) is None, "loading comes first"
    assert studio.run_one()
    assert (studio.gpu.loads, studio.order) == (["noise-flux1", "noise-qwen"], ["first"])
    studio.run_all()
    assert studio.order == ["first", "second"]
    studio.gpu.broken.add("noise-flux2")
    flux2 = OFFER.model("noise-flux2")
    studio.queue.control.order_load(LoadSpec(flux2, flux2.pipelines[0], None))
    assert studio.run_one()
    error = studio.queue.health().last_error
    assert error
    assert error.message == "There are no weights of noise-flux2."
    assert studio.queue.state() is ServerState.READY
    studio.queue.scheduler.stop()
    with pytest.raises(NoWorker):
        studio.queue.control.order_load(weights)


def test_tasks_from_before_a_start_that_allows_less_are_failed_with_the_reason(
    tmp_path: Path,
) -> None:
    store = TaskStore(tmp_path)
    queue = PlayedQueue(OFFER, TimingModel(), store)
    asked: dict[str, dict[str, Any]] = {
        "kept": {},
        "model": {"model": "noise-qwen"},
        "upscaler": {"upscale": 2.0, "upscaler": "noise-seedvr2"},
        "lora": {"loras": (("gone", 1.0),)},
        "oldest": {"model": ""},
    }
    ids = {}
    for name, changes in asked.items():
        params = params_for(**{"model": "noise-flux1", **changes})
        ids[name] = f"task-{name}"
        store.insert(Task(ids[name], params, 0, created_at=1.0))
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store)
    views = {name: queue.status(task_id) for name, task_id in ids.items()}
    assert {name for name, view in views.items() if view.status is TaskStatus.WAITING} == {
        "kept",
        "oldest",
    }
    for name, code in (
        ("model", "model_not_allowed"),
        ("upscaler", "model_not_allowed"),
        ("lora", "not_supported"),
    ):
        assert (views[name].status, views[name].error_code) == (TaskStatus.FAILED, code)
        assert views[name].error
    store.close()
