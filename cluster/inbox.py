"""What workers say to the head: each message becomes a call of the WorkerApi of their machine.

Messages are not trusted: they are parsed, and refer only to what the head has given to this worker
or allows itself. One that cannot be handled is logged, and changes nothing.
"""

import logging
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from cluster.carrier import Carrier, CarrierUnavailable
from cluster.messages import (
    MOST_IMAGE_BYTES,
    PROTOCOL,
    TO_HEAD,
    Answer,
    Decline,
    Ended,
    Goodbye,
    Heard,
    Heartbeat,
    Image,
    Loading,
    Message,
    Preview,
    Refused,
    Reported,
    Residents,
    Stop,
)
from cluster.registry import Registry
from cluster.remote_machine import RemoteMachine
from errors import StorageUnavailable
from images import format_of
from scheduler.scheduler import Scheduler
from supervision import SupervisedQueue
from task import Encoded, Progress, Verdict

log = logging.getLogger(__name__)


class Inbox:
    """The thread "cluster" calls handle(). Owns the thread "cluster-store", which waits for the
    disk.

    Args:
        preview_came: called with the id of a task and its newest preview (JPEG).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        registry: Registry,
        carrier: Carrier,
        preview_came: Callable[[str, bytes], None],
    ) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._carrier = carrier
        self._preview_came = preview_came
        self._ends = SupervisedQueue[tuple[RemoteMachine, Image | Ended | Goodbye]](
            "cluster-store", self._answer, lambda lost: None
        )

    def stop(self, timeout_s: float) -> bool:
        return self._ends.stop(timeout_s)

    def handle(self, content: Any) -> None:
        """A message has come."""
        try:
            self._handle(content)
        except ValidationError as error:
            log.warning("a message of a worker is not understood: %s", error)
        except (CarrierUnavailable, StorageUnavailable) as error:
            log.warning("%s", error)  # the worker or the next heartbeat repeats it
        except Exception:
            log.exception("a message of a worker could not be handled")

    def _handle(self, content: Any) -> None:
        if isinstance(content, dict) and content.get("kind") == "heartbeat":
            protocol = content.get("protocol")
            if protocol != PROTOCOL:
                sentence = (
                    f"The head speaks version {PROTOCOL} of the protocol, this worker version "
                    f"{protocol!r:.20}: install the same version of mflux-server on both."
                )
                self._refuse(str(content.get("worker")), str(content.get("session")), sentence)
                return
        message = TO_HEAD.validate_python(content)
        if isinstance(message, Heartbeat):
            if reason := self._registry.heard(message):
                self._refuse(message.worker, message.session, reason)
            else:
                self._carrier.send(message.worker, Heard(session=message.session).model_dump())
            return
        remote = self._registry.find(message.worker, message.session)
        if remote is None:
            return
        match message:
            case Reported():
                self._reported(remote, message)
            case Image() | Ended() | Goodbye():  # in this order
                self._ends.put((remote, message))
            case Loading():
                self._loading(remote, message)
            case Residents():
                self._resident(remote, message)
            case Preview():
                self._preview(remote, message)
            case Decline():
                self._declined(remote, message)

    def _reported(self, remote: RemoteMachine, message: Reported) -> None:
        task_id, attempt = message.task_id, message.attempt
        verdict = Verdict.STOP
        if self._begun(remote, task_id, attempt):
            run = remote.machine.runs.get(task_id)
            if run is None or not _is_within(message.progress, run.task.stages, run.task.params):
                return
            verdict = remote.api.report(task_id, attempt, message.progress)
        if verdict is Verdict.STOP:
            self._send(remote, Stop(session=remote.session, task_id=task_id, attempt=attempt))

    def _begun(self, remote: RemoteMachine, task_id: str, attempt: int) -> bool:
        """Whether this attempt runs there; one that was offered is claimed now."""
        with self._scheduler.lock:
            offered = remote.is_offered(task_id, attempt)
            remote.beginning |= offered
        if offered:
            try:
                remote.api.claim_offered(task_id, attempt)
                with self._scheduler.lock:
                    if remote.is_offered(task_id, attempt):
                        remote.offer(None, 0.0)
            finally:
                with self._scheduler.lock:
                    remote.beginning = False
                    self._scheduler.wake_worker.notify_all()
        with self._scheduler.lock:
            return remote.wants(task_id, attempt)

    def _answer(self, item: tuple[RemoteMachine, Image | Ended | Goodbye]) -> None:
        remote, message = item
        if isinstance(message, Goodbye):
            with suppress(StorageUnavailable, CarrierUnavailable):  # else the dispatcher loses it
                self._registry.lose(remote, "it has ended", interrupted=False)
                self._carrier.forget(remote.worker)
            return
        accepted, retry = False, None
        try:
            if self._begun(remote, message.task_id, message.attempt):
                accepted = self._ended(remote, message)
        except StorageUnavailable as error:
            retry = error.message
        except LookupError:
            return  # the picture has not come: the worker sends it again
        except CarrierUnavailable as error:
            log.warning("a picture could not be taken from the broker: %s", error)
            return
        if isinstance(message, Image):  # if it is sent again, then with its picture
            with suppress(CarrierUnavailable):
                self._carrier.drop(message.image)
        answer = Answer(
            session=remote.session, request=message.request, accepted=accepted, retry=retry
        )
        self._send(remote, answer)

    def _ended(self, remote: RemoteMachine, message: Image | Ended) -> bool:
        """Raises: LookupError: its picture is not there."""
        task_id, attempt, api = message.task_id, message.attempt, remote.api
        if isinstance(message, Ended):
            if message.code is not None:
                return api.fail(task_id, attempt, message.code[:100], message.message[:1000])
            return api.release(task_id, attempt, interrupted=message.interrupted)
        with self._scheduler.lock:
            run = remote.machine.runs.get(task_id)
            if run is None:
                return False
            params, stages = run.task.params, len(run.task.stages)
        measured = tuple((m.stage, m.measured) for m in message.measured if m.stage < stages)
        content = self._carrier.get(message.image)
        if content is None:
            raise LookupError
        if len(content) > MOST_IMAGE_BYTES or format_of(content) != params.format:
            return api.fail(task_id, attempt, "task_failed", "The worker sent no picture.")
        encoded = Encoded(content, message.index, measured)
        is_last = message.index == params.count - 1
        return (api.finish if is_last else api.store_image)(task_id, attempt, encoded)

    def _loading(self, remote: RemoteMachine, message: Loading) -> None:
        remote.weights_changed = True
        spec = message.spec.among(self._scheduler.allowed)
        if spec is None:  # a model that only the worker allows
            return
        if not message.done:
            if message.share > 0.0:
                remote.api.load_reported(message.share)
            else:
                remote.api.load_started(spec)
            return
        remote.api.load_finished(
            spec, message.bits, message.resident, learn=message.learn, memory=message.memory
        )

    def _resident(self, remote: RemoteMachine, message: Residents) -> None:
        remote.weights_changed = True
        if message.error is None:
            remote.api.now_resident(message.resident)
            return
        with self._scheduler.lock:
            remote.machine.last_error = message.error[:500]
            del remote.machine.load_orders[:1]
        remote.api.load_failed(
            f"{remote.name}: {message.error[:500]}", message.resident, fatal=False
        )

    def _preview(self, remote: RemoteMachine, message: Preview) -> None:
        jpeg = b64decode(message.jpeg, validate=True)
        with self._scheduler.lock:
            run = remote.machine.runs.get(message.task_id)
            runs = run is not None and run.task.attempt == message.attempt
        if runs and format_of(jpeg) == "JPEG":
            self._preview_came(message.task_id, jpeg)

    def _declined(self, remote: RemoteMachine, message: Decline) -> None:
        with self._scheduler.lock:
            if remote.is_offered(message.task_id, message.attempt):
                remote.decline(message.task_id, message.reason[:500])
            self._scheduler.wake_worker.notify_all()
        log.warning("machine %s declines task %s: %s", remote.name, message.task_id, message.reason)

    def _refuse(self, worker: str, session: str, sentence: str) -> None:
        log.warning("a worker is refused: %s", sentence)
        self._carrier.send(worker, Refused(session=session, sentence=sentence).model_dump())

    def _send(self, remote: RemoteMachine, message: Message) -> None:
        try:
            self._carrier.send(remote.worker, message.model_dump(mode="json"))
        except CarrierUnavailable as error:
            log.warning("an answer could not be sent: %s", error)  # it will be asked again


def _is_within(progress: Progress, stages: Any, params: Any) -> bool:
    """Whether there are such a stage and such an image."""
    return progress.stage < len(stages) and progress.image < params.count
