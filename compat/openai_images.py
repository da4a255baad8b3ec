"""The OpenAI Images API under /v1: what its clients send becomes a task like any other."""

import re
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

from flask import Blueprint, Response, request

import errors
from api.answers import json_response
from api.api_docs import (
    IDEMPOTENCY_KEY,
    SCHEMAS,
    ErrorShape,
    ForeignSchemas,
    documented,
    json_answer,
)
from api.query_values import gone_check, half_closed_check
from api.request_body import Form, form_body, json_body
from api.submission import Prepared
from compat.bodies import read_body, used
from compat.openai_shapes import (
    NULLS,
    ImageData,
    ImageEvent,
    ImagesResponse,
    OpenAIEdit,
    OpenAIError,
    OpenAIErrorBody,
    OpenAIGeneration,
    OpenAIModel,
    OpenAIModels,
    Usage,
)
from compat.pictures import EDIT, START, place_pictures
from compat.sync_calls import DRAWING_ERRORS, Call, Finished, SyncCalls
from decoding.protocol import Meaning
from images import CONTENT_TYPES, EXTENSIONS, decode_base64, to_base64
from models.model_catalog import Catalog
from task import GenerationParams

PREFIX = "/v1/"
SCHEMAS_OF_OPENAI: ForeignSchemas = (
    (OpenAIGeneration, "validation"),
    (ImagesResponse, "serialization"),
    (ImageEvent, "serialization"),
    (OpenAIModels, "serialization"),
    (OpenAIError, "serialization"),
)
NAMES = {
    "count": "n",
    "images": "image",
    "init_image": "image",
    "format": "output_format",
    "quality": "output_compression",
}
"""What our fields are called here, where they have another name."""
FOLLOWED_RETRY_S = 60
"""SDKs wait for Retry-After up to so many seconds; above, they try again at once."""
SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX*×]\s*([0-9]{1,5})\s*")  # noqa: RUF001
IMAGE_FIELD = re.compile(r"image(\[[0-9]{0,3}\])?")
IMAGE_NAME = re.compile(r"([0-9a-f]{1,64})_([0-9]{1,3})\.(png|jpg|webp)")
SIGN_OF_LIFE_AFTER = 15
"""Looks at a quiet task, of a second each, after which a stream says that it is alive."""

Preview = Callable[[str], bytes | None]
"""The picture of a running task so far, by task_id, where there is one."""


def openai_status(http_status: int) -> int:
    return 400 if http_status in (409, 415, 422) else http_status


def openai_error_body(problem: errors.Problem) -> dict[str, Any]:
    status = openai_status(problem.http_status)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = OpenAIErrorBody(
        message=problem.message,
        type="rate_limit_error" if status == 429 else kind,
        param=problem.field,
        code=problem.code,
    )
    return OpenAIError(error=body).model_dump()


