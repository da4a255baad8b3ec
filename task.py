"""A task: one request for an image, from submit to fetch. Its words, its limits, its validation.

`GenerateRequest` is what a client may ask (the one text that validates and documents the body of
POST /generate), `GenerationParams` is what will be done for it, `Task` is its life.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from math import isqrt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from errors import InvalidInput
from model_catalog import Model

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


def _digits_to_int(value: object) -> object:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    return value


def _upper_jpeg(value: object) -> object:
    if isinstance(value, str):
        value = value.upper()
        return "JPEG" if value == "JPG" else value
    return value


Seed = Annotated[
    int,
    Field(ge=0, le=MAX_SEED),
    BeforeValidator(
        _digits_to_int,
        json_schema_input_type=Annotated[int, Field(ge=0, le=MAX_SEED)]
        | Annotated[str, Field(pattern="^[0-9]{1,20}$")],
    ),
]
ImageFormat = Annotated[Literal["JPEG", "PNG", "WEBP"], BeforeValidator(_upper_jpeg)]


class GenerateRequest(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(
        min_length=1,
        max_length=1_000_000,
        pattern=r"\S",
        description="What the image shows. Models read only the first few hundred words.",
        examples=["A beautiful landscape"],
    )
    seed: Seed | None = Field(
        None,
        description="The noise to start from: the same seed, params and model give the same "
        "image. A number or a string of digits, 0 to 2^64-1. Random when absent; every answer "
        "tells it.",
        examples=["1725311496"],
    )
    width: int = Field(
        1024,
        ge=SIDE_STEP,
        le=8192,
        description="Pixels; rounded down to a multiple of 16, the answer says the width used.",
        examples=[1024],
    )
    height: int = Field(
        1024,
        ge=SIDE_STEP,
        le=8192,
        description="Pixels; rounded down to a multiple of 16, the answer says the height used.",
        examples=[1024],
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Denoising steps. The model's own default when absent.",
        examples=[4],
    )
    guidance: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="How closely the image follows the prompt. The model's own default when "
        "absent; distilled models have none and ignore it, the answer then lists it in "
        "`ignored_fields`.",
        examples=[3.5],
    )
    format: ImageFormat = Field("JPEG", description="File format of the image.", examples=["JPEG"])
    quality: int = Field(
        85,
        ge=1,
        le=100,
        description="Quality of JPEG and WEBP in percent; PNG is lossless.",
        examples=[85],
    )
    priority: bool | Annotated[int, Field(ge=0, le=1)] = Field(
        False,
        description="true (or 1): urgent, goes ahead of every normal task and behind the urgent "
        "ones that came earlier.",
        examples=[False],
    )
    client_task_id: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Makes submitting safe to repeat, like the header Idempotency-Key: the same "
        "key answers with the same task, also after a restart of the server.",
        examples=["chat-42-message-7"],
    )
    count: int | None = Field(
        None,
        description="Accepted for older clients and ignored: a task makes one image.",
        deprecated=True,
        exclude=True,
    )


class GenerationParams(BaseModel):
    """What is done for a task: the request with everything filled in and rounded."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int = Field(ge=0, le=MAX_SEED)
    width: int
    height: int
    steps: int
    guidance: float | None
    """None when the model has no guidance."""
    format: Literal["JPEG", "PNG", "WEBP"]
    quality: int

    @property
    def tokens(self) -> int:
        """Latent tokens of the image: one for each 16 x 16 pixels."""
        return (self.width // SIDE_STEP) * (self.height // SIDE_STEP)


@dataclass(frozen=True)
class Limits:
    """What the operator allows, on top of what the request model allows."""

    max_pixels: int = 2048 * 2048
    max_steps: int = 100
    max_prompt_chars: int = 10_000


def parse_request(body: bytes, limits: Limits) -> GenerateRequest:
    """Validate the JSON body of a request.

    Raises:
        InvalidInput: names the first field at fault and what it allows.
    """
    try:
        return GenerateRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid_input(error, limits) from None


def request_schema(limits: Limits) -> dict[str, Any]:
    """JSON schema of the request body, with the operator's limits in place of the widest ones."""
    schema = GenerateRequest.model_json_schema()
    schema["properties"]["prompt"]["maxLength"] = limits.max_prompt_chars
    for choice in schema["properties"]["steps"]["anyOf"]:
        if choice["type"] == "integer":
            choice["maximum"] = limits.max_steps
    for side in ("width", "height"):
        schema["properties"][side]["default"] = _default_side(limits)
        schema["properties"][side]["maximum"] = min(8192, limits.max_pixels // SIDE_STEP)
        schema["properties"][side]["description"] += (
            f" width x height is at most {limits.max_pixels} pixels."
        )
    return schema


def resolve(request: GenerateRequest, model: Model, limits: Limits) -> GenerationParams:
    """Fill in the model's defaults and a random seed, round the size, check the limits.

    Raises:
        InvalidInput: a field is within the request model but not within the operator's limits.
    """
    if len(request.prompt) > limits.max_prompt_chars:
        raise InvalidInput(_refusal("prompt", request.prompt, limits), field="prompt")
    width, height = (
        (side if name in request.model_fields_set else min(side, _default_side(limits)))
        // SIDE_STEP
        * SIDE_STEP
        for name, side in (("width", request.width), ("height", request.height))
    )
    if width * height > limits.max_pixels:
        raise InvalidInput(
            f"width x height must be at most {limits.max_pixels} pixels on this server, "
            f"not {width} x {height} = {width * height}.",
            field="width",
        )
    steps = min(model.default_steps, limits.max_steps) if request.steps is None else request.steps
    if steps > limits.max_steps:
        raise InvalidInput(_refusal("steps", steps, limits), field="steps")
    guidance = model.default_guidance
    if guidance is not None and request.guidance is not None:
        guidance = request.guidance
    return GenerationParams(
        prompt=request.prompt,
        seed=secrets.randbits(64) if request.seed is None else request.seed,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        format=request.format,
        quality=request.quality,
    )


def _default_side(limits: Limits) -> int:
    """Of a square picture that the operator allows."""
    return min(1024, isqrt(limits.max_pixels) // SIDE_STEP * SIDE_STEP)


def _invalid_input(error: ValidationError, limits: Limits) -> InvalidInput:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return InvalidInput(f"The body is not valid JSON: {first['ctx']['error']}.")
    if not first["loc"]:
        return InvalidInput("The body must be a JSON object with at least the field prompt.")
    name = str(first["loc"][0])[:100]
    if first["type"] == "extra_forbidden":
        known = ", ".join(GenerateRequest.model_fields)
        return InvalidInput(f"{name} is not a field of this server. Fields: {known}.", field=name)
    if first["type"] == "missing":
        return InvalidInput(f"{name} is required.", field=name)
    return InvalidInput(_refusal(name, first["input"], limits), field=name)


def _refusal(name: str, value: Any, limits: Limits) -> str:
    allowed = _in_words(request_schema(limits)["properties"][name])
    return f"{name} must be {allowed}, not {_shown(value)}."


def _in_words(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, for people: "a whole number from 1 to 100"."""
    if "anyOf" in schema:
        choices = [_in_words(choice) for choice in schema["anyOf"]]
        return " or ".join(choice for choice in choices if choice != "null")
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    nouns = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "string": "a string of digits" if "[0-9]" in schema.get("pattern", "") else "a string",
    }
    words = nouns[schema["type"]]
    if "minimum" in schema:
        words += (
            f" from {schema['minimum']:g}"
            if schema["type"] == "number"
            else f" from {schema['minimum']}"
        )
        words += f" to {schema['maximum']}"
    if "maxLength" in schema:
        words += f" of {schema['minLength']} to {schema['maxLength']} characters that is not blank"
    return words


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


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
    shown: float = 0.0
    """Part of its time that was told last, 0 to 1: what is told never goes back."""


@dataclass(frozen=True)
class Promise:
    """The forecast that a client got for its task when it submitted it."""

    at: float
    """Reading of the monotonic clock."""
    wait_s: float
    p90_s: float


@dataclass(frozen=True)
class Told:
    """What a client was last told about a task, so that the next answer does not contradict it."""

    end_at: float
    """Reading of the monotonic clock at which the task was said to be done."""
    pos: int
    switches: int
    """Model switches that were due before it."""


@dataclass
class Task:
    """A task that waits or runs. Owned by the QueueManager: only it changes one, under its lock.

    What has ended is in the store alone.
    """

    task_id: str
    params: GenerationParams
    urgent: bool
    model: Model
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
    """Active once the model was loaded; 0: it is not."""
    total_bytes: int = 0
    """Of the machine."""
