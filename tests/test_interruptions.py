"""A process that is stopped for a while (SIGSTOP, a debugger) learns nothing of that time."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, ServerProcess, allow, forecast_of, params_for
from memory_stores import memory_store

from clocks import GAP_S, RunningClock
from models.model_catalog import LoadSpec
from task import Phase
from timing_model import TimingModel

STOPPED_S = 20.0


class Machine:
    """Its clock is moved by hand, and is read each second while the process runs."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.clock = RunningClock(lambda: self.at, lambda: self.at, lambda: 0.0)
        allowed = allow("noise-flux1")
        self.weights = LoadSpec(allowed.default, allowed.default.pipelines[0], None)
        self.store = memory_store()
        self.queue = PlayedQueue(
            allowed,
            TimingModel(),
            self.store,
            monotonic=self.clock,
            now=lambda: self.at,
            gaps=lambda: self.clock.gaps,
        )

    def runs(self, seconds: float) -> None:
        while seconds > 0.0:
            self.at += min(seconds, 1.0)
            seconds -= 1.0
            self.clock()

    def is_stopped(self) -> None:
        self.at += STOPPED_S

    def load(self, *, stopped: bool = False) -> None:
        self.queue.worker.load_started(self.weights)
        self.runs(7.0)
        if stopped:
            self.is_stopped()
        self.queue.loaded(self.weights, None)

    def submit(self) -> str:
        params = params_for(width=1024, height=1024)
        return self.queue.submit(params, priority=0)[0].task_id

    def draw(self, *, stopped_at_step: int | None = None) -> str:
        """1 s text, 4 steps of 2 s, 3 s decoding."""
        task = self.queue.claim(0)
        assert task is not None
        self.runs(1.0)
        self.queue.report(task.task_id, Phase.DENOISING, 0, 4)
        for step in range(1, 5):
            self.runs(2.0)
            if step == stopped_at_step:
                self.is_stopped()
            self.queue.report(task.task_id, Phase.DENOISING, step, 4)
        self.queue.report(task.task_id, Phase.DECODING, 4, 4)
        self.runs(3.0)
        self.queue.report(task.task_id, Phase.IMAGE_ENCODING, 4, 4)
        assert self.queue.finish(task.task_id, [b"image"])
        return task.task_id

    def wait_of(self, task_id: str) -> float:
        return forecast_of(self.queue.status(task_id)).end_s


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.load()
    machine.submit()
    machine.draw()
    return machine


def test_the_clock_leaves_out_the_time_for_which_the_process_was_stopped() -> None:
    at = [100.0]
    clock = RunningClock(lambda: at[0], lambda: at[0], lambda: 0.0)
    readings = [clock()]
    for passed in (1.0, GAP_S, 3600.0, 1.0, GAP_S + 0.1, 0.5):
        at[0] += passed
        readings.append(clock())
    start = readings[0]
    assert [at - start for at in readings] == pytest.approx([0.0, 1.0, 6.0, 6.0, 7.0, 7.0, 7.5])
    assert readings == sorted(readings)
    assert clock.gaps == 2


def clocks() -> tuple[RunningClock, list[float]]:
    """A clock, and what it reads: monotonic, wall, CPU seconds."""
    at = [100.0, 1e9, 1.0]
    return RunningClock(lambda: at[0], lambda: at[1], lambda: at[2]), at


@pytest.mark.parametrize("asleep_s", [GAP_S + 0.1, 60.0, 8 * 3600.0])
def test_sleep_is_a_gap_although_the_monotonic_clock_stands_still(asleep_s: float) -> None:
    clock, at = clocks()
    start = clock()
    at[0], at[1] = at[0] + 1.0, at[1] + 1.0 + asleep_s
    assert clock() - start == pytest.approx(1.0)
    assert clock.gaps == 1
    at[0], at[1] = at[0] + 1.0, at[1] + 1.0
    assert clock() - start == pytest.approx(2.0)
    assert clock.gaps == 1


@pytest.mark.parametrize("set_by_s", [-86400.0, -1.0, 1.0, GAP_S])
def test_a_wall_clock_that_is_set_back_or_a_little_ahead_is_no_gap(set_by_s: float) -> None:
    clock, at = clocks()
    start = clock()
    at[0], at[1] = at[0] + 1.0, at[1] + 1.0 + set_by_s
    assert clock() - start == pytest.approx(1.0)
    assert clock.gaps == 0


