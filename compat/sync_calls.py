"""Calls that answer with the finished image: a task and a caller that waits for it."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import ceil
from threading import Event, Lock
from types import TracebackType
from typing import Any

from cachetools import LRUCache

from api.client_queue import ClientQueue, OwnQueue
from api.generate_request import check_request
from api.image_api import note_fetched
from api.submission import Prepared, Submission, check_same
from api.waiting_places import RETRY_AFTER_S, WaitingPlaces
from decoding.protocol import Meaning
from errors import (
    BodyTooLarge,
    ClientLimit,
    DoesNotFit,
    Gone,
    InputsFull,
    InputsTooLarge,
    InvalidInput,
    KeyReused,
    ModelNotAllowed,
    NotSupported,
    NoWorker,
    QueueFull,
    ServerError,
    StorageUnavailable,
    TaskFailed,
    TooManyWaiting,
    UnsupportedMediaType,
)
from models.model_catalog import Catalog, Model
from task import GenerationParams, Task, TaskStatus

log = logging.getLogger(__name__)

MOST_CANCELLED = 1000
"""Number of cancelled tasks that are remembered for callers that submit the same key."""
LOOK_S = 1.0
"""Seconds without an event after which the connection of the caller is checked."""
KEY = "Idempotency-Key"
NO_OTHER_NAMES: Mapping[str, str] = {}
CLAMPED_TO = 2
"""Steps are limited to so many times the default of the model."""
DRAWING_ERRORS = (
    InvalidInput,
    BodyTooLarge,
    UnsupportedMediaType,
    ModelNotAllowed,
    NotSupported,
    KeyReused,
    DoesNotFit,
    Gone,
    QueueFull,
    ClientLimit,
    InputsFull,
    InputsTooLarge,
    TooManyWaiting,
    TaskFailed,
    StorageUnavailable,
    NoWorker,
)
"""Errors of such a call."""


@dataclass(frozen=True)
class Finished:
    images: list[bytes]
    params: GenerationParams


class SyncCalls:
    """The calls that the foreign APIs share. Thread-safe.

    Args:
        max_wait_s: longest forecast wait with which a call is taken; 0: no limit.
        clamp: whether steps and CFG are limited to what suits the model.
    """

    def __init__(
        self,
        own_queue: OwnQueue,
        submission: Submission,
        catalog: Catalog,
        places: WaitingPlaces,
        *,
        max_wait_s: float = 280.0,
        clamp: bool = True,
    ) -> None:
        self.own_queue = own_queue
        self.allowed = submission.allowed
        self.limits = submission.limits
        self.catalog = catalog
        self.clamp = clamp
        self._submission = submission
        self.room_for_the_body = submission.room_for_the_body
        self.decoder = submission.decoder
        self.places = places
        self._max_wait_s = max_wait_s
        self._lock = Lock()
        self._callers: Counter[str] = Counter()
        """Number of waiting callers by task_id."""
        self._cancelled: LRUCache[str, Event] = LRUCache(MOST_CANCELLED)
        """Tasks whose last caller has left, by task_id; the event is set when they have ended."""

    def known_name(self, name: str | None) -> str | None:
        """The name of a model if there is one of it, allowed or not; None: the default is meant.
        Apps that know Ollama append `:latest`."""
        name = name.removesuffix(":latest") if name else None
        if name and (Catalog(self.allowed.models).find(name) or self.catalog.find(name)):
            return name
        return None

    def steps(self, model: Model, asked: int | None) -> int | None:
        if asked is None or not self.clamp:
            return asked
        return min(asked, model.default_steps * CLAMPED_TO, self.limits.max_steps)

    def prepare(
        self,
        fields: dict[str, Any],
        names: Mapping[str, str] = NO_OTHER_NAMES,
        *,
        mask_meaning: Meaning = Meaning.MASK,
        invert_mask: bool = False,
        empty_prompt: bool = False,
    ) -> Prepared:
        """From the fields of /generate, those that are None left out.

        Args:
            names: what errors call our fields, if they have another name in the foreign API.
            mask_meaning, invert_mask, empty_prompt: as for Submission.prepare.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            asked = check_request(given, self.limits)
            return self._submission.prepare(
                asked,
                mask_meaning=mask_meaning,
                invert_mask=invert_mask,
                empty_prompt=empty_prompt,
            )
        except ServerError as error:
            error.field = names.get(error.field or "", error.field)
            raise

    def start(
        self,
        prepared: Prepared,
        *,
        priority: int = 0,
        end_user: str = "",
        client_key: str | None = None,
        hung_up: Callable[[], bool],
    ) -> "Call":
        """Put the task into the queue. Close the call when it is over.

        Raises:
            QueueFull: its caller would wait longer than such callers can.
            KeyReused: the client_key came before with another request.
        """
        with ExitStack() as until_closed:
            full = QueueFull(
                f"Too many callers wait here for their pictures: try again in {RETRY_AFTER_S} s, "
                "or use POST /generate, which does not wait.",
                retry_after_s=RETRY_AFTER_S,
            )
            until_closed.enter_context(self.places.place(full))
            queue = self.own_queue().for_user(end_user)
            known = queue.submitted_as(client_key) if client_key else None
            if known:
                check_same(known[0].params, prepared.params, KEY)
            else:
                self._check_wait(queue, prepared.params, priority)
            after = queue.events.last_id
            task_id = self._submit(queue, prepared, priority, client_key)
            prepared.inputs.clear()
            until_closed.callback(self._leave, queue, task_id)
            return Call(
                queue,
                self.places,
                task_id,
                prepared.params,
                after,
                hung_up=hung_up,
                until_closed=until_closed.pop_all(),
            )

    def _submit(
        self, queue: ClientQueue, prepared: Prepared, priority: int, client_key: str | None
    ) -> str:
        """Submit, and count the caller; returns the task_id. A task of this key that is being
        cancelled, because its last caller has left, is not joined: its key is free afterwards."""
        while True:
            task, _ = queue.submit(
                prepared.params, priority=priority, client_key=client_key, inputs=prepared.inputs
            )
            check_same(task.params, prepared.params, KEY)
            with self._lock:
                cancelled = self._cancelled.get(task.task_id)
                if cancelled is None:
                    self._callers[task.task_id] += 1
                    return task.task_id
            cancelled.wait()

    def _check_wait(self, queue: ClientQueue, params: GenerationParams, priority: int) -> None:
        if self._max_wait_s <= 0:
            return
        wait, _ = queue.estimate(params, priority=priority)
        over_s = ceil(wait.end_s - self._max_wait_s)
        if over_s > 0:
            # A task would have its weights downloaded; this becomes none.
            if failure := queue.fetch_ahead(params):
                raise TaskFailed(failure)
            raise QueueFull(
                f"This would be ready in about {wait.end_s:.0f} s, and a call that waits may take "
                f"{self._max_wait_s:.0f} s: try again in {over_s} s, or use POST /generate, which "
                "does not wait.",
                retry_after_s=over_s,
            )

    def _leave(self, queue: ClientQueue, task_id: str) -> None:
        """A caller disconnects or is answered; the last one cancels a task that has not ended."""
        cancelled = Event()
        with self._lock:
            self._callers[task_id] -= 1
            if self._callers[task_id] > 0:
                return
            del self._callers[task_id]
            self._cancelled[task_id] = cancelled
        has_ended_it = False
        try:
            has_ended_it = self._cancel(queue, task_id)
        finally:
            if not has_ended_it:
                with self._lock:
                    self._cancelled.pop(task_id, None)
            cancelled.set()

    def _cancel(self, queue: ClientQueue, task_id: str) -> bool:
        """Returns False if the task had ended, or goes on: the server stops, the disk refuses."""
        with suppress(ServerError):
            if queue.status(task_id).ended or queue.events.closed:
                return False
            was = queue.delete(task_id, only_unfinished=True)
            if was in (TaskStatus.WAITING, TaskStatus.RUNNING):  # else it has ended just now
                log.info("task %s has no caller any more", task_id)
                return True
        return False


