"""What happens while a task is paused for another one, in virtual time."""

from collections.abc import Iterator

import pytest
from conftest import forecast_of
from preempting import STEP_S, Bench, about

from errors import StorageUnavailable
from task import Phase, TaskStatus, Verdict


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def paused(bench: Bench) -> Iterator[tuple[Bench, str, str]]:
    """A paused task, and the one that preempts it. At the end nothing is remembered of them."""
    long = bench.submit("long", "alice", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", "bob", priority=1)
    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) == urgent
    bench.step(urgent)
    yield bench, long, urgent
    scheduler = bench.queue.scheduler
    assert len(scheduler) == 0
    assert scheduler.machine.runs == {}
    assert vars(scheduler.policy)["_shares"]._clients == {}


def test_the_paused_task_is_cancelled(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    bench.queue.delete(long)
    assert bench.queue.status(long).status is TaskStatus.CANCELLED
    waiting = bench.submit("next")
    assert forecast_of(bench.queue.status(waiting)).start_s == about(3 * STEP_S)
    bench.draw(urgent)
    assert bench.queue.status(urgent).status is TaskStatus.DONE
    assert bench.report(long, 6) is Verdict.STOP
    assert not bench.worker.release(long, 1)
    bench.worker.left(long)
    bench.begin(waiting)
    bench.draw(waiting)


def test_the_preempting_task_is_cancelled(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    bench.queue.delete(urgent)
    assert bench.end_in_s(long) == about((44 + 1) * STEP_S), "after the step that it is at"
    assert bench.report(urgent, 2) is Verdict.STOP
    assert bench.resume(long) is Verdict.CONTINUE
    bench.draw(long)
    assert bench.queue.status(long).status is TaskStatus.DONE


def test_the_preempting_task_fails(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    assert bench.worker.fail(urgent, 1, "task_failed", "no room")
    assert bench.resume(long) is Verdict.CONTINUE
    assert bench.end_in_s(long) == about(44 * STEP_S)
    bench.draw(long)
    assert bench.queue.status(urgent).status is TaskStatus.FAILED
    assert bench.queue.status(long).status is TaskStatus.DONE


def test_both_wait_again_when_the_server_stops(paused: tuple[Bench, str, str]) -> None:
    bench, long, urgent = paused
    bench.worker.stop()
    assert bench.step(urgent) is Verdict.STOP
    assert bench.worker.release(urgent, 1)
    assert bench.resume(long) is Verdict.STOP
    assert bench.worker.release(long, 1)
    tasks, _ = bench.queue.unfinished(10, 0)
    assert [(task.task_id, task.status) for task in tasks] == [
        (urgent, TaskStatus.WAITING),
        (long, TaskStatus.WAITING),
    ]
    assert [task.interruptions for task in tasks] == [0, 0]
    bench.queue.delete(urgent)
    bench.queue.delete(long)


def test_while_the_server_drains_nothing_is_paused_and_what_fits_is_finished(
    paused: tuple[Bench, str, str],
) -> None:
    bench, long, urgent = paused
    bench.submit("urgent 2", priority=1)
    bench.worker.stop(drain_s=5 * STEP_S)
    bench.draw(urgent)
    assert bench.queue.status(urgent).status is TaskStatus.DONE
    assert bench.resume(long) is Verdict.STOP
    assert bench.worker.release(long, 1)
    for task in bench.queue.unfinished(10, 0)[0]:
        bench.queue.delete(task.task_id)


def test_a_queue_that_the_operator_has_paused_preempts_nothing(bench: Bench) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    bench.submit("urgent", priority=1)
    bench.queue.scheduler.paused = True
    assert bench.step(long) is Verdict.CONTINUE
    bench.queue.scheduler.paused = False
    assert bench.step(long) is Verdict.PAUSE


def test_no_task_is_paused_for_one_whose_time_is_up(bench: Bench) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", priority=1, max_age_s=1.0)
    assert bench.step(long) is Verdict.PAUSE
    assert bench.preempt(long) is None
    assert bench.queue.status(urgent).status is TaskStatus.CANCELLED
    assert bench.resume(long) is Verdict.CONTINUE


def test_no_task_is_paused_for_one_that_cannot_be_claimed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = bench.submit("long", steps=50)
    bench.begin(long, 5)
    urgent = bench.submit("urgent", priority=1)
    assert bench.step(long) is Verdict.PAUSE
    with monkeypatch.context() as patched:
        patched.setattr(bench.queue.scheduler.store, "claim", lambda *_, **__: False)
        with pytest.raises(StorageUnavailable):
            bench.preempt(long)
    assert bench.queue.status(long).phase is Phase.DENOISING
    bench.queue.delete(urgent)
    assert bench.preempt(long) is None
    assert bench.step(long) is Verdict.CONTINUE
