"""A task: one request for images, from submit to fetch. Its words and its life.

`GenerationParams` is what is done for it (api/generate_request.py has what a client may ask),
`Task` is its life.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from models.model_catalog import Lora, Weights
from timing_model import Measured, Work

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**64 - 1
SIDE_STEP = 16
"""mflux draws in squares of 16 pixels: widths and heights are rounded down to multiples of it."""


class TaskStatus(StrEnum):
    WAITING = "waiting"  # in the queue; the worker moves it on (claim), or its client (cancel)
    RUNNING = "running"  # on the GPU or being encoded; the worker moves it on
    DONE = "done"  # its image can be fetched; leaves when fetched and deleted, or pruned
    FAILED = "failed"  # ended with an error; leaves when pruned
    CANCELLED = "cancelled"  # ended by its client; leaves when pruned


class Phase(StrEnum):
    """What a running task is at, in this order."""

    TEXT_ENCODING = "text_encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    IMAGE_ENCODING = "image_encoding"


Report = Callable[[Phase, int, int], None]
"""Tells that a phase was reached or a step ended: (phase, steps_done, steps_total). May raise to
end the generation at this point."""


class InputImage(NamedTuple):
    """A picture that the client gave, decoded, turned upright and kept as PNG in the task's folder
    of inputs."""

    file: str
    """Name of the file: the first 16 hexadecimal digits of the SHA-256 of its bytes."""
    width: int
    height: int


class GenerationParams(BaseModel):
    """What is done for a task: the request with everything filled in and rounded."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int = Field(ge=0, le=MAX_SEED)
    """Of the first image; the next one has this plus 1, and so on, modulo 2^64."""
    width: int
    height: int
    steps: int
    guidance: float | None
    """None when the model has no guidance."""
    format: Literal["JPEG", "PNG", "WEBP"]
    quality: int
    model: str = ""
    """Empty in records from before tasks named one: the server's default."""
    quantize: int | None = None
    """Bits asked for."""
    count: int = 1
    """Images."""
    negative_prompt: str | None = None
    scheduler: str | None = None
    init_image: InputImage | None = None
    image_strength: float | None = None
    """0 to 1, how much of init_image is kept (mflux's meaning)."""
    images: tuple[InputImage, ...] = ()
    mask: InputImage | None = None
    control_image: InputImage | None = None
    control_strength: float | None = None
    control_type: str | None = None
    loras: tuple[Lora, ...] = ()
    upscale: float | None = None
    """Factor by which the pictures (of an upscaler: init_image) are enlarged at the end; width and
    height are those before."""
    upscaler: str | None = None
    """The model that does it, where that is not `model`."""
    metadata: bool = True
    """Whether the image files tell these params."""
    warnings: tuple[str, ...] = ()
    """What its client should know: a sentence for each LoRA that fits the model in part."""
    asked: str = ""
    """Digest of what the client asked for, without its pictures (GenerateRequest.digest); empty in
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
        """Of the finished images, in pixels, as an upscaler is asked for it."""
        return round(min(self.width, self.height) * (self.upscale or 1.0))

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % (MAX_SEED + 1)


@dataclass
class Progress:
    """What a running task has behind it. Durations come from a monotonic clock, in seconds."""

    phase: Phase
    claimed_at: float
    """Readings of the monotonic clock, like all that end with at."""
    phase_started_at: float
    steps_done: int = 0
    steps_total: int = 0
    phase_s: dict[Phase, float] = field(default_factory=dict)
    """Seconds of each phase that has ended."""
    step_s: list[float] = field(default_factory=list)
    """Seconds of each step that has ended."""
    step_started_at: float = 0.0
    stage: int = 0
    images_done: int = 0
    """Of this stage."""
    measured: "list[tuple[Work, Measured]]" = field(default_factory=list)
    """What each image before this one was, and took."""
    gaps_before: int = 0
    """Gaps of the clock (RunningClock.gaps) when the task was claimed."""
    shown: float = 0.0
    """Part of its time that was told last, 0 to 1: what is told never goes back."""


@dataclass(frozen=True)
class Promise:
    """The forecast that a client got for its task when it submitted it."""

    at: float
    """Reading of the monotonic clock."""
    wait_s: float
    p90_s: float
    gaps_before: int = 0
    """Gaps of the clock (RunningClock.gaps) at that moment."""


@dataclass(frozen=True)
class Told:
    """What a client was last told about a task, so that the next answer does not contradict it."""

    end_at: float
    """Reading of the monotonic clock at which the task was said to be done."""
    pos: int
    switches: int
    """Model switches that were due before it."""


@dataclass(frozen=True)
class Stage:
    """A part of a task that one model does."""

    weights: Weights
    params: GenerationParams

    def image(self, index: int) -> "Stage":
        """The part of it that makes one of its images."""
        seed = self.params.seed_of(index)
        return Stage(self.weights, self.params.model_copy(update={"seed": seed, "count": 1}))

    def starting_from(self, picture: InputImage) -> "Stage":
        return Stage(self.weights, self.params.model_copy(update={"init_image": picture}))


@dataclass(frozen=True)
class Drawn:
    """A picture that was made, and what mflux writes about it into a file."""

    picture: "Image"
    metadata: Mapping[str, Any] | None = None


@dataclass
class Task:
    """A task that waits or runs. Owned by the QueueManager: only it changes one, under its lock.

    What has ended is in the store alone.
    """

    task_id: str
    params: GenerationParams
    urgent: bool
    stages: tuple[Stage, ...]
    """What is done for it, one after the other: drawing, and perhaps enlarging."""
    created_at: float
    """Unix seconds."""
    status: TaskStatus = TaskStatus.WAITING
    attempts: int = 0
    """Claims so far that were not released."""
    started_at: float | None = None
    """Unix seconds, of its claim."""
    progress: Progress | None = None
    """None while it waits."""
    submitted: "Promise | None" = None
    """What was forecast when it was submitted; None for tasks from before the start."""
    patience_s: float = 0.0
    """Seconds by which others may still delay it by joining the line ahead of it."""
    told: "Told | None" = None
    """What the latest answer about it said."""


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
