"""The machines that draw: the tasks that run on each, what it loads, its busy time.

Data and bookkeeping; no forecasts. Not thread-safe: the scheduler calls it under its lock.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cachetools import FIFOCache

from errors import UnknownMachine
from models.model_catalog import LoadSpec, Model
from scheduler.progress import ShownShare
from scheduler.resident import Resident, Sizes
from task import Memory, Phase, Progress, Stage, Task
from timing_model import LOCAL

HOUR_S = 3600.0
LOST_KEPT = 100  # machines that have left and are still listed
DECLINED_KEPT = 1_000  # of each machine, tasks that it has declined


@dataclass(eq=False)
class Run:
    """A task that runs. Times are readings of the monotonic clock, in seconds; each pause moves
    those before it, as if everything had happened later."""

    task: Task
    machine: "Machine"
    claimed_at: float
    progress: Progress
    phase_started_at: float
    step_started_at: float
    step_s: list[float] = field(default_factory=list)
    """Seconds of each step of the present image that has ended."""
    gaps_before: int = 0
    """How often the process had been stopped when it was claimed (RunningClock.gaps)."""
    left_gpu_at: float | None = None
    """When its last image was drawn; None: it still needs the GPU."""
    text_s: float = 0.0
    """Seconds that encoding the prompt of the present image took; 0: it has not ended."""
    reported_at: float = 0.0
    shown_share: ShownShare = field(default_factory=ShownShare)
    """Of its time that is over."""
    paused_at: float | None = None
    """When another task preempted it; None: it is not paused."""
    pauses: int = 0
    """How often it was paused."""

    @property
    def stage(self) -> Stage:
        return self.task.stages[self.progress.stage]

    @property
    def shown(self) -> Progress:
        """Its progress as clients see it."""
        if self.paused_at is None:
            return self.progress
        return replace(self.progress, phase=Phase.PAUSED)

    @property
    def on_gpu(self) -> bool:
        """Whether it still needs the GPU: its last image is not being encoded yet."""
        return self.progress.phase is not Phase.IMAGE_ENCODING

    def gpu_s(self, at: float) -> float:
        """Seconds that it has been on the GPU, loading of its weights included."""
        return (self.until(at) if self.left_gpu_at is None else self.left_gpu_at) - self.claimed_at

    def until(self, at: float) -> float:
        """This moment, or when it was paused."""
        return at if self.paused_at is None else self.paused_at

    def pause(self, at: float) -> None:
        """Another task preempts it."""
        self.paused_at = at
        self.pauses += 1

    def resume(self, at: float) -> None:
        """It continues, if it was paused."""
        paused_s = at - self.until(at)
        self.claimed_at += paused_s
        self.phase_started_at += paused_s
        self.step_started_at += paused_s
        self.reported_at += paused_s
        self.paused_at = None

    def note_forecast(self, left_s: float, at: float) -> None:
        """A report came at this moment: its task is forecast to end in left_s seconds."""
        spent_s = at - self.claimed_at
        share = spent_s / (spent_s + left_s) if spent_s + left_s > 0.0 else 0.0
        self.shown_share.reported(at - self.reported_at, share)
        self.reported_at = at

    def advance(self, progress: Progress, at: float) -> None:
        """A report came at this moment."""
        self.resume(at)
        before = self.progress
        if (before.stage, before.image) != (progress.stage, progress.image):
            self.step_s, self.text_s = [], 0.0
            self.phase_started_at = self.step_started_at = at
        elif progress.phase is not before.phase:
            if before.phase is Phase.TEXT_ENCODING and progress.phase is Phase.DENOISING:
                self.text_s = at - self.phase_started_at
            self.phase_started_at = self.step_started_at = at
        elif progress.steps_done > before.steps_done:
            self.step_s.append(at - self.step_started_at)
            self.step_started_at = at
        self.progress = progress


@dataclass(frozen=True)
class About:
    """What a worker on another machine says of itself."""

    hardware: str
    system: str
    memory_bytes: int
    versions: Mapping[str, str]
    models: tuple[str, ...]
    """Names of those that it may load."""
    heard_at: float
    """Of its latest heartbeat, in unix seconds."""


class Machine:
    """Something that draws, here or elsewhere: its tasks, its weights, its busy time.

    Args:
        models_in_memory: load specs that its memory holds at a time.
        first: what it loads before anything else.
        started_at: reading of the monotonic clock.
        loaded_bytes: memory of load specs that were loaded by earlier processes, by key.
        allows: whether it may run a task; None: all of them.
    """

    def __init__(
        self,
        name: str = LOCAL,
        *,
        first: LoadSpec | None = None,
        models_in_memory: int = 1,
        speed: float = 1.0,
        started_at: float = 0.0,
        loaded_bytes: Mapping[str, int] | None = None,
        allows: Callable[[Task], bool] | None = None,
    ) -> None:
        self.name = name
        self.allows = allows
        self.missing: frozenset[str] = frozenset()  # names of models that it has to download first
        self.about: About | None = None  # None: it is this machine
        self.available = True  # its worker is there, and begins tasks
        self.drained = False  # the operator gives it no more tasks
        self.declined = FIFOCache[str, str](DECLINED_KEPT)  # by task, why it will not draw it
        self.last_error: str | None = None  # of its worker, in words
        self.offered: Task | None = None  # a waiting task that was sent to it
        self.load_orders: list[LoadSpec] = []  # what the operator wants loaded on it
        self.downloaded_bytes: int | None = None  # of what it loads, while it downloads that
        self.resident = Resident(Sizes(measured=loaded_bytes), most=models_in_memory)
        self.speed = speed  # work that it does in a second, in seconds of the timing model
        self.runs: dict[str, Run] = {}
        """By task id, in the order of their claims: those that are being encoded, perhaps a paused
        one, and one on the GPU."""
        self.stopping: Run | None = None
        """Cancelled, but the worker has not stopped at a step yet."""
        self.loading: LoadSpec | None = first
        """What is being loaded, or will be before anything else."""
        self.load_started_at: float | None = None
        self.load_share = 0.0  # part of the weights in memory of what is being loaded
        self.load_part_s = 0.0
        """Longest time between two reports of this load, in which it cannot be stopped."""
        self.load_reported_at = 0.0
        self._loaded: dict[str, LoadSpec] = {}  # all that were in memory since the start, by key
        self._started_at = started_at
        self._busy: deque[tuple[float, float]] = deque()  # end, seconds; of the last hour
        self.busy_ended_s = 0.0  # of all that have left the GPU, since the start
        self._done: deque[float] = deque()  # ends of tasks that were done, of the last hour

    @property
    def loaded(self) -> tuple[LoadSpec, ...]:
        """The weights in memory, the latest used first."""
        return tuple(self._loaded[key] for key in self.resident.keys if key in self._loaded)

    @property
    def in_order(self) -> list[Run]:
        """The running tasks in the order in which they leave the GPU: a paused one is last."""
        return sorted(self.runs.values(), key=lambda run: run.paused_at is not None)

    @property
    def last_on_gpu(self) -> Run | None:
        """The running task that leaves the GPU last: others may preempt it."""
        return next((run for run in reversed(self.in_order) if run.on_gpu), None)

    @property
    def takes_tasks(self) -> bool:
        return self.available and not self.drained

    @property
    def planned_by(self) -> tuple[object, ...]:
        """What a plan depends on, besides the schedule."""
        takes = self.available, self.drained, self.missing, len(self.declined), self.offered
        return self.name, *takes, self.speed, self.resident, self.loading, self.stopping, *self.runs

    def can_run(self, task: Task) -> bool:
        """Whether it takes tasks, and may load all that this one needs."""
        if not self.takes_tasks or task.task_id in self.declined:
            return False
        return self.allows is None or self.allows(task)

    def download_bytes(self, task: Task) -> float:
        """What it would have to download before it can run a task."""
        if not self.missing:
            return 0.0
        models = {stage.load_spec.model for stage in task.stages}
        return sum(model.download_bytes for model in models if model.name in self.missing)

    @property
    def loading_run(self) -> Run | None:
        """The running task whose weights are being loaded."""
        runs = self.runs.values()
        return next((run for run in runs if run.progress.phase is Phase.LOADING), None)

    def start(self, task: Task, at: float, gaps: int = 0) -> None:
        """A task is claimed."""
        self.stopping = self.offered = None
        progress = Progress(
            Phase.TEXT_ENCODING, steps_total=task.params.steps_run, image=task.images_done
        )
        self.runs[task.task_id] = Run(task, self, at, progress, at, at, gaps_before=gaps)
        self.use(task.stages[0].load_spec)

    def report(self, run: Run, progress: Progress, at: float) -> None:
        was_on_gpu = run.on_gpu
        new_stage = progress.stage != run.progress.stage
        run.advance(progress, at)
        if was_on_gpu and not run.on_gpu:
            self._book(run, at)
        if new_stage:
            self.use(run.stage.load_spec)

    def end(self, run: Run, at: float, *, done: bool = False, stopping: bool = False) -> None:
        """A task no longer runs.

        Args:
            stopping: the worker is still at a step of it.
        """
        del self.runs[run.task.task_id]
        if done:
            self._done.append(at)
        if run.on_gpu:
            self._book(run, at)
            if stopping and run.paused_at is None:
                self.stopping = run

    def run(self, task_id: str, attempt: int) -> Run | None:
        """None: the task does not run any more, or not this attempt, or not here."""
        run = self.runs.get(task_id)
        return run if run is not None and run.task.attempt == attempt else None

    def use(self, spec: LoadSpec) -> None:
        """These weights are used, if they are in memory."""
        if spec.key in self.resident.keys:
            self.resident = self.resident.after(spec)

    def load_started(self, spec: LoadSpec, at: float) -> None:
        self.loading, self.load_started_at, self.load_share = spec, at, 0.0
        self.load_part_s, self.load_reported_at = 0.0, at

    def load_reported(self, share: float, at: float) -> None:
        """A part of the weights is in memory, and this share of them."""
        self.load_part_s = max(self.load_part_s, at - self.load_reported_at)
        self.load_share, self.load_reported_at = share, at

    def load_finished(
        self, spec: LoadSpec, resident: Sequence[str], at: float, memory: Memory | None = None
    ) -> float:
        """These weights are in memory. Returns the seconds that loading took.

        Args:
            resident: keys of all that is in memory now, the latest used first.
            memory: of the machine, now.
        """
        seconds = at - (at if self.load_started_at is None else self.load_started_at)
        self._loaded[spec.key] = spec
        if memory:
            sizes = self.resident.sizes.now(memory.room_bytes, memory.loaded_bytes)
            self.resident = self.resident._replace(sizes=sizes)
        self.resident.sizes.of(spec)
        self.now_resident(resident)
        for run in self.runs.values():  # the task has lost no time of its own by it
            if run.progress.phase in (Phase.LOADING, Phase.TEXT_ENCODING):
                run.phase_started_at = run.step_started_at = at
        return seconds

    def now_resident(self, resident: Sequence[str]) -> None:
        """Loading has ended, well or not, or weights were unloaded: this is in memory."""
        self.loading = self.load_started_at = None
        self.resident = self.resident._replace(keys=tuple(resident))

    def resident_after_runs(self) -> Resident:
        """What is in memory when the first waiting task starts."""
        resident = self.resident
        if self.loading is not None:
            resident = resident.after(self.loading)
        for run in self.in_order:
            if run.on_gpu:
                _, resident = resident.loads(run.task.stages[run.progress.stage :])
        return resident

    def last_hour(self, now: float) -> tuple[int, float]:
        """Tasks done in the last hour (or since the start), and the share of it in which the GPU
        had a task."""
        since = max(self._started_at, now - HOUR_S)
        while self._done and self._done[0] < since:
            self._done.popleft()
        return len(self._done), min(self.busy_s(since, now) / max(now - since, 1e-9), 1.0)

    def busy_s(self, since: float, now: float) -> float:
        """Seconds since this moment, at most an hour ago, in which the GPU had a task."""
        while self._busy and self._busy[0][0] < now - HOUR_S:
            self._busy.popleft()
        return sum(seconds for end, seconds in self._busy if end >= since) + self.running_s(now)

    def running_s(self, now: float) -> float:
        """Seconds that its running tasks have been on the GPU, if they still need it."""
        return sum(run.gpu_s(now) for run in self.runs.values() if run.on_gpu)

    def _book(self, run: Run, at: float) -> None:
        run.left_gpu_at = run.until(at)
        self._busy.append((at, run.gpu_s(at)))
        self.busy_ended_s += run.gpu_s(at)


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
        self.lost = FIFOCache[str, Machine](LOST_KEPT)
        """By name, those that have left, the latest last."""
        self.local, self._draws, self._needs_download = local, draws, needs_download
        if not draws:
            local.available, local.loading = False, None

    @property
    def drawing(self) -> list[Machine]:
        """All but the server's own, if that does not draw."""
        return [machine for machine in self if self._draws or machine is not self.local]

    def join(self, machine: Machine) -> None:
        self.append(machine)
        self.lost.pop(machine.name, None)
        if not self._draws and self.local in self:
            self.remove(self.local)

    def leave(self, machine: Machine) -> None:
        """A machine that runs nothing any more leaves."""
        if machine in self:
            self.remove(machine)
            self.lost[machine.name] = machine
        if not self:
            self.append(self.local)

    def named(self, name: str) -> Machine:
        """One of them, or one that has left. Raises: UnknownMachine."""
        known: dict[str, Machine] = {**self.lost, **{m.name: m for m in (*self, self.local)}}
        if name not in known:
            raise UnknownMachine
        return known[name]

    def lack(self, model: Model) -> bool:
        """Whether weights must be downloaded to the server's machine before a task can run: no
        machine has them. Any thread may call it, without a lock."""
        if not self._draws or not self._needs_download(model):
            return False
        others = (o for o in list(self) if o.about and model.name in o.about.models)
        if all(model.name in other.missing for other in others):
            return True
        self.local.missing |= {model.name}
        return False

    def run(self, task_id: str) -> Run | None:
        """What a worker runs."""
        return next((m.runs[task_id] for m in self if task_id in m.runs), None)
