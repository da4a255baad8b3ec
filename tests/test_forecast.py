"""Forecasts of tasks that run, and what is sent of them."""

import time
from math import sin
from typing import Any

import pytest
import requests
from bench import KLEIN, SCHNELL, UPSCALER, Bench, spec_of
from conftest import ServerProcess

from api.server_answers import StatsAnswer
from api.task_answers import EstimateAnswer
from scheduler.downloads import USUAL_BYTES_PER_S
from scheduler.forecast import P90_OF_DOWNLOADS
from scheduler.machines import HOUR_S, Run
from scheduler.pending import Pending
from task import Phase, Task
from timing.spread import Outcome
from timing_model import PRIOR_P90, Confidence, Measured

LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}


# -- a machine ------------------------------------------------------------------------------------


def running(bench: Bench, task: Task) -> Run:
    bench.join(task)
    return bench.start(task)


def test_a_load_counts_down_and_one_that_is_due_counts_in_full() -> None:
    bench = Bench()
    bench.machine.loading = spec_of(KLEIN)
    bench.at = 5.0
    assert bench.forecaster.next_start_s() == pytest.approx(14.0)
    bench.machine.load_started(spec_of(KLEIN), bench.at)
    bench.at += 4.0
    assert bench.forecaster.next_start_s() == pytest.approx(10.0)
    bench.at += 100.0
    assert bench.forecaster.next_start_s() > 30.0, "it is late: what is left is forecast again"
    task = bench.task("a", KLEIN)
    bench.join(task)
    assert bench.forecaster.of(task).switches == 0, "it is loaded by then"


def test_a_running_task_is_forecast_at_its_own_pace() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    task, behind = bench.task("a", steps=10), bench.task("b", steps=10)
    run = running(bench, task)
    bench.join(behind)
    before, behind_before = bench.end_s(task), bench.end_s(behind)
    bench.report(run, Phase.DENOISING)
    for step in range(1, 4):
        bench.at += 100.0
        bench.report(run, Phase.DENOISING, step)
    assert bench.end_s(task) > 5 * before
    assert bench.end_s(behind) - bench.end_s(task) == pytest.approx(behind_before - before)


@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_the_next_task_starts_when_the_cancelled_one_is_left_at_the_end_of_its_step(
    speed: float,
) -> None:
    bench = Bench()
    bench.load(SCHNELL)
    bench.machine.speed = speed
    run = running(bench, bench.task("a", side=1024, steps=10))
    durations = bench.estimates.durations(run.stage)
    bench.report(run, Phase.DENOISING)
    bench.at += (durations.first_step_extra_s + durations.step_s) / speed
    bench.report(run, Phase.DENOISING, 1)
    bench.at += 0.25
    bench.machine.end(run, bench.at, stopping=True)
    assert bench.forecaster.next_start_s() == pytest.approx(durations.step_s / speed - 0.25)
    bench.at += 100.0
    assert bench.forecaster.next_start_s() > 30.0, "the step is late"
    following = running(bench, bench.task("b", side=1024))
    assert bench.machine.stopping is None
    bench.report(following, Phase.DECODING, 4)
    bench.machine.end(following, bench.at, stopping=True)
    assert bench.forecaster.next_start_s() == pytest.approx(durations.decoding_s / speed)


def test_a_task_that_is_cancelled_while_it_is_encoded_does_not_delay_others() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    run = running(bench, bench.task("a"))
    bench.report(run, Phase.IMAGE_ENCODING, 4)
    bench.machine.end(run, bench.at, stopping=True)
    assert bench.forecaster.next_start_s() == 0.0


def test_images_are_encoded_one_after_the_other_while_the_gpu_goes_on() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    first = running(bench, bench.task("a", side=4096, steps=1, format="PNG"))
    encoding_s = bench.estimates.durations(first.stage).image_encoding_s
    assert encoding_s > 3.0
    bench.report(first, Phase.IMAGE_ENCODING, 1)
    bench.at += 1.0
    assert bench.forecaster.next_start_s() == 0.0, "the GPU is free"
    assert bench.end_s(first.task) == pytest.approx(encoding_s - 1.0)
    small = bench.task("b", side=64, steps=1)
    own = bench.estimates.durations(*small.stages)
    assert own.gpu_s < encoding_s - 1.0
    bench.join(small)
    assert bench.end_s(small) == pytest.approx(encoding_s - 1.0 + own.image_encoding_s)
    bench.start(small)
    assert bench.end_s(small) == pytest.approx(encoding_s - 1.0 + own.image_encoding_s)
    bench.at += encoding_s
    assert 0.0 < bench.end_s(first.task) < 1.0


