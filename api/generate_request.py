"""The fields of POST /generate: they validate and document its body.

A body is JSON, or a form (multipart/form-data) whose parts are the same fields and whose files are
the pictures. submission.py makes GenerationParams of it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from api.json_text import parse_object, refuse_nul, unknown_field
from api.request_values import Image, LoraInput, Seed
from api.schema_words import in_words, shown
from errors import InvalidInput
from fields import MOST_CONTROLS, PassedFields, Takes, given_of
from images import UPLOAD_FORMATS
from models.model_rules import SIDE_STEP

CALLBACK_URL = re.compile(r"https?://([A-Za-z0-9._-]+)(?::[0-9]{1,5})?(?:[/?][!-\[\]-~]*)?")
MOST_IMAGES, MOST_LORAS = 10, 8


MOST_PROMPTS = 100
"""Prompts of one task."""


def _one_or_many(value: object) -> object:
    """A blank text as "", and a list of one prompt as this prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    return "" if isinstance(value, str) and not value.strip() else value


Prompt = Annotated[str, Field(max_length=1_000_000)]
IMAGE_HELP = (
    " base64, a data URL, a file of a form, or `{task_id, index}` of an earlier result; "
    f"{UPLOAD_FORMATS}. URLs are not fetched."
)


PICTURES = ("init_image", "images", "mask", "control_image", "control_images")
SIDE_HELP = (
    "Pixels, rounded down to multiples of 16 (some models: 32); absent sides follow an input image "
    "(init_image, else images, else control_image): its aspect ratio; at most about one megapixel."
)
NOT_ASKED = {*PICTURES, "client_task_id"}


