"""AUTOMATIC1111's API under /sdapi/v1. Its requests become tasks.

a1111_lists.py has what its clients ask around a picture: options, models, samplers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flask import Response, jsonify, request

import errors
from api.answers import json_response
from api.api_docs import SCHEMAS, ForeignSchemas, documented, json_answer, query
from api.identity import client
from api.query_values import gone_check
from api.request_body import json_body
from api.routes import route
from api.submission import Prepared
from compat.a1111_answers import images_answer, progress_answer
from compat.a1111_callers import Caller, Callers
from compat.a1111_checkpoint import Checkpoint
from compat.a1111_controlnet import controls_of, with_names_only
from compat.a1111_errors import A1111_ERRORS, TAG
from compat.a1111_extras import NAMES as EXTRA_NAMES
from compat.a1111_extras import ExtraImage, ExtraSingleImage, cropped, extra_fields
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
from fields import Takes
from images import decode_base64, to_base64

SCHEMAS_OF_A1111: ForeignSchemas = (
    (TextToImage, "validation"),
    (ImageToImage, "validation"),
    (PngInfo, "validation"),
    (ExtraSingleImage, "validation"),
    (ExtraImage, "serialization"),
    (A1111Images, "serialization"),
    (A1111Progress, "serialization"),
    (A1111PngInfo, "serialization"),
    (A1111Error, "serialization"),
)
NOTHING = {"description": "Nothing.", "content": {"application/json": {"schema": {}}}}


class A1111Routes:
    def __init__(
        self,
        calls: SyncCalls,
        checkpoint: Checkpoint,
        callers: Callers,
        preview: Callable[[str], bytes | None],
    ) -> None:
        self._calls = calls
        self._checkpoint = checkpoint
        self._callers = callers
        self._preview = preview

    @route("POST", "/txt2img")
    @documented(
        "Draw images, and wait for them",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "TextToImage"}}},
        answers={200: json_answer(A1111Images, "The images.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def txt2img(self) -> Response:
        calls, checkpoint = self._calls, self._checkpoint
        with calls.room_for_the_body(request.content_length):
            asked = read_body(TextToImage, json_body())
            named = self._named_model(asked)
            controls = controls_of(asked, named, frozenset(), calls, checkpoint)
            started = self._start(asked, {"model": named or checkpoint.model.name} | controls)
            asked = with_names_only(asked)  # frees the pictures while the caller waits
        return self._drawn(asked, started)

    @route("POST", "/img2img")
    @documented(
        "Draw images from a picture, and wait for them",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "ImageToImage"}}},
        answers={200: json_answer(A1111Images, "The images.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def img2img(self) -> Response:
        calls, checkpoint = self._calls, self._checkpoint
        with calls.room_for_the_body(request.content_length):
            asked = read_body(ImageToImage, json_body())
            named = self._named_model(asked)
            if named is None and checkpoint.model is not calls.allowed.default:
                named = checkpoint.model.name
            given = {Takes.INIT_IMAGE} | ({Takes.MASK} if asked.mask else set())
            controls = controls_of(asked, named, frozenset(given), calls, checkpoint)
            named = controls.get("model", named)
            started = self._start(asked, placed_pictures(asked, named, calls) | controls)
            asked = with_names_only(asked)
        return self._drawn(asked, started)

    @route("POST", "/extra-single-image")
    @documented(
        "Upscale a picture, and wait for it",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "ExtraSingleImage"}}},
        answers={200: json_answer(ExtraImage, "The picture.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def extra_single_image(self) -> Response:
        calls = self._calls
        with calls.room_for_the_body(request.content_length):
            fields, size = extra_fields(read_body(ExtraSingleImage, json_body()), calls)
            prepared = calls.prepare(fields, EXTRA_NAMES)
            fields.clear()  # the picture is freed while the caller waits
            started = self._started(prepared)
        with started as call:
            image = call.result().images[0]
        answer = json_response(ExtraImage(image=to_base64(cropped(image, size))))
        answer.call_on_close(call.fetched)
        return answer

    @route("GET", "/progress")
    @documented(
        "How far the caller's own task is",
        tag=TAG,
        description="A caller is identified by its key, address, Authorization and User-Agent.",
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
    def progress(self) -> Response:
        view = self._callers.present(_caller())
        answer = progress_answer(view) if view else A1111Progress()
        if view and request.args.get("skip_current_image", "").lower() not in ("true", "1"):
            picture = self._preview(view.task_id)
            answer.current_image = to_base64(picture) if picture else None
        return jsonify(answer.model_dump())

    @route("POST", "/interrupt")
    @route("POST", "/skip")
    @documented(
        "Stop the caller's own task",
        tag=TAG,
        description="The one that runs, or the first that waits; never another client's.",
        answers={200: NOTHING},
        errors=(errors.TooManyWaiting, errors.StorageUnavailable),
        shape=A1111_ERRORS,
    )
    def stop(self) -> Response:
        with self._calls.places.place_for_change():
            self._callers.interrupt(_caller())
        return jsonify({})

    @route("POST", "/png-info")
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
    def png_info(self) -> Response:
        with self._calls.room_for_the_body(request.content_length):
            data = decode_base64(read_body(PngInfo, json_body()).image, "image")
            with self._calls.decoder.reading() as reader:
                texts, made = reader.texts(data, "image")
        info = texts.get("parameters") or str(made.get("prompt") or "")
        return json_response(A1111PngInfo(info=info, items={**texts}, parameters=made))

    def _named_model(self, asked: TextToImage) -> str | None:
        """Returns the model that this request names, if it exists."""
        return self._checkpoint.named(asked.override_settings.get("sd_model_checkpoint"))

    def _start(self, asked: TextToImage, placed: dict[str, Any]) -> Call:
        """
        Args:
            placed: fields of /generate: `model`, and the pictures.
        """
        calls = self._calls
        model = calls.allowed.model(placed["model"])
        fields = fields_of(asked, model, calls) | placed
        prepared = calls.prepare(
            fields,
            NAMES,
            mask_meaning=Meaning.MASK_OPAQUE,
            invert_mask=is_inverted(asked),
            empty_prompt=True,
        )
        return self._started(prepared)

    def _started(self, prepared: Prepared) -> Call:
        submit = partial(self._calls.start, prepared, hung_up=gone_check())
        return self._callers.start(_caller(), submit)

    def _drawn(self, asked: TextToImage, started: Call) -> Response:
        callers = self._callers
        with started as call:
            try:
                finished = call.result()
            except errors.Gone:
                if not callers.was_interrupted(call.task_id):
                    raise
                finished = Finished([], call.params)
        drawn = (finished.params.width, finished.params.height)
        hires = hires_of(asked, drawn, self._calls)
        answer = json_response(images_answer(asked, finished, hires))
        if finished.images and asked.send_images:
            answer.call_on_close(call.fetched)
        return answer


def _caller() -> Caller:
    """Identifies the caller, because these clients do not name tasks."""
    headers = request.headers
    return (
        client().name,
        request.remote_addr or "",
        headers.get("Authorization", "").strip(),
        headers.get("User-Agent", ""),
    )
