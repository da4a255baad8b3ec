"""AUTOMATIC1111's API under /sdapi/v1: what its clients send becomes a task like any other.

a1111_lists.py has what its clients ask around a picture: options, models, samplers.
"""

import re
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, jsonify, request

import errors
from api.answers import json_response
from api.api_docs import SCHEMAS, ErrorShape, ForeignSchemas, documented, json_answer, query
from api.query_values import gone_check
from api.request_body import json_body
from compat.a1111_answers import images_answer, progress_answer
from compat.a1111_callers import Caller, Callers
from compat.a1111_fields import NAMES, fields_of, hires_of, is_inverted, placed_pictures
from compat.a1111_shapes import (
    A1111Error,
    A1111Images,
    A1111PngInfo,
    A1111Progress,
    ImageToImage,
    PngInfo,
    TextToImage,
)
from compat.bodies import read_body
from compat.sync_calls import DRAWING_ERRORS, Call, Finished, SyncCalls
from decoding.protocol import Meaning
from images import decode_base64, to_base64
from models.model_catalog import Model
from task import GenerationParams

PREFIX = "/sdapi/"
TAG = "AUTOMATIC1111"
SCHEMAS_OF_A1111: ForeignSchemas = (
    (TextToImage, "validation"),
    (ImageToImage, "validation"),
    (PngInfo, "validation"),
    (A1111Images, "serialization"),
    (A1111Progress, "serialization"),
    (A1111PngInfo, "serialization"),
    (A1111Error, "serialization"),
)
NOTHING = {"description": "Nothing.", "content": {"application/json": {"schema": {}}}}


def a1111_error_body(problem: errors.Problem) -> dict[str, Any]:
    body = A1111Error(error=problem.code, detail=problem.message, errors=problem.message)
    return body.model_dump()