class Call:
    """A caller that waits for a task."""

    def __init__(
        self,
        queue: ClientQueue,
        places: WaitingPlaces,
        task_id: str,
        params: GenerationParams,
        after: int,
        *,
        hung_up: Callable[[], bool],
        until_closed: ExitStack,
    ) -> None:
        self.task_id = task_id
        self.params = params
        self._queue = queue
        self._places = places
        self._after = after
        self._hung_up = hung_up
        self._until_closed = until_closed

    def views(self) -> Iterator[Task]:
        """The task as it stands, whenever something has happened and at least each LOOK_S; ends
        with the task.

        Raises:
            Gone: the caller has disconnected, or the task was removed.
            NoWorker: the server stops; the task runs again after its next start.
        """
        while not (view := self._queue.status(self.task_id)).ended:
            yield view
            if self._hung_up():
                raise Gone("The caller has hung up.")
            if self._queue.events.closed:
                raise NoWorker("The server is stopping; the task goes on after its next start.")
            events = self._queue.events.wait(self._after, LOOK_S, (self.task_id,))
            if events:
                self._after = events[-1].id

    def result(self) -> Finished:
        """Waits until the task has ended.

        Raises:
            TaskFailed: it failed.
            Gone: it was cancelled before an image was stored.
        """
        for _ in self.views():
            pass
        self.ended()
        images, params = self._queue.all_images(self.task_id)
        return Finished(images, params)

    def ended(self) -> Task:
        """Waits until the task has ended and returns it.

        Raises:
            TaskFailed: it failed.
            Gone: it was cancelled before an image was stored.
        """
        task = self._queue.status(self.task_id)
        if task.status is TaskStatus.FAILED:
            raise TaskFailed(task.error)
        if not task.images_done:
            self.image(0)  # raises with the reason
        return task

    def image(self, index: int) -> bytes:
        """A stored image.

        Raises:
            Gone, NotReady, StorageUnavailable
        """
        return self._queue.image(self.task_id, index)[0]

    def fetched(self) -> None:
        """Marks the images as fetched."""
        note_fetched(self._queue, self._places, self.task_id)

    def at_close(self, callback: Callable[[], object]) -> None:
        """Call this first when the call is closed."""
        self._until_closed.callback(callback)

    def close(self) -> None:
        self._until_closed.close()

    def __enter__(self) -> "Call":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
