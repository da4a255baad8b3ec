"""Workers that are lost while something else happens, and what they leave behind."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest
from conftest import GIVE_UP_S, until
from played_head import LEASE_S, PlayedHead, drawing

from cluster.carrier import new_key
from cluster.registry import Registry
from errors import StorageUnavailable
from scheduler.machines import LOST_KEPT
from task import Encoded, TaskStatus
from timing_model import TimingModel


@pytest.fixture
def head(tmp_path: Path) -> Iterator[PlayedHead]:
    with closing(PlayedHead(tmp_path)) as head:
        yield head


def lose(registry: Registry, name: str) -> None:
    remote = registry.named(name)
    if remote:
        registry.lose(remote, "the test says so", interrupted=True)


def test_a_task_that_is_being_claimed_for_a_lost_worker_waits_again(head: PlayedHead) -> None:
    head.beat("cellar")
    task_id = head.submit()
    assert head.offers() == [("cellar", task_id)]
    losing = Thread(target=lose, args=(head.registry, "cellar"))

    def while_the_claim_is_written(statement: str) -> None:
        if statement.startswith("UPDATE tasks SET status") and not losing.ident:
            losing.start()
            losing.join(0.2)  # it ends in this time, unless it waits for the claim

    connection = head.scheduler.store._database.connection
    connection.set_trace_callback(while_the_claim_is_written)
    head.report("cellar", task_id, 0)
    connection.set_trace_callback(None)
    losing.join(GIVE_UP_S)
    assert losing.ident, "it was lost while the claim was written"
    assert not losing.is_alive()
    assert head.queue.status(task_id).status is TaskStatus.WAITING
    head.beat("other")
    assert head.offers() == [("other", task_id)]


def test_a_worker_that_is_lost_while_its_last_image_is_stored_leaves_after_that(
    head: PlayedHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = drawing(head, "cellar")
    remote = head.registry.named("cellar")
    assert remote
    learned = TimingModel.learned

    def lose_and_learn(self: TimingModel, samples: object) -> object:
        with pytest.raises(StorageUnavailable, match="being stored"):
            lose(head.registry, "cellar")
        return learned(self, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(TimingModel, "learned", lose_and_learn)
    assert remote.api.finish(task_id, 1, Encoded(b"image", 0))
    assert head.queue.status(task_id).status is TaskStatus.DONE
    head.step()
    assert head.registry.machines == []


def test_a_cancelled_task_ends_with_the_worker_that_had_its_last_image(head: PlayedHead) -> None:
    task_id = drawing(head, "cellar", count=3)
    head.queue.delete(task_id, after_current=True)
    head.report("cellar", task_id, 0, image=1)
    head.say("cellar", "ended", request=new_key(), task_id=task_id, attempt=1)
    head.say("cellar", "goodbye")
    until(lambda: not head.registry.machines)
    assert head.queue.status(task_id).status is TaskStatus.CANCELLED


def test_a_worker_that_is_lost_twice_at_the_same_time_is_forgiven_once(
    head: PlayedHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher loses it, and its next heartbeat comes before that is over."""
    drawing(head, "cellar")
    remote = head.registry.named("cellar")
    assert remote
    release = remote.api.release

    def beat_and_release(*task: object, interrupted: bool = False) -> bool:
        monkeypatch.setattr(remote.api, "release", release)
        head.beat("cellar")
        return release(*task, interrupted=interrupted)  # type: ignore[arg-type]

    monkeypatch.setattr(remote.api, "release", beat_and_release)
    head.step(LEASE_S + 1)
    registered = head.registry.machines
    assert [one.name for one in registered] == ["cellar"]
    assert registered != [remote]
    assert head.registry._silent == {}


def test_forecasts_go_on_when_one_of_several_machines_with_waiting_tasks_leaves(
    head: PlayedHead,
) -> None:
    for name in ("attic", "cellar", "garden"):
        head.beat(name)
    waiting = [head.submit(str(number)) for number in range(10)]
    head.step()
    head.say("garden", "goodbye")
    until(lambda: len(head.registry.machines) == 2)
    head.step(LEASE_S + 1, "attic")
    assert [one.name for one in head.registry.machines] == ["attic"]
    assert all(head.queue.status(task_id).forecast for task_id in waiting)


def test_the_tasks_of_a_hundred_silent_workers_are_remembered(head: PlayedHead) -> None:
    for number in range(LOST_KEPT + 2):
        task_id = drawing(head, f"worker {number}")
        head.step(LEASE_S + 1)
        head.queue.delete(task_id)
    assert len(head.registry._silent) == LOST_KEPT


def test_a_loss_that_the_disk_refuses_is_tried_again_after_a_pause(
    head: PlayedHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = drawing(head, "cellar")
    pauses: list[float] = []
    wake = head.scheduler.wake_worker
    monkeypatch.setattr(wake, "wait_for", lambda over, timeout_s: pauses.append(timeout_s))
    head.at += LEASE_S + 1
    with closing(sqlite3.connect(tmp_path / "tasks.sqlite3")) as other:
        other.execute("BEGIN IMMEDIATE")
        head.dispatcher.step(1.0)
    assert pauses == [1.0]
    assert head.queue.status(task_id).status is TaskStatus.RUNNING
    head.step()
    assert head.queue.status(task_id).status is TaskStatus.WAITING


def test_a_task_whose_last_image_is_awaited_is_missed_once_for_each_heartbeat(
    head: PlayedHead, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = drawing(head, "cellar", count=3)
    head.queue.delete(task_id, after_current=True)
    head.report("cellar", task_id, 0, image=1)
    caplog.clear()
    caplog.set_level(logging.WARNING)
    for beats in (1, 2):
        head.at += LEASE_S - 1
        head.beat("cellar")
        head.step()
        head.step()
        assert caplog.text.count("has lost task") == beats
    assert head.queue.status(task_id).status is TaskStatus.RUNNING


def test_messages_to_a_lost_worker_are_removed_from_the_broker(head: PlayedHead) -> None:
    for name in ("silent", "leaving"):
        head.beat(name)
    head.say("leaving", "goodbye")
    until(lambda: head.carrier.forget.call_count == 1)
    head.step(LEASE_S + 1)
    forgotten = [
        bytes.fromhex(call.args[0]).rstrip(b"\0") for call in head.carrier.forget.mock_calls
    ]
    assert forgotten == [b"leaving", b"silent"]
