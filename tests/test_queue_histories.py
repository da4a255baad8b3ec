"""Histories of the queue that random ones meet too seldom, and threads at once."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Barrier
from typing import Any

import pytest
from conftest import forecast_of
from queue_model import CANCELLED, DONE, FAILED, RULES, RUNNING, WAITING, some_params
from queue_rules import QueueRules

from errors import Gone, ServerError
from scheduler.health import ServerState
from scheduler.limits import MAX_INTERRUPTIONS
from scheduler.scheduler import PRUNE_EVERY_S
from storage.ended_tasks import TOMBSTONE_S
from task import Phase


@pytest.fixture
def history() -> Iterator[QueueRules]:
    history = QueueRules()
    yield history
    history.teardown()


def test_the_reason_why_a_task_is_gone_stays_the_same(history: QueueRules) -> None:
    history.the_history_begins(done=[20], running=0, waiting=[])
    (task,) = history.tasks
    history.fetch(0)
    history.clock.at += RULES.keep_s + RULES.refetch_s
    for _ in range(2):
        with pytest.raises(Gone, match="fetched"):
            history.queue.status(task.task_id)
        history.queue.worker.prune()


def test_no_forecast_says_that_a_task_is_done_before_it_starts(history: QueueRules) -> None:
    """Short tasks overtake a short one: its end moves back a little, which is not reported."""
    history.the_model_is_loaded()
    history.submit(0, 1, 256, None)
    history.a_task_runs_to_its_end(0.1, 20)
    history.submit(0, 1, 256, None)
    (task,) = history.waiting
    history.ask(task.task_id)
    for _ in range(3):
        history.submit(1, 1, 256, None)
    forecast = forecast_of(history.ask(task.task_id))
    assert (forecast.pos, forecast.reason) == (3, None)
    assert forecast.start_s <= forecast.end_s


def test_a_worker_that_dies_of_a_cancelled_task_leaves_no_trace_of_it(history: QueueRules) -> None:
    history.the_history_begins(done=[], running=2, waiting=[])
    history.cancel_the_task_on_the_gpu()
    assert history.queue.state() is ServerState.BUSY
    history.the_worker_dies_of_the_cancelled_task()
    assert history.queue.state() is ServerState.READY


def test_a_damaged_record_does_not_keep_anything_from_being_pruned(history: QueueRules) -> None:
    history.the_history_begins(done=[20, 20, 20], running=0, waiting=[])
    damaged = history.tasks[1].task_id
    history.store._database.connection.execute(
        "UPDATE tasks SET params = replace(params, '{', '') WHERE task_id = ?", (damaged,)
    )
    history.clock.at += RULES.keep_s + 1
    history.queue.worker.prune()
    for task in history.tasks:
        with pytest.raises(Gone, match="expired"):
            history.queue.status(task.task_id)
    assert history.queue.images() == (0, 0)
    assert history.queue.health().last_error is None


def test_a_damaged_record_can_be_deleted(history: QueueRules) -> None:
    history.the_history_begins(done=[20], running=0, waiting=[])
    (task,) = history.tasks
    history.store._database.connection.execute("UPDATE tasks SET params = 'x'")
    with suppress(ServerError):  # it may be refused, but it must not be an internal error
        history.queue.delete(task.task_id)
    assert history.queue.health().running == 0


def test_a_task_that_was_kept_for_months_is_gone_then_and_not_unknown(history: QueueRules) -> None:
    history.store.close()
    history.limits = replace(RULES, keep_s=2.0 * TOMBSTONE_S)
    history.start()
    history.the_history_begins(done=[20], running=0, waiting=[])
    (task,) = history.tasks
    history.clock.at += history.limits.keep_s
    history.queue.worker.prune()
    assert history.queue.status(task.task_id).status is DONE
    history.clock.at += PRUNE_EVERY_S
    history.queue.worker.prune()
    with pytest.raises(Gone, match="expired"):
        history.queue.status(task.task_id)


def test_a_task_of_which_the_worker_died_twice_is_failed_and_those_released_do_not_count(
    history: QueueRules,
) -> None:
    history.the_history_begins(done=[], running=1, waiting=[0])
    suspect, other = history.tasks
    history.release(interrupted=False)
    for _ in range(MAX_INTERRUPTIONS - 1):
        history.claim()
        history.release(interrupted=True)
        history.the_model_is_loaded()
        assert history.queue.status(suspect.task_id).status is WAITING
    history.claim()
    history.release(interrupted=False)
    history.claim()
    history.release(interrupted=True)
    view = history.queue.status(suspect.task_id)
    assert (view.status, view.error_code) == (FAILED, "ended_too_often")
    assert [view.task_id for view in history.queue.unfinished(10, 0)[0]] == [other.task_id]


def test_a_stop_with_several_tasks_running_keeps_their_order(history: QueueRules) -> None:
    history.the_history_begins(done=[], running=9, waiting=[0, 0, 1])
    for _ in range(2):
        history.claim()
        history.report(9, 0.25)
    assert len(history.encoding) == 3
    history.stop(lose_an_image=False)
    history.the_order_is_urgent_first_then_first_come_first_served()
    history.kill(with_strays=True)
    history.the_order_is_urgent_first_then_first_come_first_served()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What they return; all begin at the same moment."""
    barrier = Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(begin, call) for call in calls]]


