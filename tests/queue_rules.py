"""The queue's rules as a simple model, against which random histories are compared.

A kill leaves what is on disk at that moment: the folder is copied while the store is open, and the
next start finds the copy.
"""

import shutil
from collections.abc import Callable

import pytest
from conftest import forecast_of
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from queue_invariants import QueueInvariants
from queue_model import (
    CANCELLED,
    DONE,
    ENDED,
    FAILED,
    PAUSES,
    RULES,
    WAITING,
    ModelTask,
    some_params,
)
from queue_worker import WorkerRules

from errors import Gone, NoWorker, QueueFull, StorageUnavailable
from scheduler.health import ServerState
from scheduler.limits import ENDED_TOO_OFTEN, MAX_INTERRUPTIONS
from scheduler.retention import DELETED
from storage.file_store import image_name


class QueueRules(WorkerRules, QueueInvariants):
    """What clients do, time, restarts and the disk; a worker does the rest."""

    @initialize(
        done=st.lists(st.integers(20, 60), max_size=4),
        running=st.integers(0, 9),
        waiting=st.lists(st.integers(0, 1), max_size=5),
    )
    def the_history_begins(self, done: list[int], running: int, waiting: list[int]) -> None:
        """In the middle of the day: some tasks are done, one runs, some wait."""
        self.the_model_is_loaded()
        for size in done:
            self.submit(0, 1, 256, None)
            self.a_task_runs_to_its_end(0.25, size)
        if running:
            self.submit(0, 2, 1024, None)
            self.claim()
            self.report(running, 0.25)
        for priority in waiting:
            self.submit(priority, 2, 1024, None)

    @rule(levels=st.lists(st.integers(0, 1), min_size=1, max_size=5), steps=st.integers(1, 3))
    def several_are_submitted(self, levels: list[int], steps: int) -> None:
        for priority in levels:
            self.submit(priority, steps, 1024, None)

    @rule(
        priority=st.integers(0, 1),
        steps=st.sampled_from([1, 2, 4]),
        side=st.sampled_from([256, 1024]),
        key=st.sampled_from([None, None, "a", "b", "c"]),
        count=st.sampled_from([1, 1, 3]),
    )
    def submit(self, priority: int, steps: int, side: int, key: str | None, count: int = 1) -> None:
        params = some_params(len(self.seen_ids), steps, side, count)
        known = self.by_key(key)
        if known and (self.reason(known) or known.status in (FAILED, CANCELLED)):
            known.key, known = None, None  # the key is free
        if known:
            view, others = self.queue.submit(params, priority=priority, client_key=key)
            assert view == self.ask(known.task_id)
            assert (view.task_id, view.params) == (known.task_id, known.params)
            assert others == self.unfinished - (known.status not in ENDED)
        elif len(self.waiting) >= RULES.max_queue:
            with pytest.raises(QueueFull) as full:
                self.queue.submit(params, priority=priority, client_key=key)
            assert full.value.retry_after_s >= 1
        else:
            estimate, before = self.queue.estimate(params, priority=priority)
            view, others = self.queue.submit(params, priority=priority, client_key=key)
            assert others == before == self.unfinished
            forecast = forecast_of(view)
            assert (estimate.pos, forecast.reason) == (forecast.pos, None)
            assert estimate.end_s == pytest.approx(forecast.end_s, rel=1e-6, abs=1e-6)
            assert view.task_id not in self.seen_ids
            self.seen_ids.add(view.task_id)
            number = len(self.seen_ids)
            task = ModelTask(view.task_id, params, priority, key, self.clock(), number)
            self.tasks.append(task)
            self.set_baseline(task)
            assert (view.status, view.params, view.priority) == (WAITING, params, priority)

    @precondition(lambda self: self.tasks)
    @rule(choice=st.integers(0, 99))
    def delete(self, choice: int) -> None:
        task = self.tasks[choice % len(self.tasks)]
        if reason := self.reason(task):
            with pytest.raises(Gone) as caught:
                self.queue.delete(task.task_id)
            assert caught.value.message == reason
            return
        assert self.queue.delete(task.task_id) is task.status
        if task.status in ENDED:
            task.gone, task.gone_at = DELETED, self.clock()
        else:
            at_gpu = task is self.on_gpu
            task.end(CANCELLED, self.clock())
            if task in self.running:
                self.leaving = task if at_gpu else self.leaving
                self.running.remove(task)
            self.improve_baselines()

    @precondition(lambda self: self.running)
    @rule()
    def cancel_the_task_on_the_gpu(self) -> None:
        self.delete(self.tasks.index(self.running[-1]))

    @precondition(lambda self: self.tasks)
    @rule(choice=st.integers(0, 99))
    def fetch(self, choice: int) -> None:
        """All images that there are. Also of a task that has none, when there is no image."""
        task = (self.with_images or self.tasks)[choice % len(self.with_images or self.tasks)]
        self.queue.fetched(task.task_id)
        self.is_fetched(task)

    def is_fetched(self, task: ModelTask) -> None:
        if not task.images or task.gone:
            return
        task.fetched = len(task.images)
        if task.status in ENDED and task.fetched_at is None:
            task.fetched_at = self.clock()

    # -- time, restarts and the disk ---------------------------------------------------------------

    @rule(seconds=PAUSES, tidy=st.booleans())
    def time_passes(self, seconds: float, tidy: bool) -> None:
        self.clock.at += seconds
        if tidy:
            self.tidy_up()

    @rule(how=st.sampled_from(["killed", "killed at work", "stopped", "stopped, an image is lost"]))
    def the_server_starts_again(self, how: str) -> None:
        if how.startswith("killed"):
            self.kill(with_strays=how != "killed")
        else:
            self.stop(lose_an_image=how != "stopped")

    @precondition(lambda self: self.running or (self.may_claim and self.waiting))
    @rule()
    def the_process_dies_of_a_task(self) -> None:
        if not self.running:
            self.claim()
        self.kill(with_strays=True)
        self.the_model_is_loaded()

    def kill(self, with_strays: bool) -> None:
        self.starts += 1
        as_it_was = self.folder.parent / str(self.starts)
        shutil.copytree(self.folder, as_it_was, ignore=shutil.ignore_patterns("*-shm"))
        if with_strays:  # it was killed between the image and the status, or while writing
            for task in self.running:
                name = image_name(task.task_id, len(task.images))
                (as_it_was / "images" / name).write_bytes(b"not done yet")
                (as_it_was / "images" / f"{name}.part").write_bytes(b"half")
        self.store.close()
        shutil.rmtree(self.folder)
        self.folder = as_it_was
        self.start()
        for task in self.running:
            if task.interruptions + 1 >= MAX_INTERRUPTIONS:
                task.fail(*ENDED_TOO_OFTEN, at=self.clock())
            else:
                task.wait(interrupted=True)
        self.running = []
        self.set_baselines()

    def set_baselines(self) -> None:
        """The server has started."""
        for task in self.waiting:
            self.set_baseline(task)

    def stop(self, lose_an_image: bool) -> None:
        self.queue.scheduler.stop()
        assert self.queue.state() is ServerState.DRAINING
        assert self.queue.claim(0) is None
        with pytest.raises(NoWorker):
            self.queue.submit(some_params(0, 1, 16), priority=0)
        self.queue.worker.release_all()
        for task in self.running:
            task.wait(interrupted=False)
        self.running = []
        self.the_order_is_urgent_first_then_first_come_first_served()
        self.store.close()
        done = [task for task in self.kept if task.status is DONE]
        if lose_an_image and done:
            (self.folder / "images" / done[0].task_id).unlink()
            lost = done[0]
            lost.gone, lost.gone_at = "The image was removed.", lost.ended_at
        self.start()
        self.set_baselines()

    @rule()
    def the_disk_refuses_for_a_while_and_nothing_changes(self) -> None:
        changes: list[Callable[[], object]] = []
        if len(self.waiting) < RULES.max_queue:
            changes.append(lambda: self.queue.submit(some_params(0, 1, 16), priority=1))
        if self.waiting:
            waiting = self.waiting[-1].task_id
            changes += [lambda: self.queue.claim(0), lambda: self.queue.delete(waiting)]
        if self.running:
            running = self.running[-1].task_id
            changes += [
                lambda: self.queue.fail(running, "task_failed", "no"),
                lambda: self.queue.release(running),
                lambda: self.queue.delete(running),
                lambda: self.queue.finish(running, [b"no room for it"]),
            ]
        self.store._database.connection.execute("PRAGMA query_only = ON")
        for change in changes:
            with pytest.raises(StorageUnavailable):
                change()
            assert self.queue.health().state is ServerState.FAILED
            self.every_task_has_the_status_that_it_should_have()
        for task in self.kept[-1:]:  # its image was sent: that is written later
            self.queue.fetched(task.task_id)
            self.is_fetched(task)
        self.store._database.connection.execute("PRAGMA query_only = OFF")
        for _ in range(2):  # it works again when nothing was refused between two probes
            if self.queue.scheduler.health.storage_error is not None:
                self.prune()
            self.queue.scheduler.check_storage()
        self.store.probe()
