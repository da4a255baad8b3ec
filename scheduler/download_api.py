"""The calls of the threads that prepare tasks: downloads, and prompts that a chat model writes."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from copy import copy

from errors import ModelLoadError, ServerError, StorageUnavailable
from models.hub_cache import as_stored
from models.model_catalog import LoadSpec
from scheduler.health import Cause
from scheduler.pending import EXPANSION_KEY
from scheduler.scheduler import Scheduler
from task import Task

log = logging.getLogger(__name__)


class DownloadApi:
    """The thread of the downloads calls it, and the worker before it loads anything."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._downloads = scheduler.downloads
        self._pending = scheduler.pending

    def fetch_first(self) -> None:
        """Called by the worker: waits until the weights that the server starts with are on disk, or
        their download has failed. Then loading them fails, too, with the reason."""
        scheduler, spec = self._scheduler, self._scheduler.allowed.first_spec
        if not scheduler.machines.lack(spec.model):
            return
        with scheduler.lock:
            self._downloads.order(spec)
            scheduler.wake_downloads.notify_all()
            scheduler.wake_worker.wait_for(
                lambda: scheduler.stopping or not self._pending.wants(spec.model)
            )

    def next_download(self) -> LoadSpec | None:
        """Waits for weights to download and returns them. None: the server is stopping."""
        scheduler, pending = self._scheduler, self._pending
        with scheduler.lock:
            scheduler.wake_downloads.wait_for(lambda: scheduler.stopping or pending.next_missing())
            return None if scheduler.stopping else pending.next_missing()

    def download_began(self, spec: LoadSpec, bytes_before: int) -> None:
        """Args:
        bytes_before: what an earlier download has left on disk.
        """
        with self._scheduler.lock:
            self._downloads.begin(spec, bytes_before)

    def download_progress(self, spec: LoadSpec, bytes_done: int) -> bool:
        """This many bytes of the weights are on disk. Returns whether they are still wanted."""
        total = spec.model.download_bytes
        with self._scheduler.lock:
            before = self._downloads.current
            tenths_before = before.bytes_done * 10 // total if before and total else 0
            self._downloads.progress(bytes_done)
            wanted = self._pending.wants(spec.model)
        if total and bytes_done * 10 // total > tenths_before:
            done_gb, total_gb = bytes_done / 1e9, total / 1e9
            log.info("the weights of %s: %.1f of about %.1f GB", spec.model.name, done_gb, total_gb)
        return wanted

    def download_interrupted(self) -> None:
        """The download has ended without a result."""
        with self._scheduler.lock:
            self._downloads.interrupt()

    def download_failed(self, spec: LoadSpec, message: str) -> None:
        """These weights cannot be downloaded: the tasks that wait for them fail."""
        scheduler, name = self._scheduler, spec.model.name
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                needing = self._pending.needing(spec.model)
            for task in needing:
                scheduler.fail(task, ModelLoadError.code, message)
            with scheduler.lock:
                scheduler.health.failed(Cause.DOWNLOAD, message)
                orders = scheduler.machine.load_orders
                orders[:] = [spec for spec in orders if spec.model.name != name]
                self._downloads.fail(spec.model, message)
                scheduler.wake_worker.notify_all()  # it may wait for the weights of the start

    def download_ended(self, spec: LoadSpec) -> None:
        """These weights are on this machine: the tasks that waited for them join the schedule."""
        scheduler = self._scheduler
        as_stored(spec.model)  # reads the disk: not under the lock
        with scheduler.changes:
            scheduler.downloaded(spec)
        scheduler.health.succeeded(Cause.DOWNLOAD)
        log.info("the weights of %s are downloaded", spec.model.name)


class ExpansionApi:
    """The expander calls it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._pending = scheduler.pending

    def next_expansion(self) -> tuple[Task, float] | None:
        """Waits for a task whose prompts are to be written; returns it and the seconds that this
        may take. None: the server is stopping."""
        scheduler = self._scheduler
        with scheduler.lock:
            scheduler.wake_downloads.wait_for(
                lambda: scheduler.stopping or self._pending.has_unwritten
            )
            if scheduler.stopping:
                return None
            task, timeout_s = self._pending.begin_expansion()
            return copy(task), timeout_s

    def expanded(
        self, task_id: str, prompts: Sequence[str], *, failure: str | None, seconds: float | None
    ) -> None:
        """The prompts of a task are written: it joins the schedule, unless it lacks weights.

        Args:
            prompts: as many as the task has.
            failure: why some are as they were sent; None: all are written.
            seconds: that one prompt took; None: nothing is learned.

        Raises:
            StorageUnavailable: nothing has changed.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.health.noting_storage():
            with scheduler.lock:
                task = scheduler.get(task_id)
                if task is None or not self._pending.lacks_prompt(task_id):
                    return
                params = task.params
            update: dict[str, object] = {"expand": False, "prompt": prompts[0]}
            if params.prompts:
                update["prompts"] = tuple(prompts)
            if failure:
                sentence = f"The prompt was not expanded: {failure}. It is used as it was sent."
                update["warnings"] = (*params.warnings, sentence)
            params = params.model_copy(update=update)
            try:
                stages = scheduler.allowed.stages(params)
            except ServerError as error:
                scheduler.fail(task, error.code, error.message)
                return
            if not scheduler.store.rewrite(task, params):
                return
            with scheduler.lock:
                task.params, task.stages = params, stages
                self._pending.expansion_s = seconds or self._pending.expansion_s
                if self._pending.written(task):
                    scheduler.enter(task)
            scheduler.joined_late(task)
        if seconds is not None:
            with suppress(StorageUnavailable), scheduler.health.noting_storage():
                scheduler.store.timings.keep_load(EXPANSION_KEY, seconds)
