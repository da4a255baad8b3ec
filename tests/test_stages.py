"""Tasks of two stages: their images, cancelling in each stage, their waits, errors."""

from typing import Any

import pytest
from conftest import forecast_of
from studio import StudioOf

from models.model_catalog import LoadSpec
from scheduler.health import ServerState
from task import Stage, TaskStatus


def test_a_task_of_two_stages_generates_all_images_and_then_upscales_them(
    studio_of: StudioOf,
) -> None:
    studio = studio_of()
    done: list[tuple[int, int]] = []
    task_id = studio.submit(
        "noise-flux1", count=3, steps=2, upscale=2.0, upscaler="noise-seedvr2"
    ).task_id
    studio.gpu.on_step = lambda stage, step: done.append(
        (studio.status(task_id).images_done, studio.status(task_id).steps_total)
    )
    studio.run_all()
    keys = [key for key, _, _ in studio.gpu.drawn]
    assert keys == ["noise-flux1"] * 3 + ["noise-seedvr2"] * 3
    assert [seed for _, _, seed in studio.gpu.drawn] == [1, 2, 3] * 2
    assert studio.gpu.loads == ["noise-flux1", "noise-seedvr2"]
    assert done == [(0, 2)] * 6 + [(0, 1), (1, 1), (2, 1)]
    view = studio.status(task_id)
    assert (view.status, view.images_done, len(view.measured)) == (TaskStatus.DONE, 3, 6)
    for index in range(3):
        assert studio.queue.image(task_id, index)[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("moment", [("noise-flux1", 1), ("noise-seedvr2", 1)])
def test_a_cancel_in_any_stage_ends_it_and_the_next_task_runs(
    studio_of: StudioOf, moment: tuple[str, int]
) -> None:
    studio = studio_of()
    task_id = studio.submit("noise-flux1", count=2, upscale=2.0, upscaler="noise-seedvr2").task_id
    behind = studio.submit("noise-flux1", "behind").task_id

    def cancel(stage: Stage, step: int) -> None:
        if (stage.load_spec.key, step) == moment and stage.params.prompt != "behind":
            studio.queue.delete(task_id)
            assert 0 <= forecast_of(studio.status(behind)).end_s < 60

    studio.gpu.on_step = cancel
    studio.run_all()
    assert studio.status(task_id).status is TaskStatus.CANCELLED
    assert studio.status(behind).status is TaskStatus.DONE
    assert studio.queue.state() is ServerState.READY


def test_an_upscaler_that_cannot_be_loaded_fails_the_task_that_was_drawn(
    studio_of: StudioOf,
) -> None:
    studio = studio_of()
    studio.gpu.broken.add("noise-seedvr2")
    task_id = studio.submit("noise-flux1", upscale=2.0, upscaler="noise-seedvr2").task_id
    studio.run_all()
    view = studio.status(task_id)
    assert (view.status, view.error_code) == (TaskStatus.FAILED, "model_load_failed")
    assert studio.queue.health().loaded == ()
    assert forecast_of(studio.submit("noise-flux1")).end_s


def test_a_wait_never_jumps_while_a_task_of_two_stages_runs(studio_of: StudioOf) -> None:
    """The forecast of the end stays where it is, through both stages and the loading between."""
    studio = studio_of()
    asked: dict[str, Any] = {"count": 2, "upscale": 2.0, "upscaler": "noise-seedvr2"}
    for _ in range(8):
        studio.submit("noise-flux1", **asked)
        studio.run_all()
    running = studio.submit("noise-flux1", **asked).task_id
    behind = studio.submit("noise-flux1").task_id
    ends: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        ends.append(
            (
                studio.clock.at + forecast_of(studio.status(running)).end_s
                if studio.queue.length > 1
                else 0,
                studio.clock.at + forecast_of(studio.status(behind)).end_s,
            )
        )

    load = studio.gpu.load

    def noting_load(weights: LoadSpec, report: object = None) -> int | None:
        note()
        bits = load(weights)
        note()
        return bits

    studio.gpu.on_step = note
    studio.gpu.load = noting_load  # type: ignore[method-assign]
    note()
    assert studio.run_one()
    for of_running, of_behind in ends:
        assert of_running == pytest.approx(ends[0][0], abs=0.1)
        assert of_behind == pytest.approx(ends[0][1], abs=0.1)
