"""Bodies and answers of OpenAI's Responses API, as far as they draw."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from api.answers import Answer
from compat.bodies import Body
from compat.openai_shapes import Drawing, ModelName

Status = Literal["queued", "in_progress", "completed", "failed"]


def _known_action(value: object) -> object:
    return value if value in ("generate", "edit") else "auto"


class ResponsesRequest(Body):
    """The body of POST /v1/responses. Other fields are ignored, and so is what is null or empty."""

    of_any_length: ClassVar[frozenset[str]] = frozenset({"input"})
    pictures: ClassVar[frozenset[str]] = frozenset({"input", "tools"})

    model: ModelName = Field(
        None, description="Used as the model of the tool if it is one of GET /v1/models."
    )
    input: Any = Field(
        description="The prompt, or items: the text of the last message of the user is the prompt; "
        "the pictures of this message, else the latest ones before it, are edited.",
        json_schema_extra={
            "oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "object"}},
            ]
        },
    )
    tools: Any = Field(
        None,
        description="One of them is of the type image_generation (ResponsesTool). Others are "
        "ignored.",
        json_schema_extra={"type": "array", "minItems": 1, "items": {"type": "object"}},
    )
    tool_choice: Any = Field(
        None, description="Must allow image_generation; required, auto and absent do."
    )
    previous_response_id: Any = Field(
        None, description="A response of this server, whose picture is edited if it is still there."
    )
    stream: bool = Field(False, description="Answer server-sent events.")
    background: Any = Field(None, description="true is refused: calls wait for their picture.")
    user: Any = Field(None, description="Users of one client share its GPU time equally.")


class ResponsesTool(Drawing):
    """The tool image_generation of POST /v1/responses. Other fields are ignored."""

    pictures: ClassVar[frozenset[str]] = frozenset({"input_image_mask"})

    type: Literal["image_generation"] = Field(description="Always image_generation.")
    action: Annotated[Literal["generate", "edit", "auto"], BeforeValidator(_known_action)] = Field(
        "auto", description="generate: pictures are not used. edit: there must be one."
    )
    input_image_mask: Any = Field(
        None,
        description="image_url of a picture as a data URL that is transparent where to repaint.",
        json_schema_extra={"type": "object"},
    )


class ImageCall(Answer):
    """A picture, or one that is being drawn."""

    id: str = Field(description="ig_ and the task_id.")
    type: Literal["image_generation_call"] = Field(
        "image_generation_call", description="Always image_generation_call."
    )
    status: Literal["in_progress", "generating", "completed", "failed"] = Field(
        description="Where it is."
    )
    result: str | None = Field(None, description="The picture as base64.")
    revised_prompt: str | None = Field(None, description="The prompt that was drawn.")
    action: str | None = Field(None, description="generate or edit.")
    size: str | None = Field(None, description="WIDTHxHEIGHT, as drawn.")
    quality: str | None = Field(None, description="Always auto.")
    background: str | None = Field(None, description="transparent or opaque.")
    output_format: str | None = Field(None, description="png, jpeg or webp.")
    seed: str | None = Field(None, description="Extension: the seed as digits.")


class CachedTokens(Answer):
    cached_tokens: int = Field(0, description="Not counted here.")


class ReasoningTokens(Answer):
    reasoning_tokens: int = Field(0, description="Not counted here.")


class ResponsesUsage(Answer):
    """Token usage, always 0."""

    input_tokens: int = Field(0, description="Not counted here.")
    input_tokens_details: CachedTokens = Field(CachedTokens(), description="Not counted here.")
    output_tokens: int = Field(0, description="Not counted here.")
    output_tokens_details: ReasoningTokens = Field(
        ReasoningTokens(), description="Not counted here."
    )
    total_tokens: int = Field(0, description="Not counted here.")


class ResponseError(Answer):
    code: str = Field(description="Stable, for programs.")
    message: str = Field(description="One sentence.")


class ResponsesAnswer(Answer):
    """A response: its output is one picture."""

    id: str = Field(description="resp_ and the task_id.")
    object: Literal["response"] = Field("response", description="Always response.")
    created_at: int = Field(description="Unix seconds.")
    status: Status = Field(description="Where it is.")
    error: ResponseError | None = Field(None, description="Of a failed one, in a stream.")
    model: str = Field(description="The model that draws.", examples=["schnell"])
    output: list[ImageCall] = Field(description="One picture; none before it is finished.")
    parallel_tool_calls: bool = Field(False, description="Always false.")
    previous_response_id: str | None = Field(None, description="As it was sent.")
    tool_choice: dict[str, str] = Field(
        {"type": "image_generation"}, description="Always image_generation."
    )
    tools: list[dict[str, str]] = Field(
        [{"type": "image_generation"}], description="Always image_generation."
    )
    metadata: dict[str, str] = Field({}, description="Always empty.")
    usage: ResponsesUsage | None = Field(None, description="Always 0; of a finished one.")
