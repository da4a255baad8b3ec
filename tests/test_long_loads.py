"""Loads and steps that take long: their progress, and how long a cancelled task still needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for
from fake_generator import FakeGenerator
from memory_stores import memory_store
from played_app import PlayedApp

from api.task_answers import status_answer
from errors import LoadStopped, ModelLoadError
from generation import loading
from generator import MfluxGenerator
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from scheduler.health import ServerState
from scheduler.walk import REPEATED
from task import Phase, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

ALLOWED = allow("noise-flux1", "noise-flux2")
FIRST, OTHER = ALLOWED.models


class Bench:
    """A queue under a clock of the test, with one task whose weights are being loaded."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.queue = PlayedQueue(
            ALLOWED,
            TimingModel(),
            memory_store(),
            monotonic=lambda: self.at,
            now=lambda: self.at,
        )
        self.queue.load()
        self.task_id = self.submit()
        claimed = self.queue.claim()
        assert claimed
        self.spec: LoadSpec = claimed.stages[0].load_spec
        self.queue.report(self.task_id, Phase.LOADING, 0, 4)
        self.queue.worker.load_started(self.spec)

    def submit(self) -> str:
        return self.queue.submit(params_for(model=OTHER.name))[0].task_id

    def part(self, share: float, seconds: float) -> bool:
        """A part of the load ends; returns whether it goes on."""
        self.at += seconds
        return self.queue.worker.load_reported(share)

    def load_s(self) -> float:
        scheduler = self.queue.scheduler
        return scheduler.forecaster.remaining.before_runs_s(scheduler.machine, self.at)


def test_a_load_has_its_own_progress_and_its_countdown_follows_the_parts() -> None:
    bench = Bench()
    for number in range(1, 10):
        assert bench.part(number / 10, 60.0)  # far more than the prior of a tiny model
        task = bench.queue.status(bench.task_id)
        answer = status_answer(task, ServerState.LOADING, now=0.0, version=1)
        assert (answer.phase, answer.loading_progress) == (Phase.LOADING, number / 10)
        if number >= 3:
            left_s = (10 - number) * 60.0
            assert left_s / 2 < bench.load_s() < 2 * left_s
    bench.queue.loaded(bench.spec)
    bench.queue.report(bench.task_id, Phase.TEXT_ENCODING, 0, 4)
    task = bench.queue.status(bench.task_id)
    answer = status_answer(task, ServerState.BUSY, now=0.0, version=1)
    assert (answer.phase, answer.loading_progress) == (Phase.TEXT_ENCODING, None)


def test_the_load_of_a_cancelled_task_goes_on_only_for_another_one() -> None:
    bench = Bench()
    assert bench.part(0.1, 5.0)
    bench.queue.delete(bench.task_id)
    stopping = bench.queue.stopping(bench.task_id)
    assert stopping
    assert stopping.phase is Phase.LOADING
    assert stopping.seconds == pytest.approx(5.0, abs=1.0)
    waiting = bench.submit()
    assert bench.part(0.2, 5.0), "another task needs these weights"
    assert bench.queue.stopping(bench.task_id) is None
    bench.queue.delete(waiting)
    assert not bench.part(0.3, 5.0)


def test_a_load_is_stopped_with_the_server_unless_its_task_can_end_in_time() -> None:
    bench = Bench()
    bench.queue.worker.stop(drain_s=100_000.0)
    assert bench.part(0.5, 10.0)
    bench.queue.worker.stop(drain_s=0.0)
    assert not bench.part(0.6, 10.0)


def test_a_load_that_no_task_needs_is_stopped_with_the_server_at_once() -> None:
    queue = PlayedQueue(ALLOWED, TimingModel(), memory_store())
    queue.worker.load_started(queue.worker.first_spec)
    assert queue.worker.load_reported(0.1), "the server is to be ready for the first task"
    queue.worker.stop(drain_s=600.0)
    assert not queue.worker.load_reported(0.2)


def test_the_time_of_the_first_load_is_not_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]

    class Slow(FakeGenerator):
        def load(self, weights: LoadSpec, report: object = None) -> int | None:
            now[0] += 500.0
            return super().load(weights)

    monkeypatch.setattr("workers.worker.time.monotonic", lambda: now[0])
    queue = PlayedQueue(ALLOWED, TimingModel(), memory_store())
    generator = Slow()
    worker = Worker(queue.worker, generator, lambda error: None, unload_after_s=60.0)
    assert worker.load()
    worker.unload_if_idle()
    assert generator.resident
    now[0] += 61.0
    worker.unload_if_idle()
    assert not generator.resident


def test_mflux_loads_in_parts_and_a_stopped_load_leaves_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PART_BYTES", 100_000)
    prepare_mlx()
    generator = MfluxGenerator(data_dir)
    spec = LoadSpec(FIRST, FIRST.pipelines[0], None)
    shares: list[float] = []
    active_bytes: list[int] = []

    def note(share: float) -> None:
        shares.append(share)
        active_bytes.append(generator.memory.active_bytes)

    generator.load(spec, note)
    assert shares == sorted(shares)
    assert active_bytes[-1] > active_bytes[0], "it is counted during the load, too"
    read = [share for share in shares if share > 0.0]
    assert len(read) > 3
    assert read[-1] <= 1.0
    generator.unload()
    before = generator.memory.active_bytes

    def stop(share: float) -> None:
        if share > 0.5:
            raise LoadStopped

    with pytest.raises(LoadStopped):
        generator.load(spec, stop)
    assert not generator.resident
    assert generator.memory.active_bytes <= before + 100_000
    generator.load(spec)
    assert list(generator.resident) == [spec.key]
    generator.unload()


