"""Callbacks: the status of an ended task is sent to the URL of its client.

What is still to be sent stands in the store, so it survives a restart and needs no queue in memory.
A thread of its own ("webhooks") sends it, so that a slow receiver delays only the others that
wait to be called. A receiver may be called twice (the process may end after it was), and never by
way of a redirect, a proxy or another host than the operator allows.

Calls are signed as the Standard Webhooks specification says (standardwebhooks.com): the signature
covers an id, a timestamp and the body, so that a receiver can refuse a call that is replayed.
"""

import base64
import hashlib
import hmac
import http.client
import logging
import time
from collections.abc import Callable
from threading import Event

from api.generate_request import Limits
from api.task_answers import status_answer
from errors import Gone, StorageUnavailable, UnknownTask
from outgoing import post
from queue_manager import QueueManager
from scheduler.events import ENDS
from storage.callback_store import Callback, CallbackStore
from supervision import SupervisedThread

log = logging.getLogger(__name__)

RETRY_AFTER_S = (1.0, 10.0, 60.0, 600.0)
"""Pauses between the tries; after the last one the callback is given up."""
TRY_S = 10.0
"""A whole try: connecting, sending, and until the head of the answer is there, at whatever pace."""
LOOK_S = 60.0
STORAGE_RETRY_S = 1.0
SECRET_PREFIX = "whsec_"
STILL_ENDING = b"-"
"""In place of a body: on disk the task has ended, in memory it will have in a moment."""


class Webhooks:
    """Owns the thread.

    Args:
        key: `whsec_` and the secret in base64; empty: calls are not signed.
    """

    def __init__(
        self,
        queue: QueueManager,
        callbacks: CallbackStore,
        limits: Limits,
        key: str,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._callbacks = callbacks
        self._limits = limits
        self._secret = base64.b64decode(key.removeprefix(SECRET_PREFIX) + "==")
        self._now = now
        self._stopping = Event()
        self._thread = SupervisedThread("webhooks", self._run)

    def start(self) -> None:
        """No-op when no callback host is allowed."""
        if self._limits.callback_hosts:
            self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stops the thread. A call that is being made is repeated after the next start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not (self._stopping.is_set() or self._queue.events.closed):
            after = self._queue.events.last_id
            try:
                wait_s = self.run_once()
            except StorageUnavailable as error:
                log.warning("callbacks are put off: %s", error)
                self._stopping.wait(STORAGE_RETRY_S)
            else:
                self._until_a_task_ends(after, wait_s)

    def run_once(self) -> float:
        """Makes the call that is due first, if any; returns seconds until the next one."""
        callback = self._callbacks.next()
        if callback is None:
            return LOOK_S
        wait_s = callback.due_at - self._queue.keep_clock()
        if 0 < wait_s <= max(RETRY_AFTER_S):  # more: the clock was set back before the start
            return min(wait_s, LOOK_S)
        task_id = callback.task_id
        body = self._body(callback)
        if body == STILL_ENDING:
            return LOOK_S  # its event comes
        refused = self._refusal(callback, body) if body else None
        if refused is None:
            self._callbacks.end(task_id)
        elif callback.tries < len(RETRY_AFTER_S):
            log.info("task %s: the callback failed and is tried again: %s", task_id, refused)
            due_at = self._queue.keep_clock() + RETRY_AFTER_S[callback.tries]
            self._callbacks.put_off(task_id, due_at)
        else:
            log.warning("task %s: the callback failed and is given up: %s", task_id, refused)
            self._callbacks.end(task_id)
        return 0.0

    def _until_a_task_ends(self, after: int, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        while found := self._queue.events.wait(after, until - time.monotonic()):
            if any(event.kind in ENDS for event in found):
                return
            after = found[-1].id

    def _body(self, callback: Callback) -> bytes:
        """Returns the body to send; None if the call must not be made any more."""
        task_id = callback.task_id
        if not self._limits.may_call(callback.url):
            log.warning("task %s: its callback is not allowed any more", task_id)
            return b""
        version = self._queue.events.version(task_id)
        try:
            view = self._queue.status(task_id)
        except (Gone, UnknownTask):
            return b""
        if not view.ended:
            return STILL_ENDING
        answer = status_answer(view, self._queue.state(), self._now(), version=version)
        return answer.as_json().encode()

    def _refusal(self, callback: Callback, body: bytes) -> str | None:
        """Makes the call; returns the error, or None."""
        headers = self._headers(callback.task_id, body)
        try:
            status = _post(callback.url, body, headers)
        except (http.client.HTTPException, OSError, ValueError) as error:
            return type(error).__name__
        except Exception as error:
            log.exception("the callback of task %s failed", callback.task_id)
            return type(error).__name__
        return None if 200 <= status < 300 else f"it answered {status}"

    def _headers(self, task_id: str, body: bytes) -> dict[str, str]:
        """The id stays the same when the call is repeated, the timestamp is that of this try."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "mflux-server",
            "webhook-id": f"msg_{task_id}",
            "webhook-timestamp": str(int(self._now())),
        }
        if self._secret:
            signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
            digest = hmac.new(self._secret, signed, hashlib.sha256).digest()
            headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
        return headers


def _post(url: str, body: bytes, headers: dict[str, str]) -> int:
    """POST within TRY_S; returns the status of the answer, whose body is not read.

    Raises:
        http.client.HTTPException, OSError, ValueError
    """
    return post(url, body, headers, timeout_s=TRY_S)[0]
