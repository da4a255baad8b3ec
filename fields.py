"""Declares each field of a request that the server passes on unchanged.

`PassedFields` are part of GenerateRequest (what a client may send), of GenerationParams (what is
stored and generated) and of Params (what is answered). A field that is added here is validated,
documented, stored, answered and passed to mflux without other changes. client/mflux_client.py
repeats its name and type; a test compares the two.

Fields that the server fills in, rounds or decodes are declared in each of the three classes.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field

SCHEDULERS = ("linear", "flow_match_euler_discrete", "er_sde", "euler")
"""Schedulers of mflux; models/model_rules.py has those of each model. Other names are never passed
on, because mflux imports dotted names."""
PRESETS = ("V4_QUALITY_48", "V4_DEFAULT_20", "V4_TURBO_12")
"""Of Ideogram: how many steps, and the guidance of each."""
CONTROL_TYPES = ("canny", "mlsd", "depth", "hed", "pose", "ready")
"""Kinds of control that are extracted from an image: canny and mlsd by mflux alone; depth, hed and
pose with helper models; ready: the image is such a map already."""


LORA_STYLES = (
    "couple",
    "font",
    "home",
    "identity",
    "illustration",
    "portrait",
    "ppt",
    "sandstorm",
    "sparklers",
    "storyboard",
)
"""In-context LoRAs that mflux names."""
MOST_CONTROLS = 3
"""Controls beside control_image."""
ControlStrength = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
MASK_FEATHER = 8
"""Pixels, if a request gives none."""
MOST_MASK_FEATHER = 256
MOSS_LAYERS = 42
"""Of the transformer of MOSS-Image."""
Strength = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Layer = Annotated[int, Field(ge=0, le=MOSS_LAYERS - 1)]


class Takes(StrEnum):
    """Fields that only some pipelines take. Errors name the first one in this order."""

    GUIDANCE = "guidance"
    NEGATIVE_PROMPT = "negative_prompt"
    SCHEDULER = "scheduler"
    PRESET = "preset"
    INIT_IMAGE = "init_image"
    IMAGE_STRENGTH = "image_strength"
    IMAGES = "images"
    MASK = "mask"
    MASK_FEATHER = "mask_feather"
    BACKGROUND = "background"
    CONTROL_IMAGE = "control_image"
    CONTROL_STRENGTH = "control_strength"
    CONTROL_TYPE = "control_type"
    CONTROL_IMAGES = "control_images"
    CONTROL_TYPES = "control_types"
    CONTROL_STRENGTHS = "control_strengths"
    REFERENCE_STRENGTHS = "reference_strengths"
    EDIT_STRENGTH = "edit_strength"
    AUTO_MASK = "auto_mask"
    VERIFY_RETRIES = "verify_retries"
    OUTPUT_RESOLUTION = "output_resolution"
    STEP_CACHE = "step_cache"
    CFG_END = "cfg_end"
    SKIP_LAYERS = "skip_layers"
    LORA_STYLE = "lora_style"
    LORAS = "loras"
    UPSCALE = "upscale"
    SOFTNESS = "softness"
    STEPS = "steps"
    PROMPT = "prompt"


def is_given(name: Takes, value: object) -> bool:
    """Whether the value of a field has to be honoured by the model."""
    if name is Takes.BACKGROUND:
        return value == "transparent"
    return value not in (None, "", ())


ALL_TAKES = tuple(Takes)


def given_of(fields: Mapping[str, object]) -> frozenset[Takes]:
    """Those of these fields that only some pipelines take and that have to be honoured."""
    return frozenset(
        [name for name in ALL_TAKES if fields[name] is not None and is_given(name, fields[name])]
    )


class Mflux(NamedTuple):
    """Marks a field that is passed to mflux. A pipeline takes it if its generate_image has this
    parameter."""

    parameter: str


def _blank_as_absent(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _upper_jpeg(value: object) -> object:
    if isinstance(value, str):
        value = value.upper()
        return "JPEG" if value == "JPG" else value
    return value


class PassedFields(BaseModel):
    """The fields. Ranges may only become wider, because stored tasks are validated, too."""

    guidance: Annotated[float | None, Mflux("guidance")] = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="How closely the image follows the prompt. The model's own default if "
        "absent. Distilled models have none and ignore it; the answer then lists it in "
        "`ignored_fields`.",
        examples=[3.5],
    )
    format: Annotated[Literal["JPEG", "PNG", "WEBP"], BeforeValidator(_upper_jpeg)] = Field(
        "JPEG", description="File format of the image.", examples=["JPEG"]
    )
    quality: int = Field(
        85,
        ge=1,
        le=100,
        description="Quality of JPEG and WEBP in percent; PNG is lossless.",
        examples=[85],
    )
    quantize: int | None = Field(
        None,
        ge=3,
        le=8,
        description="Bits to quantize the weights to (3, 4, 5, 6, 8), if the operator allows a "
        "choice.",
        examples=[8],
    )
    background: Literal["transparent", "opaque"] | None = Field(
        None,
        description="`transparent`: the image gets an alpha channel, with models that can and the "
        "formats PNG and WEBP. `opaque`: what the model leaves transparent becomes white. If "
        "absent, the image is as the model draws it; transparent parts are white in JPEG.",
        examples=["opaque"],
    )
    negative_prompt: Annotated[
        str | None, BeforeValidator(_blank_as_absent), Mflux("negative_prompt")
    ] = Field(
        None,
        max_length=1_000_000,
        description="What the image must not show. Has an effect with guidance above 1. Empty "
        "counts as absent.",
        examples=["blurry"],
    )
    scheduler: Annotated[
        Literal[SCHEDULERS] | None,  # type: ignore[valid-type]
        Mflux("scheduler"),
    ] = Field(
        None,
        description="Noise schedule of the steps; GET /models lists those of each model. The "
        "model's own default if absent.",
        examples=[SCHEDULERS[0]],
    )
    preset: Annotated[Literal[PRESETS] | None, Mflux("preset")] = Field(  # type: ignore[valid-type]
        None,
        description="Steps and the guidance of each step together, for models that have presets. A "
        "request with `steps` has that many, all with the same guidance.",
        examples=[PRESETS[1]],
    )
    image_strength: Annotated[float | None, Mflux("image_strength")] = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="How much of init_image is kept, above 0 and below 1. 0.4 if absent.",
        examples=[0.4],
    )
    mask_feather: int | None = Field(
        None,
        ge=0,
        le=MOST_MASK_FEATHER,
        description="Pixels around the mask over which the result fades into init_image, with "
        "models that have no inpainting weights of their own. Outside them, init_image stays as it "
        f"is. {MASK_FEATHER} if absent.",
        examples=[MASK_FEATHER],
    )
    control_strength: Annotated[float | None, Mflux("controlnet_strength")] = Field(
        None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="How closely control_image is followed. If absent: 0.4 for FLUX.1, 1 for "
        "others.",
        examples=[0.7],
    )
    control_type: Literal[CONTROL_TYPES] | None = Field(  # type: ignore[valid-type]
        None,
        description="Kind of control that is extracted from control_image. `depth`, `hed` and "
        "`pose` need a helper model that the operator allows. `ready`: control_image is such a map "
        "already. If absent: canny for Z-Image, and ready for the other models.",
        examples=[CONTROL_TYPES[0]],
    )
    control_types: list[Literal[CONTROL_TYPES]] | None = Field(  # type: ignore[valid-type]
        None,
        min_length=1,
        max_length=MOST_CONTROLS,
        description="`control_type` of each of `control_images`, in their order. canny if absent.",
        examples=[["depth"]],
    )
    control_strengths: list[ControlStrength] | None = Field(
        None,
        min_length=1,
        max_length=MOST_CONTROLS,
        description="Strength of each of `control_images`, in their order, 0 to 2, multiplied by "
        "`control_strength`. 1 if absent.",
        examples=[[0.5]],
    )
    upscale: Annotated[float | None, Mflux("resolution")] = Field(
        None,
        gt=1,
        le=4,
        allow_inf_nan=False,
        description="Factor by which the finished images are upscaled, above 1 and up to 4, if the "
        "operator allows an upscaler. With an upscaler as `model`: the factor for init_image.",
        examples=[2],
    )
    upscaler: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="The upscaler for `upscale`: the name of a model. If absent, an upscaler whose "
        "weights are on disk is preferred.",
        examples=["seedvr2-3b"],
    )
    softness: Annotated[float | None, Mflux("softness")] = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="How much the upscaler blurs its source before it adds detail, 0 to 1. 0 if "
        "absent.",
        examples=[0.3],
    )
    reference_strengths: Annotated[list[Strength] | None, Mflux("redux_image_strengths")] = Field(
        None,
        min_length=1,
        max_length=10,
        description="Strength of each of `images`, in their order, 0 to 10 (Redux). 1 if absent.",
        examples=[[0.8, 1.0]],
    )
    edit_strength: Annotated[float | None, Mflux("strength")] = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How much of the first of `images` is redrawn, above 0 and up to 1 (edits with "
        "qwen-image-2.1). 1 if absent.",
        examples=[0.6],
    )
    auto_mask: Annotated[str | None, BeforeValidator(_blank_as_absent), Mflux("auto_mask")] = Field(
        None,
        max_length=500,
        description="Name of the object to repaint in the first of `images`; the model finds it. "
        "Replaces `mask` (edits with qwen-image-2.1).",
        examples=["the red shirt"],
    )
    verify_retries: Annotated[int | None, Mflux("verify_retries")] = Field(
        None,
        ge=1,
        le=3,
        description="The model compares its edit with the prompt. If they do not match, it draws "
        "again with the next seed, at most this many times (edits with qwen-image-2.1). The "
        "forecast does not include it.",
        examples=[1],
    )
    output_resolution: Annotated[int | None, Mflux("output_resolution")] = Field(
        None,
        ge=32,
        le=4096,
        multiple_of=32,
        description="`images` are scaled to the number of pixels of a square with this side "
        "(qwen-image-2.1). 1024 if absent.",
        examples=[1024],
    )
    lora_style: Literal[LORA_STYLES] | None = Field(  # type: ignore[valid-type]
        None,
        description="In-context style of a pair of images, of which `images` is the first "
        "(FLUX.1 dev). Its LoRA comes from Hugging Face (`--allow-lora-repos`).",
        examples=["storyboard"],
    )
    step_cache: Annotated[float | None, Mflux("step_cache_ratio")] = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Share of the steps that reuse the previous step instead of being computed, "
        "above 0 and below 1. 0.25 is about 1.4 times as fast and less exact. For edits with "
        "qwen-image-2.1 it is a threshold, usually 0.12. No effect below 10 steps.",
        examples=[0.25],
    )
    cfg_end: Annotated[float | None, Mflux("cfg_end")] = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the steps that use `guidance`, above 0 and up to 1. The steps after "
        "them run without it, about twice as fast. 1 if absent.",
        examples=[0.6],
    )
    skip_layers: Annotated[list[Layer] | None, Mflux("uncond_skip_layers")] = Field(
        None,
        max_length=MOSS_LAYERS,
        description="Layers that the negative branch skips, counted from 0 (MOSS-Image). Layer 22 "
        "if absent; none with an empty list.",
        examples=[[22]],
    )
    expand: bool = Field(
        False,
        description="Let the operator's chat model write the prompt from this one (--expand-url). "
        "If that fails, the prompt is used as it was sent, and `warnings` says so. In answers: "
        "whether the prompt is still to be written; then `prompt` contains it.",
        examples=[False],
    )
    tags: list[Annotated[str, Field(min_length=1, max_length=40)]] | None = Field(
        None,
        max_length=10,
        description="Labels that are kept with the task. GET /queue?tag= lists the tasks with a "
        "tag.",
        examples=[["chat-42"]],
    )

    max_age_s: float | None = Field(
        None,
        gt=0,
        le=10_000_000,
        allow_inf_nan=False,
        description="Seconds within which the task must start. If it has not, it is cancelled, and "
        "`error` in GET /status has the code `expired`.",
        examples=[600],
    )
    keep_alive_s: float | None = Field(
        None,
        ge=10,
        le=10_000_000,
        allow_inf_nan=False,
        description="Seconds without a request for the task, while it waits, after which it is "
        "cancelled (`abandoned`). GET /status, requests that wait and streams of events count.",
        examples=[60],
    )

    def passed(self) -> dict[str, object]:
        """Returns only these fields, with their values."""
        values = vars(self)
        return {name: values[name] for name in PASSED}


PASSED = tuple(PassedFields.model_fields)


def mflux_parameters() -> Iterator[tuple[str, str]]:
    """Yields each parameter of mflux and the field that fills it."""
    for name, field in PassedFields.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Mflux):
                yield mark.parameter, name