class _OwnFields(BaseModel):
    """Fields that submission.py fills in or decodes, and fields that do not change the image."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: Annotated[
        Prompt
        | Annotated[
            list[Annotated[Prompt, Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_PROMPTS),
        ]
        | None,
        BeforeValidator(_one_or_many),
    ] = Field(
        None,
        description="Describes the image. Models read only the first few hundred words. May be "
        "absent or empty only with an input image (init_image, images, control_image). A list: "
        "one image of each, in one task; `count` is then their number.",
        examples=["A beautiful landscape"],
    )
    expand_wildcards: bool = Field(
        False,
        description="Replace `{a|b|c}` in the prompt by one of the alternatives (`{2::a|b}`: a "
        "twice as often) and `__name__` by a line of the operator's wildcard of this name (GET "
        "/wildcards). The seed of the image decides, so the same seed gives the same prompt; "
        "`params` contains it. A backslash keeps a brace or a bar.",
        examples=[False],
    )
    seed: Seed | None = Field(
        None,
        description="Seed of the noise: the same seed, params and model give the same image. "
        "A number or a string of digits, 0 to 2^64-1. Random if absent; every answer contains it.",
        examples=["1725311496"],
    )
    width: int = Field(
        1024,
        ge=SIDE_STEP,
        le=8192,
        description=SIDE_HELP,
        examples=[1024],
    )
    height: int = Field(
        1024,
        ge=SIDE_STEP,
        le=8192,
        description=SIDE_HELP,
        examples=[1024],
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Denoising steps. The model's own default if absent.",
        examples=[4],
    )
    priority: bool | Annotated[int, Field(ge=-1, le=1)] = Field(
        False,
        description="true (or 1): urgent, runs before normal tasks, for clients with the right to "
        "it. -1: background, runs when nothing else waits.",
        examples=[False],
    )
    user: str | None = Field(
        None,
        max_length=200,
        description="Which user of the client the task is for. The users of a client share its "
        "GPU time equally. Nothing else depends on it.",
    )
    client_task_id: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Idempotency key, like the header Idempotency-Key. The same key returns the "
        "same task, also after a restart of the server; with a different request it is refused. "
        "The key is free again when its task has failed, was cancelled or was removed.",
        examples=["chat-42-message-7"],
    )
    model: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Name of a model from GET /models that the operator allows. The server's "
        "default if absent.",
        examples=["flux2-klein-4b"],
    )
    count: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Number of images, with the seeds `seed`, `seed` + 1, and so on. 1 if absent.",
        examples=[1],
    )
    n: int | None = Field(None, ge=1, le=100, description="The same as `count`.", examples=[1])
    init_image: Image | None = Field(
        None, description="Image to start from (img2img), or to upscale:" + IMAGE_HELP
    )
    images: list[Image] | None = Field(
        None,
        min_length=1,
        max_length=MOST_IMAGES,
        description="Reference images to edit, combine or vary (edit models, Kontext, Redux, "
        "in-context):" + IMAGE_HELP,
    )
    mask: Image | None = Field(
        None, description="White where the picture is repainted, scaled to its size:" + IMAGE_HELP
    )
    control_image: Image | None = Field(
        None, description="Image whose edges, depth or pose are followed (ControlNet):" + IMAGE_HELP
    )
    control_images: list[Image] | None = Field(
        None,
        min_length=1,
        max_length=MOST_CONTROLS,
        description="Further controls, beside control_image (Z-Image):" + IMAGE_HELP,
    )
    loras: list[LoraInput] | None = Field(
        None,
        min_length=1,
        max_length=MOST_LORAS,
        description="LoRAs from the operator's folder: names, or `{name, scale}`.",
        examples=[[{"name": "watercolour", "scale": 0.8}]],
    )
    metadata: bool | None = Field(
        None,
        description="Whether image files contain the parameters. If absent: as the operator says.",
        examples=[True],
    )
    callback_url: str | None = Field(
        None,
        min_length=1,
        max_length=2000,
        description="URL to which the final answer of GET /status is sent (POST, JSON): http or "
        "https, and a host that the operator allows. No answer contains it.",
        examples=["https://chat.example.org/pictures"],
    )


def priority_answer(priority: int) -> bool | int:
    """As clients send it: true, false or -1."""
    return priority if priority < 0 else priority > 0


class GenerateRequest(PassedFields, _OwnFields):
    """The body of POST /generate."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image, or the one of all."""
        return self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]

    @property
    def digest(self) -> str:
        """Equal for equal fields. Pictures are compared by their pixels (submission.py)."""
        asked = self.model_dump(exclude=NOT_ASKED, exclude_none=True, exclude_unset=True)
        if "n" in asked:
            asked["count"] = asked.pop("n")
        if "priority" in asked:
            asked["priority"] = priority_answer(int(asked["priority"]))
        text = json.dumps(asked, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def given(self) -> frozenset[Takes]:
        """Returns the fields of this request that only some models take."""
        return given_of(vars(self))


@dataclass(frozen=True)
class Limits:
    """Limits of the operator, in addition to those of the request model."""

    max_pixels: int = 2048 * 2048
    max_steps: int = 100
    max_prompt_chars: int = 10_000
    max_count: int = 10
    """Largest number of images of one task."""
    max_input_pixels: int = 50_000_000
    """Largest number of pixels of an image that a client sends."""
    callback_hosts: frozenset[str] = frozenset()
    """Hosts of callbacks, in lower case."""

    def may_call(self, url: str) -> bool:
        """Whether this is an address of one of the callback hosts, and nothing else: no user, no
        address that two readers may read in two ways."""
        found = CALLBACK_URL.fullmatch(url)
        return found is not None and found[1].lower() in self.callback_hosts


def parse_request(body: bytes, limits: Limits) -> GenerateRequest:
    """Validate the JSON body of a request.

    Raises:
        InvalidInput: names the first field at fault and what it allows.
    """
    return _checked(parse_object(body), limits, strict=True)


def parse_form(
    texts: Mapping[str, Sequence[str]], files: Mapping[str, Sequence[bytes]], limits: Limits
) -> GenerateRequest:
    """Validate a form: its text fields, and its files, which are pictures.

    A text field that is empty counts as absent. Lists are fields that come several times;
    `{task_id, index}` and `{name, scale}` are JSON.

    Raises:
        InvalidInput: as parse_request does.
    """
    fields: dict[str, Any] = {}
    for name, values in texts.items():
        kept: list[Any] = [_from_form(name, value) for value in values if value.strip()]
        if kept:
            fields[name] = kept if name in LISTS else kept[-1]
    for name, contents in files.items():
        if name in LISTS and contents:
            fields[name] = [*fields.get(name, []), *contents]
        elif contents:
            fields[name] = contents[-1]
    return check_request(fields, limits)


def check_request(fields: Mapping[str, Any], limits: Limits) -> GenerateRequest:
    """A request of fields that may be texts.

    Raises:
        InvalidInput: names the first field at fault and what it allows.
    """
    return _checked(fields, limits, strict=False)


def _checked(fields: Mapping[str, Any], limits: Limits, *, strict: bool) -> GenerateRequest:
    name = unknown_field(fields, GenerateRequest.model_fields)
    if name is not None:
        known = ", ".join(GenerateRequest.model_fields)
        name = name[:100]
        raise InvalidInput(f"{name} is not a field of this server. Fields: {known}.", field=name)
    for name, most in LISTS.items():  # pydantic would validate each item before it counts them
        if isinstance(items := fields.get(name), list) and len(items) > most:
            raise refusal(name, items, limits)
    try:
        request = GenerateRequest.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise _invalid_input(error, limits) from None
    refuse_nul((name, getattr(request, name)) for name in fields)
    return request


LISTS: Mapping[str, int] = {
    name: choice["maxItems"]
    for name, field in GenerateRequest.model_json_schema()["properties"].items()
    for choice in field.get("anyOf", ())
    if choice.get("type") == "array"
}
"""Fields with several values, and the largest number of them."""
OBJECTS = ("images", "control_images", "loras", "init_image", "mask", "control_image")


def _from_form(name: str, value: str) -> object:
    if name in OBJECTS and value.lstrip().startswith("{"):
        return parse_object(value.encode(), name, field=name)
    return value


def request_schema(limits: Limits, ref_template: str = "#/$defs/{model}") -> dict[str, Any]:
    """Returns the JSON schema of the request body, with the operator's limits."""
    schema: dict[str, Any] = json.loads(_without_limits(ref_template))
    for choice in schema["properties"]["steps"]["anyOf"]:
        if choice["type"] == "integer":
            choice["maximum"] = limits.max_steps
    for name in ("count", "n"):
        schema["properties"][name]["anyOf"][0]["maximum"] = limits.max_count
    text, texts, _ = schema["properties"]["prompt"]["anyOf"]
    text["maxLength"] = texts["items"]["maxLength"] = limits.max_prompt_chars
    texts["maxItems"] = min(MOST_PROMPTS, limits.max_count)
    schema["properties"]["negative_prompt"]["anyOf"][0]["maxLength"] = limits.max_prompt_chars
    for side in ("width", "height"):
        schema["properties"][side]["default"] = default_side(limits)
        schema["properties"][side]["maximum"] = min(8192, limits.max_pixels // SIDE_STEP)
        schema["properties"][side]["description"] += (
            f" width x height is at most {limits.max_pixels} pixels."
        )
    return schema


@cache
def _without_limits(ref_template: str) -> str:
    """The schema as JSON: pydantic needs 4 ms for it, and each refusal reads it."""
    return json.dumps(GenerateRequest.model_json_schema(ref_template=ref_template))


def default_side(limits: Limits) -> int:
    """Returns the default width and height in pixels: a square that the operator allows."""
    return min(1024, isqrt(limits.max_pixels) // SIDE_STEP * SIDE_STEP)


def _invalid_input(error: ValidationError, limits: Limits) -> InvalidInput:
    first = error.errors(include_url=False)[0]
    return refusal(str(first["loc"][0]), first["input"], limits)


def refusal(name: str, value: Any, limits: Limits) -> InvalidInput:
    """Returns the error: the allowed values of this field and the value received."""
    allowed = in_words(request_schema(limits)["properties"][name])
    return InvalidInput(f"{{field}} must be {allowed}, not {shown(value)}.", field=name)
