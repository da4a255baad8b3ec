"""A task: one request for images, from submit to deletion.

`GenerationParams` are its complete parameters (api/generate_request.py: what a client may send).
`Task` is its state: the scheduler changes it, the store keeps it, answers are built from copies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ConfigDict, Field

from fields import PassedFields
from models.model_catalog import LoadSpec, Lora
from models.model_rules import SIDE_STEP
from timing_model import LOCAL, Confidence, Measured

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**64 - 1
ANONYMOUS = BY_ID, BY_ADDRESS = "id:", "address:"
"""With which the names of clients without a key begin."""


class TaskStatus(StrEnum):
    WAITING = "waiting"  # for the GPU, weights or its prompt; next: claimed, cancelled, failed
    RUNNING = "running"  # a worker has it; next: finished, failed, released, cancelled
    DONE = "done"  # all images are stored; next: removed (fetched, deleted or pruned)
    FAILED = "failed"  # ended with an error; next: retried, removed
    CANCELLED = "cancelled"  # by its client, the operator, or its time was up; next: removed


class Phase(StrEnum):
    """Phases of a task: it waits in the first one, runs in the others; between steps: paused."""

    PROMPT_EXPANSION = "prompt_expansion"
    LOADING = "loading"
    TEXT_ENCODING = "text_encoding"
    DENOISING = "denoising"
    PAUSED = "paused"  # another task is drawn first (scheduler/policy.py)
    DECODING = "decoding"
    IMAGE_ENCODING = "image_encoding"


Report = Callable[[Phase, int, int], None]
"""Called when a phase begins or a step ends: (phase, steps_done, steps_total). It may raise."""


class InputImage(NamedTuple):
    """An image from the client: decoded, upright, stored as PNG in the input folder of the task."""

    file: str
    """Name of the file: the first 16 hexadecimal digits of the SHA-256 of its bytes."""
    width: int
    height: int


class Control(NamedTuple):
    """A picture to follow."""

    image: InputImage
    type: str | None = None
    strength: float | None = None
    """Relative to control_strength; None: 1."""


class GenerationParams(PassedFields):
    """The complete parameters of a task: the request with defaults filled in and sizes rounded.

    `guidance` is None if the model has none. width and height are those before `upscale`.
    `upscaler` is the model that upscales the images at the end; None if `model` does it itself.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    prompts: tuple[str, ...] = ()
    """The prompt of each image, where they differ; `prompt` is the first one."""
    seed: int = Field(ge=0, le=MAX_SEED)
    """Seed of the first image. Each further image adds 1, modulo 2^64."""
    width: int
    height: int
    steps: int
    model: str = ""
    """Empty in old records: the server's default model."""
    count: int = 1
    init_image: InputImage | None = None
    images: tuple[InputImage, ...] = ()
    mask: InputImage | None = None
    control_image: InputImage | None = None
    control_images: tuple[InputImage, ...] = ()
    """Further controls."""
    loras: tuple[Lora, ...] = ()
    metadata: bool = True
    """Whether the image files contain the parameters."""
    defaulted: tuple[str, ...] = ()
    """Fields that the request left to the model. Empty in records from before it was kept."""
    warnings: tuple[str, ...] = ()
    """Sentences for the client: one for each LoRA that fits only a part of the model."""
    asked: str = ""
    """Digest of the request without its images (GenerateRequest.digest); empty in old
    records."""

    @property
    def tokens(self) -> int:
        """Latent tokens of an image: one per 16 x 16 pixels. Stage.tokens: those that are drawn."""
        return (self.width // SIDE_STEP) * (self.height // SIDE_STEP)

    @property
    def steps_run(self) -> int:
        """Steps that are run. With an init_image, mflux skips the first ones."""
        if self.init_image is None or not self.image_strength:
            return self.steps
        return self.steps - max(1, int(self.steps * self.image_strength))

    @property
    def inputs(self) -> tuple[InputImage, ...]:
        single = (self.init_image, self.mask, self.control_image)
        return (*(image for image in single if image), *self.images, *self.control_images)

    @property
    def controls(self) -> tuple[Control, ...]:
        """All controls, control_image first."""
        if self.control_image is None:
            return ()
        more = zip_longest(
            self.control_images, self.control_types or (), self.control_strengths or ()
        )
        return (
            Control(self.control_image, self.control_type),
            *(Control(*control) for control in more),
        )

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the finished images, in pixels."""
        if not self.upscale:
            return self.width, self.height
        scale = self.shorter_side / min(self.width, self.height)
        return int(self.width * scale) // 2 * 2, int(self.height * scale) // 2 * 2  # as in mflux

    @property
    def shorter_side(self) -> int:
        """The shorter side of the finished images in pixels, a parameter of the upscaler."""
        return round(min(self.width, self.height) * (self.upscale or 1.0))

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % (MAX_SEED + 1)

    def prompt_of(self, index: int) -> str:
        return self.prompts[index] if self.prompts else self.prompt


@dataclass(frozen=True)
class Progress:
    """The progress of a running task, as its worker reports it."""

    phase: Phase
    steps_done: int = 0
    """Steps of the current image."""
    steps_total: int = 0
    stage: int = 0
    image: int = 0


class Verdict(Enum):
    """The answer to a report: what the worker must do."""

    CONTINUE = "continue"
    PAUSE = "pause"  # claim the task that preempts this one, draw it, report again, go on
    STOP = "stop"  # the task was cancelled or taken away, or the server stops


class Reason(StrEnum):
    """Why a task ends later than was forecast before."""

    OVERTAKEN = "overtaken"
    MODEL_SWITCH = "model_switch"
    SLOWER = "slower_than_expected"


class Forecast(NamedTuple):
    """Expected start and end of a task, in seconds from now."""

    pos: int
    """Number of tasks that wait before it; 0 if it is next or running."""
    start_s: float
    """Seconds until a worker starts it; 0 if it runs."""
    end_s: float
    """Seconds until its last image is ready, median estimate."""
    p90_s: float
    """Seconds until then, 90 % bound."""
    confidence: Confidence
    switches: int = 0
    """Number of model loads before it starts, its own included."""
    reason: Reason | None = None
    preempted: bool = False
    """Whether it runs, and others preempt it or have done so."""


@dataclass(frozen=True)
class Stage:
    """A part of a task that one model does."""

    load_spec: LoadSpec
    params: GenerationParams
    control: int = 0
    """Index of the control of which a helper model makes a map."""
    images_done: int = 0
    """Images that are stored already and not generated again."""

    @property
    def images_left(self) -> int:
        return self.params.count - self.images_done

    @property
    def tokens(self) -> int:
        """Latent tokens that are drawn: some classes draw two pictures beside each other."""
        return self.params.tokens * self.load_spec.pipeline.width_factor

    def image(self, index: int) -> "Stage":
        """Returns the part of this stage that makes one image."""
        if index == 0 and self.params.count == 1:
            return self
        seed, prompt = self.params.seed_of(index), self.params.prompt_of(index)
        one = {"seed": seed, "count": 1, "prompt": prompt, "prompts": ()}
        return Stage(self.load_spec, self.params.model_copy(update=one))

    def helped(self, helper: "Stage", results: Sequence[object]) -> "Stage":
        """Returns the stage with the control image or the prompts that a helper has made for it."""
        number, makes, result = helper.control, helper.load_spec.model.makes, results[0]
        more: dict[str, object] = {"control_type": "ready"} if makes == "control_image" else {}
        if self.params.prompts and makes == "prompt":
            more = {"prompts": tuple(results)}
        update = {makes: result, **more}
        if number:
            images = list(self.params.control_images)
            types = [control.type for control in self.params.controls[1:]]
            images[number - 1 : number], types[number - 1] = [result], "ready"  # type: ignore[list-item]
            update = {"control_images": tuple(images), "control_types": types}
        return Stage(self.load_spec, self.params.model_copy(update=update))

    def first_images(self, count: int) -> "Stage":
        """Returns this stage with only so many images; a helper model runs once for all."""
        if self.load_spec.model.makes:
            return self
        return replace(self, params=self.params.model_copy(update={"count": count}))

    def after_images(self, count: int) -> "Stage":
        """Returns this stage as it continues when so many images are stored."""
        return self if self.load_spec.model.makes else replace(self, images_done=count)

    def starting_from(self, picture: InputImage) -> "Stage":
        return Stage(self.load_spec, self.params.model_copy(update={"init_image": picture}))


@dataclass(frozen=True)
class Drawn:
    """A generated picture, and the metadata that mflux would write into its file."""

    picture: "Image"
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Encoded:
    """A generated and encoded image."""

    image: bytes
    index: int
    measured: tuple[tuple[int, Measured], ...] = ()
    """Measured durations of each stage of this image. Empty: nothing is learned."""


class Owner(NamedTuple):
    """The client of a task, and its share of the GPU time."""

    name: str = ""
    """Of the client that submitted it (key_file.Client, or identity.py); empty: everybody."""
    end_user: str = ""
    """Which user of that client, as the client says; matters for the order only."""
    weight: float = 1.0
    """Share of the GPU time relative to other clients."""


ANYBODY = Owner()


@dataclass
class Task:
    """One task: in memory while it waits or runs, on disk until it is pruned. Only the scheduler
    changes a task, under its lock. All others get copies."""

    task_id: str
    params: GenerationParams
    priority: int
    """Higher runs first: -1 background, 0 normal, 1 urgent."""
    created_at: float
    """Unix seconds, as all fields that end with _at."""
    owner: Owner = ANYBODY
    status: TaskStatus = TaskStatus.WAITING
    attempt: int = 0
    """Number of its latest claim, from 1. Calls of a worker with another number are refused."""
    retried_after: int = 0  # number of its claims until it was retried last; 0: it never was
    interruptions: int = 0  # number of claims during which the worker or the server died
    machine: str = LOCAL  # name of the one that has claimed it last
    started_at: float | None = None
    ended_at: float | None = None
    last_image: int | None = None
    """Index of the image after which the task is to be cancelled; None: generate all images."""
    fetched_at: float | None = None
    """When all of its images had been fetched and were marked for deletion."""
    kept: bool = False  # pinned by its client
    kept_since: float | None = None  # when it ended, was pinned or released (KeepClock)
    expires_in_s: float | None = None  # until it is removed; in copies of ended tasks only
    image_sizes: tuple[int, ...] = ()
    """Size of each stored image in bytes."""
    measured: tuple[Measured, ...] = ()
    """Measured durations of each stored image, by stage."""
    error_code: str | None = None
    error: str | None = None

    stages: tuple[Stage, ...] = ()
    """Its stages in order: generation, and perhaps upscaling. Empty once it has ended."""
    sequence: int = 0
    """Number in the order in which tasks joined the schedule."""
    group: int = 0
    """Sequence of the task that it joined because they share weights, or its own (policy.py)."""
    turn: float = 0.0
    """Decides when it runs (policy.key): virtual time (fair_share.py), or that of its group."""
    overtaken_s: float = 0.0
    """GPU seconds of urgent tasks that came later and were started before it."""
    aged: bool = False  # whether it counts as urgent, because it was overtaken for too long
    waits_for_download: bool = False  # in copies only, as the next one
    waits_for_prompt: bool = False
    start_by: float | None = None  # when it must have started (max_age_s), as kept_since
    asked_at: float = 0.0
    """When its client asked for it last, in seconds of the KeepClock. Kept in memory only."""
    progress: Progress | None = None  # None unless it is running; in copies only
    share_done: float = 0.0  # of its running time, 0 to 1; in copies only
    load_share: float | None = None  # 0 to 1 of its weights, in the phase LOADING; in copies only
    forecast: Forecast | None = None  # None once it has ended; in copies only

    def __copy__(self) -> "Task":
        """Faster than the default of copy(), because lists copy 1,000 tasks at a time."""
        task = object.__new__(Task)
        task.__dict__.update(self.__dict__)
        return task

    @property
    def ended(self) -> bool:
        return self.status not in (TaskStatus.WAITING, TaskStatus.RUNNING)

    @property
    def images_done(self) -> int:
        return len(self.image_sizes)

    @property
    def pos(self) -> int | None:
        """Number of tasks that wait before it. Set in copies only."""
        return self.forecast.pos if self.forecast else None

    @property
    def phase(self) -> Phase | None:
        if self.waits_for_prompt:
            return Phase.PROMPT_EXPANSION
        return self.progress.phase if self.progress else None

    @property
    def steps_done(self) -> int:
        if self.progress:
            return self.progress.steps_done
        return self.params.steps_run if self.status is TaskStatus.DONE else 0

    @property
    def steps_total(self) -> int:
        return self.progress.steps_total if self.progress else self.params.steps_run


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, as counted by MLX."""

    active_bytes: int = 0
    peak_bytes: int = 0
    """Peak of active memory during the latest image."""
    cache_bytes: int = 0
    """Memory that was freed and is kept for reuse."""
    weights_bytes: int = 0
    """Memory of the loaded models; 0: none is loaded."""
    total_bytes: int = 0
    """Memory of the machine."""
    room_bytes: int = 0
    """Memory that several loaded models may fill together; 0: unknown."""
    loaded_bytes: Mapping[str, int] = field(default_factory=dict)
    """What each load spec takes that has been loaded since the start, by key."""
