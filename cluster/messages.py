"""The messages between the head and its workers: JSON, checked by these models when they arrive.

No message contains a path, a URL or code. Names of models and LoRAs are looked up in what the
receiver allows; pictures are named by keys of the carrier.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from allowed import Allowed
from models.model_catalog import Catalog, LoadSpec, Lora
from task import Memory, Phase, Progress
from timing.speeds import Product
from timing_model import Measured

PROTOCOL = 3
"""Both sides must have the same. It changes with every change of a message."""
MOST_IMAGE_BYTES = 256_000_000
"""Of a picture that travels, in either direction."""

Name = Annotated[str, Field(min_length=1, max_length=200)]
TaskId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
File = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0, le=10_000)]
Attempt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spec(Message):
    """Which weights."""

    model: Name
    pipeline: Name
    quantize: int | None
    loras: list[tuple[str, float]]
    control_strength: float | None

    @staticmethod
    def of(spec: LoadSpec) -> "Spec":
        return Spec(
            model=spec.model.name,
            pipeline=spec.pipeline.name,
            quantize=spec.quantize,
            loras=[(lora.name, lora.scale) for lora in spec.loras],
            control_strength=spec.control_strength,
        )

    def among(self, allowed: Allowed) -> LoadSpec | None:
        """The weights; None: they are not allowed here."""
        model = Catalog([*allowed.models, *allowed.helpers]).find(self.model)
        for pipeline in model.pipelines if model else ():
            if model and pipeline.name == self.pipeline:
                loras = tuple(Lora(name, scale) for name, scale in self.loras)
                return LoadSpec(model, pipeline, self.quantize, loras, self.control_strength)
        return None


# -- from the head ---------------------------------------------------------------------------------


class Presence(BaseModel):
    """What the head says of itself while it runs. Later versions may add to it."""

    protocol: int
    session: str
    lease_s: Annotated[float, Field(gt=0, le=3600)]
    """A worker that was silent for so long has lost its tasks."""


class Offer(Message):
    """A task to draw, after the one that is being drawn."""

    kind: Literal["offer"] = "offer"
    session: Name
    task_id: TaskId
    attempt: Attempt
    params: dict[str, Any]
    images_done: Count
    inputs: dict[File, Key]


class Stop(Message):
    """This attempt is not wanted any more, whether it has begun or not."""

    kind: Literal["stop"] = "stop"
    session: Name
    task_id: TaskId
    attempt: Attempt


class Answer(Message):
    """The answer to an Ended or an Image."""

    kind: Literal["answer"] = "answer"
    session: Name
    request: Key
    accepted: bool
    retry: str | None = None
    """Why the head could not do it now: ask again."""


class Watch(Message):
    """Somebody looks at the preview of this task."""

    kind: Literal["watch"] = "watch"
    session: Name
    task_id: TaskId


class Load(Message):
    """The operator wants these weights loaded after the present task. Repeated until it begins."""

    kind: Literal["load"] = "load"
    session: Name
    spec: Spec


class Heard(Message):
    """The answer to a heartbeat."""

    kind: Literal["heard"] = "heard"
    session: Name


class Refused(Message):
    """The head does not take this worker. The sentence says why."""

    kind: Literal["refused"] = "refused"
    session: Name
    sentence: str


FromHead = Offer | Stop | Answer | Watch | Load | Heard | Refused


# -- from a worker ---------------------------------------------------------------------------------


class Model(Message):
    name: Name
    missing: bool = False
    """Whether its weights would have to be downloaded first."""
    options: Annotated[str, Field(max_length=200)] = ""
    """How it is built: BuildOptions.suffix."""


class Registration(Message):
    """What a worker says about itself."""

    name: Name
    hardware: Name
    system: Name
    memory_bytes: Annotated[int, Field(ge=0)]
    speeds: dict[Product, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    """Measured FLOP/s; empty: not yet."""
    versions: dict[Name, Name]
    models: list[Model]
    bits: list[int | None]
    """What weights may be quantized to."""
    loras: list[Name]
    lora_repos: bool
    models_in_memory: Annotated[int, Field(ge=1, le=100)]


class FromWorker(Message):
    worker: Key
    session: Name


class Held(Message):
    task_id: TaskId
    attempt: Attempt


class Heartbeat(FromWorker):
    """Sent every few seconds; the first one registers the worker."""

    kind: Literal["heartbeat"] = "heartbeat"
    protocol: int
    registration: Registration
    resident: list[Name]
    held: list[Held]
    """The tasks that it has, begun or not."""
    waiting: bool = False
    """Whether its worker thread waits for a task."""
    downloaded_bytes: Annotated[int, Field(ge=0)] | None = None
    """On its disk of the weights that it loads, while they are downloaded."""
    deaf: bool = False
    """Whether nothing of the head reaches it, not even answers to heartbeats."""
    stopping: bool = False
    """Whether it begins no more tasks."""


class Decline(FromWorker):
    """It will never draw this task: it does not allow what the task needs."""

    kind: Literal["decline"] = "decline"
    task_id: TaskId
    attempt: Attempt
    reason: str


class Reported(FromWorker):
    """A task has reached a phase or ended a step. The first report begins it."""

    kind: Literal["report"] = "report"
    task_id: TaskId
    attempt: Attempt
    phase: Phase
    steps_done: Count
    steps_total: Count
    stage: Count
    image: Count

    @property
    def progress(self) -> Progress:
        return Progress(self.phase, self.steps_done, self.steps_total, self.stage, self.image)


class MeasuredStage(Message):
    stage: Count
    text_encoding_s: Seconds
    step_s: list[Seconds]
    decoding_s: Seconds
    image_encoding_s: Seconds

    @staticmethod
    def of(stage: int, measured: Measured) -> "MeasuredStage":
        return MeasuredStage(stage=stage, **vars(measured))

    @property
    def measured(self) -> Measured:
        return Measured(**self.model_dump(exclude={"stage"}))


class Image(FromWorker):
    """An image of a task is encoded. Repeated until it is answered."""

    kind: Literal["image"] = "image"
    request: Key
    task_id: TaskId
    attempt: Attempt
    index: Count
    image: Key
    measured: list[MeasuredStage]


class Ended(FromWorker):
    """A task has failed, or waits again. Repeated until it is answered."""

    kind: Literal["ended"] = "ended"
    request: Key
    task_id: TaskId
    attempt: Attempt
    code: str | None = None
    """Of the error; None: it is released."""
    message: str = ""
    interrupted: bool = False


class Loading(FromWorker):
    """It loads weights, or has loaded them."""

    kind: Literal["loading"] = "loading"
    spec: Spec
    done: bool
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the weights that is in memory; 0: it begins."""
    bits: int | None = None
    resident: list[Name] = []
    learn: bool = False
    room_bytes: Annotated[int, Field(ge=0)] = 0
    loaded_bytes: dict[Name, int] = {}

    @property
    def memory(self) -> Memory:
        return Memory(room_bytes=self.room_bytes, loaded_bytes=self.loaded_bytes)


class Residents(FromWorker):
    """This is in its memory: weights were unloaded, or could not be loaded."""

    kind: Literal["resident"] = "resident"
    resident: list[Name]
    error: str | None = None


class Preview(FromWorker):
    """A small JPEG of a running task, in base64."""

    kind: Literal["preview"] = "preview"
    task_id: TaskId
    attempt: Attempt
    jpeg: Annotated[str, Field(max_length=500_000)]


class Goodbye(FromWorker):
    """It ends, and has given back its tasks."""

    kind: Literal["goodbye"] = "goodbye"


ToHead = Heartbeat | Decline | Reported | Image | Ended | Loading | Residents | Preview | Goodbye
FROM_HEAD: TypeAdapter[FromHead] = TypeAdapter(Annotated[FromHead, Field(discriminator="kind")])
TO_HEAD: TypeAdapter[ToHead] = TypeAdapter(Annotated[ToHead, Field(discriminator="kind")])
