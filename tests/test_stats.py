"""GET /stats: forecasts and truth, pace, seconds of a step, busy hours; and who may see what."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from played_app import PlayedApp

from monitoring.stats import LAST_TASKS, STEP_SAMPLES
from storage.usage_store import HOUR_S, HOURS_KEPT, by_hour
from task import Phase
from timing.spread import Outcome, Spread
from timing_model import Measured, TimingModel, Work

OF_OPERATORS = {"last_tasks", "drift", "step_seconds", "busy_hours"}
PROMPT = "a secret of alice"
NOON = 1000 * 12 * HOUR_S


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    bench.store.close()
    bench.at = float(NOON)
    bench.open()
    yield bench
    bench.store.close()


def stats(bench: PlayedApp, name: str = "root") -> dict[str, Any]:
    return bench.json(name, "GET", "/stats")


def busy(bench: PlayedApp) -> list[float]:
    (hours,) = stats(bench)["busy_hours"]
    assert hours["machine"] == "local"
    assert hours["starts_at"] == int(bench.at // HOUR_S) * HOUR_S - (HOURS_KEPT - 1) * HOUR_S
    shares: list[float] = hours["shares"]
    assert len(shares) == HOURS_KEPT
    return shares


def draw(bench: PlayedApp, times: int = 1, **fields: Any) -> None:
    for _ in range(times):
        bench.submit("alice", PROMPT, **fields)
        bench.run()


# -- forecast against truth ------------------------------------------------------------------------


def test_the_last_tasks_are_there_with_forecast_and_truth_also_after_a_restart(
    bench: PlayedApp,
) -> None:
    draw(bench, 3)
    found = stats(bench)
    last = found["last_tasks"][-1]
    assert (last["model"], last["machine"]) == ("noise-flux1", "local")
    assert last["actual_s"] == 8.0
    assert last["forecast_s"] == pytest.approx(8.0, rel=0.1)
    assert last["p90_s"] >= last["forecast_s"]
    assert last["ended_at"] == bench.at
    ends = [task["ended_at"] for task in found["last_tasks"]]
    assert ends == sorted(ends)
    assert len(ends) == found["forecasts_compared"] == 2  # the first forecast was a guess
    bench.reopen()
    for name in ("last_tasks", "median_error", "share_inside_p90", "step_seconds", "drift"):
        assert stats(bench)[name] == found[name], name


def test_a_client_sees_no_single_task_and_no_machine_and_nobody_sees_a_prompt_or_an_id(
    bench: PlayedApp,
) -> None:
    draw(bench, 2)
    task_id = bench.submit("alice", PROMPT)
    assert set(stats(bench)) == set(stats(bench, "bob")) | OF_OPERATORS
    assert not set(stats(bench, "bob")) & OF_OPERATORS
    text = bench.ask("root", "GET", "/stats").text
    assert PROMPT not in text
    assert task_id not in text
    assert "alice" not in text


def test_only_the_last_tasks_are_kept_whatever_their_priority() -> None:
    spread = Spread(Outcome(n % 2, 1.0, 2.0, 1.0, ended_at=float(n)) for n in range(300))
    assert [o.ended_at for o in spread.latest(LAST_TASKS)] == list(range(100, 300))


def test_tasks_of_an_earlier_version_have_no_model_and_no_time(bench: PlayedApp) -> None:
    with closing(sqlite3.connect(bench.folder / "data" / "tasks.sqlite3")) as database:
        database.execute(
            "INSERT INTO outcomes (priority, forecast_s, p90_s, actual_s) VALUES (0, 2, 3, 2.5)"
        )
        database.commit()
    draw(bench, 2)
    bench.reopen()
    first, second = stats(bench)["last_tasks"]
    assert first == {"forecast_s": 2.0, "p90_s": 3.0, "actual_s": 2.5}
    assert second["model"] == "noise-flux1"


# -- pace ------------------------------------------------------------------------------------------


def test_drift_says_how_much_slower_a_machine_is_than_before() -> None:
    timing = TimingModel()
    work = Work("model", 1.0, 4096, 4, "JPEG")
    assert timing.drift is None

    def draw_at(pace: float, times: int) -> None:
        for _ in range(times):
            timing.learn(work, Measured(0.5 * pace, (pace,) * 4, pace, 0.02))

    draw_at(1.0, 20)
    assert timing.drift == pytest.approx(1.0, abs=0.02)
    draw_at(2.0, 8)
    assert timing.drift == pytest.approx(2.0, rel=0.05)
    assert timing.of("another").drift is None


def test_the_drift_is_that_of_the_model_that_was_run_last() -> None:
    timing = TimingModel()
    one, other = (Work(name, 1.0, 4096, 4, "JPEG") for name in ("one", "other"))
    for pace in [1.0] * 10 + [2.0] * 5:
        timing.learn(one, Measured(0.5 * pace, (pace,) * 4, pace, 0.02))
    for _ in range(3):
        timing.take(timing.learned([(other, Measured(0.5, (1.0,) * 4, 1.0, 0.02))]))
    assert timing.drift == pytest.approx(1.0, abs=0.02)


# -- seconds of a step -----------------------------------------------------------------------------


def test_the_seconds_of_a_step_are_medians_by_model_and_size(bench: PlayedApp) -> None:
    draw(bench, 2)
    draw(bench, 1, width=128, height=64)
    rows = stats(bench)["step_seconds"]
    common = {"machine": "local", "model": "noise-flux1", "step_s": 2.0}
    assert rows == [
        {**common, "width": 64, "height": 64, "pictures": 2},
        {**common, "width": 128, "height": 64, "pictures": 1},
    ]


def test_only_the_latest_samples_of_a_step_are_read(bench: PlayedApp) -> None:
    work, measured = Work("old", 1.0, 16, 2, "JPEG"), Measured(0.1, (1.0, 1.0), 0.1, 0.1)
    timings = bench.store.timings
    timings.keep_samples([(work, measured)])
    for number in range(2):  # of each model 300 are kept
        newer = Work(f"new {number}", 1.0, 16, 2, "JPEG")
        timings.keep_samples([(newer, measured)] * (STEP_SAMPLES // 2))
    models = [row["model"] for row in stats(bench)["step_seconds"]]
    assert models == ["new 0", "new 1"]


# -- busy hours ------------------------------------------------------------------------------------


def test_busy_hours_divide_a_task_among_hours_and_survive_a_restart(bench: PlayedApp) -> None:
    bench.at = NOON + HOUR_S - 2.0
    draw(bench)  # 8 s: 2 in one hour, 6 in the next
    assert bench.at == NOON + HOUR_S + 6.0
    assert busy(bench)[-2:] == [pytest.approx(2 / HOUR_S, abs=1e-6), 1.0]
    bench.reopen()
    bench.at += HOUR_S
    assert busy(bench)[-3:-1] == pytest.approx([2 / HOUR_S, 6 / HOUR_S], abs=1e-6)
    assert busy(bench)[-1] == 0.0
    bench.at += 22 * HOUR_S
    assert sum(busy(bench)) == pytest.approx(6 / HOUR_S, abs=1e-6)
    draw(bench)
    bench.at += HOUR_S
    assert sum(busy(bench)) == pytest.approx(8 / HOUR_S, abs=1e-6)


def test_a_task_that_runs_counts_as_busy(bench: PlayedApp) -> None:
    bench.submit("alice")
    task = bench.claim()
    bench.at += HOUR_S * 1.5
    assert busy(bench)[-3:] == [0.0, 1.0, 1.0]
    assert bench.queue.report(task.task_id, Phase.DENOISING, 1, 4)
    assert bench.json("alice", "DELETE", f"/delete?task_id={task.task_id}")["was"] == "running"
    assert busy(bench)[-3:] == [0.0, 1.0, 1.0]


def test_a_released_task_counts_once(bench: PlayedApp) -> None:
    bench.submit("alice")
    task = bench.claim()
    bench.at += 1800.0
    assert bench.queue.release(task.task_id)
    bench.at += 1800.0
    assert busy(bench)[-2:] == [0.5, 0.0]


def test_a_time_of_many_days_is_divided_among_the_latest_hours_only() -> None:
    hours = by_hour(0.0, 1e7)
    assert len(hours) == HOURS_KEPT
    assert max(hours) == int(1e7 // HOUR_S)
    assert sum(hours.values()) == pytest.approx((HOURS_KEPT - 1) * HOUR_S + 1e7 % HOUR_S)
    assert by_hour(10.0, 20.0) == {0: 10.0}


# -- the queue -------------------------------------------------------------------------------------


def test_an_operator_sees_the_names_of_clients_in_the_queue_and_others_do_not(
    bench: PlayedApp,
) -> None:
    for name in ("alice", "bob"):
        bench.submit(name)
    tasks = bench.json("root", "GET", "/queue")["tasks"]
    assert [task["client"] for task in tasks] == ["alice", "bob"]
    assert all("client" not in task for task in bench.json("alice", "GET", "/queue")["tasks"])