def test_the_second_stage_of_a_running_task_is_forecast_with_its_load_once() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    task = bench.task("two", steps=2, count=2, upscale=2.0)
    _, enlarge = task.stages
    load_s = bench.estimates.load_s(enlarge.load_spec)
    bench.join(task)
    works = [bench.estimates.durations(stage) for stage in task.stages]
    whole_s = sum(work.gpu_s for work in works)
    assert bench.end_s(task) == pytest.approx(whole_s + load_s + works[1].image_encoding_s)
    run = bench.start(task)
    assert bench.forecaster.next_start_s() == pytest.approx(whole_s + load_s)
    bench.report(run, Phase.DENOISING, 2)
    bench.report(run, Phase.TEXT_ENCODING, 0, 0, 1)
    bench.report(run, Phase.LOADING, 0, 1, 0)
    assert bench.forecaster.next_start_s() == pytest.approx(works[1].gpu_s + load_s)
    bench.machine.load_started(enlarge.load_spec, bench.at)
    bench.at += 30.0
    assert bench.forecaster.next_start_s() == pytest.approx(works[1].gpu_s + load_s - 30.0, abs=0.5)
    bench.at += 5.0
    bench.machine.load_finished(enlarge.load_spec, [enlarge.load_spec.key], bench.at)
    bench.report(run, Phase.TEXT_ENCODING, 0, 1, 0)
    assert bench.forecaster.next_start_s() == pytest.approx(works[1].gpu_s)


def test_a_load_that_makes_the_upscaler_leave_memory_is_forecast() -> None:
    bench = Bench(models_in_memory=2)
    draw, enlarge = bench.task("x", KLEIN, upscale=2.0).stages
    bench.load(UPSCALER, (SCHNELL, UPSCALER))
    task = bench.task("two", KLEIN, upscale=2.0)
    bench.join(task)
    bench.start(task)
    bench.machine.load_started(draw.load_spec, bench.at)
    works_s = sum(bench.estimates.durations(stage).gpu_s for stage in task.stages)
    loads_s = bench.estimates.loads_s([draw.load_spec, enlarge.load_spec])
    assert bench.forecaster.next_start_s() == pytest.approx(works_s + loads_s)
    third = bench.task("three", SCHNELL)
    bench.join(third)
    assert bench.forecaster.of(third).switches == 1, "the two others have displaced it"


def test_an_image_that_is_upscaled_gives_no_sample_of_encoding() -> None:
    bench = Bench()
    draw, enlarge = bench.task("x", side=1024, steps=10, upscale=2.0).stages
    before = bench.estimates.durations(enlarge).image_encoding_s
    assert before > 0
    for _ in range(20):
        bench.timing.learn(bench.estimates.work(draw), Measured(0.5, [1.0] * 10, 1.0, 0.0))
    assert bench.estimates.durations(enlarge).image_encoding_s == before


def test_the_p90_follows_what_became_of_earlier_forecasts_of_the_same_priority() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    for _ in range(100):
        bench.spread.learn(Outcome(0, 10.0, 20.0, 17.0))
    normal, urgent = bench.task("a"), bench.task("b", priority=1)
    for task in (normal, urgent):
        bench.join(task)
    forecast = bench.forecaster.of(normal)
    assert forecast.p90_s == pytest.approx(1.7 * forecast.end_s)
    forecast = bench.forecaster.of(urgent)
    assert forecast.end_s < forecast.p90_s < 1.7 * forecast.end_s


def test_the_p90_is_wide_while_nothing_is_known_and_narrow_for_a_running_task() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    unknown = bench.task("a", quantize=4)  # a timing key of its own
    bench.join(unknown)
    forecast = bench.forecaster.of(unknown)
    assert forecast.confidence is Confidence.NONE
    assert forecast.p90_s == pytest.approx(PRIOR_P90 * forecast.end_s)
    known = bench.task("b")
    bench.join(known)
    waiting = bench.forecaster.of(known)
    bench.policy.leave(unknown)
    bench.start(known)
    now = bench.forecaster.of(known)
    assert 1.0 < now.p90_s / now.end_s < waiting.p90_s / waiting.end_s


def test_the_busy_time_is_that_of_the_last_hour_and_of_what_runs_now() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    assert bench.machine.busy_s(0.0, 0.0) == 0.0
    run = running(bench, bench.task("a"))
    bench.at = 60.0
    assert bench.machine.busy_s(0.0, bench.at) == 60.0
    bench.report(run, Phase.IMAGE_ENCODING, 4)
    bench.at = 90.0
    assert bench.machine.busy_s(0.0, bench.at) == 60.0, "encoding needs no GPU"
    bench.machine.end(run, bench.at)
    cancelled = running(bench, bench.task("b"))
    bench.at = 100.0
    bench.machine.end(cancelled, bench.at, stopping=True)
    assert bench.machine.busy_s(0.0, bench.at) == 70.0
    bench.at = HOUR_S + 90.0
    assert bench.machine.busy_s(bench.at - HOUR_S, bench.at) == 10.0