def test_a_worker_whose_load_is_stopped_leaves_the_task_and_draws_the_next_one() -> None:
    bench = Bench()
    bench.queue.release(bench.task_id)

    class Parts(FakeGenerator):
        cancelled = False

        def load(self, weights: LoadSpec, report: object = None) -> int | None:
            assert callable(report)
            report(0.5)
            if weights.model is OTHER and not self.cancelled:
                self.cancelled = True
                bench.queue.delete(bench.task_id)
                report(0.6)
                pytest.fail("nobody needs these weights")
            return super().load(weights)

    def fail(error: ModelLoadError) -> None:
        pytest.fail(str(error))

    worker = Worker(bench.queue.worker, Parts(), fail)
    assert worker.load()
    assert worker.run_once(0)
    assert bench.queue.status(bench.task_id).status is TaskStatus.CANCELLED
    assert bench.queue.stopping(bench.task_id) is None
    following = bench.submit()
    assert worker.run_once(0)
    assert worker.stop(GIVE_UP_S)
    assert bench.queue.status(following).status is TaskStatus.DONE


# -- cancelling -----------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> Iterator[PlayedApp]:
    played = PlayedApp(tmp_path)
    yield played
    played.store.close()


PHASES = {
    Phase.TEXT_ENCODING: "The encoding of its prompt",
    Phase.DENOISING: "Its present step",
    Phase.DECODING: "The decoding of its image",
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_answer_to_a_cancel_says_what_must_end_first_and_when(
    app: PlayedApp, phase: Phase
) -> None:
    body = {"prompt": "x", "width": 1024, "height": 1024, "steps": 2}
    task_id = app.ask("alice", "POST", "/generate", json=body).json["task_id"]  # type: ignore[index]
    task = app.queue.claim()
    assert task
    if phase is not Phase.TEXT_ENCODING:
        app.at += 60.0
        app.queue.report(task_id, Phase.DENOISING, 0, 2)
    if phase is Phase.DECODING:
        app.at += 60.0
        app.queue.report(task_id, Phase.DENOISING, 1, 2)
        app.at += 60.0
        app.queue.report(task_id, Phase.DECODING, 2, 2)
    app.at += 30.0
    answer = app.ask("alice", "DELETE", f"/delete?task_id={task_id}").json
    assert answer
    assert answer["stopping_s"] > 5.0
    assert answer["message"].startswith(f"The task was cancelled. {PHASES[phase]} must end first")
    assert not app.queue.report(task_id, Phase.DECODING, 2, 2)
    gone = app.ask("alice", "DELETE", f"/delete?task_id={task_id}").json
    assert gone
    assert "stopping_s" not in gone


def test_a_task_that_ends_after_its_present_image_says_when_that_is(app: PlayedApp) -> None:
    body = {"prompt": "x", "steps": 2, "count": 3}
    task_id = app.ask("alice", "POST", "/generate", json=body).json["task_id"]  # type: ignore[index]
    assert app.queue.claim()
    app.at += 1.0
    app.queue.report(task_id, Phase.DENOISING, 0, 2)
    app.at += 60.0
    app.queue.report(task_id, Phase.DENOISING, 1, 2)
    path = f"/delete?task_id={task_id}&after_current=true"
    answer = app.ask("alice", "DELETE", path).json
    assert answer
    assert answer["stopping_s"] > 0.0
    assert "The image must end first" in answer["message"]


def test_a_waiting_task_is_cancelled_without_anything_that_must_end(app: PlayedApp) -> None:
    task_id = app.ask("alice", "POST", "/generate", json={"prompt": "x"}).json["task_id"]  # type: ignore[index]
    answer = app.ask("alice", "DELETE", f"/delete?task_id={task_id}").json
    assert answer
    assert answer["message"] == "The task was taken out of the queue."
    assert "stopping_s" not in answer


def test_a_prompt_is_encoded_again_once_its_model_has_left_memory() -> None:
    bench = Bench()
    bench.queue.loaded(bench.spec)
    schedule = bench.queue.scheduler.schedule

    def repeats(task_id: str) -> bool:
        task = bench.queue.scheduler.get(task_id)
        assert task
        return bool(schedule.kinds(schedule.position(task))[0] % 2 == REPEATED)

    again = bench.submit()
    assert repeats(again), "the running task encodes it first"
    bench.queue.delete(again)
    bench.queue.report(bench.task_id, Phase.DENOISING, 1, 4)
    bench.queue.worker.now_resident(())
    first, second = bench.submit(), bench.submit()
    assert not repeats(first)
    assert repeats(second)
    bench.queue.worker.now_resident(())
    assert repeats(second), "a waiting task encodes it first"
