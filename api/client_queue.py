"""The queue as one client sees it: its own tasks, and of others only that they are there.

Routes have no other way to tasks, so that none of them can forget to ask whose a task is. A task
of somebody else is unknown, as if its id had never been given.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from api.audit import audit
from api.identity import client as present_client
from errors import Gone, NotPermitted, UnknownTask
from key_file import Client
from queue_manager import QueueManager
from scheduler.limits import NO_LIMITS, ClientLimits
from scheduler.stopping import Stopping
from task import Forecast, GenerationParams, Owner, Task, TaskStatus


class ClientQueue:
    """Methods raise what those of QueueManager raise, and UnknownTask for tasks of others."""

    def __init__(self, queue: QueueManager, client: Client, end_user: str = "") -> None:
        self.client = client
        self._owner = Owner(client.name, end_user, client.weight)
        self._limits = ClientLimits(client.max_waiting, client.max_wait_seconds)
        self.events = queue.events
        self.state = queue.state
        self.health = queue.health
        self.download_for = queue.download_for
        self.allowed = queue.allowed
        self._queue = queue

    def for_user(self, end_user: str | None) -> "ClientQueue":
        """The same queue, for one of the users of this client (Owner.end_user)."""
        return ClientQueue(self._queue, self.client, end_user) if end_user else self

    @property
    def paused(self) -> bool:
        """Whether the operator has paused the queue."""
        return self._queue.control.paused

    @property
    def sees_all(self) -> bool:
        return self.client.operator or not self.client.name

    def owns(self, task: Task) -> bool:
        """Whether this client may see and change a task."""
        return self.sees_all or task.owner.name == self.client.name

    def knows(self, task_id: str) -> bool:
        """Whether a task is or was one of its own."""
        if self.sees_all:
            return True
        try:
            self.status(task_id)
        except UnknownTask:
            return False
        except Gone:
            return True
        return True

    def submit(
        self,
        params: GenerationParams,
        *,
        priority: int = 0,
        client_key: str | None = None,
        inputs: Mapping[str, bytes] | None = None,
        callback_url: str | None = None,
    ) -> tuple[Task, int]:
        """Raises: NotPermitted: it may not send urgent tasks."""
        self._check_priority(priority)
        return self._queue.submit(
            params,
            priority=priority,
            owner=self._owner,
            client_key=client_key and self._own_key(client_key),
            inputs=inputs,
            callback_url=callback_url,
            limits=self._limits,
        )

    def submitted_as(self, client_key: str) -> tuple[Task, int] | None:
        return self._queue.submitted_as(self._own_key(client_key))

    def estimate(self, params: GenerationParams, *, priority: int = 0) -> tuple[Forecast, int]:
        """Raises: NotPermitted: it may not send urgent tasks."""
        self._check_priority(priority)
        return self._queue.estimate(params, priority=priority, owner=self._owner)

    def fetch_ahead(self, params: GenerationParams) -> str | None:
        return self._queue.fetch_ahead(params)

    def status(self, task_id: str) -> Task:
        try:
            task = self._queue.status(task_id)
        except Gone as gone:
            if self.sees_all or gone.owner == self.client.name:
                raise
            raise UnknownTask from None
        if not self.owns(task):
            raise UnknownTask
        if task.params.keep_alive_s is not None:
            self.asked((task_id,))
        return task

    def asked(self, task_ids: Collection[str] | None = None) -> None:
        """The client still waits for these of its own tasks; None: for all of them."""
        self._queue.asked(self.client.name, task_ids)

    def unfinished(
        self, limit: int, offset: int, wanted: Callable[[Task], bool] | None = None
    ) -> tuple[list[Task], int]:
        """Tasks of all clients; with `wanted` those of its own for which it is true."""
        if wanted is None:
            return self._queue.unfinished(limit, offset)
        return self._queue.unfinished(limit, offset, lambda task: self.owns(task) and wanted(task))

    def newest_done(self, most: int) -> list[Task]:
        """Its own tasks that are done and kept, the latest one first; of an operator, too, only
        those that it has submitted itself."""
        found = []
        for task_id in self._queue.newest_done(self.client.name, most):
            with suppress(UnknownTask, Gone):  # fetched, or removed just now
                found.append(self._queue.status(task_id))
        return found

    def image(self, task_id: str, index: int = 0) -> tuple[bytes, GenerationParams]:
        return self._queue.image_of(self._own(task_id), index)

    def all_images(self, task_id: str) -> tuple[list[bytes], GenerationParams]:
        return self._queue.all_images_of(self._own(task_id))

    def keep(self, task_id: str, kept: bool) -> tuple[Task, int, int]:
        """Pin a task, or release it; returns it, how many pictures its client has pinned, and how
        many it may."""
        self.status(task_id)
        task = self._queue.keep(task_id, kept)
        return task, *self._queue.kept_by(task.owner.name)

    def kept(self) -> tuple[list[str], int, int]:
        """The tasks that this client has pinned, their pictures, and how many it may pin."""
        owner = self.client.name
        return self._queue.kept_ids(owner), *self._queue.kept_by(owner)

    def fetched(self, task_id: str, index: int | None = None) -> None:
        if not self.sees_all:
            self.status(task_id)
        self._queue.fetched(task_id, index)

    def delete(
        self, task_id: str, *, after_current: bool = False, only_unfinished: bool = False
    ) -> TaskStatus:
        owner = self.status(task_id).owner.name
        was = self._queue.delete(
            task_id, after_current=after_current, only_unfinished=only_unfinished
        )
        if owner != self.client.name:
            audit(f"cancelled or removed task {task_id} of {owner or 'nobody'}")
        return was

    def stopping(self, task_id: str) -> Stopping | None:
        """What its task that was cancelled still keeps the GPU busy with."""
        return self._queue.stopping(task_id)

    def retry(self, task_id: str) -> Task:
        """Try a failed task again; returns it. Raises what QueueControl.retry raises."""
        owner = self.status(task_id).owner.name
        is_own = owner == self.client.name
        self._queue.control.retry(task_id, self._limits if is_own else NO_LIMITS)
        if not is_own:
            audit(f"tries task {task_id} of {owner or 'nobody'} again")
        return self.status(task_id)

    def clear(self) -> int:
        """Cancel all of its own tasks that wait; returns how many there were."""
        return self._queue.control.clear(self.client.name)

    # -- inside -----------------------------------------------------------------------------------

    def _own(self, task_id: str) -> Task:
        return self._queue.status(task_id) if self.sees_all else self.status(task_id)

    def _check_priority(self, priority: int) -> None:
        if priority > 0 and not self.client.may_prioritize:
            raise NotPermitted(
                "priority: urgent tasks need a key that the operator allows to send them "
                "(may_prioritize in the file of --keys).",
                field="priority",
            )

    def _own_key(self, client_key: str) -> str:
        """Keys of one client are no keys of another."""
        return f"{self.client.name}\n{client_key}" if self.client.name else client_key


OwnQueue = Callable[[], ClientQueue]


def own_queue_of(queue: QueueManager) -> OwnQueue:
    """What answers the queue as the client of the present request sees it."""
    return lambda: ClientQueue(queue, present_client())
