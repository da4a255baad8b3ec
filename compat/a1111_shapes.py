"""Bodies and answers of AUTOMATIC1111's API."""

from math import isfinite
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field

from api.answers import Answer
from compat.bodies import IF_USED, Body
from fields import MASK_FEATHER
from task import MAX_SEED


def _seed(value: object) -> object:
    """None, which is random, for what is negative."""
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return value
    return None if number < 0 else number


def _whole(value: object) -> object:
    """Rounds down numbers such as 512.5, as AUTOMATIC1111 does."""
    return int(value) if isinstance(value, float) and isfinite(value) else value


def _side(value: object) -> object:
    """None, as if it were absent, for 0."""
    value = _whole(value)
    return None if value == 0 else value


def _object(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _pictures(value: object) -> object:
    """A single text is a list of one; null and empty entries are left out."""
    if isinstance(value, str):
        return [value]
    return (
        [entry for entry in value if entry not in (None, "")] if isinstance(value, list) else value
    )


A1111Seed = Annotated[int | None, Field(le=MAX_SEED), BeforeValidator(_seed)]
Whole = Annotated[int, BeforeValidator(_whole)]
Side = Annotated[int | None, Field(ge=1, le=8192), BeforeValidator(_side)]
Factor = Annotated[float, Field(allow_inf_nan=False), IF_USED]
HiresSide = Annotated[Annotated[int, Field(ge=0, le=16384), BeforeValidator(_whole)], IF_USED]


class TextToImage(Body):
    """The body of POST /sdapi/v1/txt2img. Other fields are ignored, and so is what is null or
    empty."""

    pictures: ClassVar[frozenset[str]] = frozenset({"alwayson_scripts"})

    prompt: str = Field(
        "", description="What the image shows. <lora:NAME:SCALE> takes a LoRA of the operator."
    )
    negative_prompt: Annotated[str, IF_USED] = Field(
        "", description="Ignored where the model does not know it."
    )
    seed: A1111Seed = Field(
        None, description="Random where it is -1, null, empty or absent; `info` contains it."
    )
    steps: Whole | None = Field(
        None,
        ge=1,
        description="The model's own when absent. At most twice that, but for --clamp off.",
    )
    cfg_scale: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False), IF_USED] = Field(
        None, description="Of models with a real CFG, at most their own; FLUX takes none of it."
    )
    distilled_cfg_scale: Annotated[
        float | None, Field(ge=0, le=100, allow_inf_nan=False), IF_USED
    ] = Field(None, description="Guidance of FLUX, as in Forge.")
    width: Side = Field(
        None, description="Pixels. 512 when absent; with a picture as its size or aspect ratio."
    )
    height: Side = Field(
        None, description="Pixels. 512 when absent; with a picture as its size or aspect ratio."
    )
    batch_size: Whole = Field(1, ge=1, le=100, description="Images: batch_size x n_iter.")
    n_iter: Whole = Field(1, ge=1, le=100, description="Images: batch_size x n_iter.")
    sampler_name: Any = Field("Euler", description="Returned unchanged; the model has its own.")
    scheduler: Any = Field("automatic", description="One of GET schedulers; others are ignored.")
    denoising_strength: Annotated[float, Field(allow_inf_nan=False), IF_USED] = Field(
        0.75, description="How much a picture is changed, 0 to 1."
    )
    enable_hr: Annotated[bool, IF_USED] = Field(
        False, description="Upscale, where the operator allows an upscaler."
    )
    hr_scale: Factor = Field(2.0, description="By this factor, up to 4.")
    hr_resize_x: HiresSide = Field(
        0, description="Of txt2img: upscale to this width instead; 0: as hr_resize_y says."
    )
    hr_resize_y: HiresSide = Field(
        0, description="Of txt2img: upscale to this height instead; 0: as hr_resize_x says."
    )
    hr_upscaler: Any = Field(
        None, description="One of GET upscalers; another name means the server's own choice."
    )
    alwayson_scripts: Any = Field(
        None,
        description="controlnet: units as of sd-webui-controlnet (`args`). Others are ignored; "
        "`info` names them in `warnings`.",
        json_schema_extra={"type": "object"},
    )
    override_settings: Annotated[dict[str, Any], BeforeValidator(_object)] = Field(
        {}, description="Of these, sd_model_checkpoint is the model."
    )
    send_images: bool = Field(True, description="false: answer without the images.")


class ImageToImage(TextToImage):
    """The body of POST /sdapi/v1/img2img."""

    pictures: ClassVar[frozenset[str]] = TextToImage.pictures | {"init_images", "mask"}

    init_images: Annotated[list[str], BeforeValidator(_pictures)] = Field(
        min_length=1, max_length=8, description="Pictures as base64 or data URLs."
    )
    mask: str | None = Field(None, description="White where to repaint, as base64 or a data URL.")
    inpainting_mask_invert: Annotated[bool, IF_USED] = Field(
        False, description="The mask is black where to repaint."
    )
    mask_blur: Annotated[Whole | None, IF_USED] = Field(
        None,
        description="Pixels around the mask over which the result fades into the picture, with "
        f"models that have no inpainting weights. {MASK_FEATHER} when absent.",
    )


class PngInfo(Body):
    """The body of POST /sdapi/v1/png-info."""

    pictures: ClassVar[frozenset[str]] = frozenset({"image"})

    image: str = Field(description="A picture as base64 or a data URL.")


class A1111Images(Answer):
    images: list[str] = Field(description="PNG as base64.")
    parameters: dict[str, Any] = Field(description="What was asked, without pictures.")
    info: str = Field(description="How the images were made: JSON, as a text.")


class A1111State(Answer):
    skipped: bool = Field(False, description="Always false.")
    interrupted: bool = Field(False, description="Always false.")
    stopping_generation: bool = Field(False, description="Always false.")
    job: str = Field("", description="The task_id; empty when idle.")
    job_count: int = Field(0, description="Images of the task; 0 when idle.")
    job_timestamp: str = Field("0", description="When it was asked for, as digits.")
    job_no: int = Field(0, description="Images of it that are drawn.")
    sampling_step: int = Field(0, description="Steps of the present image that have ended.")
    sampling_steps: int = Field(0, description="Steps of each image.")


class A1111Progress(BaseModel):
    """The progress of the caller's own task."""

    progress: float = Field(0.0, description="0 to 1; exactly 0 when idle.")
    eta_relative: float = Field(0.0, description="Forecast seconds until the images are ready.")
    state: A1111State = Field(A1111State(), description="Where the task is.")
    current_image: str | None = Field(
        None,
        description="The picture so far, where there is one.",
        json_schema_extra={"nullable": True},
    )
    textinfo: str | None = Field(
        None, description="In words.", json_schema_extra={"nullable": True}
    )


class A1111PngInfo(Answer):
    info: str = Field(description="How the picture was made; empty: it does not tell.")
    items: dict[str, Any] = Field(description="All parameters in the file.")
    parameters: dict[str, Any] = Field(description="The same by name.")


class A1111Error(BaseModel):
    """An error of this API."""

    error: str = Field(description="Stable, for programs.")
    detail: str = Field(description="One sentence.")
    body: str = Field("", description="Always empty.")
    errors: str = Field(description="The same sentence.")
