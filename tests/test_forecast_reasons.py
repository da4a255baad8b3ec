"""What readers see while a forecast changes: it goes on counting down, or says why it is later."""

import random
from pathlib import Path

import pytest
from bench import ALLOWED, KLEIN, SCHNELL, learned, spec_of
from conftest import PlayedQueue, forecast_of, params_for
from memory_stores import memory_store

from models.model_catalog import Model
from scheduler.baselines import STEADY_S, STEADY_SHARE
from scheduler.machines import HOUR_S
from storage.task_store import TaskStore
from task import Encoded, GenerationParams, Phase, Reason, TaskStatus, Verdict


class Desk:
    """A queue of two models whose worker is played, under a clock that the test moves."""

    def __init__(self, folder: Path | None = None) -> None:
        self.at = 1000.0
        self.folder = folder
        self.open()

    def open(self) -> None:
        self.store = TaskStore(self.folder)
        self.queue = PlayedQueue(
            ALLOWED, learned(), self.store, monotonic=self.clock, now=self.clock
        )
        self.load(SCHNELL)

    def restart(self) -> None:
        """As after kill -9."""
        self.store.close()
        self.open()

    def clock(self) -> float:
        return self.at

    def load(self, model: Model) -> None:
        self.queue.worker.load_started(spec_of(model))
        self.at += 7.0
        self.queue.loaded(spec_of(model))

    def params(self, *, steps: int = 10, count: int = 1) -> GenerationParams:
        return params_for(
            model="schnell", width=1024, height=1024, steps=steps, count=count, format="JPEG"
        )

    def submit(self, *, steps: int = 10, count: int = 1, priority: int = 0) -> str:
        params = self.params(steps=steps, count=count)
        return self.queue.submit(params, priority=priority)[0].task_id

    def start(self, task_id: str) -> None:
        claimed = self.queue.claim()
        assert claimed
        assert claimed.task_id == task_id
        self.at += 0.5
        self.queue.report(task_id, Phase.DENOISING, 0, claimed.params.steps)

    def work(self, task_id: str, steps: int, pace: float) -> tuple[str, int] | None:
        """The next step of a task ends, after `pace` times its forecast seconds, or the whole task
        does. Returns the task and its steps while it runs."""
        task = self.queue.status(task_id)
        durations = self.queue.scheduler.estimates.durations(
            self.queue.scheduler.machine.runs[task_id].stage
        )
        if steps < task.steps_total:
            first_s = durations.text_encoding_s + durations.first_step_extra_s if not steps else 0.0
            self.at += pace * (durations.step_s + first_s)
            self.queue.report(task_id, Phase.DENOISING, steps + 1, task.steps_total)
            return task_id, steps + 1
        self.at += pace * durations.decoding_s + durations.image_encoding_s
        self.queue.finish(task_id, [b"image"])
        return None

    def reason(self, task_id: str) -> Reason | None:
        return forecast_of(self.queue.status(task_id)).reason


def test_a_forecast_that_is_later_than_it_was_says_why_to_each_reader() -> None:
    desk = Desk()
    first, waiting = desk.submit(), desk.submit()
    desk.start(first)
    assert desk.reason(waiting) is None

    urgent = desk.submit(priority=1)
    for _ in range(2):
        assert desk.reason(waiting) is Reason.OVERTAKEN
    listed = {task.task_id: forecast_of(task) for task in desk.queue.unfinished(9, 0)[0]}
    assert listed[waiting].reason is Reason.OVERTAKEN
    assert listed[urgent].reason is None
    desk.queue.delete(urgent)
    assert desk.reason(waiting) is None, "what overtook it has gone"

    desk.at += 60.0  # the first step does not end
    for _ in range(2):
        assert desk.reason(waiting) is Reason.SLOWER
        assert desk.reason(first) is Reason.SLOWER


def test_a_task_says_that_it_was_overtaken_also_when_the_other_one_runs() -> None:
    desk = Desk()
    first, waiting = desk.submit(), desk.submit()
    desk.start(first)
    urgent = desk.submit(priority=1)
    desk.at += 12.0
    desk.queue.finish(first, [b"image"])
    desk.start(urgent)
    assert forecast_of(desk.queue.status(waiting)).pos == 0
    assert desk.reason(waiting) is Reason.OVERTAKEN
    desk.queue.release(urgent)
    assert desk.reason(waiting) is Reason.OVERTAKEN
    assert desk.reason(urgent) is None


