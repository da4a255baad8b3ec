"""The head's side of the cluster: workers on other machines draw tasks of this server.

The scheduler has the only order and the only state. What workers should have is compared, again and
again, with what they say they have, and the difference is sent: a message that is lost, late or
repeated does no harm, and an empty broker is filled again.
"""

import logging
from collections.abc import Callable
from contextlib import suppress

from cluster.carrier import Carrier, CarrierUnavailable
from cluster.dispatcher import Dispatcher
from cluster.inbox import Inbox
from cluster.registry import Registry
from errors import StorageUnavailable
from scheduler.scheduler import Scheduler
from supervision import SupervisedThread

log = logging.getLogger(__name__)


class Head:
    """Owns the threads "cluster" (messages of workers), "cluster-store" and "dispatcher".

    Args:
        broker: URL of Redis or Valkey.
        lease_s: seconds of silence after which a worker is lost.
        preview_came: called with the id of a task and its newest preview (JPEG).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        broker: str,
        lease_s: float,
        preview_came: Callable[[str, bytes], None],
    ) -> None:
        self._scheduler = scheduler
        self._carrier = Carrier(broker)
        self.registry = Registry(scheduler, lease_s)
        self._dispatcher = Dispatcher(scheduler, self.registry, self._carrier)
        self._inbox = Inbox(scheduler, self.registry, self._carrier, preview_came)
        self._thread = SupervisedThread("cluster", self._receive)
        self._stopping = False

    def start(self) -> None:
        with suppress(CarrierUnavailable):  # what is left there is of earlier sessions
            self._carrier.forget()
        self._dispatcher.start()
        self._thread.start()

    def watch(self, task_id: str) -> None:
        """Somebody looks at the preview of a task."""
        self._dispatcher.watch(task_id)

    def stop(self, timeout_s: float) -> None:
        """What workers draw waits for the next start."""
        self._stopping = True
        self._dispatcher.stop(timeout_s)
        self._carrier.stop()
        self._thread.let_end()
        with suppress(CarrierUnavailable):
            self._carrier.leave()
        with self._scheduler.lock:
            machines = self.registry.machines
        for remote in machines:
            with suppress(StorageUnavailable):
                remote.api.release_all()
        self._inbox.stop(timeout_s)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _receive(self) -> None:
        while not self._stopping:
            self._carrier.receive(self._inbox.handle)
