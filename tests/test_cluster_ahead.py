"""Tasks that the head sends to a worker ahead of time: how many, and when they are taken back."""

import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from played_head import PlayedHead, drawing

from task import TaskStatus


@pytest.fixture
def head(tmp_path: Path) -> Iterator[PlayedHead]:
    with closing(PlayedHead(tmp_path)) as head:
        yield head


def test_one_task_is_sent_ahead_and_no_more(head: PlayedHead) -> None:
    running = drawing(head, "cellar")
    waiting = [head.submit(str(number)) for number in range(3)]
    assert head.offers() == [("cellar", waiting[0])]
    assert head.offers() == []
    head.report("cellar", running, 4, phase="image_encoding")
    head.report("cellar", waiting[0], 0)
    assert head.offers() == [("cellar", waiting[1])]


def test_a_task_is_not_taken_back_from_the_worker_that_begins_it(
    head: PlayedHead, caplog: pytest.LogCaptureFixture
) -> None:
    """The dispatcher works while the claim is written to disk, and after it, while it is logged."""
    drawing(head, "cellar")
    begun = head.submit("begun")
    assert head.offers() == [("cellar", begun)]
    urgent, moments = head.submit("urgent", priority=1), list[str]()

    def work(moment: str) -> None:
        moments.append(moment)
        head.dispatcher.step(0.0)

    class Dispatching(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            work(record.getMessage())

    claims, handler = logging.getLogger("scheduler.worker_api"), Dispatching()
    caplog.set_level(logging.INFO, claims.name)
    head.scheduler.store._database.connection.set_trace_callback(work)
    claims.addHandler(handler)
    try:
        head.report("cellar", begun, 0)
    finally:
        claims.removeHandler(handler)
        head.scheduler.store._database.connection.set_trace_callback(None)
    assert any(moment.startswith("UPDATE tasks SET status") for moment in moments)
    assert any(f"{begun} is running" in moment for moment in moments)
    assert head.queue.status(begun).status is TaskStatus.RUNNING
    assert [(m["kind"], m["task_id"]) for _, m in head.step()] == [("offer", urgent)]


def test_what_was_sent_ahead_is_taken_back_when_it_must_not_begin(head: PlayedHead) -> None:
    control = head.queue.control
    drawing(head, "cellar")
    ahead = head.submit("ahead")
    assert head.offers() == [("cellar", ahead)]
    for stop in (control.pause, partial(control.drain, "cellar")):
        stop(True)
        assert [(m["kind"], m["task_id"]) for _, m in head.step()] == [("stop", ahead)]
        head.report("cellar", ahead, 0)
        assert head.queue.status(ahead).status is TaskStatus.WAITING, "it has begun too late"
        stop(False)
        assert ("cellar", ahead) in head.offers()


def test_what_was_sent_ahead_gives_way_to_an_urgent_task(head: PlayedHead) -> None:
    drawing(head, "cellar")
    ahead = head.submit("ahead")
    head.step()
    urgent = head.submit("urgent", priority=1)
    kinds = [(m["kind"], m["task_id"]) for _, m in head.step()]
    assert kinds == [("stop", ahead), ("offer", urgent)]
    head.report("cellar", ahead, 0)
    assert head.queue.status(ahead).status is TaskStatus.WAITING
    assert head.all_sent()[-1][1]["kind"] == "stop", "the worker leaves it"


def test_a_cancelled_task_that_was_sent_ahead_is_stopped_and_the_next_one_sent(
    head: PlayedHead,
) -> None:
    drawing(head, "cellar")
    ahead, following = head.submit("ahead"), head.submit("following")
    assert head.offers() == [("cellar", ahead)]
    head.queue.delete(ahead)
    kinds = [(m["kind"], m["task_id"]) for _, m in head.step()]
    assert kinds == [("stop", ahead), ("offer", following)]


def test_a_task_does_not_begin_on_a_machine_that_is_drained_this_moment(head: PlayedHead) -> None:
    head.beat("cellar")
    task_id = head.submit()
    assert head.offers() == [("cellar", task_id)]
    head.queue.control.drain("cellar", True)
    head.report("cellar", task_id, 0)
    assert head.queue.status(task_id).status is TaskStatus.WAITING


def test_a_task_on_another_machine_is_not_forecast_to_be_preempted(tmp_path: Path) -> None:
    with closing(PlayedHead(tmp_path, preempt=True)) as head:
        running = drawing(head, "cellar", width=1024, height=1024)
        head.at += 1.0
        urgent = head.submit("urgent", priority=1)
        forecast = head.queue.status(running).forecast
        assert forecast
        assert not forecast.preempted
        starts = head.queue.status(urgent).forecast
        assert starts
        assert starts.start_s >= forecast.end_s - 1.0
