"""What becomes of the tasks that waited or ran when the last process ended."""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field

from allowed import Allowed
from errors import InvalidInput, ModelNotAllowed, NotSupported
from scheduler.limits import ENDED_TOO_OFTEN, MAX_INTERRUPTIONS
from task import Task, TaskStatus
from timing_model import LOCAL


@dataclass(frozen=True)
class Restarted:
    waiting: list[Task] = field(default_factory=list)
    """They wait again. In the order of their submits."""
    released: list[tuple[Task, bool]] = field(default_factory=list)
    """Those of them that ran, as they are stored, and whether this counts as an interruption."""
    cancelled: list[Task] = field(default_factory=list)
    failed: list[tuple[Task, str, str]] = field(default_factory=list)
    """With code and message."""


def restart(unfinished: Iterable[Task], allowed: Allowed) -> Restarted:
    """Gives the waiting ones their stages."""
    found = Restarted()
    for task in unfinished:
        # A worker elsewhere has not died with the server.
        died = task.status is TaskStatus.RUNNING and task.machine == LOCAL
        if task.last_image is not None:  # that image is lost, and no other one is wanted
            found.cancelled.append(task)
            continue
        try:
            stages = allowed.stages(task.params)
        except (ModelNotAllowed, NotSupported, InvalidInput) as error:
            # The operator allows less than before.
            found.failed.append((task, error.code, error.message))
            continue
        if died and task.interruptions + 1 >= MAX_INTERRUPTIONS:
            found.failed.append((task, *ENDED_TOO_OFTEN))
            continue
        task.stages = tuple(stage.after_images(task.images_done) for stage in stages)
        if task.status is TaskStatus.RUNNING:
            found.released.append((copy(task), died))
            task.status, task.started_at = TaskStatus.WAITING, None
            task.interruptions += died
        found.waiting.append(task)
    return found
