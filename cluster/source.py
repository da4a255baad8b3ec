"""The source of tasks of a worker on another machine than the head: its verbs travel.

The head sends offers; claim() takes the next one and says so. report() goes out without waiting for
an answer: the head sends a Stop for a task that is not wanted any more, and the next report stops
it. An image, a failure or a release waits until the head has answered.
"""

import logging
import re
import shutil
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Condition
from typing import Any

from cachetools import FIFOCache
from pydantic import ValidationError

from allowed import Allowed
from cluster.carrier import Carrier, CarrierUnavailable, new_key
from cluster.messages import (
    FROM_HEAD,
    MOST_IMAGE_BYTES,
    PROTOCOL,
    Answer,
    Decline,
    Ended,
    Goodbye,
    Heartbeat,
    Held,
    Image,
    Load,
    Loading,
    MeasuredStage,
    Offer,
    Preview,
    Refused,
    Registration,
    Reported,
    Residents,
    Spec,
    Stop,
    Watch,
)
from cluster.outbox import Outbox
from errors import InvalidInput, ServerError
from models.model_catalog import LoadSpec, Model
from task import Encoded, GenerationParams, Memory, Phase, Progress, Task, TaskStatus, Verdict

log = logging.getLogger(__name__)

STOPS_KEPT = 100
UNANSWERED = 5
"""A worker is deaf after so many heartbeats without an answer."""
DEAF_S = 30.0
"""So long it is deaf before it connects to the broker again."""
_FILE = re.compile(r"[0-9a-f]{16}")


