"""Ollama's API under /api, as far as it draws: models, and POST /api/generate.

The native API has POST /generate under /api, too. A body with `stream`, `options` or `keep_alive`
is Ollama's: its clients send at least one of them, and the native API refuses them.
"""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from flask import Response, g, has_app_context, request

import errors
from api.answers import json_response
from api.api_docs import SCHEMAS, ErrorShape, ForeignSchemas, documented, json_answer
from api.json_text import parse_object
from api.query_values import gone_check
from api.request_body import json_body
from api.routes import route
from compat.bodies import read_body
from compat.ollama_shapes import (
    OllamaDetails,
    OllamaError,
    OllamaGenerate,
    OllamaLine,
    OllamaLoaded,
    OllamaLoadedModel,
    OllamaModel,
    OllamaOptions,
    OllamaShow,
    OllamaShown,
    OllamaTags,
    OllamaVersion,
)
from compat.pictures import EDIT, START, place_pictures
from compat.streams import StreamFormat, streamed
from compat.sync_calls import Call, SyncCalls
from images import decode_base64, to_base64
from models.hub_cache import bytes_on_disk
from models.model_catalog import Model
from task import Task
from version import VERSION

TAG = "Ollama"
PATHS = ("/api/tags", "/api/version", "/api/ps", "/api/show")
NOT_HERE = ("/api/chat", "/api/embed", "/api/embeddings", "/api/pull", "/api/push", "/api/create")
"""What Ollama's clients also call: their errors have its form."""
ONLY_OLLAMAS = ("stream", "options", "keep_alive")
"""Fields of a body that the native API does not have."""
TAG_OF_NAME = re.compile(r":[^:/]*$")
SCHEMAS_OF_OLLAMA: ForeignSchemas = (
    (OllamaShow, "validation"),
    (OllamaTags, "serialization"),
    (OllamaLoaded, "serialization"),
    (OllamaShown, "serialization"),
    (OllamaVersion, "serialization"),
    (OllamaError, "serialization"),
)


def ollama_error_body(problem: errors.Problem) -> dict[str, Any]:
    return {"error": problem.message}


