"""What the tools of MCP are called and take.

A field of /generate that a tool takes is named here and declared where /generate declares it: its
type, range and description come from there, with the operator's limits.
"""

from typing import Any, NamedTuple

from pydantic import Field

from api.answers import Answer
from api.generate_request import Limits, request_schema

MOST_WAIT_S = 45
"""Hosts of MCP give up on a call after about 60 s."""
GENERATE_FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    "width",
    "height",
    "steps",
    "guidance",
    "seed",
    "count",
    "format",
    "background",
    "loras",
    "upscale",
)
EDIT_FIELDS = (
    *(name for name in GENERATE_FIELDS if name != "background"),
    "mask",
    "image_strength",
)
"""Beside the picture itself: IMAGE_FIELDS."""
IMAGE_FIELDS = ("image", "task_id", "index")
SHOWN_AS_TEXT = ("prompt", "seed", "mask")
"""Of the types that /generate takes, a tool shows the text: many hosts know one type for each
argument."""
IN_TOOLS = {
    "prompt": "What the picture shows; with a picture to edit also: what to change. Models read "
    "only the first few hundred words.",
    "width": "Pixels, rounded down to multiples of 16 (some models: 32). The server's default if "
    "absent; if a picture is edited, as that one.",
    "height": "As width.",
    "seed": "Digits. The same seed, arguments and model give the same picture. Random if absent; "
    "every answer contains it.",
    "count": "How many pictures of the prompt, with the seeds that follow.",
    "mask": "White where the picture is repainted; the rest stays. base64 or a data URL.",
    "image_strength": "How much of the picture is kept, above 0 and below 1.",
    "upscale": "Factor by which the finished pictures are upscaled, above 1 and up to 4, if the "
    "operator allows an upscaler.",
}
"""Descriptions in place of those of /generate, which are about its other fields, too."""
INSTRUCTIONS = (
    "Draws pictures on one GPU that clients share. A call waits up to 45 seconds; a picture that "
    "needs longer goes on, and check_image returns it later. Show the user the link to the full "
    "picture: the inline one may be smaller."
)


class McpMessage(Answer):
    """A request or a notification of JSON-RPC 2.0."""

    jsonrpc: str = Field(description="2.0.", examples=["2.0"])
    id: str | int | None = Field(
        None, description="Repeated in the answer; absent: a notification.", examples=[1]
    )
    method: str = Field(
        description="initialize, server/discover, ping, tools/list, tools/call, resources/list, "
        "resources/templates/list, resources/read.",
        examples=["tools/list"],
    )
    params: dict[str, Any] = Field({}, description="Of the method.", examples=[{}])


class McpErrorBody(Answer):
    code: int = Field(description="Of JSON-RPC or MCP.", examples=[-32602])
    message: str = Field(description="One sentence.")
    data: dict[str, Any] | None = Field(
        None, description="What the message says, for programs: code, field and others."
    )


class McpAnswer(Answer):
    """An answer of JSON-RPC 2.0."""

    jsonrpc: str = Field(description="2.0.", examples=["2.0"])
    id: str | int | None = Field(
        None, description="Of the request; absent: it could not be read.", examples=[1]
    )
    result: dict[str, Any] | None = Field(None, description="Either this or error is there.")
    error: McpErrorBody | None = Field(None, description="What went wrong.")


class Tool(NamedTuple):
    title: str
    description: str
    fields: tuple[str, ...] = ()
    """Of /generate."""
    own: tuple[str, ...] = ()
    """Arguments of OWN_ARGUMENTS."""
    required: tuple[str, ...] = ()
    only_reads: bool = True


OWN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "wait_s": {
        "type": "number",
        "minimum": 0,
        "maximum": MOST_WAIT_S,
        "default": MOST_WAIT_S,
        "description": "Seconds to wait for the picture. With 0 the task_id comes at once: so "
        "several pictures can be ordered one after the other.",
    },
    "task_id": {
        "type": "string",
        "minLength": 1,
        "maxLength": 64,
        "description": "The id of one of your tasks.",
    },
    "index": {
        "type": "integer",
        "minimum": 0,
        "maximum": 999,
        "default": 0,
        "description": "Which picture of task_id, from 0.",
    },
    "image": {
        "type": "string",
        "minLength": 1,
        "description": "The picture to edit as base64 or as a data URL: PNG, JPEG, WebP or GIF. "
        "URLs are not fetched, and files are not read. For a picture that was drawn here, give "
        "its task_id instead.",
    },
}
TOOLS = {
    "generate_image": Tool(
        "Generate a picture",
        "Draws a picture from a description. Returns the picture, or its task_id and the seconds "
        "left if it is not ready in time.",
        GENERATE_FIELDS,
        ("wait_s",),
        ("prompt",),
        only_reads=False,
    ),
    "edit_image": Tool(
        "Edit a picture",
        "Draws a changed version of a picture: one that was drawn here (task_id), or one that is "
        "sent (image). `prompt` says what to change, or what the new picture shows.",
        EDIT_FIELDS,
        (*IMAGE_FIELDS, "wait_s"),
        ("prompt",),
        only_reads=False,
    ),
    "check_image": Tool(
        "Check a picture",
        "Returns the picture of a task once it is ready, or the seconds left.",
        own=("task_id", "wait_s"),
        required=("task_id",),
    ),
    "cancel": Tool(
        "Cancel a picture",
        "Cancels a task that waits or is being drawn. Finished pictures stay.",
        own=("task_id",),
        required=("task_id",),
        only_reads=False,
    ),
    "list_models": Tool("List models", "Lists the models and LoRAs that may be used here."),
    "estimate": Tool(
        "Estimate the time",
        "Forecasts when a picture with these arguments would be ready. Draws nothing.",
        GENERATE_FIELDS,
        required=("prompt",),
    ),
}


def tools_list(limits: Limits) -> list[dict[str, Any]]:
    """The answer to tools/list, in a fixed order."""
    schema = request_schema(limits)
    return [
        {
            "name": name,
            "title": tool.title,
            "description": tool.description,
            "inputSchema": {
                "type": "object",
                "properties": {
                    **{field: _argument(field, schema) for field in tool.fields},
                    **{argument: OWN_ARGUMENTS[argument] for argument in tool.own},
                },
                "required": list(tool.required),
                "additionalProperties": False,
            },
            "annotations": {
                "readOnlyHint": tool.only_reads,
                "destructiveHint": name == "cancel",
                "openWorldHint": False,
            },
        }
        for name, tool in TOOLS.items()
    ]


def _argument(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A field of /generate with one type."""
    field = dict(schema["properties"][name])
    choices = [one for one in field.pop("anyOf", ()) if one != {"type": "null"}]
    if choices:
        texts = [one for one in choices if one.get("type") == "string"]
        field |= texts[0] if name in SHOWN_AS_TEXT else choices[0]
    field.pop("title", None)
    field.pop("default", None)  # the server's, which depend on model and picture
    description = IN_TOOLS.get(name) or str(field["description"])
    field["description"] = description.replace("GET /models", "list_models")
    found: dict[str, Any] = _inlined(field, schema["$defs"])
    return found


def _inlined(part: Any, parts: dict[str, Any]) -> Any:
    """Many hosts do not follow references."""
    if isinstance(part, list):
        return [_inlined(one, parts) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(parts[part["$ref"].rpartition("/")[2]], parts)
    return {name: _inlined(one, parts) for name, one in part.items()}