@pytest.mark.parametrize(("cpu_s", "gaps"), [(0.0, 1), (2.0, 1), (9.0, 0), (20.0, 0)])
def test_a_process_that_computes_so_hard_that_no_thread_reads_the_clock_is_not_stopped(
    cpu_s: float, gaps: int
) -> None:
    clock, at = clocks()
    start = clock()
    at[0], at[1], at[2] = at[0] + 10.0, at[1] + 10.0, at[2] + cpu_s
    assert clock() - start == pytest.approx(0.0 if gaps else 10.0)
    assert clock.gaps == gaps


def test_the_clock_is_read_by_a_thread_of_its_own_so_an_idle_process_has_no_gaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clocks.TICK_S", 0.001)
    read = threading.Event()
    clock = RunningClock(lambda: 0.0, lambda: 0.0)

    def monotonic() -> float:
        if threading.current_thread().name == "clock":
            read.set()
        return 0.0

    clock._monotonic = monotonic
    clock.start()
    assert read.wait(GIVE_UP_S)
    clock.stop()
    assert clock.gaps == 0


def test_an_interrupted_task_is_done_and_gives_no_sample(machine: Machine) -> None:
    before = machine.store.timings.samples(), machine.store.timings.outcomes()
    stats = machine.queue.stats()
    interrupted = machine.submit()
    machine.draw(stopped_at_step=2)
    assert machine.queue.image(interrupted)[0] == b"image"
    assert (machine.store.timings.samples(), machine.store.timings.outcomes()) == before
    after = machine.queue.stats()
    assert (after.median_error, after.outcomes) == (stats.median_error, stats.outcomes)
    assert machine.wait_of(machine.submit()) == pytest.approx(12.0, rel=0.05)
    measured = machine.queue.status(interrupted).measured
    assert measured
    assert sum(measured[0].step_s) == pytest.approx(8.0)


def test_tasks_that_waited_meanwhile_teach_no_error_of_their_forecast(machine: Machine) -> None:
    known = machine.store.timings.outcomes()
    machine.submit()
    behind = machine.submit()
    machine.draw(stopped_at_step=3)
    machine.draw()
    assert machine.queue.image(behind)
    assert machine.store.timings.outcomes() == known
    machine.submit()
    machine.draw()
    assert len(machine.store.timings.outcomes()) == len(known) + 1


def test_the_forecast_of_a_running_task_goes_on_where_it_was(machine: Machine) -> None:
    running, waiting = machine.submit(), machine.submit()
    assert machine.queue.claim(0)
    machine.runs(1.0)
    machine.queue.report(running, Phase.DENOISING, 0, 4)
    machine.runs(2.0)
    machine.queue.report(running, Phase.DENOISING, 1, 4)
    before = machine.wait_of(running), machine.wait_of(waiting)
    machine.is_stopped()
    assert (machine.wait_of(running), machine.wait_of(waiting)) == pytest.approx(before, abs=1.0)
    machine.runs(2.0)
    machine.queue.report(running, Phase.DENOISING, 2, 4)
    assert machine.wait_of(running) == pytest.approx(before[0] - 2.0, abs=0.5)


def test_loading_that_was_interrupted_is_not_learned(machine: Machine) -> None:
    known = machine.store.timings.loads()
    assert list(known.values()) == [pytest.approx(7.0)]
    machine.load(stopped=True)
    assert machine.store.timings.loads() == known
    machine.load()
    assert machine.store.timings.loads() == known


SHORT_GAPS = """
import clocks as clock, server, sys
clock.GAP_S, clock.TICK_S = 1.0, 0.2
sys.exit(server.main(sys.argv[1:]))
"""


def test_a_server_that_is_stopped_and_continued_learns_nothing_of_that_task(
    tmp_path: Path,
) -> None:
    def learned() -> dict[str, Any]:
        stats = server.get("/stats").json()
        return {
            name: stats[name]
            for name in stats
            if name not in ("tasks_last_hour", "busy_share", "busy_hours")
        }

    server = ServerProcess(tmp_path, "--model", "noise-flux1", program=("-c", SHORT_GAPS))
    try:
        server.wait_until_ended(server.submit()["task_id"])
        known = learned()
        task_id = server.submit(width=1024, height=1024, steps=30)["task_id"]
        server.wait_for(task_id, lambda status: status["steps_done"] >= 1)
        server.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(2.0)
        server.process.send_signal(signal.SIGCONT)
        assert server.wait_until_ended(task_id)["status"] == "done"
        assert learned() == known
    finally:
        server.stop()