def ollama_error(problem: errors.Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of an answer."""
    return ollama_error_body(problem), problem.http_status, problem.headers


OLLAMA_ERRORS = ErrorShape("OllamaError", ollama_error_body, int)


def is_ollamas(path: str) -> bool:
    """Whether the present request is one of Ollama's clients. Some are refused before the
    application sees them."""
    return path in (*PATHS, *NOT_HERE) or (has_app_context() and "ollamas" in g)


class OllamaRoutes:
    """
    Args:
        started_at: unix seconds.
    """

    def __init__(self, calls: SyncCalls, *, started_at: float) -> None:
        self._calls = calls
        self._started_at = _time(started_at)

    @route("GET", "/version")
    @documented(
        "The version of this server",
        tag=TAG,
        answers={200: json_answer(OllamaVersion, "The version.")},
        errors=(),
        shape=OLLAMA_ERRORS,
    )
    def version(self) -> Response:
        return json_response(OllamaVersion(version=VERSION))

    @route("GET", "/tags")
    @documented(
        "List the models that may be named",
        tag=TAG,
        answers={200: json_answer(OllamaTags, "The models.")},
        errors=(),
        shape=OLLAMA_ERRORS,
    )
    def tags(self) -> Response:
        models = [
            OllamaModel(
                name=_name(model),
                model=_name(model),
                modified_at=self._started_at,
                size=bytes_on_disk(model),
                details=self._details(model),
            )
            for model in self._calls.allowed.models
            if not model.upscaler
        ]
        return json_response(OllamaTags(models=models))

    @route("GET", "/ps")
    @documented(
        "List the models in memory",
        tag=TAG,
        answers={200: json_answer(OllamaLoaded, "The models.")},
        errors=(),
        shape=OLLAMA_ERRORS,
    )
    def loaded(self) -> Response:
        models = [
            OllamaLoadedModel(
                name=_name(spec.model),
                model=_name(spec.model),
                size=round(spec.expected_bytes),
                size_vram=round(spec.expected_bytes),
                details=self._details(spec.model),
            )
            for spec in self._calls.own_queue().health().loaded
        ]
        return json_response(OllamaLoaded(models=models))

    @route("POST", "/show")
    @documented(
        "One model",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "OllamaShow"}}},
        answers={200: json_answer(OllamaShown, "The model.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.TooManyWaiting,
            errors.ModelNotAllowed,
            errors.UnknownModel,
        ),
        shape=OLLAMA_ERRORS,
    )
    def show(self) -> Response:
        with self._calls.room_for_the_body(request.content_length):
            asked = read_body(OllamaShow, json_body())
        model = self._named(asked.model or asked.name or "")
        return json_response(
            OllamaShown(
                modified_at=self._started_at,
                details=self._details(model),
                model_info={"general.architecture": model.family},
            )
        )

    def generate_or(self, native: Callable[[], Any]) -> Callable[[], Any]:
        """The view of POST /api/generate.

        Args:
            native: what answers the bodies that are not Ollama's.
        """

        def generate() -> Any:
            with self._calls.room_for_the_body(request.content_length):
                begun = self._begun()
            return native() if begun is None else _answer(*begun)

        return generate

    def _begun(self) -> tuple[OllamaGenerate, Call | None] | None:
        """What the body asks for, without its pictures, and its call; None: it is not Ollama's."""
        fields = _ollamas_body()
        if fields is None:
            return None
        g.ollamas = True
        asked = read_body(OllamaGenerate, fields)
        call = self._start(asked)
        return asked.model_copy(update={"images": []}), call

    def _start(self, asked: OllamaGenerate) -> Call | None:
        """Returns None for a request without a prompt, which only asks to load a model."""
        calls = self._calls
        model = self._named(asked.model)
        if not asked.prompt.strip() and not asked.images:
            return None
        fields: dict[str, Any] = {
            "prompt": asked.prompt,
            "model": model.name,
            "width": asked.width,
            "height": asked.height,
            "steps": calls.steps(model, asked.steps),
            "seed": read_body(OllamaOptions, asked.options).seed,
            "format": "PNG",
        }
        if asked.images:
            pictures = [decode_base64(text, "images") for text in asked.images]
            fields |= place_pictures(
                calls, model.name, pictures, None, ways=(EDIT, START), field="images"
            )
        prepared = calls.prepare(fields, {"init_image": "images"})
        return calls.start(prepared, hung_up=gone_check())

    def _named(self, name: str) -> Model:
        """The model of this name: also with a tag (`:latest`) and a namespace (`x/`).

        Raises:
            InvalidInput, UnknownModel, ModelNotAllowed
        """
        if not name:
            raise errors.InvalidInput("{field} is required.", field="model")
        plain = TAG_OF_NAME.sub("", name)
        candidates = (name, plain, plain.rpartition("/")[2])
        known = next(filter(None, map(self._calls.known_name, candidates)), None)
        if known is None:
            raise errors.UnknownModel(f"model {name[:100]!r} not found.", field="model")
        return self._calls.allowed.model(known)

    def _details(self, model: Model) -> OllamaDetails:
        bits = self._calls.allowed.quantize or model.stored_bits
        return OllamaDetails(
            family=model.family,
            families=[model.family],
            quantization_level=f"{bits}-bit" if bits else "",
        )


def _ollamas_body() -> dict[str, Any] | None:
    """The body if it is Ollama's; else it is left for the native route."""
    if request.mimetype == "multipart/form-data" or request.headers.get("Content-Encoding"):
        return None
    body = request.get_data(cache=False)  # a kept one would stay while the caller waits
    if any(f'"{name}"'.encode() in body for name in ONLY_OLLAMAS):
        fields = parse_object(body)
        if any(name in fields for name in ONLY_OLLAMAS):
            return fields
    request.stream = BytesIO(body)
    return None


def _answer(asked: OllamaGenerate, call: Call | None) -> Response:
    if call is None:
        return _line_response(_line(asked, done=True, done_reason="load"))
    if asked.stream:
        return streamed(call, _Lines(asked), 0, lambda task_id: None)
    with call:
        call.result()
        task = call.ended()
        answer = _line_response(_last_line(asked, task, call.image(0)))
    answer.call_on_close(call.fetched)
    return answer


class _Lines(StreamFormat):
    """Lines of JSON: the progress, and the picture."""

    mimetype = "application/x-ndjson"

    def __init__(self, asked: OllamaGenerate) -> None:
        self._asked = asked
        self._written: tuple[int, int] | None = None

    def running(self, task: Task) -> str:
        progress = (task.steps_done, task.steps_total)
        if progress == self._written:
            return ""
        self._written = progress
        return self.alive(task)

    def alive(self, task: Task) -> str:
        done, total = task.steps_done, task.steps_total
        return _text(_line(self._asked, done=False, completed=done, total=total))

    def image(self, task: Task, index: int, image: bytes) -> str:
        return _text(_last_line(self._asked, task, image))

    def failed(self, error: errors.ServerError) -> str:
        return _text(OllamaError(error=error.message))


def _last_line(asked: OllamaGenerate, task: Task, image: bytes) -> OllamaLine:
    return _line(
        asked,
        done=True,
        done_reason="stop",
        image=to_base64(image),
        total_duration=max(round((time.time() - task.created_at) * 1e9), 0),
    )


def _line(asked: OllamaGenerate, **fields: Any) -> OllamaLine:
    return OllamaLine(model=asked.model, created_at=_time(time.time()), **fields)


def _text(line: OllamaLine | OllamaError) -> str:
    return line.model_dump_json(exclude_none=True) + "\n"


def _line_response(line: OllamaLine) -> Response:
    return Response(_text(line), mimetype="application/json")


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def _name(model: Model) -> str:
    return f"{model.name}:latest"