class RemoteSource:
    """The TaskSource of a worker; also the thread of the carrier calls it, with messages.

    Args:
        worker: the id of this machine.
        allowed: what this worker may load. What the head sends is looked up in it.
        registration: what this worker says about itself.
        resident: keys of the weights in memory now.
        downloaded: bytes of these weights on disk; None: all of them are there.
        folder: for input pictures.
        refused: called with a sentence when the head does not take this worker.
        watched: called with the id of a task whose preview somebody looks at.
    """

    def __init__(
        self,
        worker: str,
        carrier: Carrier,
        allowed: Allowed,
        *,
        registration: Callable[[], Registration],
        resident: Callable[[], Sequence[str]],
        downloaded: Callable[[Model], int | None] = lambda model: None,
        folder: Path,
        refused: Callable[[str], None],
        watched: Callable[[str], object] = lambda task_id: None,
    ) -> None:
        self._worker, self._session = worker, new_key()
        self._carrier = carrier
        self._allowed = allowed
        self._registration = registration
        self._resident, self._downloaded = resident, downloaded
        self._folder = folder
        self._refused = refused
        self._watched = watched
        self._changed = Condition()
        self._offers: list[Task] = []
        self._loading: LoadSpec | None = None
        self._ordered: LoadSpec | None = None
        self._waiting = False
        """Whether the worker thread waits for a task."""
        self._held: dict[str, int] = {}
        """By task, the attempt that this worker has: offered, or begun and not ended yet."""
        self._stops = FIFOCache[tuple[str, int], None](STOPS_KEPT)
        """Attempts that are not wanted any more, the latest last."""
        self._stop_at: float | None = None
        self._unanswered: list[float] = []
        """Monotonic seconds of the heartbeats since it has heard of the head."""
        self.outbox = Outbox(
            carrier, self._heartbeat, head_changed=self._head_changed, refused=refused
        )
        self.first_spec = allowed.first_spec

    # -- the thread of the carrier ----------------------------------------------------------------

    def handle(self, content: object) -> None:
        """A message of the head has come."""
        try:
            message = FROM_HEAD.validate_python(content)
        except ValidationError as error:
            log.warning("a message of the head is not understood: %s", error)
            return
        if message.session != self._session:  # to an earlier process
            return
        self._unanswered = []
        match message:
            case Offer():
                self._offered(message)
            case Stop():
                self._stop(message.task_id, message.attempt)
            case Answer():
                self.outbox.answered(message)
            case Watch():
                self._watched(message.task_id)
            case Load():
                with self._changed:
                    self._ordered = message.spec.among(self._allowed)
                    self._changed.notify_all()
            case Refused():
                self._refused(message.sentence)

    def _offered(self, offer: Offer) -> None:
        try:
            task = self._task_of(offer)
            self._fetch_inputs(offer)
        except (ServerError, ValidationError) as error:
            reason = error.message if isinstance(error, ServerError) else "The task is malformed."
            log.warning("task %s is declined: %s", offer.task_id, reason)
            self._send(Decline, task_id=offer.task_id, attempt=offer.attempt, reason=reason)
            return
        except (CarrierUnavailable, LookupError, OSError) as error:
            log.warning("the pictures of task %s did not come: %s", offer.task_id, error)
            return  # it is not held, so the head offers it again
        with self._changed:
            self._stops.pop((task.task_id, task.attempt), None)  # it was taken back before
            if self._held.get(task.task_id) != task.attempt:  # else it is being drawn
                self._offers.append(task)
                self._held[task.task_id] = task.attempt
                self._changed.notify_all()

    def _task_of(self, offer: Offer) -> Task:
        """Raises: ServerError: this worker does not allow what the task needs."""
        params = GenerationParams.model_validate(offer.params)
        if any(not _FILE.fullmatch(picture.file) for picture in params.inputs):
            raise InvalidInput("The name of a picture is not one.")
        self._allowed.bits(params.quantize)
        stages = self._allowed.stages(params, offer.images_done)
        task = Task(
            task_id=offer.task_id,
            params=params,
            priority=0,
            created_at=time.time(),
            status=TaskStatus.RUNNING,
            attempt=offer.attempt,
            image_sizes=(0,) * offer.images_done,
            stages=stages,
        )
        task.progress = Progress(
            Phase.TEXT_ENCODING, steps_total=params.steps_run, image=task.images_done
        )
        return task

    def _fetch_inputs(self, offer: Offer) -> None:
        folder = self.inputs_of(offer.task_id)
        folder.mkdir(parents=True, exist_ok=True)
        for file, key in offer.inputs.items():
            content = self._carrier.get(key)
            if content is None or len(content) > MOST_IMAGE_BYTES:
                raise LookupError("the broker does not have it")
            (folder / f"{file}.png").write_bytes(content)
        self._carrier.drop(*offer.inputs.values())

    def _stop(self, task_id: str, attempt: int) -> None:
        with self._changed:
            self._stops[task_id, attempt] = None
            before = len(self._offers)
            self._offers = [t for t in self._offers if (t.task_id, t.attempt) != (task_id, attempt)]
            if len(self._offers) < before:
                self._drop(task_id, attempt)
                log.info("task %s is taken back", task_id)

    # -- the worker -------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        return self._stop_at is not None

    @property
    def has_work(self) -> bool:
        return self.stopping or bool(self._offers or self._ordered)

    def copies_saved(self) -> None:
        pass

    def load_started(self, spec: LoadSpec) -> None:
        self._loading = spec
        self._send(Loading, spec=Spec.of(spec), done=False)

    def load_reported(self, share: float) -> bool:
        if self._loading and share > 0.0:
            spec = Spec.of(self._loading)
            self._send(Loading, spec=spec, done=False, share=min(share, 1.0))
        if self._stop_at is not None:
            return time.monotonic() < self._stop_at
        held = list(self._held.items())
        return not held or any(taken not in self._stops for taken in held)

    def load_finished(
        self,
        spec: LoadSpec,
        bits: int | None,
        resident: Sequence[str],
        *,
        learn: bool = True,
        memory: Memory | None = None,
    ) -> None:
        self._loading, memory = None, memory or Memory()
        self._send(
            Loading,
            spec=Spec.of(spec),
            done=True,
            bits=bits,
            resident=list(resident),
            learn=learn,
            room_bytes=memory.room_bytes,
            loaded_bytes=dict(memory.loaded_bytes),
        )

    def load_failed(self, message: str, resident: Sequence[str], *, fatal: bool) -> None:
        self._loading = None
        self._send(Residents, resident=list(resident), error=message)

    def now_resident(self, resident: Sequence[str]) -> None:
        self._loading = None
        self._send(Residents, resident=list(resident))

    def next_load_order(self) -> LoadSpec | None:
        ordered, self._ordered = self._ordered, None
        return ordered

    def claim(self, timeout_s: float | None = None) -> Task | None:
        with self._changed:
            self._waiting = True
            self._changed.wait_for(lambda: self.has_work, timeout_s)
            self._waiting = False
            if self.stopping or not self._offers:
                return None
            task = self._offers.pop(0)
        if task.progress:
            self.report(task.task_id, task.attempt, task.progress)
        return task

    def claim_preempting(self, task_id: str, attempt: int) -> Task | None:
        return None

    def inputs_of(self, task_id: str) -> Path:
        return self._folder / task_id

    def report(self, task_id: str, attempt: int, progress: Progress) -> Verdict:
        if (task_id, attempt) in self._stops:
            return Verdict.STOP
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            return Verdict.STOP
        self._send(
            Reported,
            task_id=task_id,
            attempt=attempt,
            phase=progress.phase,
            steps_done=progress.steps_done,
            steps_total=progress.steps_total,
            stage=progress.stage,
            image=progress.image,
        )
        return Verdict.CONTINUE

    def store_image(self, task_id: str, attempt: int, encoded: Encoded) -> bool:
        measured = [MeasuredStage.of(*one) for one in encoded.measured]
        picture: dict[str, Any] = {"index": encoded.index, "image": new_key(), "measured": measured}
        return self._ask(Image, task_id, attempt, encoded.image, **picture)

    def finish(self, task_id: str, attempt: int, encoded: Encoded) -> bool:
        stored = self.store_image(task_id, attempt, encoded)
        self._drop(task_id, attempt)
        return stored

    def fail(self, task_id: str, attempt: int, code: str, message: str) -> bool:
        return self._end(task_id, attempt, code=code, message=message)

    def release(self, task_id: str, attempt: int, *, interrupted: bool = False) -> bool:
        return self._end(task_id, attempt, interrupted=interrupted)

    def left(self, task_id: str) -> None:
        if task_id not in self._held:
            shutil.rmtree(self.inputs_of(task_id), ignore_errors=True)

    def prune(self) -> None:
        pass

    def stop(self, drain_s: float = 0.0) -> None:
        with self._changed:
            self._stop_at = time.monotonic() + drain_s
            self._changed.notify_all()
        self.outbox.leave()

    def close(self, timeout_s: float) -> None:
        """Say goodbye, which gives back what was offered."""
        self._send(Goodbye)
        self.outbox.stop(timeout_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    def preview_made(self, task_id: str, jpeg: bytes | None) -> None:
        """There is a newer preview of a running task."""
        attempt = self._held.get(task_id)
        if jpeg and attempt:
            content = b64encode(jpeg).decode()
            self._send(Preview, task_id=task_id, attempt=attempt, jpeg=content)

    # -- private ----------------------------------------------------------------------------------

    def _end(self, task_id: str, attempt: int, **how: Any) -> bool:
        ended = self._ask(Ended, task_id, attempt, **how)
        self._drop(task_id, attempt)
        return ended

    def _ask(
        self,
        kind: Callable[..., Image | Ended],
        task_id: str,
        attempt: int,
        picture: bytes | None = None,
        **content: object,
    ) -> bool:
        ids = {"worker": self._worker, "session": self._session, "request": new_key()}
        message = kind(**ids, task_id=task_id, attempt=attempt, **content)
        return self.outbox.ask(message, picture)

    def _drop(self, task_id: str, attempt: int) -> None:
        """A task is not held any more."""
        with self._changed:
            if self._held.get(task_id) == attempt:
                del self._held[task_id]
        self.left(task_id)

    def _send(self, kind: Callable[..., object], **content: object) -> None:
        message = kind(worker=self._worker, session=self._session, **content)
        self.outbox.put(message)  # type: ignore[arg-type]

    def _heartbeat(self) -> Heartbeat:
        with self._changed:
            held = [Held(task_id=task_id, attempt=n) for task_id, n in self._held.items()]
        loading, unanswered = self._loading, [*self._unanswered, time.monotonic()]
        is_deaf = len(unanswered) > UNANSWERED
        if is_deaf and unanswered[-1] - unanswered[0] > DEAF_S:
            log.warning("nothing of the head has come for %.0f s: connecting again", DEAF_S)
            self._carrier.reconnect()
            unanswered = unanswered[-1:] * UNANSWERED
        self._unanswered = unanswered
        return Heartbeat(
            worker=self._worker,
            session=self._session,
            protocol=PROTOCOL,
            registration=self._registration(),
            resident=list(self._resident()),
            held=held,
            waiting=self._waiting,
            deaf=is_deaf,
            downloaded_bytes=self._downloaded(loading.model) if loading else None,
            stopping=self.stopping,
        )

    def _head_changed(self) -> None:
        """Another head knows none of the offers of the one before."""
        with self._changed:
            offers, self._offers = self._offers, []
        for task in offers:
            self._drop(task.task_id, task.attempt)
