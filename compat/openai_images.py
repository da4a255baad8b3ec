"""The OpenAI Images API under /v1. Its requests become tasks."""

import re
from typing import Any

from flask import Response, request

import errors
from api.answers import json_response
from api.api_docs import (
    IDEMPOTENCY_KEY,
    SCHEMAS,
    ForeignSchemas,
    documented,
    in_path,
    json_answer,
    query,
)
from api.identity import public
from api.links import EXPIRES, SIGNATURE, Links
from api.request_body import json_body
from api.routes import route
from compat.bodies import read_body, used
from compat.openai_answers import ImagesStream, UrlOf, images_response
from compat.openai_errors import OPENAI_ERRORS
from compat.openai_fields import edit_of, fields_of, start, variation_of
from compat.openai_shapes import (
    ImageEvent,
    ImagesResponse,
    OpenAIError,
    OpenAIGeneration,
    OpenAIModel,
    OpenAIModels,
)
from compat.streams import Preview, streamed
from compat.sync_calls import DRAWING_ERRORS, Call, SyncCalls
from images import CONTENT_TYPES, EXTENSIONS
from models.model_catalog import Catalog

SCHEMAS_OF_OPENAI: ForeignSchemas = (
    (OpenAIGeneration, "validation"),
    (ImagesResponse, "serialization"),
    (ImageEvent, "serialization"),
    (OpenAIModels, "serialization"),
    (OpenAIError, "serialization"),
)
TAG = "OpenAI Images API"
IMAGE_NAME = re.compile(r"([0-9a-f]{1,64})_([0-9]{1,3})\.(png|jpg|webp)")
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
EDIT_FORM: dict[str, Any] = {
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
PICTURE_IN_JSON = {
    "oneOf": [
        {"type": "string", "description": "A data URL, or base64."},
        {"type": "object", "properties": {"image_url": {"type": "string"}}},
    ]
}
EDIT_JSON = {
    "type": "object",
    "description": "The fields of a generation, and pictures.",
    "properties": {
        "prompt": EDIT_FORM["properties"]["prompt"],
        "images": {"type": "array", "minItems": 1, "items": PICTURE_IN_JSON},
        "mask": PICTURE_IN_JSON,
    },
    "required": ["images"],
}
VARIATION_FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "The picture."},
        "n": {"type": "integer", "minimum": 1, "maximum": 10, "description": "How many images."},
        "size": {"type": "string", "description": "WIDTHxHEIGHT; absent: as the picture."},
        "response_format": {"type": "string", "description": "url or b64_json."},
    },
}
NAME_IN_PATH = in_path("name", "As other answers of this API tell it.")


