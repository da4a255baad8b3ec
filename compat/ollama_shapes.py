"""Bodies and answers of Ollama's API, as far as it draws."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from api.answers import Answer
from compat.bodies import Body
from task import MAX_SEED

MOST_IMAGES = 20


def _absent_if_0(value: object) -> object:
    return None if value == 0 else value


def _object(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _random_if_negative(value: object) -> object:
    return None if isinstance(value, int) and value < 0 else value


Whole = Annotated[int | None, Field(ge=1, le=8192), BeforeValidator(_absent_if_0)]


class OllamaOptions(Body):
    """`options` of a request. Others are ignored."""

    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED), BeforeValidator(_random_if_negative)] = (
        Field(None, description="The seed; negative: random.")
    )


class OllamaGenerate(Body):
    """The body of POST /api/generate as Ollama's clients send it. Other fields are ignored, and so
    is what is null or empty."""

    pictures: ClassVar[frozenset[str]] = frozenset({"images"})

    model: str = Field(min_length=1, max_length=500, description="One of GET /api/tags.")
    prompt: str = Field("", description="What the image shows. Empty: nothing is drawn.")
    images: list[str] = Field(
        [], max_length=MOST_IMAGES, description="Pictures as base64, which are edited."
    )
    width: Whole = Field(None, description="Pixels.")
    height: Whole = Field(None, description="Pixels.")
    steps: Whole = Field(None, description="Denoising steps.")
    stream: bool = Field(True, description="false: one answer in place of lines of progress.")
    options: Annotated[dict[str, Any], BeforeValidator(_object)] = Field(
        {}, description="Of these, seed is honoured."
    )


class OllamaShow(Body):
    """The body of POST /api/show."""

    model: str | None = Field(None, max_length=500, description="One of GET /api/tags.")
    name: str | None = Field(None, max_length=500, description="The same, from older clients.")


class OllamaDetails(Answer):
    parent_model: str = Field("", description="Always empty.")
    format: str = Field("safetensors", description="Always safetensors.")
    family: str = Field(description="mflux's family of the model.", examples=["flux"])
    families: list[str] = Field(description="The same.")
    parameter_size: str = Field("", description="Always empty.")
    quantization_level: str = Field(description="Such as 8-bit; empty: not quantized.")


class OllamaModel(Answer):
    name: str = Field(description="Its name and :latest.", examples=["schnell:latest"])
    model: str = Field(description="The same.")
    modified_at: str = Field(description="The start of the server.")
    size: int = Field(description="Bytes on disk.")
    digest: str = Field("", description="Always empty.")
    details: OllamaDetails = Field(description="What it is.")
    capabilities: list[str] = Field(["image"], description="Always image.")


class OllamaTags(Answer):
    models: list[OllamaModel] = Field(description="The models, the default first.")


class OllamaLoadedModel(Answer):
    name: str = Field(description="Its name and :latest.")
    model: str = Field(description="The same.")
    size: int = Field(description="Bytes of its weights in memory, about.")
    size_vram: int = Field(description="The same.")
    digest: str = Field("", description="Always empty.")
    details: OllamaDetails = Field(description="What it is.")


class OllamaLoaded(Answer):
    models: list[OllamaLoadedModel] = Field(description="Those in memory.")


class OllamaShown(Answer):
    modified_at: str = Field(description="The start of the server.")
    details: OllamaDetails = Field(description="What it is.")
    model_info: dict[str, str] = Field(description="general.architecture: the family.")
    capabilities: list[str] = Field(["image"], description="Always image.")


class OllamaVersion(Answer):
    version: str = Field(description="Of this server.")


class OllamaLine(Answer):
    """An answer of POST /api/generate, or a line of its stream."""

    model: str = Field(description="As it was sent.")
    created_at: str = Field(description="The time.")
    response: str = Field("", description="Always empty: there is no language model.")
    done: bool = Field(description="Whether it is the last line.")
    done_reason: str | None = Field(None, description="stop, or load without a prompt.")
    completed: int | None = Field(None, description="Steps that have ended.")
    total: int | None = Field(None, description="Steps.")
    image: str | None = Field(None, description="The picture as base64, in the last line.")
    total_duration: int | None = Field(None, description="Nanoseconds since it was asked for.")


class OllamaError(Answer):
    error: str = Field(description="One sentence.")