def test_a_task_that_waits_for_a_download_is_forecast_as_it_was_when_it_was_new() -> None:
    bench = Bench()
    bench.load(SCHNELL)
    for number in range(3):
        bench.join(bench.task(str(number)))
    task = bench.task("lacking", KLEIN)
    missing = (task.stages[0].load_spec,)
    promised = bench.forecaster.of_new(task, missing)
    bench.pending.add(Pending(task, missing, *bench.forecaster.load_and_work_s(task)))
    assert bench.forecaster.of(task) == promised
    durations = bench.estimates.durations(*task.stages)
    ready_s = KLEIN.download_bytes / USUAL_BYTES_PER_S
    assert promised.pos == 3
    assert promised.start_s == pytest.approx(ready_s)
    assert promised.end_s == pytest.approx(ready_s + 14.0 + durations.total_s)
    assert promised.p90_s == pytest.approx(PRIOR_P90 * promised.end_s)
    assert [entry[0].task_id for entry in bench.in_order(2)] == ["2", "lacking"]
    bench.downloads.begin(missing[0], 0)
    bench.at += 10.0
    bench.downloads.progress(int(KLEIN.download_bytes) - 1_000)
    forecast = bench.forecaster.of(task)
    waiting_s = (
        bench.end_s(bench.schedule[2])
        - bench.estimates.durations(*bench.schedule[2].stages).image_encoding_s
    )
    assert forecast.start_s == pytest.approx(waiting_s), "it joins behind those that wait"
    assert forecast.p90_s == pytest.approx(P90_OF_DOWNLOADS * forecast.end_s)


# -- over HTTP ------------------------------------------------------------------------------------


def test_every_field_of_the_forecast_is_returned_while_a_real_task_runs(
    server: ServerProcess,
) -> None:
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
    for _ in range(4):  # the first forecast is a guess if the machine is not calibrated yet
        server.wait_until_ended(server.submit(width=512, height=512)["task_id"])
    stats = server.get("/stats").json()
    StatsAnswer.model_validate(stats)
    assert stats["model"] == "noise-flux1"
    assert stats["tasks_learned_from"] >= 3
    assert [size["width"] for size in stats["sizes"]] == [512, 768, 1024, 1536]
    assert all(size["step_s"] > 0 for size in stats["sizes"])
    assert stats["forecasts_compared"] >= 3
    assert stats["median_error"] >= 0
    assert 0 <= stats["share_inside_p90"] <= 1
    assert stats["tasks_last_hour"] >= 3
    assert 0 < stats["busy_share"] <= 1


def drifting(bench: Bench) -> float:
    """The bench's machine has become slower and quicker lately. Returns how slow it is now."""
    work, slower = bench.estimates.work(bench.task("x", side=1024, steps=10).stages[0]), 1.0
    for number in range(40):
        slower = 1.0 + 0.25 * sin(number / 6)
        bench.timing.learn(work, Measured(0.5, [1.2 * slower] * 10, slower, 0.01))
    return slower


def test_what_waits_follows_the_pace_of_the_running_picture() -> None:
    bench = Bench()
    bench.load()
    slower = drifting(bench)
    run = running(bench, bench.task("a", side=1024, steps=10))
    waiting, other = bench.task("b", side=512), bench.task("c", KLEIN, side=512)
    bench.join(waiting)
    bench.join(other)
    before = bench.forecaster.of(waiting)
    own_s, load_s = before.end_s - before.start_s, bench.estimates.load_s(spec_of(KLEIN))
    bench.report(run, Phase.DENOISING, 0)
    for step in range(1, 4):
        bench.at += 1.2 * slower * 1.1
        bench.report(run, Phase.DENOISING, step)
    pace = bench.forecaster.lanes()[0].pace
    assert 1.02 < pace < 1.1
    now = bench.forecaster.of(waiting)
    assert now.end_s - now.start_s == pytest.approx(pace * own_s, rel=0.01)
    behind = bench.forecaster.of(other)
    work_s = bench.gpu_s(other)
    gpu_s = bench.estimates.durations(*waiting.stages).gpu_s
    assert behind.start_s == pytest.approx(now.start_s + pace * gpu_s)
    assert behind.end_s - behind.start_s == pytest.approx(load_s + pace * work_s, rel=0.01)
    assert bench.forecaster.of_new(bench.task("d", KLEIN)).start_s > behind.start_s
