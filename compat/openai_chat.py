"""OpenAI's chat completions, as far as they draw: an answer is images, as data URLs."""

import json
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from flask import Response, request
from pydantic import Field

import errors
from api.answers import Answer, json_response
from api.api_docs import IDEMPOTENCY_KEY, SCHEMAS, ForeignSchemas, documented
from api.request_body import json_body
from api.routes import route
from compat.bodies import read_body
from compat.openai_errors import OPENAI_ERRORS, openai_error_body
from compat.openai_fields import NAMES, fields_of, start
from compat.openai_messages import request_in
from compat.openai_shapes import Drawing
from compat.pictures import EDIT, START, place_pictures
from compat.streams import Preview, StreamFormat, streamed
from compat.sync_calls import DRAWING_ERRORS, Call, SyncCalls
from images import CONTENT_TYPES, to_base64
from task import GenerationParams, Task

TAG = "OpenAI API"


class ChatRequest(Drawing):
    """The body of POST /v1/chat/completions. Other fields are ignored, and so is what is null or
    empty."""

    of_any_length: ClassVar[frozenset[str]] = frozenset({"messages"})
    pictures: ClassVar[frozenset[str]] = frozenset({"messages"})

    messages: Any = Field(
        description="The text of the last message of the user is the prompt; the pictures of this "
        "message, else the latest ones before it, are edited. They are data URLs.",
        json_schema_extra={"type": "array", "minItems": 1, "items": {"type": "object"}},
    )
    modalities: Any = Field(
        None,
        description="Must contain image: there is no language model here.",
        json_schema_extra={"type": "array", "items": {"type": "string"}, "example": ["image"]},
    )
    n: int = Field(1, ge=1, le=10, description="How many images; each is a choice.")
    stream: bool = Field(False, description="Answer server-sent events.")
    stream_options: Any = Field(None, description="include_usage: a last event with usage.")
    user: Any = Field(None, description="Users of one client share its GPU time equally.")


class ImageUrl(Answer):
    url: str = Field(description="The image as a data URL.")


class ChatImage(Answer):
    type: Literal["image_url"] = Field("image_url", description="Always image_url.")
    image_url: ImageUrl = Field(description="The image.")
    index: int = Field(0, description="Always 0: each choice has one image.")


class ChatMessage(Answer):
    role: Literal["assistant"] = Field("assistant", description="Always assistant.")
    content: str = Field("", description="Always empty.")
    images: list[ChatImage] = Field(description="One image.")


class ChatChoice(Answer):
    index: int = Field(description="From 0.")
    message: ChatMessage = Field(description="The image.")
    finish_reason: str = Field("stop", description="Always stop.")


class ChatUsage(Answer):
    """Token usage, always 0."""

    prompt_tokens: int = Field(0, description="Not counted here.")
    completion_tokens: int = Field(0, description="Not counted here.")
    total_tokens: int = Field(0, description="Not counted here.")


class ChatCompletion(Answer):
    id: str = Field(description="chatcmpl- and the task_id.")
    object: Literal["chat.completion"] = Field(
        "chat.completion", description="Always chat.completion."
    )
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="The model that drew.", examples=["schnell"])
    choices: list[ChatChoice] = Field(description="The images.")
    usage: ChatUsage = Field(ChatUsage(), description="Always 0.")


class ChatChunk(Answer):
    """An event of a stream."""

    id: str = Field(description="chatcmpl- and the task_id.")
    object: Literal["chat.completion.chunk"] = Field(
        "chat.completion.chunk", description="Always chat.completion.chunk."
    )
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="The model that draws.")
    choices: list[dict[str, Any]] = Field(description="`delta` has `images`.")
    usage: ChatUsage | None = Field(None, description="In the last event, if asked for.")


