"""The rules of the queue, in virtual time."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, params_for
from memory_stores import memory_store

from api.task_answers import status_answer
from errors import Gone, NoWorker, QueueFull, UnknownTask
from models.model_catalog import LoadSpec
from scheduler.health import ServerState
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import Phase, Task, TaskStatus
from timing_model import TimingModel

OFFER = allow("noise-flux1")


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at

    def pass_s(self, seconds: float) -> None:
        self.at += seconds


class Bench:
    """A queue whose clock and whose worker are moved by hand. A step takes `step_s`."""

    def __init__(self, loaded: bool = True, store: TaskStore | None = None, **rules: Any) -> None:
        self.clock = Clock()
        self.queue = PlayedQueue(
            OFFER,
            TimingModel(),
            store or memory_store(),
            QueueLimits(**rules),
            monotonic=self.clock,
            now=self.clock,
        )
        self.queue.worker.load_started(self.queue.scheduler.allowed.first_spec)
        if loaded:
            self.queue.loaded(self.queue.scheduler.allowed.first_spec, None)

    def submit(self, priority: int = 0, steps: int = 4) -> str:
        params = params_for(width=1024, height=1024, steps=steps, format="JPEG")
        return self.queue.submit(params, priority=priority)[0].task_id

    def claim(self) -> Task:
        task = self.queue.claim(0)
        assert task is not None
        return task

    def run(self, step_s: float = 2.0, image: bytes = b"image") -> str:
        """Claim the next task and bring it to its end: 1 s text, steps, 3 s decoding."""
        task = self.claim()
        self.clock.pass_s(1.0)
        self.queue.report(task.task_id, Phase.DENOISING, 0, task.params.steps)
        for step in range(task.params.steps):
            self.clock.pass_s(step_s)
            self.queue.report(task.task_id, Phase.DENOISING, step + 1, task.params.steps)
        steps = task.params.steps
        self.queue.report(task.task_id, Phase.DECODING, steps, steps)
        self.clock.pass_s(3.0)
        self.queue.report(task.task_id, Phase.IMAGE_ENCODING, steps, steps)
        assert self.queue.finish(task.task_id, [image])
        return task.task_id

    def wait_of(self, task_id: str) -> float:
        forecast = self.queue.status(task_id).forecast
        assert forecast is not None
        return forecast.end_s


def test_urgent_tasks_go_first_and_each_level_is_first_come_first_served() -> None:
    bench = Bench()
    normal = [bench.submit() for _ in range(3)]
    urgent = [bench.submit(priority=1) for _ in range(2)]
    order = urgent + normal
    assert [view.task_id for view in bench.queue.unfinished(100, 0)[0]] == order
    assert [bench.queue.status(task_id).pos for task_id in order] == [0, 1, 2, 3, 4]
    assert [bench.run() for _ in order] == order


def test_after_one_task_the_forecast_of_its_like_is_right_and_counts_steps() -> None:
    bench = Bench()
    bench.submit()
    bench.run()  # 12 s
    first, second, third = bench.submit(), bench.submit(steps=10), bench.submit()
    assert bench.wait_of(first) == pytest.approx(12.0, rel=0.02)
    assert bench.wait_of(second) == pytest.approx(12.0 + 24.0, rel=0.02)
    assert bench.wait_of(third) == pytest.approx(12.0 + 24.0 + 12.0, rel=0.02)
    status = status_answer(bench.queue.status(third), ServerState.READY, now=0.0, version=1)
    assert status.wait_remaining == pytest.approx(48, abs=1)


def test_the_remaining_steps_of_the_running_task_count_at_their_real_pace() -> None:
    bench = Bench()
    bench.submit()
    bench.run()
    running, waiting = bench.submit(), bench.submit()
    bench.claim()
    bench.clock.pass_s(1.0)
    bench.queue.report(running, Phase.DENOISING, 0, 4)
    assert bench.wait_of(running) == pytest.approx(11.0, rel=0.02)
    for step in (1, 2):
        bench.clock.pass_s(6.0)  # three times slower than learned
        bench.queue.report(running, Phase.DENOISING, step, 4)
    assert 2 * 2.0 + 3.0 < bench.wait_of(running) <= 3 * (2 * 2.0 + 3.0)
    assert bench.wait_of(waiting) == pytest.approx(bench.wait_of(running) + 12.0, rel=0.05)
    before = bench.wait_of(waiting)
    bench.clock.pass_s(1.0)
    assert bench.wait_of(waiting) == pytest.approx(before - 1.0, abs=0.01)


def test_loading_counts_into_the_wait_and_shows_in_the_state() -> None:
    bench = Bench(loaded=False)
    task_id = bench.submit()
    assert bench.queue.state() is ServerState.LOADING
    while_loading = bench.wait_of(task_id)
    bench.clock.pass_s(1.0)
    assert bench.wait_of(task_id) == pytest.approx(while_loading - 1.0)
    bench.queue.loaded(bench.queue.scheduler.allowed.first_spec, 8)
    assert bench.queue.state() is ServerState.READY
    assert bench.queue.health().quantize == 8
    assert bench.wait_of(task_id) < while_loading


def test_cancelling_a_waiting_task_moves_those_behind_it_up() -> None:
    bench = Bench()
    first, second = bench.submit(), bench.submit()
    before = bench.wait_of(second)
    assert bench.queue.delete(first) is TaskStatus.WAITING
    assert bench.queue.status(first).status is TaskStatus.CANCELLED
    assert bench.queue.status(second).pos == 0
    assert bench.wait_of(second) < before
    assert bench.run() == second


def test_the_next_report_of_a_cancelled_task_returns_stop_and_it_stays_cancelled() -> None:
    bench = Bench()
    running, waiting = bench.submit(), bench.submit()
    bench.claim()
    assert bench.queue.report(running, Phase.DENOISING, 0, 4)
    before = bench.wait_of(waiting)
    assert bench.queue.delete(running) is TaskStatus.RUNNING
    assert bench.wait_of(waiting) < before
    assert not bench.queue.report(running, Phase.DENOISING, 1, 4)
    assert not bench.queue.finish(running, [b"image"])
    assert not bench.queue.fail(running, "task_failed", "too late")
    assert not bench.queue.release(running)
    assert bench.queue.status(running).status is TaskStatus.CANCELLED
    with pytest.raises(Gone, match="cancelled"):
        bench.queue.image(running)


def test_a_failed_task_says_why_and_the_next_one_runs() -> None:
    bench = Bench()
    failing, following = bench.submit(), bench.submit()
    bench.claim()
    assert bench.queue.fail(failing, "task_failed", "ValueError: no")
    view = bench.queue.status(failing)
    assert (view.status, view.error, view.forecast) == (TaskStatus.FAILED, "ValueError: no", None)
    with pytest.raises(Gone, match="ValueError: no"):
        bench.queue.image(failing)
    error = bench.queue.health().last_error
    assert error
    assert error.message == f"task {failing}: task_failed"  # for everyone to see
    assert bench.run() == following


def test_failed_and_cancelled_tasks_teach_the_forecast_nothing() -> None:
    bench = Bench()
    bench.submit()
    bench.run()
    for end in (lambda t: bench.queue.fail(t, "task_failed", "no"), bench.queue.delete):
        task_id = bench.submit()
        bench.claim()
        bench.clock.pass_s(500.0)
        end(task_id)
        assert not bench.queue.report(task_id, Phase.DENOISING, 0, 4), "the worker leaves it"
    assert bench.wait_of(bench.submit()) == pytest.approx(12.0, rel=0.02)


def test_a_released_task_waits_before_all_others_of_its_priority() -> None:
    bench = Bench()
    first, second = bench.submit(), bench.submit()
    assert bench.claim().task_id == first
    assert bench.queue.release(first)
    assert [view.task_id for view in bench.queue.unfinished(100, 0)[0]] == [first, second]
    assert bench.queue.status(first).status is TaskStatus.WAITING


def test_a_stopping_queue_accepts_and_claims_nothing_and_stops_the_running_task() -> None:
    bench = Bench()
    running = bench.submit()
    bench.submit()
    bench.claim()
    bench.queue.scheduler.stop()
    assert bench.queue.claim(0) is None
    assert not bench.queue.report(running, Phase.DENOISING, 1, 4)
    with pytest.raises(NoWorker):
        bench.submit()
    assert bench.queue.state() is ServerState.DRAINING


def test_a_full_queue_says_when_to_come_back() -> None:
    bench = Bench(max_queue=2)
    bench.submit()
    bench.run()
    bench.submit()
    bench.claim()
    bench.submit()
    bench.submit()
    with pytest.raises(QueueFull) as caught:
        bench.submit()
    assert caught.value.retry_after_s == pytest.approx(12, abs=1)


def test_images_leave_after_their_time_and_the_oldest_when_there_is_no_room() -> None:
    bench = Bench(keep_s=3600, keep_bytes=25, refetch_s=0)
    old = bench.submit()
    bench.run(image=b"x" * 10)
    bench.clock.pass_s(3600)
    kept = [bench.submit() for _ in range(3)]
    for _ in kept:
        bench.run(image=b"x" * 10)
    with pytest.raises(Gone, match="expired"):
        bench.queue.status(old)
    with pytest.raises(Gone, match="room for newer"):
        bench.queue.image(kept[0])
    assert bench.queue.image(kept[2])[0] == b"x" * 10
    assert bench.queue.images()[1] == 20


def test_a_fetched_task_is_gone_and_one_never_known_is_unknown() -> None:
    bench = Bench(refetch_s=0)
    task_id = bench.submit()
    bench.queue.fetched(task_id)  # too early
    assert bench.queue.status(task_id).status is TaskStatus.WAITING
    bench.run()
    bench.queue.fetched(task_id)
    for call in (bench.queue.status, bench.queue.image, bench.queue.delete):
        with pytest.raises(Gone, match="fetched"):
            call(task_id)
        with pytest.raises(UnknownTask):
            call("never known")


def test_a_claimed_task_cannot_be_claimed_again() -> None:
    bench = Bench()
    bench.submit()
    bench.claim()
    assert bench.queue.claim(0) is None
    assert bench.queue.state() is ServerState.BUSY


def test_tasks_that_join_after_a_download_have_the_same_order_after_a_restart(
    tmp_path: Path,
) -> None:
    needed = {"schnell"}
    names: dict[str, str] = {}
    allowed = allow("noise-flux1", "schnell")
    schnell = allowed.models[1]

    def start() -> tuple[PlayedQueue, TaskStore]:
        store = TaskStore(tmp_path)
        return PlayedQueue(
            allowed,
            TimingModel(),
            store,
            needs_download=lambda model: model.name in needed,
        ), store

    def submit(name: str, model: str = "noise-flux1") -> None:
        names[queue.submit(params_for(model=model))[0].task_id] = name

    def order() -> list[str]:
        return [names[task.task_id] for task in queue.unfinished(100, 0)[0]]

    queue, store = start()
    submit("first")
    submit("schnell", "schnell")
    submit("second")
    needed.discard("schnell")
    queue.downloads.download_ended(LoadSpec(schnell, schnell.pipelines[0], None))
    submit("third")
    in_order = ["first", "second", "schnell", "third"]
    assert order() == in_order
    store.close()
    queue, store = start()
    assert order() == in_order
    store.close()
