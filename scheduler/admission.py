"""Whether the queue has room for one more task and its input images: the operator's limits."""

from math import ceil

from errors import ClientLimit, InputsFull, InputsTooLarge, NoWorker, QueueFull
from models.model_catalog import LoadSpec
from scheduler.limits import NO_LIMITS, ClientLimits
from scheduler.scheduler import Scheduler
from task import Task


def check_admission(
    scheduler: Scheduler, task: Task, missing: tuple[LoadSpec, ...], client: ClientLimits
) -> None:
    """Check that a task may join (locked).

    Args:
        missing: the weights that it would have to wait for.
        client: limits of its client.

    Raises:
        NoWorker: the server is stopping.
        QueueFull: too many tasks wait, or the wait would be too long.
        ClientLimit: too many of this client wait.
    """
    limits = scheduler.limits
    if scheduler.stopping or scheduler.health.load_failed:
        raise NoWorker
    if scheduler.waiting >= limits.max_queue:
        retry_after_s = _retry_after(scheduler.forecaster.next_start_s())
        raise QueueFull(
            f"{limits.max_queue} tasks wait already: try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )
    if limits.max_wait_s > 0:
        wait_s = scheduler.forecaster.of_new(task, missing).end_s
        if wait_s > limits.max_wait_s:
            retry_after_s = _retry_after(wait_s - limits.max_wait_s)
            raise QueueFull(
                f"This task would wait {wait_s:.0f} s, the server accepts up to "
                f"{limits.max_wait_s:.0f} s: try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )
    if client != NO_LIMITS:
        _check_client(scheduler, task, client)


def reserve_inputs(scheduler: Scheduler, task_id: str, size_bytes: int) -> None:
    """Take room for the input images of a task that may join.

    Raises:
        InputsTooLarge: they take more than all tasks may.
        InputsFull: those of other tasks leave too little.
    """
    limit = scheduler.limits.input_bytes
    if size_bytes > limit:
        raise InputsTooLarge(
            f"The input images of this task take {size_bytes} bytes; the server keeps up to "
            f"{limit} for all tasks (--input-bytes)."
        )
    if scheduler.store.reserve_inputs(task_id, size_bytes, limit):
        return
    with scheduler.lock:
        retry_after_s = _retry_after(scheduler.forecaster.next_start_s())
    raise InputsFull(
        f"The input images of waiting tasks take the {limit} bytes that the operator allows: try "
        f"again in {retry_after_s} s.",
        retry_after_s=retry_after_s,
    )


def _check_client(scheduler: Scheduler, task: Task, client: ClientLimits) -> None:
    name = task.owner.name
    own = [*scheduler.policy.waiting_of(name), *scheduler.pending.waiting_of(name)]
    own_s = sum(seconds for _, seconds in own)
    have_to_start = 0
    if client.max_waiting is not None:
        have_to_start = max(len(own) + 1 - client.max_waiting, 0)
    if client.max_wait_seconds is not None:
        left_s = own_s + scheduler.estimates.durations(*task.stages).gpu_s
        left_s -= sum(seconds for _, seconds in own[:have_to_start])
        while have_to_start < len(own) and left_s > client.max_wait_seconds:
            left_s -= own[have_to_start][1]
            have_to_start += 1
    if have_to_start == 0:
        return
    last = scheduler.get(own[have_to_start - 1][0])
    retry_after_s = _retry_after(scheduler.forecaster.of(last).start_s if last else 0.0)
    raise ClientLimit(
        f"{len(own)} of your tasks wait, with {own_s:.0f} s of work; the operator allows "
        f"{_in_words(client)}: try again in {retry_after_s} s.",
        retry_after_s=retry_after_s,
    )


def _retry_after(seconds: float) -> int:
    return max(ceil(seconds), 1)


def _in_words(client: ClientLimits) -> str:
    allowed = []
    if client.max_waiting is not None:
        allowed.append(f"{client.max_waiting} tasks")
    if client.max_wait_seconds is not None:
        allowed.append(f"{client.max_wait_seconds:.0f} s")
    return " and ".join(allowed)
