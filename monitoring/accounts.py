"""What each client has in the queue, and what it has had."""

from collections import Counter
from dataclasses import dataclass

from scheduler.scheduler import Scheduler
from storage.usage_store import Usage
from task import TaskStatus


@dataclass(frozen=True)
class Account:
    name: str
    waiting: int = 0
    running: int = 0
    gpu_s: float = 0.0
    """GPU seconds of its ended tasks, in all."""
    today_s: float = 0.0
    """The same since midnight, UTC."""


def accounts_of(scheduler: Scheduler) -> dict[str, Account]:
    """By name, the clients that have tasks or have used the GPU."""
    usage = scheduler.store.usage.by_client(scheduler.now())
    with scheduler.lock:
        tasks = [(task.owner.name, task.status) for task in scheduler.unfinished]
    waiting = Counter(name for name, status in tasks if status is TaskStatus.WAITING)
    running = Counter(name for name, status in tasks if status is TaskStatus.RUNNING)
    accounts = {}
    for name in {*usage, *waiting, *running}:
        used = usage.get(name, Usage())
        accounts[name] = Account(name, waiting[name], running[name], used.gpu_s, used.today_s)
    return accounts
