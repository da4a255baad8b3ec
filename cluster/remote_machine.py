"""A worker on another machine, as the head sees it.

Not thread-safe: its fields belong to the scheduler's lock.
"""

from dataclasses import dataclass, field
from math import inf

from cluster.messages import Heartbeat, Registration
from scheduler.machines import About, Machine
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from task import Task

DEAF = "Nothing of the head reaches it."


@dataclass(frozen=True)
class Offered:
    """A task that was sent to a worker, and that it has not begun yet."""

    task: Task
    attempt: int
    at: float
    """Monotonic seconds."""


@dataclass(eq=False)
class RemoteMachine:
    worker: str
    """Id of the machine, which a restart keeps."""
    session: str
    """Of the process; another one has none of its tasks."""
    registration: Registration
    machine: Machine
    api: WorkerApi
    heard_at: float
    """Monotonic seconds of its latest message."""
    beat_at: float = 0.0
    """Monotonic seconds of its latest heartbeat."""
    offered: Offered | None = None
    beginning: bool = False
    """Whether `offered` is being claimed for it, which takes a write to disk. Meanwhile it is
    neither taken back nor followed by another offer: its worker draws it."""
    held: dict[str, int] = field(default_factory=dict)
    """By task, the attempt that it has, as its latest heartbeat said."""
    stopped: set[tuple[str, int]] = field(default_factory=set)
    """Attempts that it was sent a Stop for since its latest heartbeat."""
    compared_at: float = -inf
    """`beat_at` when `held` was last compared with what should run there."""
    progress_at: float = 0.0
    """Monotonic seconds of its latest message but heartbeats, or of a part of a download."""
    ordered_at: float = -inf
    """Monotonic seconds at which it was last sent what the operator wants loaded."""
    weights_changed: bool = False
    """Whether it has said since its latest heartbeat that it loads or frees weights."""
    stalled: bool = False
    """Whether it has lost its task because it made no progress, and does not wait for one yet."""
    calibrated: bool = False
    """Whether the speed that it has measured is known."""
    lost: bool = False
    """Whether its tasks are being given to others."""

    @staticmethod
    def registered(heartbeat: Heartbeat, scheduler: Scheduler) -> "RemoteMachine":
        """A worker that has sent its first heartbeat."""
        registration = heartbeat.registration
        machine = Machine(
            registration.name,
            models_in_memory=registration.models_in_memory,
            speed=scheduler.timing.of(registration.name).relative_speed(scheduler.timing),
            started_at=scheduler.monotonic(),
        )
        remote = RemoteMachine(
            heartbeat.worker,
            heartbeat.session,
            registration,
            machine,
            WorkerApi(scheduler, machine),
            scheduler.monotonic(),
        )
        machine.allows = remote.allows
        machine.now_resident(heartbeat.resident)
        remote.heard(heartbeat, scheduler.monotonic(), scheduler.now())
        return remote

    @property
    def name(self) -> str:
        return self.machine.name

    def heard(self, heartbeat: Heartbeat, at: float, now: float) -> None:
        """A heartbeat has come.

        Args:
            at, now: monotonic and unix seconds.
        """
        self.heard_at = self.beat_at = at
        self.registration = heartbeat.registration
        self.stalled = self.stalled and not heartbeat.waiting
        self.held = {held.task_id: held.attempt for held in heartbeat.held}
        self.stopped.clear()
        missing = (model.name for model in heartbeat.registration.models if model.missing)
        self.machine.missing = frozenset(missing)
        may_begin = not (self.lost or self.stalled or heartbeat.deaf or heartbeat.stopping)
        self.machine.available = may_begin
        if heartbeat.deaf or self.machine.last_error == DEAF:
            self.machine.last_error = DEAF if heartbeat.deaf else None
        self.machine.about = About(
            self.registration.hardware,
            self.registration.system,
            self.registration.memory_bytes,
            self.registration.versions,
            tuple(model.name for model in self.registration.models),
            heard_at=now,
        )
        self._weights_are(heartbeat)
        if heartbeat.downloaded_bytes != self.machine.downloaded_bytes:
            self.machine.downloaded_bytes, self.progress_at = heartbeat.downloaded_bytes, at

    def _weights_are(self, heartbeat: Heartbeat) -> None:
        """What is in its memory, if a message that said so was lost."""
        loading = self.machine.loading
        is_over = loading is None or heartbeat.waiting or loading.key in heartbeat.resident
        if is_over and not self.weights_changed:
            self.machine.now_resident(heartbeat.resident)
        self.weights_changed = False

    def allows(self, task: Task) -> bool:
        """Whether it may load all that a task needs, as far as its registration says."""
        known = self.registration
        options = {model.name: model.options for model in known.models}
        bits, loras = set(known.bits), set(known.loras)
        if task.params.quantize not in bits:
            return False
        for stage in task.stages:
            model = stage.load_spec.model
            if options.get(model.name) != model.options.suffix:
                return False
            for lora in stage.load_spec.loras:
                if lora.name not in loras and not (known.lora_repos and "/" in lora.name):
                    return False
        return True

    def decline(self, task_id: str, reason: str) -> None:
        """It will not draw a task."""
        self.machine.declined[task_id] = self.machine.last_error = reason
        if self.offered and self.offered.task.task_id == task_id:
            self.offer(None, 0.0)

    def wants(self, task_id: str, attempt: int) -> bool:
        """Whether this attempt runs or is offered here."""
        run = self.machine.runs.get(task_id)
        if run is not None and run.task.attempt == attempt:
            return True
        return self.is_offered(task_id, attempt)

    def is_offered(self, task_id: str, attempt: int) -> bool:
        offered = self.offered
        return offered is not None and (offered.task.task_id, offered.attempt) == (
            task_id,
            attempt,
        )

    def offer(self, task: Task | None, at: float) -> None:
        """It is sent this task; None: it has none that it has not begun."""
        self.offered = Offered(task, task.attempt + 1, at) if task else None
        self.machine.offered = task
