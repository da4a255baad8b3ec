"""A task: one request for images, from submit to deletion.

`GenerationParams` is what is done for it (api/generate_request.py: what a client may send).
`Task` is its one snapshot: the scheduler changes it under its lock, the store keeps it, and
answers are made from copies of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ConfigDict, Field

from fields import PassedFields
from models.model_catalog import LoadSpec, Lora
from timing_model import Confidence, Measured

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**64 - 1
SIDE_STEP = 16
"""mflux draws in squares of 16 pixels: widths and heights are rounded down to multiples of it."""


class TaskStatus(StrEnum):
    WAITING = "waiting"  # in the schedule or waiting for a download; next: claim, cancel
    RUNNING = "running"  # a worker has it; next: finish, fail, release (by the worker), cancel
    DONE = "done"  # all images can be fetched; deleted when they were, or pruned
    FAILED = "failed"  # ended with an error; pruned
    CANCELLED = "cancelled"  # ended by its client, perhaps with some images; pruned


class Phase(StrEnum):
    """What a running task is at, in this order."""

    LOADING = "loading"
    TEXT_ENCODING = "text_encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    IMAGE_ENCODING = "image_encoding"


Report = Callable[[Phase, int, int], None]
"""Called by a generator when a phase begins or a step ends: (phase, steps_done, steps_total). May
raise to end the generation at this point."""


class InputImage(NamedTuple):
    """A picture that the client gave, decoded, turned upright and kept as PNG in the task's folder
    of inputs."""

    file: str
    """Name of the file: the first 16 hexadecimal digits of the SHA-256 of its bytes."""
    width: int
    height: int


class GenerationParams(PassedFields):
    """What is done for a task: the request with everything filled in and rounded.

    `guidance` is None when the model has none. width and height are those before `upscale`.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int = Field(ge=0, le=MAX_SEED)
    """Of the first image; the next one has this plus 1, and so on, modulo 2^64."""
    width: int
    height: int
    steps: int
    model: str = ""
    """Empty in records from before tasks named one: the server's default."""
    count: int = 1
    """Images."""
    init_image: InputImage | None = None
    images: tuple[InputImage, ...] = ()
    mask: InputImage | None = None
    control_image: InputImage | None = None
    loras: tuple[Lora, ...] = ()
    upscaler: str | None = None
    """The model that enlarges the pictures at the end, where that is not `model`."""
    metadata: bool = True
    """Whether the image files tell these params."""
    warnings: tuple[str, ...] = ()
    """What its client should know: a sentence for each LoRA that fits the model in part."""
    asked: str = ""
    """Digest of the request, without its pictures (GenerateRequest.digest); empty in
    records from before it was kept."""

    @property
    def tokens(self) -> int:
        """Latent tokens of an image: one for each 16 x 16 pixels."""
        return (self.width // SIDE_STEP) * (self.height // SIDE_STEP)

    @property
    def steps_run(self) -> int:
        """Steps that really run: with an init_image mflux starts from one that is partly done."""
        if self.init_image is None or not self.image_strength:
            return self.steps
        return self.steps - max(1, int(self.steps * self.image_strength))

    @property
    def inputs(self) -> tuple[InputImage, ...]:
        single = (self.init_image, self.mask, self.control_image)
        return (*(image for image in single if image), *self.images)

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the finished images, in pixels."""
        if not self.upscale:
            return self.width, self.height
        scale = self.shorter_side / min(self.width, self.height)
        return int(self.width * scale) // 2 * 2, int(self.height * scale) // 2 * 2  # as mflux does

    @property
    def shorter_side(self) -> int:
        """Of the finished images, in pixels: the parameter of an upscaler."""
        return round(min(self.width, self.height) * (self.upscale or 1.0))

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % (MAX_SEED + 1)


@dataclass(frozen=True)
class Progress:
    """What a worker reports of a running task."""

    phase: Phase
    steps_done: int = 0
    """Of the present image."""
    steps_total: int = 0
    stage: int = 0
    image: int = 0
    """Index of the image that this stage is at."""


class Verdict(Enum):
    """What a worker must do after a report."""

    CONTINUE = "continue"
    STOP = "stop"  # the task was cancelled or taken away, or the server stops


class Reason(StrEnum):
    """Why a task is done later than was forecast when it was submitted or claimed."""

    OVERTAKEN = "overtaken"
    MODEL_SWITCH = "model_switch"
    SLOWER = "slower_than_expected"


@dataclass(frozen=True)
class Forecast:
    """When a task is expected to start and to end. Seconds from now."""

    pos: int
    """Tasks that wait before it; 0 when it is next or running."""
    start_s: float
    """Until a worker starts it; 0 when it runs."""
    end_s: float
    """Until its last image is ready: median estimate."""
    p90_s: float
    """Until then, in nine of ten cases."""
    confidence: Confidence
    switches: int = 0
    """Loads of weights that are due before it starts, its own included."""
    reason: Reason | None = None


@dataclass(frozen=True)
class Stage:
    """A part of a task that one model does."""

    load_spec: LoadSpec
    params: GenerationParams

    def image(self, index: int) -> "Stage":
        """The part of it that makes one of its images."""
        seed = self.params.seed_of(index)
        return Stage(self.load_spec, self.params.model_copy(update={"seed": seed, "count": 1}))

    def first_images(self, count: int) -> "Stage":
        """The part of it that makes only so many of its images."""
        return Stage(self.load_spec, self.params.model_copy(update={"count": count}))

    def starting_from(self, picture: InputImage) -> "Stage":
        return Stage(self.load_spec, self.params.model_copy(update={"init_image": picture}))


@dataclass(frozen=True)
class Drawn:
    """A picture that was made, and what mflux writes about it into a file."""

    picture: "Image"
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Encoded:
    """An image that is drawn and encoded."""

    image: bytes
    index: int
    """Of the image, from 0."""
    measured: tuple[tuple[int, Measured], ...] = ()
    """Seconds of each picture that was drawn for it: stage, and what it took. Empty: nothing is
    learned."""


@dataclass
class Task:
    """One task: in memory while it waits or runs, on disk until it is pruned.

    The scheduler alone changes one, under its lock; everybody else gets copies.
    """

    task_id: str
    params: GenerationParams
    priority: int
    """Higher runs first: 0 normal, 1 urgent."""
    created_at: float
    """Unix seconds, like the other times that end with _at."""
    status: TaskStatus = TaskStatus.WAITING
    attempt: int = 0
    """Number of its latest claim, from 1; a worker that names another one is refused."""
    interruptions: int = 0
    """Claims during which the worker or the server died."""
    started_at: float | None = None
    ended_at: float | None = None
    last_image: int | None = None
    """Index of the image after which its client wants it cancelled; None: draw all images."""
    fetched_at: float | None = None
    """When the last of its images was sent and marked for deletion."""
    image_sizes: tuple[int, ...] = ()
    """Bytes of each image that is stored."""
    measured: tuple[Measured, ...] = ()
    """Seconds that each stored image took, by stage."""
    error_code: str | None = None
    error: str | None = None

    stages: tuple[Stage, ...] = ()
    """What is done for it, one after the other: drawing, and perhaps upscaling. Empty once it has
    ended."""
    sequence: int = 0
    """Number in the order in which tasks joined the schedule."""
    group: int = 0
    """Sequence of the task that it joined because they share weights, or its own (policy.py)."""
    waits_for_download: bool = False
    progress: Progress | None = None
    """None unless it runs."""
    share_done: float = 0.0
    """Share of its running time that is over, 0 to 1; in copies for readers."""
    forecast: Forecast | None = None
    """In copies for readers; None once it has ended."""

    def __copy__(self) -> "Task":
        """Several times as fast as the default of copy(): lists copy 1,000 tasks at a time."""
        task = object.__new__(Task)
        task.__dict__.update(self.__dict__)
        return task

    @property
    def ended(self) -> bool:
        return self.status not in (TaskStatus.WAITING, TaskStatus.RUNNING)

    @property
    def images_done(self) -> int:
        """Images that are stored."""
        return len(self.image_sizes)

    @property
    def pos(self) -> int | None:
        """Tasks that wait before it; in copies for readers."""
        return self.forecast.pos if self.forecast else None

    @property
    def phase(self) -> Phase | None:
        return self.progress.phase if self.progress else None

    @property
    def steps_done(self) -> int:
        """Of the present image."""
        if self.progress:
            return self.progress.steps_done
        return self.params.steps_run if self.status is TaskStatus.DONE else 0

    @property
    def steps_total(self) -> int:
        return self.progress.steps_total if self.progress else self.params.steps_run


@dataclass(frozen=True)
class Memory:
    """Bytes, as MLX counts them."""

    active_bytes: int = 0
    peak_bytes: int = 0
    """Most that was active during the latest picture."""
    cache_bytes: int = 0
    """Freed, and kept for reuse."""
    weights_bytes: int = 0
    """Of the loaded models; 0: none is."""
    total_bytes: int = 0
    """Of the machine."""