class OpenAIRoutes:
    """
    Args:
        started_at: unix seconds.
    """

    def __init__(
        self,
        calls: SyncCalls,
        preview: Preview,
        links: Links,
        *,
        started_at: float = 0.0,
    ) -> None:
        self._calls = calls
        self._preview = preview
        self._links = links
        self._started_at = started_at

    @route("POST", "/images/generations")
    @documented(
        "Draw images, and wait for them",
        tag=TAG,
        parameters=[IDEMPOTENCY_KEY],
        content={"application/json": {"schema": {"$ref": SCHEMAS + "OpenAIGeneration"}}},
        answers={200: DRAWN},
        errors=DRAWING_ERRORS,
        shape=OPENAI_ERRORS,
    )
    def generations(self) -> Response:
        calls = self._calls
        with calls.room_for_the_body(request.content_length):
            asked = read_body(OpenAIGeneration, json_body())
            fields = fields_of(asked, asked.prompt, asked.n)
            fields["model"] = calls.known_name(asked.model)
            call = self._start(asked, fields)
        return self._drawn(asked, call, "image_generation")

    @route("POST", "/images/edits")
    @documented(
        "Draw images from others, and wait for them",
        tag=TAG,
        description="An edit model draws where the operator allows one; else drawing starts from "
        "the picture.",
        parameters=[IDEMPOTENCY_KEY],
        content={
            "multipart/form-data": {"schema": EDIT_FORM},
            "application/json": {"schema": EDIT_JSON},
        },
        answers={200: DRAWN},
        errors=DRAWING_ERRORS,
        shape=OPENAI_ERRORS,
    )
    def edits(self) -> Response:
        with self._calls.room_for_the_body(request.content_length):
            asked, fields = edit_of(self._calls)
            call = self._start(asked, fields)
        return self._drawn(asked, call, "image_edit")

    @route("POST", "/images/variations")
    @documented(
        "Draw variations of an image, and wait for them",
        tag=TAG,
        description="Drawing starts from the picture, without a prompt. Nothing is streamed.",
        parameters=[IDEMPOTENCY_KEY],
        content={"multipart/form-data": {"schema": VARIATION_FORM}},
        answers={200: json_answer(ImagesResponse, "The images.")},
        errors=DRAWING_ERRORS,
        shape=OPENAI_ERRORS,
    )
    def variations(self) -> Response:
        with self._calls.room_for_the_body(request.content_length):
            asked, fields = variation_of(self._calls)
            asked = asked.model_copy(update={"stream": False})
            call = self._start(asked, fields)
        return self._drawn(asked, call, "image_edit")

    @public
    @route("GET", "/images/img-<name>")
    @documented(
        "Fetch an image by its URL",
        tag=TAG,
        description="As answered with `response_format` url and by POST /image/link; removes "
        "nothing. With a valid signature it needs no key.",
        parameters=[
            NAME_IN_PATH,
            query(EXPIRES, "When the link expires.", {"type": "integer", "minimum": 0}),
            query(SIGNATURE, "As the URL has it.", {"type": "string"}),
        ],
        answers={
            200: {
                "description": "The image.",
                "content": {
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in CONTENT_TYPES.values()
                },
            }
        },
        errors=(
            errors.InvalidInput,
            errors.Unauthorized,
            errors.UnknownTask,
            errors.NotReady,
            errors.Gone,
        ),
        shape=OPENAI_ERRORS,
    )
    def image(self, name: str) -> Response:
        queue = self._links.queue_for(name, self._calls.own_queue)
        found = IMAGE_NAME.fullmatch(name)
        if found is None:
            raise errors.UnknownTask("There is no image of this name.")
        data, params = queue.image(found[1], int(found[2]))
        if EXTENSIONS[params.format] != found[3]:
            raise errors.UnknownTask("There is no image of this name.")
        answer = Response(data, mimetype=CONTENT_TYPES[params.format])
        answer.headers["Cache-Control"] = "private, max-age=3600"
        return answer

    @route("GET", "/models")
    @documented(
        "List the models that may be named",
        tag=TAG,
        answers={200: json_answer(OpenAIModels, "The models.")},
        errors=(),
        shape=OPENAI_ERRORS,
    )
    def models(self) -> Response:
        models = [model for model in self._calls.allowed.models if not model.upscaler]
        return json_response(OpenAIModels(data=[self._model(model.name) for model in models]))

    @route("GET", "/models/<name>")
    @documented(
        "One model",
        tag=TAG,
        parameters=[NAME_IN_PATH],
        answers={200: json_answer(OpenAIModel, "The model.")},
        errors=(errors.UnknownModel,),
        shape=OPENAI_ERRORS,
    )
    def model(self, name: str) -> Response:
        if Catalog(self._calls.allowed.models).find(name) is None:
            raise errors.UnknownModel(f"There is no model {name[:100]!r}.", field="model")
        return json_response(self._model(name))

    def _drawn(self, asked: OpenAIGeneration, call: Call, kind: str) -> Response:
        """Returns the answer when the images are finished, or a stream."""
        if asked.stream:
            return streamed(call, ImagesStream(kind), asked.partial_images, self._preview)
        with call:
            finished = call.result()
        as_url = (asked.response_format or _usual_form(asked.model)) == "url"
        answer = json_response(images_response(finished, self._url_of(call) if as_url else None))
        if not as_url:
            answer.call_on_close(call.fetched)
        return answer

    def _start(self, asked: OpenAIGeneration, fields: dict[str, Any]) -> Call:
        if asked.stream:
            used(asked.partial_images, "partial_images")
        else:
            used(asked.response_format, "response_format")
        return start(self._calls, asked, fields, end_user=asked.user)

    def _url_of(self, call: Call) -> UrlOf:
        return lambda index, extension: self._links.to(f"{call.task_id}_{index}.{extension}")[0]

    def _model(self, name: str) -> OpenAIModel:
        model = self._calls.allowed.model(name)
        return OpenAIModel(id=model.name, created=int(self._started_at), owned_by=model.family)


def _usual_form(model: str | None) -> str:
    return "url" if (model or "").lower().startswith("dall-e") else "b64_json"