SCHEMAS_OF_CHAT: ForeignSchemas = (
    (ChatRequest, "validation"),
    (ChatCompletion, "serialization"),
    (ChatChunk, "serialization"),
)
DRAWN = {
    "description": "The images; with `stream`, events (ChatChunk), the last of them [DONE].",
    "content": {
        "application/json": {"schema": {"$ref": SCHEMAS + "ChatCompletion"}},
        "text/event-stream": {"schema": {"$ref": SCHEMAS + "ChatChunk"}},
    },
}
CHAT_NAMES = {**NAMES, "prompt": "messages", "images": "messages", "init_image": "messages"}
"""Fields of /generate that have another name in this call."""


class ChatRoutes:
    def __init__(self, calls: SyncCalls, preview: Preview) -> None:
        self._calls = calls
        self._preview = preview

    @route("POST", "/chat/completions")
    @documented(
        "Draw what the last message says, and wait for it",
        tag=TAG,
        description="With `modalities` image. No language model reads the messages.",
        parameters=[IDEMPOTENCY_KEY],
        content={"application/json": {"schema": {"$ref": SCHEMAS + "ChatRequest"}}},
        answers={200: DRAWN},
        errors=(*DRAWING_ERRORS, errors.UnknownTask, errors.NotReady),
        shape=OPENAI_ERRORS,
    )
    def complete(self) -> Response:
        calls = self._calls
        with calls.room_for_the_body(request.content_length):
            asked = read_body(ChatRequest, json_body())
            call = self._start(asked)
            asked = asked.model_copy(update={"messages": None})  # frees its pictures
        if asked.stream:
            return streamed(call, _ChatStream(call, asked), 0, self._preview)
        with call:
            finished = call.result()
        params = finished.params
        answer = json_response(
            ChatCompletion(
                id=_id(call),
                created=int(time.time()),
                model=params.model,
                choices=[
                    ChatChoice(index=index, message=ChatMessage(images=[_image(image, params)]))
                    for index, image in enumerate(finished.images)
                ],
            )
        )
        answer.call_on_close(call.fetched)
        return answer

    def _start(self, asked: ChatRequest) -> Call:
        calls = self._calls
        if not isinstance(asked.modalities, list) or "image" not in asked.modalities:
            raise errors.InvalidInput(
                '{field} must contain "image": this server draws, it has no language model.',
                field="modalities",
            )
        wanted = request_in(asked.messages, "messages")
        named = calls.known_name(asked.model)
        fields = fields_of(asked, wanted.prompt, asked.n)
        fields["model"] = named
        if wanted.pictures:
            ways = (EDIT, START)
            fields |= place_pictures(
                calls, named, wanted.pictures, None, ways=ways, field="messages"
            )
        return start(calls, asked, fields, end_user=asked.user, names=CHAT_NAMES)


class _ChatStream(StreamFormat):
    def __init__(self, call: Call, asked: ChatRequest) -> None:
        self._id = _id(call)
        self._created = int(time.time())
        self._model = call.params.model
        options = asked.stream_options
        self._with_usage = isinstance(options, dict) and options.get("include_usage") is True

    def opening(self) -> str:
        return self._event([_delta(0, {"role": "assistant", "content": ""})])

    def image(self, task: Task, index: int, image: bytes) -> str:
        images = [_image(image, task.params).model_dump()]
        return self._event([_delta(index, {"role": "assistant", "images": images})])

    def closing(self, task: Task) -> str:
        ends = [_delta(index, {}, "stop") for index in range(task.images_done)]
        usage = self._event([], ChatUsage()) if self._with_usage else ""
        return f"{self._event(ends)}{usage}data: [DONE]\n\n"

    def failed(self, error: errors.ServerError) -> str:
        return f"data: {json.dumps(openai_error_body(error.problem))}\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: ChatUsage | None = None) -> str:
        chunk = ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
        return f"data: {chunk.model_dump_json(exclude={'usage'} if usage is None else None)}\n\n"


def _delta(index: int, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def _image(image: bytes, params: GenerationParams) -> ChatImage:
    return ChatImage(image_url=ImageUrl(url=data_url(image, params)))


def data_url(image: bytes, params: GenerationParams) -> str:
    return f"data:{CONTENT_TYPES[params.format]};base64,{to_base64(image)}"


def _id(call: Call) -> str:
    return f"chatcmpl-{call.task_id}"
