"""The workers that the head knows.

A heartbeat registers a worker. One that is silent for a lease is lost: what it ran is released and
drawn elsewhere. All fields belong to the scheduler's lock.
"""

import logging

from cachetools import FIFOCache

from cluster.messages import Heartbeat, Registration
from cluster.remote_machine import RemoteMachine
from errors import StorageUnavailable
from scheduler.machines import LOST_KEPT
from scheduler.scheduler import Scheduler
from task import Task
from timing.speeds import Product
from timing_model import LOCAL

log = logging.getLogger(__name__)


class Registry:
    """Args:
    lease_s: seconds of silence after which a worker is lost.
    """

    def __init__(self, scheduler: Scheduler, lease_s: float) -> None:
        self.lease_s = lease_s
        self._scheduler = scheduler
        self._by_worker: dict[str, RemoteMachine] = {}
        self._silent = FIFOCache[str, tuple[str, list[Task]]](LOST_KEPT)
        """By worker that was lost while it was silent: its session, and what it ran."""

    @property
    def machines(self) -> list[RemoteMachine]:
        """Those that are registered (locked)."""
        return list(self._by_worker.values())

    def named(self, name: str) -> RemoteMachine | None:
        """(locked)"""
        return next((remote for remote in self.machines if remote.name == name), None)

    def find(self, worker: str, session: str) -> RemoteMachine | None:
        """The worker that has sent a message, which extends its lease. None: it is not registered,
        or the message is of an earlier process."""
        with self._scheduler.lock:
            remote = self._by_worker.get(worker)
            if remote is None or remote.session != session or remote.lost:
                return None
            remote.heard_at = remote.progress_at = self._scheduler.monotonic()
            return remote

    def heard(self, heartbeat: Heartbeat) -> str | None:
        """A heartbeat has come. Returns why the worker is refused; None: it is registered.

        Raises:
            StorageUnavailable: what its earlier process ran cannot be released now.
        """
        scheduler = self._scheduler
        with scheduler.lock:
            known = self._by_worker.get(heartbeat.worker)
            is_same = known and known.session == heartbeat.session and not known.lost
            if known and is_same:
                known.heard(heartbeat, scheduler.monotonic(), scheduler.now())
                scheduler.wake_worker.notify_all()
        if known and is_same:
            self._calibrate(known, heartbeat.registration)
            return None
        if known:
            self.lose(known, "it was started again", interrupted=True)
        self._forgive(heartbeat)
        name = heartbeat.registration.name
        drained = scheduler.store.state.is_drained(name)
        with scheduler.lock:
            if name == LOCAL or self.named(name):
                return f"There is a machine {name!r} already: choose another --worker-name."
            remote = RemoteMachine.registered(heartbeat, scheduler)
            remote.machine.drained = drained
            remote.machine.speed = scheduler.timing.of(name).relative_speed(scheduler.timing)
            self._by_worker[remote.worker] = remote
            scheduler.machines.join(remote.machine)
            scheduler.baselines.improve_waiting()
            scheduler.wake_worker.notify_all()
        self._calibrate(remote, heartbeat.registration)
        self._bring_weights(remote)
        log.info("machine %s is registered: %s", name, heartbeat.registration.hardware)
        return None

    def _bring_weights(self, remote: RemoteMachine) -> None:
        """A worker has weights: tasks that wait for their download need it no more."""
        scheduler = self._scheduler
        for model in remote.registration.models:
            with scheduler.changes:
                with scheduler.lock:
                    spec = scheduler.pending.lacking(model.name)
                if spec and not model.missing:
                    scheduler.downloaded(spec)
                    with scheduler.lock:
                        scheduler.machine.missing |= {model.name}

    def _calibrate(self, remote: RemoteMachine, registration: Registration) -> None:
        """A worker has measured its machine, perhaps."""
        if registration.speeds.keys() >= set(Product) and not remote.calibrated:
            remote.calibrated = True
            remote.api.calibrate(lambda: registration.speeds, registration.versions.get("mlx", ""))
            timing = self._scheduler.timing
            with self._scheduler.lock:
                remote.machine.speed = timing.of(remote.name).relative_speed(timing)

    def lose(self, remote: RemoteMachine, reason: str, *, interrupted: bool) -> None:
        """A worker is gone: what it ran waits again.

        Args:
            interrupted: it died, perhaps because of what it ran.

        Raises:
            StorageUnavailable: not all could be released; call it again.
        """
        scheduler = self._scheduler
        with scheduler.changes, scheduler.lock:  # no claim for it is under way
            remote.lost = True
            remote.machine.available = False
            remote.offer(None, scheduler.monotonic())
            running = [run.task for run in remote.machine.runs.values()]
        for task in reversed(running):
            # The image after which a task is cancelled does not come any more either.
            ends = interrupted or task.last_image is not None
            remote.api.release(task.task_id, task.attempt, interrupted=ends)
        with scheduler.lock:
            if self._by_worker.get(remote.worker) is not remote:
                return  # another thread has lost it meanwhile
            if remote.machine.runs:
                raise StorageUnavailable(f"The last image of {remote.name} is being stored.")
            if interrupted and running:
                self._silent[remote.worker] = remote.session, running
            del self._by_worker[remote.worker]
            scheduler.machines.leave(remote.machine)
            scheduler.baselines.improve_waiting()
            scheduler.wake_worker.notify_all()
        log.warning("machine %s is lost: %s", remote.name, reason)

    def _forgive(self, heartbeat: Heartbeat) -> None:
        """A worker that was lost has not died: its network was cut, or it was frozen. So what it
        ran is not the cause of its death."""
        session, tasks = self._silent.pop(heartbeat.worker, ("", []))
        for task in tasks if session == heartbeat.session else ():
            with self._scheduler.changes, self._scheduler.health.noting_storage():
                if task.interruptions and self._scheduler.store.forgive(task):
                    task.interruptions -= 1

    def stall(self, remote: RemoteMachine, silent_s: float) -> None:
        """A worker makes no progress: what it runs waits again, and it gets no task before it waits
        for one.

        Raises:
            StorageUnavailable: nothing has changed; call it again.
        """
        scheduler = self._scheduler
        with scheduler.lock:
            run = remote.machine.last_on_gpu
        if run:
            remote.api.release(run.task.task_id, run.task.attempt, interrupted=True)
        with scheduler.lock:
            remote.stalled = True
            remote.machine.available = False
            remote.machine.last_error = f"It made no progress for {silent_s:.0f} s."
            remote.offer(None, 0.0)
            scheduler.baselines.improve_waiting()
            scheduler.wake_worker.notify_all()
        log.warning("machine %s made no progress for %.0f s", remote.name, silent_s)

    def is_expired(self, remote: RemoteMachine) -> bool:
        """Whether it was silent for too long (locked)."""
        return self._scheduler.monotonic() - remote.heard_at > self.lease_s

    def heard_none(self) -> None:
        """The broker was away, so that nobody could be heard: all leases begin again, and workers
        have another one to find the broker (locked)."""
        for remote in self.machines:
            remote.heard_at = remote.progress_at = self._scheduler.monotonic() + self.lease_s
