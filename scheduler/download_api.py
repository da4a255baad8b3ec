"""The calls of the download thread."""

import logging

from errors import ModelLoadError
from models.hub_cache import as_stored
from models.model_catalog import LoadSpec
from scheduler.events import EventKind
from scheduler.health import Cause
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)


class DownloadApi:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._downloads = scheduler.downloads

    def next_download(self) -> LoadSpec | None:
        """Waits for weights to download and returns them. None: the server is stopping."""
        scheduler, downloads = self._scheduler, self._downloads
        with scheduler.lock:
            scheduler.wake_downloads.wait_for(
                lambda: scheduler.stopping or downloads.next_missing()
            )
            return None if scheduler.stopping else downloads.next_missing()

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
            wanted = self._downloads.wants(spec.model)
        if total and bytes_done * 10 // total > tenths_before:
            done, much = bytes_done / 1e9, total / 1e9
            log.info("the weights of %s: %.1f of about %.1f GB", spec.model.name, done, much)
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
                needing = self._downloads.needing(spec.model)
            for task in needing:
                scheduler.fail(task, ModelLoadError.code, message)
            with scheduler.lock:
                scheduler.health.failed(Cause.DOWNLOAD, message)
                scheduler.load_orders = [o for o in scheduler.load_orders if o.model.name != name]
                self._downloads.fail(spec.model, message)
                scheduler.wake_worker.notify_all()  # it may wait for the weights of the start

    def download_ended(self, spec: LoadSpec) -> None:
        """These weights are on this machine: the tasks that waited for them join the schedule."""
        scheduler = self._scheduler
        as_stored(spec.model)  # reads the disk: not under the lock
        with scheduler.changes, scheduler.lock:
            ready = scheduler.downloaded(spec)
        scheduler.health.succeeded(Cause.DOWNLOAD)
        log.info("the weights of %s are downloaded", spec.model.name)
        for task in ready:
            scheduler.events.publish(EventKind.WAITING, task.task_id)
