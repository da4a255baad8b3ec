"""The calls of the thread that lets prompts be written."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from copy import copy

from errors import ServerError, StorageUnavailable
from scheduler.downloads import EXPANSION_KEY
from scheduler.events import EventKind
from scheduler.scheduler import Scheduler
from task import Task

log = logging.getLogger(__name__)


class ExpansionApi:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._downloads = scheduler.downloads

    def next_expansion(self) -> tuple[Task, float] | None:
        """Waits for a task whose prompts are to be written; returns it and the seconds that this
        may take. None: the server is stopping."""
        scheduler = self._scheduler
        with scheduler.lock:
            scheduler.wake_downloads.wait_for(
                lambda: scheduler.stopping or self._downloads.has_unwritten
            )
            if scheduler.stopping:
                return None
            task, timeout_s = self._downloads.begin_expansion()
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
                if task is None or not task.waits_for_prompt:
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
                task.waits_for_prompt = False
                self._downloads.expansion_s = seconds or self._downloads.expansion_s
                if self._downloads.written(task):
                    scheduler.join(task, scheduler.place(task))
                    scheduler.set_baseline(task)
        scheduler.events.publish(EventKind.WAITING, task_id)
        if seconds is not None:
            with suppress(StorageUnavailable), scheduler.health.noting_storage():
                scheduler.store.timings.keep_load(EXPANSION_KEY, seconds)
