"""How a task and its wait are shown: what the queue tells about them at one moment."""

from dataclasses import dataclass
from enum import StrEnum

from queueing.work_line import WorkOfKey
from task import GenerationParams, Phase, Task, TaskStatus
from timing_model import Confidence, Measured


class Reason(StrEnum):
    """Why a task is done later than the latest answer said."""

    OVERTAKEN = "overtaken"
    MODEL_SWITCH = "model_switch"
    SLOWER = "slower_than_expected"


@dataclass(frozen=True)
class Wait:
    """When a task is expected to be done. Seconds from now."""

    pos: int
    """Tasks waiting before it; 0 when it is next or running."""
    start_s: float
    """Until the worker turns to it; 0 when it runs."""
    end_s: float
    """Until its image is ready: as likely later as earlier."""
    p90_s: float
    """Until its image is ready, nine times out of ten."""
    confidence: Confidence
    switches: int = 0
    reason: Reason | None = None


@dataclass(frozen=True)
class Lanes:
    """When the GPU and the encoder are free of what runs now. Seconds from now."""

    gpu_free_s: float
    encoder_free_s: float
    waits: list[tuple[Task, Wait]]
    """The running tasks, first the one that is furthest."""


@dataclass(frozen=True)
class Ahead:
    """What comes before a waiting task, behind the running ones."""

    pos: int
    works: list[WorkOfKey]
    load_s: float
    """Loading that no sum in `works` counts: for the first tasks of the levels."""
    loads: int
    own_load_s: float
    """Loading for the task itself."""
    own_loads: int


@dataclass(frozen=True)
class TaskView:
    """One task as it stands now, with its forecast."""

    task_id: str
    status: TaskStatus
    params: GenerationParams
    urgent: bool
    created_at: float
    started_at: float | None
    ended_at: float | None
    wait: Wait | None
    """None when it has ended."""
    phase: Phase | None
    steps_done: int
    steps_total: int
    progress: float
    """Part of its time that is over, 0 to 1."""
    error_code: str | None
    error: str | None
    measured: tuple[Measured, ...] = ()
    """Of each image that is done."""
    images_done: int = 0
    image_sizes: tuple[int, ...] = ()
    held: bool = False
    """Whether it waits for a download."""

    @property
    def pos(self) -> int | None:
        return self.wait.pos if self.wait else None

    @property
    def wait_s(self) -> float | None:
        """Seconds until its image is ready."""
        return self.wait.end_s if self.wait else None
