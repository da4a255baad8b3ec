"""OpenAI's Responses API, as far as it draws: the tool image_generation."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flask import Response, request

import errors
from api.answers import json_response
from api.api_docs import IDEMPOTENCY_KEY, SCHEMAS, ForeignSchemas, documented
from api.request_body import json_body
from api.routes import route
from compat.bodies import read_body, used
from compat.openai_answers import background_of, size_of
from compat.openai_errors import OPENAI_ERRORS
from compat.openai_fields import NAMES, fields_of, picture_in, start
from compat.openai_messages import earlier, request_in
from compat.openai_responses_shapes import (
    ImageCall,
    ResponseError,
    ResponsesAnswer,
    ResponsesRequest,
    ResponsesTool,
    ResponsesUsage,
    Status,
)
from compat.pictures import EDIT, START, place_pictures
from compat.streams import Preview, StreamFormat, streamed
from compat.sync_calls import DRAWING_ERRORS, Call, SyncCalls
from images import to_base64
from task import GenerationParams, Task

TAG = "OpenAI API"
SCHEMAS_OF_RESPONSES: ForeignSchemas = (
    (ResponsesRequest, "validation"),
    (ResponsesTool, "validation"),
    (ResponsesAnswer, "serialization"),
)
DRAWN = {
    "description": "The picture; with `stream`, the events of OpenAI's Responses API.",
    "content": {
        "application/json": {"schema": {"$ref": SCHEMAS + "ResponsesAnswer"}},
        "text/event-stream": {
            "schema": {
                "type": "object",
                "properties": {
                    "event": {"type": "string", "description": "As `type` in the data."},
                    "data": {"type": "string", "description": "JSON."},
                },
            }
        },
    },
}


class ResponsesRoutes:
    def __init__(self, calls: SyncCalls, preview: Preview) -> None:
        self._calls = calls
        self._preview = preview

    @route("POST", "/responses")
    @documented(
        "Draw with the tool image_generation, and wait for it",
        tag=TAG,
        description="No language model reads the input, and no response is kept: only the picture "
        "is, as that of any task.",
        parameters=[IDEMPOTENCY_KEY],
        content={"application/json": {"schema": {"$ref": SCHEMAS + "ResponsesRequest"}}},
        answers={200: DRAWN},
        errors=(*DRAWING_ERRORS, errors.UnknownTask, errors.NotReady),
        shape=OPENAI_ERRORS,
    )
    def respond(self) -> Response:
        with self._calls.room_for_the_body(request.content_length):
            asked = read_body(ResponsesRequest, json_body())
            if asked.background is True:
                raise errors.InvalidInput(
                    "{field} true: a call of this API waits; POST /generate does not.",
                    field="background",
                )
            at, tool = _tool_of(asked)
            with _named_in_tool(at, but_model=not self._calls.known_name(tool.model)):
                call = self._start(asked, tool)
            # Frees their pictures.
            asked = asked.model_copy(update={"input": None, "tools": None})
            tool = tool.model_copy(update={"input_image_mask": None})
        writer = _Answers(call, asked.previous_response_id)
        if asked.stream:
            return streamed(call, _Events(call, writer), tool.partial_images, self._preview)
        with call:
            finished = call.result()
        picture = writer.call("completed", finished.params, finished.images[0])
        answer = json_response(writer.response("completed", [picture]))
        answer.call_on_close(call.fetched)
        return answer

    def _start(self, asked: ResponsesRequest, tool: ResponsesTool) -> Call:
        calls = self._calls
        if asked.stream:
            used(tool.partial_images, "partial_images")
        wanted, where = request_in(asked.input, "input"), "input"
        pictures = wanted.pictures
        if asked.previous_response_id is not None and not pictures:
            pictures, where = [earlier(asked.previous_response_id)], "previous_response_id"
        mask = tool.input_image_mask
        for field, given in (("action", tool.action == "edit"), ("input_image_mask", mask)):
            if given not in (None, False) and not pictures:
                raise errors.InvalidInput("{field}: the input has no picture.", field=field)
        named = calls.known_name(tool.model) or calls.known_name(asked.model)
        fields = fields_of(tool, wanted.prompt)
        fields["model"] = named
        if pictures and tool.action != "generate":
            mask = None if mask is None else picture_in(mask, "input_image_mask")
            ways = (START, EDIT) if mask else (EDIT, START)
            fields |= place_pictures(calls, named, pictures, mask, ways=ways, field=where)
        names = {**NAMES, "prompt": "input", "images": where, "init_image": where}
        names["mask"] = "input_image_mask"
        return start(calls, tool, fields, end_user=asked.user, names=names)


def _tool_of(asked: ResponsesRequest) -> tuple[int, ResponsesTool]:
    """The tool image_generation and its index.

    Raises:
        InvalidInput
    """
    tools = asked.tools if isinstance(asked.tools, list) else []
    choice = asked.tool_choice
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind not in (None, "auto", "required", "image_generation", "allowed_tools"):
        raise errors.InvalidInput(
            "{field} must allow the tool image_generation: this server only draws.",
            field="tool_choice",
        )
    for at, tool in enumerate(tools):
        if isinstance(tool, dict) and tool.get("type") == "image_generation":
            with _named_in_tool(at):
                return at, read_body(ResponsesTool, tool)
    raise errors.InvalidInput(
        '{field} must have one of the type "image_generation": this server draws, it has no '
        "language model.",
        field="tools",
    )


@contextmanager
def _named_in_tool(at: int, *, but_model: bool = False) -> Iterator[None]:
    """Errors name fields of the tool as `tools[0].size`.

    Args:
        but_model: the model is not that of the tool.
    """
    try:
        yield
    except errors.ServerError as error:
        if error.field in ResponsesTool.model_fields and not (but_model and error.field == "model"):
            error.field = f"tools[{at}].{error.field}"
        raise


class _Answers:
    """Writes the response and its picture."""

    def __init__(self, call: Call, previous: object) -> None:
        self._task_id = call.task_id
        self._model = call.params.model
        self._created_at = int(time.time())
        self._previous = previous if isinstance(previous, str) else None

    @property
    def item_id(self) -> str:
        return f"ig_{self._task_id}"

    def call(
        self,
        status: Any,
        params: GenerationParams | None = None,
        image: bytes | None = None,
    ) -> ImageCall:
        if params is None or image is None:
            return ImageCall(id=self.item_id, status=status)
        return ImageCall(
            id=self.item_id,
            status=status,
            result=to_base64(image),
            revised_prompt=params.prompt or None,
            action="edit" if params.images or params.init_image else "generate",
            size=size_of(params),
            quality="auto",
            background=background_of(image),
            output_format=params.format.lower(),
            seed=str(params.seed_of(0)),
        )

    def response(
        self, status: Status, output: list[ImageCall], error: ResponseError | None = None
    ) -> ResponsesAnswer:
        return ResponsesAnswer(
            id=f"resp_{self._task_id}",
            created_at=self._created_at,
            status=status,
            error=error,
            model=self._model,
            output=output,
            previous_response_id=self._previous,
            usage=ResponsesUsage() if status == "completed" else None,
        )


class _Events(StreamFormat):
    """The events of a stream, in the order in which OpenAI sends them."""

    def __init__(self, call: Call, writer: _Answers) -> None:
        self._call = call
        self._writer = writer
        self._sequence = 0

    def opening(self) -> str:
        begun = self._response("in_progress", [])
        return "".join(
            (
                self._event("response.created", {"response": begun}),
                self._event("response.in_progress", {"response": begun}),
                self._item_event("added", self._writer.call("in_progress")),
                self._call_event("in_progress"),
                self._call_event("generating"),
            )
        )

    def partial(self, task: Task, index: int, preview: bytes) -> str:
        return self._call_event(
            "partial_image",
            {
                "partial_image_index": index,
                "partial_image_b64": to_base64(preview),
                "size": size_of(task.params),
                "quality": "auto",
                "background": "opaque",
                "output_format": "jpeg",
            },
        )

    def image(self, task: Task, index: int, image: bytes) -> str:
        done = self._writer.call("completed", task.params, image)
        return self._call_event("completed") + self._item_event("done", done)

    def closing(self, task: Task) -> str:
        picture = self._writer.call("completed", task.params, self._call.image(0))
        done = self._response("completed", [picture])
        return self._event("response.completed", {"response": done})

    def failed(self, error: errors.ServerError) -> str:
        problem = error.problem
        why = ResponseError(code=problem.code, message=problem.message)
        return self._event("response.failed", {"response": self._response("failed", [], why)})

    def _response(
        self, status: Status, output: list[ImageCall], error: ResponseError | None = None
    ) -> dict[str, Any]:
        return self._writer.response(status, output, error).model_dump(exclude_none=True)

    def _item_event(self, kind: str, item: ImageCall) -> str:
        fields = {"output_index": 0, "item": item.model_dump(exclude_none=True)}
        return self._event(f"response.output_item.{kind}", fields)

    def _call_event(self, kind: str, more: Mapping[str, Any] | None = None) -> str:
        fields = {"output_index": 0, "item_id": self._writer.item_id, **(more or {})}
        return self._event(f"response.image_generation_call.{kind}", fields)

    def _event(self, kind: str, fields: Mapping[str, Any]) -> str:
        text = json.dumps({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return f"event: {kind}\ndata: {text}\n\n"