def openai_error(problem: errors.Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of an answer."""
    headers = {}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(problem.retry_after_s)
    pointless = problem.http_status in (409, 410, 500, 507) or (
        (problem.retry_after_s or 0) > FOLLOWED_RETRY_S
    )
    if pointless:
        headers["x-should-retry"] = "false"  # else SDKs submit the same again, twice
    return openai_error_body(problem), openai_status(problem.http_status), headers


OPENAI_ERRORS = ErrorShape("OpenAIError", openai_error_body, openai_status)
DRAWN = {
    "description": "The images; with `stream`, events of one image each.",
    "content": {
        "application/json": {"schema": {"$ref": SCHEMAS + "ImagesResponse"}},
        "text/event-stream": {
            "schema": {
                "type": "object",
                "properties": {
                    "event": {"type": "string", "description": "As `type` in the data."},
                    "data": {"type": "string", "description": "JSON: an ImageEvent."},
                },
            }
        },
    },
}
EDIT_FORM = {
    "type": "object",
    "description": "The fields of a generation, and files.",
    "required": ["image"],
    "properties": {
        "prompt": {"type": "string", "description": "What the image shows; may be empty."},
        "image": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "The picture, or several; also called image[] or image[0].",
        },
        "mask": {
            "type": "string",
            "format": "binary",
            "description": "Transparent where to repaint; without transparency, white there.",
        },
    },
}


def openai_routes(
    calls: SyncCalls, preview: Preview, *, public_url: str = "", started_at: float = 0.0
) -> Blueprint:
    """Args:
    public_url: under which clients reach this server; empty: the Host of each request.
    started_at: unix seconds.
    """
    routes = Blueprint("openai", __name__, url_prefix="/v1")

    @routes.post("/images/generations")
    @documented(
        "Draw images, and wait for them",
        tag="OpenAI Images API",
        parameters=[IDEMPOTENCY_KEY],
        content={"application/json": {"schema": {"$ref": SCHEMAS + "OpenAIGeneration"}}},
        answers={200: DRAWN},
        errors=DRAWING_ERRORS,
        shape=OPENAI_ERRORS,
    )
    def generations() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked = read_body(OpenAIGeneration, json_body())
            fields = _fields(asked, calls) | {"model": calls.known_name(asked.model)}
            started = _start(asked, fields)
        return _wait(asked, *started, "image_generation")

    @routes.post("/images/edits")
    @documented(
        "Draw images from others, and wait for them",
        tag="OpenAI Images API",
        description="An edit model draws where the operator allows one; else drawing starts from "
        "the picture.",
        parameters=[IDEMPOTENCY_KEY],
        content={"multipart/form-data": {"schema": EDIT_FORM}},
        answers={200: DRAWN},
        errors=DRAWING_ERRORS,
        shape=OPENAI_ERRORS,
    )
    def edits() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked, fields = _edit(calls)
            started = _start(asked, fields)
        return _wait(asked, *started, "image_edit")

    def _start(asked: OpenAIGeneration, fields: dict[str, Any]) -> tuple[Call, Prepared]:
        if asked.stream:
            used(asked.partial_images, "partial_images")
        else:
            used(asked.response_format, "response_format")
        model = calls.allowed.model(fields["model"])
        fields["steps"] = calls.steps(model, asked.steps)
        prepared = _prepared(asked, fields, calls)
        call = calls.start(
            prepared,
            priority=int(asked.priority),
            client_key=_client_key(),
            hung_up=gone_check(),
        )
        fields.clear()  # its pictures are not held while the caller waits
        return call, prepared

    def _wait(asked: OpenAIGeneration, call: Call, prepared: Prepared, kind: str) -> Response:
        if asked.stream:
            return _streamed(call, asked, prepared, kind, preview)
        with call:
            finished = call.result()
        as_url = (asked.response_format or _usual_form(asked.model)) == "url"
        answer = json_response(_images_response(finished, call.task_id if as_url else None))
        if not as_url:
            answer.call_on_close(call.fetched)
        return answer

    def _images_response(finished: Finished, task_id: str | None) -> ImagesResponse:
        """task_id: tell URLs, and not the images themselves."""
        params = finished.params
        base = (public_url or request.host_url).rstrip("/")
        name = f"{base}/v1/images/img-{task_id}_{{}}.{EXTENSIONS[params.format]}"
        return ImagesResponse(
            created=int(time.time()),
            output_format=params.format.lower(),
            size=_size(params),
            data=[
                ImageData(
                    url=name.format(index) if task_id else None,
                    b64_json=None if task_id else to_base64(image),
                    seed=str(params.seed_of(index)),
                )
                for index, image in enumerate(finished.images)
            ],
        )

    @routes.get("/images/img-<name>")
    @documented(
        "Fetch an image by its URL",
        tag="OpenAI Images API",
        description="As answered with `response_format` url; removes nothing.",
        parameters=[_in_path("name")],
        answers={
            200: {
                "description": "The image.",
                "content": {
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in CONTENT_TYPES.values()
                },
            }
        },
        errors=(errors.InvalidInput, errors.UnknownTask, errors.NotReady, errors.Gone),
        shape=OPENAI_ERRORS,
    )
    def image(name: str) -> Response:
        found = IMAGE_NAME.fullmatch(name)
        if found is None:
            raise errors.UnknownTask("There is no image of this name.")
        data, params = calls.queue.image(found[1], int(found[2]))
        if EXTENSIONS[params.format] != found[3]:
            raise errors.UnknownTask("There is no image of this name.")
        answer = Response(data, mimetype=CONTENT_TYPES[params.format])
        answer.headers["Cache-Control"] = "private, max-age=3600"
        return answer

    @routes.get("/models")
    @documented(
        "List the models that may be named",
        tag="OpenAI Images API",
        answers={200: json_answer(OpenAIModels, "The models.")},
        errors=(),
        shape=OPENAI_ERRORS,
    )
    def models() -> Response:
        return json_response(
            OpenAIModels(data=[one(name) for name in _names(calls)]),
        )

    @routes.get("/models/<name>")
    @documented(
        "One model",
        tag="OpenAI Images API",
        parameters=[_in_path("name")],
        answers={200: json_answer(OpenAIModel, "The model.")},
        errors=(errors.UnknownModel,),
        shape=OPENAI_ERRORS,
    )
    def model(name: str) -> Response:
        if Catalog(calls.allowed.models).find(name) is None:
            raise errors.UnknownModel(f"There is no model {name[:100]!r}.", field="model")
        return json_response(one(name))

    def one(name: str) -> OpenAIModel:
        model = calls.allowed.model(name)
        return OpenAIModel(id=model.name, created=int(started_at), owned_by=model.family)

    return routes


def _edit(calls: SyncCalls) -> tuple[OpenAIEdit, dict[str, Any]]:
    """The body of an edit, and the fields of /generate that it means."""
    form = form_body() if request.mimetype == "multipart/form-data" else Form()
    pictures = [
        picture
        for name in {**form.files, **form.texts}
        if IMAGE_FIELD.fullmatch(name)
        for picture in _pictures(form, name, "image")
    ]
    if not pictures:
        raise errors.InvalidInput(
            "image is required: a file of a form (multipart/form-data).", field="image"
        )
    asked = read_body(OpenAIEdit, {name: texts[0] for name, texts in form.texts.items()})
    mask = next(iter(_pictures(form, "mask", "mask")), None)
    placed = place_pictures(
        calls,
        calls.known_name(asked.model),
        pictures,
        mask,
        ways=(START, EDIT) if mask else (EDIT, START),
        field="image",
    )
    return asked, _fields(asked, calls) | placed


def _pictures(form: Form, name: str, field: str) -> list[bytes]:
    """The files of a field, and its texts, which are base64 or data URLs."""
    texts = [text for text in form.texts.get(name, ()) if text not in ("", *NULLS)]
    return [*form.files.get(name, ()), *(decode_base64(text, field) for text in texts)]


def _names(calls: SyncCalls) -> list[str]:
    return [model.name for model in calls.allowed.models if not model.upscaler]


def _fields(asked: OpenAIGeneration, calls: SyncCalls) -> dict[str, Any]:
    """The fields of /generate."""
    compression = None
    if asked.output_format != "png":
        compression = max(used(asked.output_compression, "output_compression"), 1)
    return {
        "prompt": asked.prompt,
        "count": asked.n,
        "format": asked.output_format,
        "quality": compression,
        "seed": asked.seed,
        "guidance": asked.guidance,
        "negative_prompt": asked.negative_prompt,
        **_sides(asked.size),
    }


def _sides(size: str | None) -> dict[str, int]:
    if size is None or size.strip().lower() == "auto":
        return {}
    found = SIZE.fullmatch(size)
    if found is None:
        raise errors.InvalidInput(
            f"size must be WIDTHxHEIGHT in pixels, like 1024x1024, or auto, not {size[:50]!r}.",
            field="size",
        )
    return {"width": int(found[1]), "height": int(found[2])}


def _prepared(asked: OpenAIGeneration, fields: dict[str, Any], calls: SyncCalls) -> Prepared:
    try:
        return calls.prepare(fields, NAMES, mask_meaning=Meaning.MASK_CLEAR)[1]
    except errors.ServerError as error:
        if error.field in ("width", "height"):
            error.field = "size"
            error.message = f"size {asked.size}: {error.message}" if asked.size else error.message
        raise


def _usual_form(model: str | None) -> str:
    return "url" if (model or "").lower().startswith("dall-e") else "b64_json"


def _size(params: GenerationParams) -> str:
    width, height = params.final_size
    return f"{width}x{height}"


def _client_key() -> str | None:
    """Keys of this API are no keys of another."""
    key = request.headers.get("Idempotency-Key", "").strip()
    return f"openai:{sha256(key.encode()).hexdigest()}" if key else None


def _streamed(
    call: Call, asked: OpenAIGeneration, prepared: Prepared, kind: str, preview: Preview
) -> Response:
    half_closed = half_closed_check()

    def events() -> Iterator[str]:
        try:
            yield from _partial_images(
                call,
                asked.partial_images,
                prepared.params,
                kind,
                preview=preview,
                half_closed=half_closed,
            )
            finished = call.result()
            for index, image in enumerate(finished.images):
                yield _event(
                    _image_event(f"{kind}.completed", image, finished.params).model_copy(
                        update={"usage": Usage(), "seed": str(finished.params.seed_of(index))}
                    )
                )
            call.fetched()
        except errors.ServerError as error:
            problem = errors.Problem(error.http_status, error.code, error.message, error.field)
            body = OpenAIError.model_validate(openai_error_body(problem))
            yield f"event: error\ndata: {body.model_dump_json()}\n\n"

    answer = Response(events(), mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Accel-Buffering"] = "no"
    answer.call_on_close(call.close)
    return answer


def _partial_images(
    call: Call,
    most: int,
    params: GenerationParams,
    kind: str,
    *,
    preview: Preview,
    half_closed: Callable[[], bool],
) -> Iterator[str]:
    """Previews at even distances, as far as there are any, until the task has ended. A client that
    has closed its half of the connection gets comments: one that has gone answers with a reset."""
    sent, quiet, latest = 0, 0, None
    for view in call.views():
        quiet += 1
        due = view.steps_total * (sent + 1) / (most + 1)
        picture = preview(call.task_id) if sent < most else None  # made for those who look
        if view.steps_done >= due and picture is not None and picture != latest:
            event = _image_event(f"{kind}.partial_image", picture, params)
            yield _event(event.model_copy(update={"partial_image_index": sent}))
            sent, quiet, latest = sent + 1, 0, picture
        elif quiet >= SIGN_OF_LIFE_AFTER or half_closed():
            yield ":\n\n"
            quiet = 0


def _image_event(kind: str, image: bytes, params: GenerationParams) -> ImageEvent:
    return ImageEvent(
        type=kind,
        b64_json=to_base64(image),
        created_at=int(time.time()),
        size=_size(params),
        output_format="jpeg" if kind.endswith("partial_image") else params.format.lower(),
    )


def _event(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def _in_path(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "description": "As other answers of this API tell it.",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 200},
    }
