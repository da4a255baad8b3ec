"""The thread that sends tasks to workers, and gives up workers that are silent.

Each step compares what each worker should have (the scheduler's answer) with what it has, and sends
the difference. It is woken by whatever changes a task or a machine.
"""

import logging
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from math import inf
from typing import Any

from cluster.carrier import Carrier, CarrierUnavailable, new_key
from cluster.messages import PROTOCOL, Load, Message, Offer, Presence, Spec, Stop, Watch
from cluster.registry import Registry
from cluster.remote_machine import RemoteMachine
from cluster.stalls import stalled_s
from errors import StorageUnavailable
from scheduler.scheduler import Scheduler
from supervision import SupervisedThread
from task import Task

log = logging.getLogger(__name__)

ANNOUNCE_S = 1.0
"""The presence of the head is announced this often."""
AWAY_LEASES = 3.0
"""While the broker is away no worker can be heard. They are lost after so many leases."""
LOST_LEASES = 0.5
"""What a worker does not hold so long after it was sent, or after it began, was lost on the way."""


class Dispatcher:
    """Owns the thread "dispatcher"."""

    def __init__(self, scheduler: Scheduler, registry: Registry, carrier: Carrier) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._carrier = carrier
        self._session = new_key()
        self._announced_at = -ANNOUNCE_S
        self._away_since: float | None = None
        self._watched: set[str] = set()
        self._stopping = False
        self._thread = SupervisedThread("dispatcher", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        with self._scheduler.lock:
            self._stopping = True
            self._scheduler.wake_worker.notify_all()
        self._thread.let_end()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def watch(self, task_id: str) -> None:
        """Somebody looks at the preview of a task."""
        with self._scheduler.lock:
            run = self._scheduler.machines.run(task_id)
            if run and run.machine is not self._scheduler.machine:
                self._watched.add(task_id)
                self._scheduler.wake_worker.notify_all()

    def step(self, timeout_s: float) -> None:
        """Send what is due; waits for something, if nothing is."""
        self._announce()
        with self._scheduler.lock:
            due = list(self._due())
            if not due and not self._stopping and not self._scheduler.forecaster.continue_plan():
                self._scheduler.wake_worker.wait(timeout_s)
        refused = False
        for do in due:
            try:
                do()
            except CarrierUnavailable as error:
                self._broker_is_away(error)
            except StorageUnavailable as error:
                log.warning("%s", error)
                refused = True
        if refused:  # the same is due again
            with self._scheduler.lock:
                self._scheduler.wake_worker.wait_for(lambda: self._stopping, timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            self.step(ANNOUNCE_S)

    def _announce(self) -> None:
        now = self._scheduler.monotonic()
        if now - self._announced_at < ANNOUNCE_S:
            return
        self._announced_at = now
        lease_s = self._registry.lease_s
        presence = Presence(protocol=PROTOCOL, session=self._session, lease_s=lease_s)
        try:
            self._carrier.announce(presence.model_dump(), lease_s)
        except CarrierUnavailable as error:
            self._broker_is_away(error)
            return
        if self._away_since is not None:
            log.info("the broker can be reached again")
            with self._scheduler.lock:
                self._away_since = self._scheduler.health.broker_away_since = None
                self._registry.heard_none()

    def _broker_is_away(self, error: CarrierUnavailable) -> None:
        if self._away_since is None:
            log.error("the broker cannot be reached: %s", error)
            with self._scheduler.lock:
                self._away_since = self._scheduler.monotonic()
                self._scheduler.health.broker_away_since = self._scheduler.now()

    # -- what is due (locked) ---------------------------------------------------------------------

    def _due(self) -> Iterator[Callable[[], None]]:
        away, at = self._away_since, self._scheduler.monotonic()
        if away is not None and at - away < AWAY_LEASES * self._registry.lease_s:
            return
        machines = self._registry.machines
        for remote in machines:
            if remote.lost or self._registry.is_expired(remote):
                reason = f"it was silent for {at - remote.heard_at:.0f} s"
                yield partial(self._lose, remote, reason, interrupted=away is None)
        if away is not None or self._scheduler.stopping:
            return
        for remote in machines:
            if silent_s := stalled_s(remote, self._scheduler, at):
                yield partial(self._registry.stall, remote, silent_s)
        next_tasks = self._scheduler.next_tasks() if machines else {}
        for remote in machines:
            if not remote.lost:
                yield from self._stops(remote)
                yield from self._offers(remote, next_tasks.get(remote.name), at)
                yield from self._lost_runs(remote)
                yield from self._load_orders(remote, at)
        for task_id in self._watched:
            run = self._scheduler.machines.run(task_id)
            watching = (r for r in machines if run and r.machine is run.machine)
            for remote in watching:
                yield self._sending(remote, Watch, task_id=task_id)
        self._watched.clear()

    def _offers(
        self, remote: RemoteMachine, task: Task | None, at: float
    ) -> Iterator[Callable[[], None]]:
        """Give it this task, and take back another one that it has not begun."""
        offered = remote.offered
        if remote.beginning:
            return
        if offered:
            was_lost = offered.task.task_id not in remote.held and self._is_old(remote, offered.at)
            if offered.task is task and offered.attempt == task.attempt + 1 and not was_lost:
                return
            remote.offer(None, at)
            if offered.task is not task:
                stop = {"task_id": offered.task.task_id, "attempt": offered.attempt}
                yield self._sending(remote, Stop, **stop)
        if task:
            remote.offer(task, at)
            yield partial(self._send_offer, remote, copy(task), task.attempt + 1)

    def _stops(self, remote: RemoteMachine) -> Iterator[Callable[[], None]]:
        """What it holds and should not."""
        for held in remote.held.items():
            if not remote.wants(*held) and held not in remote.stopped:
                remote.stopped.add(held)
                yield self._sending(remote, Stop, task_id=held[0], attempt=held[1])

    def _lost_runs(self, remote: RemoteMachine) -> Iterator[Callable[[], None]]:
        """What it should hold and does not, once for each heartbeat: a task that is cancelled after
        an image goes on until that is stored, and its worker may hold it no more."""
        if remote.compared_at == remote.beat_at:
            return
        remote.compared_at = remote.beat_at
        for run in remote.machine.runs.values():
            task = run.task
            holds = remote.held.get(task.task_id) == task.attempt
            if not holds and self._is_old(remote, run.claimed_at):
                log.warning("machine %s has lost task %s", remote.name, task.task_id)
                yield partial(_release, remote, task.task_id, task.attempt)

    def _load_orders(self, remote: RemoteMachine, at: float) -> Iterator[Callable[[], None]]:
        """What the operator wants loaded, until it is."""
        machine = remote.machine
        orders, loading = machine.load_orders, machine.loading
        there = machine.resident.keys if loading is None else (*machine.resident.keys, loading.key)
        if orders and orders[0].key in there:
            del orders[0]
            remote.ordered_at = -inf
        if not orders:
            remote.ordered_at = -inf
        elif at - remote.ordered_at >= LOST_LEASES * self._registry.lease_s:
            remote.ordered_at = at
            yield self._sending(remote, Load, spec=Spec.of(orders[0]))

    def _is_old(self, remote: RemoteMachine, at: float) -> bool:
        """Whether its latest heartbeat is so much later that it must have been heard."""
        return remote.beat_at - at > LOST_LEASES * self._registry.lease_s

    def _lose(self, remote: RemoteMachine, reason: str, *, interrupted: bool) -> None:
        self._registry.lose(remote, reason, interrupted=interrupted)
        self._carrier.forget(remote.worker)  # it may never come to read them

    # -- sending ----------------------------------------------------------------------------------

    def _sending(
        self, remote: RemoteMachine, kind: type[Message], **content: Any
    ) -> Callable[[], None]:
        message = kind(session=remote.session, **content)  # type: ignore[call-arg]
        return partial(self._carrier.send, remote.worker, message.model_dump(mode="json"))

    def _send_offer(self, remote: RemoteMachine, task: Task, attempt: int) -> None:
        try:
            folder = self._scheduler.store.inputs_of(task.task_id)
            inputs = {
                picture.file: self._carrier.put((folder / f"{picture.file}.png").read_bytes())
                for picture in task.params.inputs
            }
            params = task.params.model_dump(mode="json")
            params["model"] = params["model"] or self._scheduler.allowed.default.name
            self._sending(
                remote,
                Offer,
                task_id=task.task_id,
                attempt=attempt,
                params=params,
                images_done=task.images_done,
                inputs=inputs,
            )()
        except (CarrierUnavailable, OSError) as error:
            with self._scheduler.lock:
                if remote.is_offered(task.task_id, attempt):
                    remote.offer(None, 0.0)
                if isinstance(error, OSError):  # it has ended, or its files are damaged
                    remote.decline(task.task_id, "its pictures cannot be read")
            if isinstance(error, CarrierUnavailable):
                raise
            log.warning("the pictures of task %s cannot be read: %s", task.task_id, error)


def _release(remote: RemoteMachine, task_id: str, attempt: int) -> None:
    remote.api.release(task_id, attempt)
