"""What a worker sends to the head, on a thread of its own: the GPU waits for no network.

Messages go out in order. While there is no head or no broker, messages that need no answer are
dropped, because the next heartbeat says what is still true; those that need one wait, and are sent
again each RESEND_S until they are answered.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

from cluster.carrier import Carrier, CarrierUnavailable
from cluster.messages import PROTOCOL, Answer, Ended, FromWorker, Image, Presence
from errors import StorageUnavailable
from supervision import SupervisedThread

log = logging.getLogger(__name__)

RESEND_S = 10.0
HEARTBEATS_IN_LEASE = 5
NO_HEAD_S = 1.0
"""Pause before it is checked again whether there is a head."""
MOST_WAITING = 1_000
"""Messages without an answer that may wait; the oldest are dropped."""


@dataclass(eq=False)
class _Request:
    message: Image | Ended
    content: bytes | None = None
    """The picture of the message."""
    sent_at: float = -RESEND_S
    answer: Answer | None = None


class Outbox:
    """Owns the thread "outbox".

    Args:
        heartbeat: makes the message that is sent every few seconds.
        head_changed: called when another head is there, or the same one after a restart.
        refused: called with a sentence when the head cannot take this worker.
    """

    def __init__(
        self,
        carrier: Carrier,
        heartbeat: Callable[[], FromWorker],
        *,
        head_changed: Callable[[], None],
        refused: Callable[[str], None],
    ) -> None:
        self._carrier = carrier
        self._heartbeat = heartbeat
        self._head_changed = head_changed
        self._refused = refused
        self._changed = Condition()
        self._messages: deque[FromWorker] = deque(maxlen=MOST_WAITING)
        self._requests: dict[str, _Request] = {}
        self._stopping = self._leaving = False
        self._head: Presence | None = None
        """None: there is none now, or the broker is away."""
        self._session = ""
        """Of the latest head."""
        self._reachable = True
        self._beat_at = 0.0
        self._thread = SupervisedThread("outbox", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End after the messages that can be sent now."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.let_end()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def leave(self) -> None:
        """The worker stops: nobody reads answers any more, so none is waited for."""
        with self._changed:
            self._leaving = True
            self._beat_at = 0.0
            self._changed.notify_all()

    def put(self, message: FromWorker) -> None:
        """Send a message soon. It may be lost."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def ask(self, message: Image | Ended, content: bytes | None = None) -> bool:
        """Send a message until it is answered; returns whether the head accepts it. When the
        worker stops, the message is sent once, and the answer is False.

        Raises:
            StorageUnavailable: the head cannot store anything now: ask again later.
        """
        request = _Request(message, content)
        with self._changed:
            self._requests[message.request] = request
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: request.answer or self._stopping or (self._leaving and request.sent_at > 0)
            )
            self._requests.pop(message.request, None)
        if request.answer and request.answer.retry:
            raise StorageUnavailable(request.answer.retry)
        return request.answer is not None and request.answer.accepted

    def answered(self, answer: Answer) -> None:
        with self._changed:
            if request := self._requests.get(answer.request):
                request.answer = answer
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._due(), self._pause_s())
                if self._stopping and not self._messages:
                    return
            try:
                self._step()
                self._reachable = True
            except CarrierUnavailable as error:
                if self._reachable:
                    log.warning("the broker cannot be reached: %s", error)
                self._reachable, self._head = False, None
                with self._changed:
                    self._beat_at = 0.0  # it is looked for after NO_HEAD_S
                    self._messages.clear()
                    self._changed.wait_for(lambda: self._stopping, NO_HEAD_S)

    def _due(self) -> bool:
        """(locked) Whether something can be sent now."""
        if self._head is None:
            return time.monotonic() >= self._beat_at
        return bool(self._messages) or self._pause_s() <= 0.0

    def _pause_s(self) -> float:
        """(locked) Seconds until the next heartbeat or the next repetition."""
        due = [self._beat_at]
        if self._head is not None:
            due += [request.sent_at + RESEND_S for request in self._requests.values()]
        return max(min(due) - time.monotonic(), 0.0)

    def _step(self) -> None:
        now = time.monotonic()
        if now >= self._beat_at:
            self._check_head()
            if self._head:
                self._publish(self._heartbeat())
        with self._changed:
            messages = list(self._messages)
            self._messages.clear()
            due = [r for r in self._requests.values() if now >= r.sent_at + RESEND_S]
        if self._head is None:
            return
        for message in messages:
            self._publish(message)
        for request in due:
            if request.content is not None and isinstance(request.message, Image):
                self._carrier.put(request.content, request.message.image)
            self._publish(request.message)
            with self._changed:
                request.sent_at = time.monotonic()
                self._changed.notify_all()

    def _check_head(self) -> None:
        found = self._carrier.presence()
        was_away = self._head is None
        self._head = Presence.model_validate(found) if found else None
        if self._head is None:
            self._beat_at = time.monotonic() + NO_HEAD_S
            return
        self._beat_at = time.monotonic() + self._head.lease_s / HEARTBEATS_IN_LEASE
        if self._head.protocol != PROTOCOL:
            self._refused(
                f"The head speaks version {self._head.protocol} of the protocol, this worker "
                f"version {PROTOCOL}: install the same version of mflux-server on both."
            )
            self._head = None
        elif was_away or self._head.session != self._session:
            log.info("there is a head")
            for request in self._requests.copy().values():
                request.sent_at = -RESEND_S
            if self._head.session != self._session:
                self._session = self._head.session
                self._head_changed()

    def _publish(self, message: FromWorker) -> None:
        self._carrier.publish(message.model_dump(mode="json"))
