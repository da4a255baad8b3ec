"""The queue's rules as a simple model, against which random histories are compared.

The PlayedQueue stands on the real store in a folder of its own, under a virtual clock. The model
is a list of tasks in the order of submission and knows no SQLite, no threads and no sums of
features. A kill leaves what is on disk at that moment: the folder is copied while the store is
open, and the next start finds the copy.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ram_disk import RAM_DISK

from errors import Gone, NotReady, NoWorker, QueueFull, ServerError, StorageUnavailable, UnknownTask
from models.prompt_tokens import tokens
from scheduler.baselines import STEADY_S, STEADY_SHARE
from scheduler.health import ServerState
from scheduler.limits import ENDED_TOO_OFTEN, MAX_INTERRUPTIONS, QueueLimits
from scheduler.retention import DELETED, EXPIRED, FETCHED, NO_ROOM
from scheduler.scheduler import PRUNE_EVERY_S
from storage.ended_tasks import TOMBSTONE_S
from storage.file_store import image_name
from storage.task_store import TaskStore
from task import Encoded, Forecast, GenerationParams, Phase, Reason, Task, TaskStatus
from timing.survival import remaining
from timing_model import Measured, TimingModel, Work

OFFER = allow("noise-flux1")
TINY = OFFER.default
RULES = QueueLimits(max_queue=8, keep_s=300.0, keep_bytes=150, refetch_s=50.0)
PAUSES = st.sampled_from([1.0, 9.75, 30.0, 60.0, 400.0, TOMBSTONE_S + 1.0])
WAITING, RUNNING = TaskStatus.WAITING, TaskStatus.RUNNING
DONE, FAILED, CANCELLED = TaskStatus.DONE, TaskStatus.FAILED, TaskStatus.CANCELLED
ENDED = (DONE, FAILED, CANCELLED)


class Clock:
    def __init__(self) -> None:
        self.at = 1_000_000.0

    def __call__(self) -> float:
        return self.at


@dataclass(eq=False)
class ModelTask:
    task_id: str
    params: GenerationParams
    priority: int
    key: str | None
    created_at: float
    number: int
    """In the order of submission, from 1."""
    promised: bool = True
    """Its forecast at submit is known still; a restart forgets it."""
    status: TaskStatus = WAITING
    interruptions: int = 0
    started_at: float | None = None
    marks: list[tuple[Phase, float]] = field(default_factory=list)
    """While it runs: when each phase and each further step began."""
    ended_at: float = 0.0
    images: list[bytes] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    fetched: int = 0
    """Of its images, from the first one on."""
    fetched_at: float | None = None
    error: str | None = None
    error_code: str | None = None
    gone: str | None = None
    """Why there is nothing to see any more."""
    gone_at: float = 0.0

    @property
    def phase(self) -> Phase:
        return self.marks[-1][0]

    @property
    def work(self) -> Work:
        """Of the images that are not stored."""
        params, left = self.params, self.params.count - len(self.images)
        return Work(
            TINY.name,
            TINY.parameters_b,
            params.tokens,
            params.steps,
            params.format,
            left,
            prompt_tokens=tokens(params.prompt, TINY),
            width=params.width,
        )

    def began(self, phase: Phase) -> float:
        return next(at for marked, at in self.marks if marked is phase)

    @property
    def steps_at(self) -> list[float]:
        """When denoising began, and when each step ended."""
        return [at for phase, at in self.marks if phase is Phase.DENOISING]

    @property
    def steps_done(self) -> int:
        return max(len(self.steps_at) - 1, 0)

    @property
    def step_s(self) -> list[float]:
        return [b - a for a, b in zip(self.steps_at, self.steps_at[1:], strict=False)]

    def end(self, status: TaskStatus, at: float) -> None:
        self.status, self.ended_at, self.marks = status, at, []
        if self.images and self.fetched == len(self.images):
            self.fetched_at = at

    def wait(self, *, interrupted: bool) -> None:
        """It runs no more and waits again, with the images that it has."""
        self.status, self.interruptions = WAITING, self.interruptions + interrupted
        self.started_at, self.marks = None, []

    def fail(self, code: str, message: str, at: float) -> None:
        self.end(FAILED, at)
        self.error_code, self.error = code, message


@dataclass(frozen=True)
class Baseline:
    """What was forecast for a task when it was submitted, or the server started, or earlier than
    that since."""

    at: float
    forecast: Forecast
    newest: int
    """Number of the task that was submitted last."""


class QueueRules(RuleBasedStateMachine):
    limits = RULES

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.root = TemporaryDirectory(prefix="queue-rules-", dir=RAM_DISK)
        self.folder = Path(self.root.name) / "0"
        self.starts = 0
        self.seen_ids: set[str] = set()
        # the model
        self.tasks: list[ModelTask] = []  # in the order of submission
        self.running: list[ModelTask] = []  # in the order of their claims
        self.forgotten: list[str] = []  # ids whose tombstones were removed
        self.leaving: ModelTask | None = None  # cancelled, but the worker is at its step still
        self.timing = TimingModel()
        self.samples = self.outcomes = 0
        self.start()

    def start(self) -> None:
        """A new process on what the folder holds."""
        self.store = TaskStore(self.folder)
        self.queue = PlayedQueue(
            allow("noise-flux1"),
            TimingModel(),
            self.store,
            self.limits,
            monotonic=self.clock,
            now=self.clock,
        )
        self.prune_at, self.leaving = 0.0, None
        self.baselines: dict[str, Baseline] = {}
        self.newest_claimed = 0
        self.overtaken: set[str] = set()
        for task in self.tasks:
            task.promised = False
        self.begin_to_load()

    def begin_to_load(self) -> None:
        self.queue.worker.load_started(self.queue.scheduler.allowed.first_spec)
        self.loaded, self.load_started_at = False, self.clock()

    def teardown(self) -> None:
        self.store.close()
        self.root.cleanup()

    # -- the model's answers -----------------------------------------------------------------------

    @property
    def waiting(self) -> list[ModelTask]:
        """In the order in which they run."""
        waiting = [task for task in self.tasks if task.status is WAITING]
        return sorted(waiting, key=lambda task: -task.priority)

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def kept(self) -> list[ModelTask]:
        """Ended ones whose images are on disk."""
        return [task for task in self.with_images if task.status in ENDED]

    @property
    def with_images(self) -> list[ModelTask]:
        return [task for task in self.tasks if task.images and not task.gone]

    @property
    def on_gpu(self) -> ModelTask | None:
        task = self.running[-1] if self.running else None
        return task if task and task.phase is not Phase.IMAGE_ENCODING else None

    @property
    def encoding(self) -> list[ModelTask]:
        return [task for task in self.running if task.phase is Phase.IMAGE_ENCODING]

    @property
    def may_claim(self) -> bool:
        return self.loaded and not self.on_gpu and not self.leaving

    def reason(self, task: ModelTask) -> str | None:
        """Why the task is gone, if it is."""
        if task.gone is None and task.fetched_at is not None and task.status in ENDED:
            return FETCHED if task.fetched_at + RULES.refetch_s <= self.clock() else None
        return task.gone

    def by_key(self, key: str | None) -> ModelTask | None:
        return next((task for task in self.tasks if key and task.key == key), None)

    def load_remaining_s(self) -> float:
        if self.loaded:
            return 0.0
        load_s = self.timing.load_s(TINY.name, TINY.parameters_b)
        elapsed_s = self.clock() - self.load_started_at
        return remaining(load_s, elapsed_s, self.timing.load_sigma(TINY.name))

    def prune(self) -> None:
        """The tasks that the queue removes when it prunes, which it does every PRUNE_EVERY_S."""
        now = self.clock()
        over = sum(size_of(task) for task in self.with_images) > RULES.keep_bytes
        if not over and now < self.prune_at:
            return
        self.prune_at = now + PRUNE_EVERY_S
        for task in self.kept:
            if task.fetched_at is not None and task.fetched_at < now - RULES.refetch_s:
                task.gone, task.gone_at = FETCHED, self.clock()
        for task in self.tasks:
            if task.status in ENDED and not task.gone and task.ended_at < now - RULES.keep_s:
                task.gone, task.gone_at = EXPIRED, self.clock()
        if over:
            size = 0
            by_age = sorted(self.kept, key=lambda task: (task.ended_at, self.tasks.index(task)))
            for task in reversed(by_age):
                size += size_of(task)
                if size > RULES.keep_bytes and task is not by_age[-1]:
                    task.gone, task.gone_at = NO_ROOM, self.clock()
        for task in list(self.tasks):
            if task.gone and task.gone_at < now - TOMBSTONE_S:
                self.tasks.remove(task)
                self.forgotten.append(task.task_id)

    # -- clients -----------------------------------------------------------------------------------

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

    # -- the worker --------------------------------------------------------------------------------

    @precondition(lambda self: not self.loaded)
    @rule()
    def the_model_is_loaded(self) -> None:
        self.queue.loaded(self.queue.scheduler.allowed.first_spec, None)
        self.loaded = True
        self.timing.learn_load(TINY.name, self.clock() - self.load_started_at)
        self.improve_baselines()

    @precondition(lambda self: self.may_claim and len(self.running) < 3)
    @rule()
    def claim(self) -> None:
        claimed = self.queue.claim(0)
        if not self.waiting:
            assert claimed is None
            return
        task = self.waiting[0]
        assert claimed is not None
        assert (claimed.task_id, claimed.params) == (task.task_id, task.params)
        assert claimed.images_done == len(task.images)
        if self.newest_claimed > self.baselines[task.task_id].newest:
            self.overtaken.add(task.task_id)
        task.status, self.newest_claimed = RUNNING, max(self.newest_claimed, task.number)
        task.started_at, task.marks = self.clock(), [(Phase.TEXT_ENCODING, self.clock())]
        self.running.append(task)
        self.reported(task)

    @precondition(lambda self: self.on_gpu)
    @rule(reports=st.integers(1, 8), each_s=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
    def report(self, reports: int, each_s: float) -> None:
        """The task on the GPU goes on by so many reports, or until its last image is decoded."""
        for _ in range(reports):
            if task := self.on_gpu:
                self.clock.at += each_s
                steps = task.params.steps
                if task.phase is Phase.TEXT_ENCODING or (
                    task.phase is Phase.DENOISING and task.steps_done < steps
                ):
                    phase = Phase.DENOISING
                elif task.phase is Phase.DENOISING:
                    phase = Phase.DECODING
                elif len(task.images) < task.params.count - 1:
                    self.next_image(task)
                    continue
                else:
                    phase = Phase.IMAGE_ENCODING
                task.marks.append((phase, self.clock()))
                assert self.queue.report(task.task_id, phase, task.steps_done, steps)
                self.reported(task)
                if phase is not Phase.IMAGE_ENCODING:
                    self.improve_baselines()

    def next_image(self, task: ModelTask) -> None:
        """One of several images is decoded: it is encoded at once, and the next one begins."""
        now, index = self.clock(), len(task.images)
        measured = self.measured(task, decoded_at=now, image_encoding_s=0.0)
        image = f"{task.task_id} {index}".encode()
        encoded = Encoded(image, index, ((0, measured),))
        attempt = self.queue.attempt(task.task_id)
        assert self.queue.worker.store_image(task.task_id, attempt, encoded)
        assert not self.queue.worker.store_image(task.task_id, attempt, encoded), "only once"
        self.stored(task, image, measured)
        self.improve_baselines()
        assert self.queue.next_image(task.task_id, 0, index + 1)
        task.marks = [(Phase.TEXT_ENCODING, now)]
        self.reported(task)
        self.improve_baselines()

    def measured(self, task: ModelTask, *, decoded_at: float, image_encoding_s: float) -> Measured:
        return Measured(
            text_encoding_s=task.began(Phase.DENOISING) - task.began(Phase.TEXT_ENCODING),
            step_s=task.step_s,
            decoding_s=decoded_at - task.began(Phase.DECODING),
            image_encoding_s=image_encoding_s,
        )

    def stored(self, task: ModelTask, image: bytes, measured: Measured) -> None:
        task.images.append(image)
        task.measured.append(measured)
        self.samples += measured.gpu_s > 0
        self.timing.learn(replace(task.work, images=1), measured)

    def set_baseline(self, task: ModelTask) -> None:
        """It begins to wait."""
        forecast = self.forecasts()[task.task_id]
        self.baselines[task.task_id] = Baseline(self.clock(), forecast, len(self.seen_ids))

    def reported(self, task: ModelTask) -> None:
        """When a task is claimed, reported or released, an earlier forecast than the baseline
        replaces it."""
        forecast, baseline = self.forecasts()[task.task_id], self.baselines[task.task_id]
        if self.clock() + forecast.end_s < baseline.at + baseline.forecast.end_s:
            self.baselines[task.task_id] = replace(baseline, at=self.clock(), forecast=forecast)

    def improve_baselines(self) -> None:
        """The same of waiting tasks, when any task may have become faster."""
        for task in self.waiting:
            self.reported(task)

    @precondition(lambda self: self.encoding)
    @rule(
        choice=st.integers(0, 99),
        size=st.integers(1, 60),
        spent_s=st.sampled_from([None, 0.0, 0.5]),
    )
    def finish(self, choice: int, size: int, spent_s: float | None) -> None:
        task = self.encoding[choice % len(self.encoding)]
        image = (task.task_id.encode() * 4)[:size]
        assert self.finish_last(task, image, spent_s)
        now = self.clock()
        if spent_s is None:
            spent_s = now - task.began(Phase.IMAGE_ENCODING)
        decoded_at = task.began(Phase.IMAGE_ENCODING)
        measured = self.measured(task, decoded_at=decoded_at, image_encoding_s=spent_s)
        self.stored(task, image, measured)
        outcomes = self.queue.stats().outcomes  # those that can be compared at all
        assert self.outcomes <= outcomes <= self.outcomes + task.promised
        self.outcomes = outcomes
        task.end(DONE, now)
        self.running.remove(task)
        self.improve_baselines()
        self.prune()

    def finish_last(self, task: ModelTask, image: bytes, spent_s: float | None) -> bool:
        self.queue._drawn[task.task_id] = []  # those before are stored
        return self.queue.finish(
            task.task_id, [image], image_encoding_s=spent_s, first=len(task.images)
        )

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(0, 99))
    def fail(self, choice: int) -> None:
        task = self.running[choice % len(self.running)]
        message = f"ValueError: number {choice}"
        assert self.queue.fail(task.task_id, "task_failed", message)
        task.fail("task_failed", message, self.clock())
        self.running.remove(task)
        self.improve_baselines()

    @precondition(lambda self: self.on_gpu)
    @rule(interrupted=st.booleans())
    def release(self, interrupted: bool) -> None:
        task = self.running.pop()  # a worker releases the one on the GPU
        assert self.queue.release(task.task_id, interrupted=interrupted)
        if interrupted and task.interruptions + 1 >= MAX_INTERRUPTIONS:
            task.fail(*ENDED_TOO_OFTEN, at=self.clock())
        else:
            task.wait(interrupted=interrupted)
            self.reported(task)
        self.improve_baselines()
        if interrupted:  # the worker died, and the one that replaces it loads again
            self.begin_to_load()

    @precondition(lambda self: self.leaving)
    @rule()
    def the_worker_leaves_the_cancelled_task(self) -> None:
        assert self.leaving
        assert not self.queue.report(self.leaving.task_id, Phase.DENOISING, 1, 2)
        assert not self.queue.release(self.leaving.task_id)
        self.leaving = None
        self.improve_baselines()

    @precondition(lambda self: self.leaving)
    @rule()
    def the_worker_dies_of_the_cancelled_task(self) -> None:
        assert self.leaving
        assert not self.queue.release(self.leaving.task_id, interrupted=True)
        self.leaving = None
        self.improve_baselines()
        self.begin_to_load()
        self.the_model_is_loaded()

    @precondition(lambda self: self.may_claim and not self.running and self.waiting)
    @rule(each_s=st.sampled_from([0.0, 0.25, 1.0]), size=st.integers(20, 60))
    def a_task_runs_to_its_end(self, each_s: float, size: int) -> None:
        self.claim()
        self.report(99, each_s)
        self.finish(0, size, None)

    def tidy_up(self) -> None:
        """As an idle worker does."""
        self.queue.worker.prune()
        self.prune()

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

    # -- what holds at any moment ------------------------------------------------------------------

    def ask(self, task_id: str) -> Task:
        return self.queue.status(task_id)

    def forecasts(self) -> dict[str, Forecast]:
        """By task, what is expected now, whatever was said before."""
        forecaster = self.queue.scheduler.forecaster
        in_order, _ = forecaster.in_order(forecaster.lanes(), 0, 1000)
        return {task.task_id: forecast() for task, forecast in in_order}

    def listing(self) -> list[Task]:
        views, length = self.queue.unfinished(1000, 0)
        assert length == len(views) == self.unfinished
        return views

    @invariant()
    def the_order_is_urgent_first_then_first_come_first_served(self) -> None:
        views = self.listing()
        order = [task.task_id for task in self.running + self.waiting]
        assert [view.task_id for view in views] == order
        pos = [0] * len(self.running) + list(range(len(self.waiting)))
        assert [view.pos for view in views] == pos
        page, total = self.queue.unfinished(2, 1)
        assert (total, [view.task_id for view in page]) == (
            len(views),
            [view.task_id for view in views[1:3]],
        )
        ends = [forecast_of(view).end_s for view in views[1:3]]
        assert [forecast_of(view).end_s for view in page] == pytest.approx(ends)
        assert [self.ask(view.task_id).pos for view in views] == pos

    @invariant()
    def every_forecast_is_that_of_a_plain_simulation(self) -> None:
        """From the start of the first waiting task on: one GPU, task after task. Those that wait
        count the encoding of those that run, and not of one another."""
        forecasts = list(self.forecasts().values())
        running, waiting = forecasts[: len(self.running)], forecasts[len(self.running) :]
        encoder_free_s = 0.0
        for forecast in running:
            assert forecast.start_s == 0
            assert forecast.end_s >= encoder_free_s
            encoder_free_s = forecast.end_s
        gpu_free_s = waiting[0].start_s if waiting else 0.0
        if waiting and not running and not self.leaving:
            # of a load that is late, what is left depends on the last digits of its forecast
            assert gpu_free_s == pytest.approx(self.load_remaining_s(), rel=1e-4)
        for task, forecast in zip(self.waiting, waiting, strict=True):
            assert forecast.start_s == near(gpu_free_s)
            durations = self.timing.durations(task.work)
            gpu_free_s += durations.gpu_s
            end_s = max(gpu_free_s, encoder_free_s) + durations.image_encoding_s
            assert forecast.end_s == near(end_s)
            assert forecast.confidence is durations.confidence

    @invariant()
    def every_reader_gets_the_same_and_a_forecast_that_is_later_has_a_reason(self) -> None:
        """Later than when the task was submitted: a little is not reported, so that the
        countdown goes on; more comes with its reason."""
        forecasts, now = self.forecasts(), self.clock()
        for view in self.listing():
            shown, forecast = forecast_of(view), forecasts[view.task_id]
            assert forecast_of(self.ask(view.task_id)) == shown, "asking changes nothing"
            assert 0 <= shown.start_s <= shown.end_s + 1e-6
            assert shown.end_s <= shown.p90_s + 1e-6
            assert math.isfinite(shown.p90_s)
            assert (shown.pos, shown.p90_s) == (forecast.pos, forecast.p90_s)
            baseline = self.baselines[view.task_id]
            end_at = baseline.at + baseline.forecast.end_s
            late_s = now + forecast.end_s - end_at
            little_s = max(STEADY_S, STEADY_SHARE * forecast.end_s)
            if late_s < little_s - 1e-6:
                assert shown.reason is None
                assert shown.end_s == near(max(min(forecast.end_s, end_at - now), 0.0))
            elif late_s > little_s + 1e-6:
                assert shown.end_s == forecast.end_s
                overtaken = self.newest_before(view.task_id) > baseline.newest
                if view.status is RUNNING:
                    overtaken = view.task_id in self.overtaken
                assert shown.reason is (Reason.OVERTAKEN if overtaken else Reason.SLOWER)

    def newest_before(self, task_id: str) -> int:
        """The newest task that runs, or has run, before this one, if this one waits."""
        numbers = [0]
        for task in self.waiting:
            if task.task_id == task_id:
                return max(self.newest_claimed, *numbers)
            numbers.append(task.number)
        return 0

    @invariant()
    def every_task_has_the_status_that_it_should_have(self) -> None:
        for task in self.tasks:
            if reason := self.reason(task):
                with pytest.raises(Gone) as caught:
                    self.queue.status(task.task_id)
                assert caught.value.message == reason
                continue
            view = self.ask(task.task_id)
            assert (view.status, view.params) == (task.status, task.params)
            assert (view.priority, view.created_at) == (task.priority, task.created_at)
            assert view.image_sizes == tuple(map(len, task.images))
            assert view.started_at == task.started_at
            assert (view.error_code, view.error) == (task.error_code, task.error)
            if task.status in ENDED:
                assert view.ended_at == task.ended_at
                assert (view.pos, view.forecast, view.phase) == (None, None, None)
                assert view.measured == tuple(task.measured)
            if task.status is RUNNING:
                assert (view.phase, view.steps_done) == (task.phase, task.steps_done)

    @invariant()
    def every_image_is_there_exactly_as_long_as_it_should_be(self) -> None:
        for task in self.tasks:
            for index in range(task.params.count):
                if index < len(task.images) and not self.reason(task):
                    found = self.queue.image(task.task_id, index)
                    assert found == (task.images[index], task.params)
                    continue
                expected: type[ServerError] = Gone if task.status in ENDED else NotReady
                with pytest.raises(expected) as caught:
                    self.queue.image(task.task_id, index)
                assert (self.reason(task) or task.error or "") in str(caught.value)
        files = {path.name: path.read_bytes() for path in (self.folder / "images").iterdir()}
        assert files == {
            image_name(task.task_id, index): image
            for task in self.with_images
            for index, image in enumerate(task.images)
        }
        sizes = list(map(size_of, self.with_images))
        assert self.queue.images() == self.store.ended.images() == (len(sizes), sum(sizes))

    @invariant()
    def what_was_forgotten_or_never_was_is_unknown(self) -> None:
        for task_id in [*self.forgotten, "never known", "", "../lock"]:
            for call in (self.queue.status, self.queue.image, self.queue.delete):
                with pytest.raises(UnknownTask):
                    call(task_id)
            self.queue.fetched(task_id)

    @invariant()
    def a_worker_that_comes_too_late_is_refused(self) -> None:
        if self.leaving:
            return  # that is one who comes in time
        for task_id in {task.task_id for task in self.tasks if task not in self.running}:
            assert not self.queue.report(task_id, Phase.DENOISING, 1, 2)
            assert not self.queue.finish(task_id, [b"too late"])
            assert not self.queue.fail(task_id, "task_failed", "too late")
            assert not self.queue.release(task_id)

    @invariant()
    def health_counts_what_waits_and_runs(self) -> None:
        health = self.queue.health()
        assert (health.waiting, health.running) == (len(self.waiting), len(self.running))
        busy = self.running or self.leaving
        idle_or_busy = ServerState.BUSY if busy else ServerState.READY
        assert health.state is (idle_or_busy if self.loaded else ServerState.LOADING)

    @invariant()
    def what_was_learned_is_counted(self) -> None:
        stats = self.queue.stats()
        assert (stats.samples, stats.outcomes) == (self.samples, self.outcomes)


def size_of(task: ModelTask) -> int:
    return sum(map(len, task.images))


def near(seconds: float) -> Any:
    return pytest.approx(seconds, rel=1e-6, abs=1e-6)


def some_params(number: int, steps: int, side: int, count: int = 1) -> GenerationParams:
    image_format = "PNG" if number % 3 else "JPEG"
    return params_for(
        f"number {number}",
        seed=number,
        width=side,
        height=side,
        steps=steps,
        format=image_format,
        count=count,
    )