def a1111_error(problem: errors.Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of an answer."""
    headers = {}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(problem.retry_after_s)
    return a1111_error_body(problem), problem.http_status, headers


HASH = re.compile(r"\s*\[[^\[\]]*\]$")
"""What AUTOMATIC1111 writes behind the name of a model."""
ENDING = re.compile(r"\.(safetensors|sft|ckpt|gguf)$", re.IGNORECASE)
A1111_ERRORS = ErrorShape("A1111Error", a1111_error_body, int)


class Checkpoint:
    """The model of requests of this API that name none.

    Args:
        switch: whether clients may choose another one for all of them.
    """

    def __init__(self, calls: SyncCalls, switch: bool) -> None:
        self._calls = calls
        self._switch = switch
        self._chosen = calls.allowed.default

    @property
    def model(self) -> Model:
        return self._chosen

    def named(self, title: object) -> str | None:
        """The model of this title; None where the present one is meant."""
        name = str(title or "").strip()
        plain = ENDING.sub("", HASH.sub("", name))
        candidates = (name, plain, re.split(r"[/\\]", plain)[-1])
        return next(filter(None, map(self._calls.known_name, candidates)), None)

    def choose(self, title: object) -> None:
        """
        Raises:
            InvalidInput: there is no such model.
            OperatorOnly: another one than before, which the operator does not allow.
            ModelNotAllowed.
        """
        if title is None or title == "":
            return
        name = self.named(title)
        if name is None:
            raise errors.InvalidInput(
                f"There is no model {str(title)[:100]!r}.", field="sd_model_checkpoint"
            )
        model = self._calls.allowed.model(name)
        if model is self._chosen:
            return
        if not self._switch:
            raise errors.OperatorOnly(
                "This server does not let its clients switch the model for all; name it in "
                "override_settings.sd_model_checkpoint, or start the server with "
                "--sdapi-model-switch on."
            )
        self._chosen = model


def a1111_routes(
    calls: SyncCalls,
    checkpoint: Checkpoint,
    callers: Callers,
    preview: Callable[[str], bytes | None],
) -> Blueprint:
    routes = Blueprint("a1111", __name__, url_prefix="/sdapi/v1")

    @routes.post("/txt2img")
    @documented(
        "Draw images, and wait for them",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "TextToImage"}}},
        answers={200: json_answer(A1111Images, "The images.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def txt2img() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked = read_body(TextToImage, json_body())
            started = _start(asked, {"model": _model_of(asked).name})
        return _wait(asked, *started)

    @routes.post("/img2img")
    @documented(
        "Draw images from a picture, and wait for them",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "ImageToImage"}}},
        answers={200: json_answer(A1111Images, "The images.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def img2img() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked = read_body(ImageToImage, json_body())
            named = checkpoint.named(asked.override_settings.get("sd_model_checkpoint"))
            if named is None and checkpoint.model is not calls.allowed.default:
                named = checkpoint.model.name
            started = _start(asked, placed_pictures(asked, named, calls))
        # Its pictures are not held while the caller waits.
        asked = asked.model_copy(update={"init_images": [], "mask": None})
        return _wait(asked, *started)

    def _model_of(asked: TextToImage) -> Model:
        named = checkpoint.named(asked.override_settings.get("sd_model_checkpoint"))
        return calls.allowed.model(named) if named else checkpoint.model

    def _start(asked: TextToImage, placed: dict[str, Any]) -> tuple[Call, GenerationParams]:
        model = calls.allowed.model(placed["model"])
        fields = fields_of(asked, model, calls) | placed
        _, prepared = calls.prepare(
            fields,
            NAMES,
            mask_meaning=Meaning.MASK_OPAQUE,
            invert_mask=is_inverted(asked),
            empty_prompt=True,
        )
        return calls.start(prepared, hung_up=gone_check()), prepared.params

    def _wait(asked: TextToImage, started: Call, params: GenerationParams) -> Response:
        with started as call, callers.waiting(_caller(), call.task_id):
            try:
                finished = call.result()
            except errors.Gone:
                if not callers.was_interrupted(call.task_id):
                    raise
                finished = Finished([], params)
        drawn = (finished.params.width, finished.params.height)
        hires = hires_of(asked, drawn, calls)
        answer = json_response(images_answer(asked, finished, hires))
        if finished.images and asked.send_images:
            answer.call_on_close(call.fetched)
        return answer

    @routes.get("/progress")
    @documented(
        "How far the caller's own task is",
        tag=TAG,
        description="A caller is identified by address, Authorization and User-Agent.",
        parameters=[
            query(
                "skip_current_image",
                "true: without the picture so far.",
                {"type": "boolean", "default": False},
            )
        ],
        answers={200: json_answer(A1111Progress, "The task as it stands; all 0 when idle.")},
        errors=(errors.StorageUnavailable,),
        shape=A1111_ERRORS,
    )
    def progress() -> Response:
        view = callers.present(_caller())
        answer = progress_answer(view) if view else A1111Progress()
        if view and request.args.get("skip_current_image", "").lower() not in ("true", "1"):
            picture = preview(view.task_id)
            answer.current_image = to_base64(picture) if picture else None
        return jsonify(answer.model_dump())

    @routes.post("/interrupt")
    @routes.post("/skip")
    @documented(
        "Stop the caller's own task",
        tag=TAG,
        description="The one that runs, or the first that waits; never another client's.",
        answers={200: NOTHING},
        errors=(errors.TooManyWaiting, errors.StorageUnavailable),
        shape=A1111_ERRORS,
    )
    def stop() -> Response:
        with calls.places.place_for_change():
            callers.interrupt(_caller())
        return jsonify({})

    @routes.post("/png-info")
    @documented(
        "How a picture was made, if its file says so",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "PngInfo"}}},
        answers={200: json_answer(A1111PngInfo, "What the file says.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.TooManyWaiting,
        ),
        shape=A1111_ERRORS,
    )
    def png_info() -> Response:
        with calls.room_for_the_body(request.content_length):
            data = decode_base64(read_body(PngInfo, json_body()).image, "image")
            with calls.decoder.reading() as reader:
                texts, made = reader.texts(data, "image")
        info = texts.get("parameters") or str(made.get("prompt") or "")
        return json_response(A1111PngInfo(info=info, items={**texts}, parameters=made))

    return routes


def _caller() -> Caller:
    """The caller, as far as it can be identified: these clients name no task."""
    headers = request.headers
    return (
        request.remote_addr or "",
        headers.get("Authorization", "").strip(),
        headers.get("User-Agent", ""),
    )
