"""The machines that draw, and those that have left.

Not thread-safe: the scheduler calls it under its lock.
"""

from scheduler.machines import Machine, Run

LOST_KEPT = 100
"""Machines that have left and are still listed."""


class Machines(list[Machine]):
    """All that are forecast with, the server's own one first.

    Args:
        local: the server's own.
        draws: whether it draws; else it is there only while there is no other one.
    """

    def __init__(self, local: Machine, *, draws: bool = True) -> None:
        super().__init__([local])
        self.lost: dict[str, Machine] = {}
        """By name, those that have left, the latest last."""
        self.local, self._draws = local, draws
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

    def run(self, task_id: str) -> Run | None:
        """What a worker runs."""
        return next((m.runs[task_id] for m in self if task_id in m.runs), None)
