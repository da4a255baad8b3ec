"""The machines that draw, and those that have left.

Not thread-safe: the scheduler calls it under its lock.
"""

from collections.abc import Callable

from models.model_catalog import Model
from scheduler.machines import Machine, Run

LOST_KEPT = 100
"""Machines that have left and are still listed."""


class Machines(list[Machine]):
    """All that are forecast with, the server's own one first.

    Args:
        local: the server's own.
        needs_download: whether weights are missing on it; may look at the disk.
        draws: whether it draws; else it is there only while there is no other one.
    """

    def __init__(
        self, local: Machine, needs_download: Callable[[Model], bool], draws: bool = True
    ) -> None:
        super().__init__([local])
        self.lost: dict[str, Machine] = {}
        """By name, those that have left, the latest last."""
        self.local, self._draws, self._needs_download = local, draws, needs_download
        if not draws:
            local.available, local.loading = False, None

    @property
    def draw_here(self) -> bool:
        """Whether the server's own machine draws."""
        return self._draws

    def join(self, machine: Machine) -> None:
        self.append(machine)
        self.lost.pop(machine.name, None)
        if not self._draws and self.local in self:
            self.remove(self.local)

    def leave(self, machine: Machine) -> None:
        """It runs nothing any more."""
        if machine in self:
            self.remove(machine)
            self.lost[machine.name] = machine
            while len(self.lost) > LOST_KEPT:
                del self.lost[next(iter(self.lost))]
        if not self:
            self.append(self.local)

    def has_elsewhere(self, name: str) -> bool:
        """Whether another machine has the weights of a model and may load it."""
        return any(
            other.about and name in other.about.models and name not in other.missing
            for other in list(self)
        )

    def lack(self, model: Model) -> bool:
        """Whether weights must be downloaded to the server's machine before a task can run: no
        machine has them. Any thread may call it, without a lock."""
        if not self._draws or not self._needs_download(model):
            return False
        if not self.has_elsewhere(model.name):
            return True
        self.local.missing |= {model.name}
        return False

    def run(self, task_id: str) -> Run | None:
        """What a worker runs."""
        return next((m.runs[task_id] for m in self if task_id in m.runs), None)
