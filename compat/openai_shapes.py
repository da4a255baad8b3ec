"""Bodies and answers of the OpenAI Images API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from api.answers import Answer
from api.request_values import Seed
from compat.bodies import IF_USED, Body


def _lower(value: object) -> object:
    value = value.lower() if isinstance(value, str) else value
    return "jpeg" if value == "jpg" else value


def _text_only(value: object) -> object:
    return value if isinstance(value, str) else None


def _random_if_minus_1(value: object) -> object:
    return None if value in (-1, "-1") else value


OutputFormat = Annotated[Literal["png", "jpeg", "webp"], BeforeValidator(_lower)]


ModelName = Annotated[str | None, BeforeValidator(_text_only)]


class Drawing(Body):
    """How the images of every call of this API are drawn."""

    model: ModelName = Field(
        None,
        description="One of GET /v1/models. Any other name (dall-e-3, gpt-image-1, ...) means the "
        "server's own model.",
        examples=["gpt-image-1"],
    )
    size: str | None = Field(
        None,
        description="WIDTHxHEIGHT in pixels, rounded down to multiples of 16; auto or absent: the "
        "server's default.",
        examples=["1024x1024"],
    )
    output_format: OutputFormat = Field("png", description="png, jpeg or webp.")
    output_compression: Annotated[int, Field(ge=0, le=100), IF_USED] = Field(
        100, description="Quality of jpeg and webp in percent; ignored for png."
    )
    quality: Any = Field(None, description="Accepted and ignored.")
    background: Any = Field(
        None,
        description="transparent (with png and webp, if the model can), opaque, or auto. Other "
        "values are ignored.",
    )
    partial_images: Annotated[int, Field(ge=0, le=3), IF_USED] = Field(
        0, description="With stream: most pictures on the way, where there are some."
    )
    seed: Annotated[Seed | None, BeforeValidator(_random_if_minus_1)] = Field(
        None, description="Extension: the seed. -1: random."
    )
    steps: int | None = Field(None, ge=1, description="Extension: denoising steps.")
    guidance: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Extension: guidance scale."
    )
    negative_prompt: str | None = Field(
        None,
        description="Extension: what the image must not show, if the model takes it.",
    )
    priority: bool = Field(False, description="Extension: runs before all normal tasks.")


class OpenAIGeneration(Drawing):
    """The body of POST /v1/images/generations. Other fields are ignored, and so is what is null or
    empty."""

    prompt: str = Field(min_length=1, description="What the image shows.")
    n: int = Field(1, ge=1, le=10, description="How many images.")
    response_format: Annotated[
        Literal["url", "b64_json"] | None, BeforeValidator(_lower), IF_USED
    ] = Field(
        None,
        description="url or b64_json. Absent: url for models named dall-e..., else b64_json. "
        "Ignored with stream.",
    )
    user: Any = Field(None, description="Users of one client share its GPU time equally.")
    stream: bool = Field(False, description="Answer server-sent events.")


NULLS = ("null", "undefined")
"""The texts of null and undefined in forms of JavaScript clients."""


class OpenAIEdit(OpenAIGeneration):
    """The body of POST /v1/images/edits, beside its pictures."""

    prompt: str = Field("", description="What the image shows; may be empty.")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        return {
            name: value for name, value in fields.items() if name == "prompt" or value not in NULLS
        }


class ImageData(Answer):
    b64_json: str | None = Field(None, description="The image. Either this or url is there.")
    url: str | None = Field(
        None, description="Where the image can be fetched, without a key, for an hour and more."
    )
    seed: str = Field(description="Extension: the seed as digits; it reproduces the image.")


class TokenDetails(Answer):
    text_tokens: int = Field(0, description="Not counted here.")
    image_tokens: int = Field(0, description="Not counted here.")


class Usage(Answer):
    """Token usage, always 0."""

    input_tokens: int = Field(0, description="Not counted here.")
    output_tokens: int = Field(0, description="Not counted here.")
    total_tokens: int = Field(0, description="Not counted here.")
    input_tokens_details: TokenDetails = Field(
        TokenDetails(), description="Not counted here, either."
    )


class ImagesResponse(Answer):
    created: int = Field(description="Unix seconds.", examples=[1725311496])
    data: list[ImageData] = Field(description="The images.")
    background: str = Field("opaque", description="transparent or opaque.")
    output_format: str = Field(description="png, jpeg or webp.", examples=["png"])
    size: str = Field(description="WIDTHxHEIGHT, as drawn.", examples=["1024x1024"])
    usage: Usage = Field(Usage(), description="Always 0.")


class ImageEvent(Answer):
    """An event of a stream."""

    type: str = Field(description="image_generation or image_edit, .partial_image or .completed.")
    b64_json: str = Field(description="The image.")
    created_at: int = Field(description="Unix seconds.")
    size: str = Field(description="WIDTHxHEIGHT.")
    quality: str = Field("auto", description="Always auto.")
    background: str = Field("opaque", description="transparent or opaque.")
    output_format: str = Field(description="png, jpeg or webp.")
    partial_image_index: int | None = Field(None, description="From 0; of partial images.")
    usage: Usage | None = Field(None, description="Of completed images.")
    seed: str | None = Field(None, description="Extension: the seed of a completed image.")


class OpenAIModel(Answer):
    id: str = Field(description="Its name.", examples=["schnell"])
    object: str = Field("model", description="Always model.")
    created: int = Field(description="Unix seconds: the start of the server.")
    owned_by: str = Field(description="mflux's family of the model.", examples=["flux"])


class OpenAIModels(Answer):
    object: str = Field("list", description="Always list.")
    data: list[OpenAIModel] = Field(description="The models, the default first.")


class OpenAIErrorBody(BaseModel):
    message: str = Field(description="One sentence.")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error.")
    param: str | None = Field(
        description="The field at fault.", json_schema_extra={"nullable": True}
    )
    code: str = Field(description="Stable, for programs.")


class OpenAIError(BaseModel):
    """An error of this API."""

    error: OpenAIErrorBody = Field(description="What went wrong.")