def test_a_task_that_an_interrupted_one_delays_is_not_overtaken() -> None:
    desk = Desk()
    first, waiting = desk.submit(), desk.submit()
    desk.start(first)
    desk.at += 30.0
    desk.queue.release(first)
    assert desk.reason(waiting) is Reason.SLOWER


def test_a_task_that_waits_since_before_the_start_has_reasons(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    first, waiting = desk.submit(), desk.submit()
    desk.start(first)
    desk.restart()
    assert desk.reason(waiting) is None
    urgent = desk.submit(priority=1)
    assert desk.reason(waiting) is desk.reason(first) is Reason.OVERTAKEN
    desk.start(urgent)
    assert desk.reason(first) is Reason.OVERTAKEN
    desk.queue.delete(urgent)
    desk.restart()
    desk.start(first)
    desk.at += 60.0  # the first step does not end
    assert desk.reason(waiting) is Reason.SLOWER
    desk.store.close()


def test_of_a_released_task_only_the_images_that_are_not_stored_count(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    one, _ = desk.queue.estimate(desk.params(count=1))
    batch, waiting = desk.submit(count=4), desk.submit()
    desk.start(batch)
    for index in range(3):
        encoded = Encoded(b"image", index)
        assert desk.queue.worker.store_image(batch, desk.queue.attempt(batch), encoded)
        desk.queue.next_image(batch, 0, index + 1)
    running_s = forecast_of(desk.queue.status(batch)).end_s
    assert running_s == pytest.approx(one.end_s, rel=0.05)
    desk.queue.release(batch)
    for _ in range(2):
        scheduler = desk.queue.scheduler
        task = scheduler.get(batch)
        assert task
        assert scheduler.forecaster.of(task).end_s == pytest.approx(one.end_s)
        shown_s = forecast_of(desk.queue.status(batch)).end_s
        assert one.end_s - STEADY_S < shown_s <= one.end_s + 1e-6, "the countdown goes on"
        after_s = forecast_of(desk.queue.status(waiting)).start_s
        assert after_s == pytest.approx(one.end_s, rel=0.05)
        desk.restart()
    claimed = desk.queue.claim()
    assert claimed
    assert (claimed.task_id, claimed.progress and claimed.progress.image) == (batch, 3)
    assert forecast_of(desk.queue.status(batch)).end_s == pytest.approx(one.end_s)
    desk.store.close()


def test_a_forecast_that_a_load_makes_later_says_so() -> None:
    desk = Desk()
    waiting = desk.submit()
    assert desk.reason(waiting) is None
    desk.load(KLEIN)
    assert desk.reason(waiting) is Reason.MODEL_SWITCH


def test_the_countdown_never_goes_back_without_a_reason_and_progress_never_at_all() -> None:
    desk, dice = Desk(), random.Random(7)
    task_id = desk.submit(steps=20)
    desk.start(task_id)
    end_at, shown = float("inf"), 0.0
    for step in range(1, 21):
        for _ in range(4):
            desk.at += 0.3 * dice.lognormvariate(0, 0.5)
            task = desk.queue.status(task_id)
            forecast = forecast_of(task)
            if forecast.reason is None:
                assert desk.at + forecast.end_s <= end_at + 1e-6
            end_at = desk.at + forecast.end_s
            assert shown <= task.share_done < 1
            shown = task.share_done
        desk.queue.report(task_id, Phase.DENOISING, step, 20)
    assert shown > 0.8


@pytest.mark.parametrize("seed", range(12))
def test_a_wait_that_grows_between_two_reads_has_a_reason(seed: int) -> None:
    """Tasks are submitted, claimed, drawn faster and slower than forecast, released and cancelled.
    One caller reads all of them after each event."""
    desk, dice = Desk(), random.Random(seed)
    ends_at: dict[str, float] = {}
    drawn: tuple[str, int] | None = None  # the running task, and its steps
    grown = 0
    for _ in range(120):
        event = dice.choice(["submit", "urgent", "work", "work", "work", "release", "cancel"])
        waiting = [t for t in desk.queue.unfinished(99, 0)[0] if t.status is TaskStatus.WAITING]
        if event in ("submit", "urgent") and len(waiting) < 8:
            desk.submit(steps=dice.choice([2, 5, 10]), priority=int(event == "urgent"))
        elif event == "cancel" and waiting:
            desk.queue.delete(dice.choice(waiting).task_id)
        elif event == "release" and drawn:
            desk.queue.release(drawn[0])
            drawn = None
        elif event == "work" and drawn is None:
            claimed = desk.queue.claim()
            drawn = (claimed.task_id, 0) if claimed else None
        elif event == "work" and drawn:
            drawn = desk.work(*drawn, dice.choice([0.5, 1.0, 1.5, 4.0]))
        for task in desk.queue.unfinished(99, 0)[0]:
            forecast = forecast_of(task)
            end_at = desk.at + forecast.end_s
            grows_s = end_at - ends_at.get(task.task_id, end_at)
            if grows_s > max(STEADY_S, STEADY_SHARE * forecast.end_s):
                assert forecast.reason is not None, (event, task.task_id, grows_s)
                grown += 1
            ends_at[task.task_id] = end_at
    assert grown > 10


def test_a_claimed_task_that_was_overtaken_says_so_while_it_runs() -> None:
    desk = Desk()
    first = desk.submit()
    urgent = desk.submit(priority=1)
    desk.start(urgent)
    desk.at += 12.0
    desk.queue.finish(urgent, [b"image"])
    desk.start(first)
    assert desk.reason(first) is Reason.OVERTAKEN


def test_a_cancelled_task_counts_until_its_worker_stops() -> None:
    desk = Desk()
    first, waiting = desk.submit(), desk.submit()
    desk.start(first)
    desk.queue.delete(first)
    assert 0.0 < forecast_of(desk.queue.status(waiting)).start_s < 5.0
    attempt = desk.queue.attempt(first)
    progress = desk.queue.scheduler.machine.stopping
    assert progress
    verdict = desk.queue.worker.report(first, attempt, progress.progress)
    assert verdict is Verdict.STOP
    assert forecast_of(desk.queue.status(waiting)).start_s == 0.0


def test_the_busy_share_is_that_since_the_start_for_the_first_hour() -> None:
    desk = Desk()
    desk.at += 23.0  # 30 s after the start
    assert desk.queue.stats().busy_share == 0.0
    task_id = desk.submit()
    desk.start(task_id)
    desk.at += 29.5
    assert desk.queue.stats().busy_share == pytest.approx(0.5)
    assert desk.queue.finish(task_id, [b"image"])
    desk.at += 60.0
    stats = desk.queue.stats()
    assert stats.tasks_last_hour == 1
    assert stats.busy_share == pytest.approx(0.25)
    desk.at += HOUR_S
    stats = desk.queue.stats()
    assert (stats.tasks_last_hour, stats.busy_share) == (0, 0.0)


def test_the_p90_is_wider_as_soon_as_tasks_that_wait_are_late_and_each_counts_once() -> None:
    at = 0.0
    queue = PlayedQueue(ALLOWED, learned(), memory_store(), monotonic=lambda: at)
    queue.load(spec_of(SCHNELL))

    def p90_factor() -> float:
        task, _ = queue.submit(params_for(width=512, height=512, steps=4), priority=0)
        forecast = forecast_of(task)
        return forecast.p90_s / forecast.end_s

    factors = [p90_factor() for _ in range(6)]
    assert queue.claim()
    at += 2000.0  # the first one is in a step that does not end
    late = p90_factor()
    assert late > 1.2 * max(factors)
    assert p90_factor() <= late, "the same tasks are still late"


def test_the_p90_follows_the_tasks_that_are_left_when_late_ones_are_cancelled() -> None:
    at = 0.0
    queue = PlayedQueue(ALLOWED, learned(), memory_store(), monotonic=lambda: at)
    queue.load(spec_of(SCHNELL))
    small = params_for(width=512, height=512, steps=4)

    def p90_factor(task_id: str) -> float:
        forecast = forecast_of(queue.status(task_id))
        return forecast.p90_s / forecast.end_s

    early = [queue.submit(small)[0].task_id]
    alone = p90_factor(early[0])
    early += [queue.submit(small)[0].task_id for _ in range(5)]
    assert queue.claim()
    at += 2000.0  # the first one is in a step that does not end
    last = queue.submit(small)[0].task_id
    late = p90_factor(last)
    assert late > 1.2 * alone
    for task_id in early:
        queue.delete(task_id)
    assert p90_factor(last) <= alone
