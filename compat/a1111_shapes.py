"""What goes in and out of AUTOMATIC1111's API, as far as this server knows it."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from api.answers import Answer
from compat.bodies import Body
from task import MAX_SEED


def _seed(value: object) -> object:
    """None, which is random, for what is negative."""
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return value
    return None if number < 0 else number


A1111Seed = Annotated[int | None, Field(le=MAX_SEED), BeforeValidator(_seed)]


class TextToImage(Body):
    """The body of POST /sdapi/v1/txt2img. Other fields are ignored, and so is what is null or
    empty."""

    prompt: str = Field(
        "", description="What the image shows. <lora:NAME:SCALE> takes an adapter of the operator."
    )
    negative_prompt: str = Field("", description="Ignored where the model does not know it.")
    seed: A1111Seed = Field(
        None, description="Random where it is -1, null, empty or absent; `info` tells it."
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="The model's own when absent. At most twice that, but for --clamp off.",
    )
    cfg_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Of models with a real CFG, at most their own; FLUX takes none of it.",
    )
    distilled_cfg_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Guidance of FLUX, as in Forge."
    )
    width: int = Field(512, ge=1, le=8192, description="Pixels.")
    height: int = Field(512, ge=1, le=8192, description="Pixels.")
    batch_size: int = Field(1, ge=1, le=100, description="Images: batch_size x n_iter.")
    n_iter: int = Field(1, ge=1, le=100, description="Images: batch_size x n_iter.")
    sampler_name: str = Field("Euler", description="Told back; the model has its own.")
    scheduler: str = Field("automatic", description="One of GET schedulers; others are ignored.")
    denoising_strength: float = Field(
        0.75, ge=0, le=1, allow_inf_nan=False, description="How much a picture is changed."
    )
    enable_hr: bool = Field(False, description="Enlarge, where the operator allows an upscaler.")
    hr_scale: float = Field(2.0, ge=0, le=100, allow_inf_nan=False, description="By this factor.")
    override_settings: dict[str, Any] = Field(
        {}, description="Of these, sd_model_checkpoint is the model."
    )
    send_images: bool = Field(True, description="false: answer without the images.")


class ImageToImage(TextToImage):
    """The body of POST /sdapi/v1/img2img."""

    width: int | None = Field(  # type: ignore[assignment]
        None, ge=1, le=8192, description="Pixels; that of the picture when absent."
    )
    height: int | None = Field(  # type: ignore[assignment]
        None, ge=1, le=8192, description="Pixels; that of the picture when absent."
    )
    init_images: list[str] = Field(
        min_length=1, max_length=8, description="Pictures as base64 or data URLs."
    )
    mask: str | None = Field(None, description="White where to repaint, as base64 or a data URL.")
    inpainting_mask_invert: bool = Field(False, description="The mask is black where to repaint.")


class PngInfo(Body):
    """The body of POST /sdapi/v1/png-info."""

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
    """Of the caller's own task."""

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
    items: dict[str, Any] = Field(description="All that the file tells.")
    parameters: dict[str, Any] = Field(description="The same by name.")


class A1111Error(BaseModel):
    """Every error of this API."""

    error: str = Field(description="Stable, for programs.")
    detail: str = Field(description="One sentence.")
    body: str = Field("", description="Always empty.")
    errors: str = Field(description="The same sentence.")
