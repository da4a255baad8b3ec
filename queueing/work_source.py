"""The queue as the worker and the downloads see it: what to do next, and what came of it."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from errors import (
    ModelLoadError,
    StorageUnavailable,
)
from models.model_catalog import Weights
from queueing.events import EventKind
from queueing.queue_core import ENDED_TOO_OFTEN, MAX_ATTEMPTS, QueueCore
from task import Phase, Task

log = logging.getLogger(__name__)


class WorkSource(QueueCore):
    """The worker thread, the encoder thread and the thread of downloads call it.

    report, finish, fail and release answer False when the task runs no more (it was cancelled).
    """

    @property
    def first_weights(self) -> Weights:
        """What to load before anything is asked for."""
        return self._own

    def load_started(self, weights: Weights) -> None:
        with self._lock:
            self._live.load_started(weights)

    def load_finished(
        self,
        weights: Weights,
        bits: int | None,
        resident: Sequence[str] | None = None,
        *,
        downloaded: bool = False,
    ) -> None:
        """Weights are ready, quantized to so many bits (None: not quantized).

        Args:
            downloaded: they had to be fetched first, so the time says nothing of the next load.
            resident: keys of all that is in memory now; None: these alone.
        """
        with self._lock:
            now = (weights.key,) if resident is None else resident
            known = {**self._loaded, weights.key: weights}
            self._loaded = {key: known[key] for key in now if key in known}
            seconds = self._live.load_finished(weights, bits, now, downloaded=downloaded)
            key = self._live.state.work.load_key(weights)
        log.info("%s is ready%s", weights.key, "" if seconds is None else f" after {seconds:.1f} s")
        if seconds is None:
            return
        with suppress(StorageUnavailable), self._troubles.noting_storage():
            self._store.timings.keep_load(key, seconds)

    def now_resident(self, resident: Sequence[str]) -> None:
        """Weights were unloaded, or could not be loaded: this is in memory, the latest first."""
        with self._lock:
            self._live.now_resident(resident)

    def load_failed(self, message: str, *, fatal: bool) -> None:
        """Weights cannot be loaded.

        Args:
            fatal: the server ends; else only what needs them fails.
        """
        with self._lock:
            self._troubles.load_failed = fatal
            self._troubles.last_error = message

    def next_load_order(self) -> Weights | None:
        """What the operator wants loaded, the first that was ordered; it is ordered no more."""
        with self._lock:
            ordered = self._next_load_order()
            if ordered:
                self._load_orders.remove(ordered)
            return ordered

    def claim(self, timeout_s: float | None = None) -> Task | None:
        """The next task to run, now running; waits for one. None: time is up, a load was ordered,
        or stop() came."""
        with self._lock:
            self._wake_worker.wait_for(
                lambda: self.stopping or self._live.first() or self._next_load_order(), timeout_s
            )
            if self._next_load_order():
                return None
        with self._writing:
            task = self._live.first()
            if self.stopping or task is None:
                return None
            started_at = self._now()
            with self._troubles.accepting():  # else its picture could not be stored
                self._store.claim(task.task_id, started_at=started_at)
            with self._lock:
                self._live.start(task, started_at=started_at)
            self.events.publish(EventKind.RUNNING, task.task_id)
            log.info(
                "task %s is running: %s, %d x %d, %d steps",
                task.task_id,
                task.stages[0].weights.key,
                task.params.width,
                task.params.height,
                task.params.steps_run,
            )
            return task

    def inputs_of(self, task_id: str) -> Path:
        """The folder with the pictures that a task starts from."""
        return self._store.inputs_of(task_id)

    def next_image(self, task_id: str, stage: int, index: int) -> bool:
        """The running task has the image before, and turns to this one of a stage.

        Returns:
            Whether it shall go on, as report() does.
        """
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                self._live.gpu_is_free()
                return False
            self._live.next_image(task, stage, index)
            self.events.publish(EventKind.IMAGE, task_id)
            return self._may_go_on(task)

    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool:
        """The running task has reached a phase or ended a step, at this moment.

        Returns:
            Whether it shall go on; False: it was cancelled, or the server stops.
        """
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                self._live.gpu_is_free()
                return False
            self._live.report(task, phase, steps_done, steps_total)
            self.events.publish(EventKind.STEP, task_id)
            return self._may_go_on(task)

    def preview_made(self, task_id: str) -> None:
        """There is a newer picture so far of a running task."""
        with self._lock:
            if self._live.get_running(task_id):
                self.events.publish(EventKind.PREVIEW, task_id)

    def finish(
        self,
        task_id: str,
        images: Sequence[bytes],
        *,
        image_encoding_s: Sequence[float] | None = None,
    ) -> bool:
        """The images are encoded: the task is done, and its timings are learned.

        Args:
            image_encoding_s: seconds that encoding each took; None: since decoding ended.
        """
        # Not under _writing: syncing an image takes milliseconds, for which the worker would wait
        # with its next claim. The store's own guard decides against a cancel at the same moment.
        with self._lock:
            task = self._live.get_running(task_id)
            if task is None:
                return False
            samples = self._live.measured(task)
            learns = not self._live.was_interrupted(task)
        if image_encoding_s is not None:
            drawn, encoded = samples[: -len(images)], samples[-len(images) :]
            samples = drawn + [
                (work, replace(measured, image_encoding_s=seconds))
                for (work, measured), seconds in zip(encoded, image_encoding_s, strict=True)
            ]
        with self._troubles.noting_storage():
            done = self._store.finish(
                task_id,
                images,
                ended_at=self._now(),
                kept_since=self.keep_clock(),
                samples=samples,
                learns=learns,
            )
        if not done:
            return False
        with self._lock:
            for work, measured in samples if learns else ():
                self._live.state.timing.learn(work, measured)
            outcome = self._live.finish(task)
        self._kept.added(sum(map(len, images)))
        self._store.discard_inputs(task_id)
        self.events.publish(EventKind.DONE, task_id)
        log.info("task %s is done", task_id)
        if outcome is not None:
            with suppress(StorageUnavailable):  # the task is done all the same
                self._store.timings.keep_outcome(outcome)
        self.prune()
        return True

    def left(self, task_id: str) -> None:
        """The worker has nothing more to do with this task: if it has ended, its pictures go."""
        with self._lock:
            ended = task_id not in self._live
        if ended:
            self._store.discard_inputs(task_id)

    def fail(self, task_id: str, code: str, message: str) -> bool:
        with self._writing, self._troubles.noting_storage():
            task = self._live.get_running(task_id)
            if task is None:
                with self._lock:
                    self._live.gpu_is_free()
                return False
            self._fail(task, code, message)
            return True

    def release(self, task_id: str, *, count_attempt: bool = False) -> bool:
        """The worker left the running task: it waits again, first of its level.

        Args:
            count_attempt: the task may have been at fault; after MAX_ATTEMPTS it is failed.
        """
        with self._writing, self._troubles.noting_storage():
            task = self._live.get_running(task_id)
            if task is None:
                with self._lock:
                    self._live.gpu_is_free()
                return False
            if count_attempt and task.attempts >= MAX_ATTEMPTS:
                self._fail(task, *ENDED_TOO_OFTEN)
                return True
            if not self._store.release(task_id, count_attempt=count_attempt):
                return False  # it has finished, this moment
            with self._lock:
                task.attempts -= 0 if count_attempt else 1
                self._live.put_back(task)
                self._wake_worker.notify_all()
            self.events.publish(EventKind.WAITING, task_id)
            log.info("task %s waits again", task_id)
            return True

    def release_running(self) -> None:
        """Whatever still runs waits again: the process ends now, and at its own wish."""
        for task in reversed(self._live.running):
            self.release(task.task_id)

    # -- downloads ------------------------------------------------------------------------------

    def next_download(self) -> Weights | None:
        """Weights that somebody waits for; waits until there are some. None: stop() came."""
        held = self._live.state.held
        with self._lock:
            self._wake_downloads.wait_for(lambda: self.stopping or held.next_missing())
            return None if self.stopping else held.next_missing()

    def download_began(self, weights: Weights, bytes_before: int) -> None:
        """Args:
        bytes_before: what an earlier download has left on disk.
        """
        with self._lock:
            self._live.state.held.begin(weights, bytes_before)

    def download_progress(self, weights: Weights, bytes_done: int) -> bool:
        """So many bytes of the weights are on disk. Returns whether somebody still wants them."""
        with self._lock:
            self._live.state.held.progress(bytes_done)
            return self._live.state.held.wants(weights.model)

    def download_left(self) -> None:
        """The download is over, and nothing was decided."""
        with self._lock:
            self._live.state.held.leave()

    def download_failed(self, weights: Weights, message: str) -> None:
        """Weights cannot be had: the tasks that wait for them fail."""
        held, name = self._live.state.held, weights.model.name
        with self._writing, self._troubles.noting_storage():
            for task in held.needing(weights.model):
                self._fail(task, ModelLoadError.code, message)
            with self._lock:
                self._troubles.last_error = message
                self._load_orders = [o for o in self._load_orders if o.model.name != name]
                held.fail(weights.model, message)

    def download_ended(self, weights: Weights) -> None:
        """Weights are on this machine: the tasks that waited for them join the line."""
        with self._writing, self._lock:
            self._here.add(weights.model.name)
            ready = self._live.download_ended(weights)
            self._wake_worker.notify_all()
        log.info("the weights of %s are here", weights.model.name)
        for task in ready:
            self.events.publish(EventKind.WAITING, task.task_id)

    # -- inside, under _lock ----------------------------------------------------------------------

    def _may_go_on(self, task: Task) -> bool:
        if self._drain_until is None:
            return True
        return self._monotonic() + self._live.state.gpu_remaining_s(task) <= self._drain_until

    def _next_load_order(self) -> Weights | None:
        return next((w for w in self._load_orders if w.model.name in self._here), None)