def run_to_encoding(history: QueueRules) -> str:
    history.submit(0, 1, 256, None)
    history.claim()
    history.report(8, 0.0)
    return history.running.pop().task_id


def test_a_task_that_is_finished_and_deleted_at_once_is_cancelled_or_deleted(
    history: QueueRules,
) -> None:
    queue = history.queue
    history.the_model_is_loaded()
    for _ in range(100):
        task_id = run_to_encoding(history)
        was, finished = at_once(
            partial(queue.delete, task_id), partial(queue.finish, task_id, [b"image" * 1000])
        )
        if was is RUNNING:
            assert not finished
            assert queue.status(task_id).status is CANCELLED
        else:
            assert (was, finished) == (DONE, True)
            with pytest.raises(Gone, match="deleted"):
                queue.status(task_id)
        assert queue.unfinished(10, 0) == ([], 0)
        assert (queue.health().waiting, queue.health().running) == (0, 0)
        assert queue.images() == (0, 0)
        assert list((history.folder / "images").iterdir()) == []
        history.tasks.clear()


def test_a_task_that_is_finished_and_released_at_once_is_done_or_waits(
    history: QueueRules,
) -> None:
    queue = history.queue
    history.the_model_is_loaded()
    for _ in range(100):
        task_id = run_to_encoding(history)
        released, finished = at_once(
            partial(queue.release, task_id), partial(queue.finish, task_id, [b"image" * 1000])
        )
        assert released is not finished
        assert queue.status(task_id).status is (DONE if finished else WAITING)
        assert [view.task_id for view in queue.unfinished(10, 0)[0]] == [task_id] * released
        queue.delete(task_id)
        assert queue.images() == (0, 0)
        history.tasks.clear()


def test_many_threads_that_submit_claim_finish_and_delete_leave_nothing_behind(
    history: QueueRules,
) -> None:
    history.store.close()
    history.limits = replace(RULES, max_queue=20, keep_bytes=10**6)
    history.start()
    history.the_model_is_loaded()
    queue = history.queue

    def submit(number: int) -> str:
        key = f"key {number % 20}"  # each is used twice
        params = some_params(number, 1, 256)
        return queue.submit(params, priority=0, client_key=key)[0].task_id

    def work() -> int:
        done = 0
        while task := queue.claim(0):
            queue.report(task.task_id, Phase.DENOISING, 0, 1)
            queue.report(task.task_id, Phase.DENOISING, 1, 1)
            queue.report(task.task_id, Phase.IMAGE_ENCODING, 1, 1)
            done += queue.finish(task.task_id, [task.task_id.encode()])
        return done

    with ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(submit, range(40)))
        assert len(ids) == 20
        assert [view.pos for view in queue.unfinished(100, 0)[0]] == list(range(20))
        assert sum(future.result() for future in [threads.submit(work) for _ in range(4)]) == 20
        assert queue.images() == (20, 20 * 16)
        assert all(queue.image(task_id)[0] == task_id.encode() for task_id in ids)
        assert set(threads.map(queue.delete, ids)) == {DONE}
    assert queue.images() == (0, 0)
    assert (queue.health().waiting, queue.health().running) == (0, 0)
