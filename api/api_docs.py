"""The documentation of the API: an OpenAPI specification and flasgger's page over it.

Each route is described beside its code with `documented(...)`; fields, ranges and examples come
from the models that validate requests and shape answers, errors from errors.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from flasgger import Swagger, swag_from
from flask import Flask, redirect, request
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from werkzeug.wrappers import Response as BaseResponse

from api.answers import ErrorAnswer
from api.generate_request import Limits, request_schema
from api.machine_answers import MachineAnswer, MachinesAnswer
from api.model_answers import LoadAnswer, ModelAnswer, ModelsAnswer, WildcardsAnswer
from api.operator_answers import ClearedAnswer, ClientsAnswer, PausedAnswer, PlaceAnswer
from api.queue_answers import DeleteAnswer, OriginalTask, QueueAnswer
from api.server_answers import HealthAnswer, StatsAnswer
from api.task_answers import (
    EstimateAnswer,
    GenerateAnswer,
    LinkAnswer,
    StatusAnswer,
)
from errors import (
    Gone,
    InvalidInput,
    NotReady,
    Problem,
    ServerError,
    StorageUnavailable,
    TryLater,
    UnknownTask,
)

ANSWERS = (
    GenerateAnswer,
    EstimateAnswer,
    StatsAnswer,
    StatusAnswer,
    QueueAnswer,
    DeleteAnswer,
    HealthAnswer,
    ModelsAnswer,
    ModelAnswer,
    LoadAnswer,
    PausedAnswer,
    ClearedAnswer,
    PlaceAnswer,
    ClientsAnswer,
    MachineAnswer,
    MachinesAnswer,
    LinkAnswer,
    OriginalTask,
    WildcardsAnswer,
    ErrorAnswer,
)
SCHEMAS = "#/components/schemas/"
ENCODED = "'format': 'byte'"
SPEC_ROUTE = "/openapi.json"
PAGE_ROUTE = "/swagger"
PAGE_SCRIPT = """{
  url: new URL("openapi.json", location.href).href,
  requestInterceptor: (request) => {
    const here = new URL(".", location.href).href;
    const top = `${location.origin}/`;
    if (!request.url.startsWith(here)) request.url = request.url.replace(top, here);
    return request;
  },
}"""
"""Options of the page in JavaScript: only the browser knows the path prefix of a proxy."""
STATIC_ROUTE = "/flasgger_static"
STATIC_FILES = {
    "favicon": "favicon-32x32.png",
    "jquery_js": "lib/jquery.min.js",
    "swagger_ui_bundle_js": "swagger-ui-bundle.js",
    "swagger_ui_css": "swagger-ui.css",
    "swagger_ui_standalone_preset_js": "swagger-ui-standalone-preset.js",
}
"""Named relative to the page, which works below a path prefix of a proxy, too."""

RETRY_AFTER = {
    "description": "Seconds after which trying again pays, from the forecast.",
    "schema": {"type": "integer", "minimum": 1},
}

View = TypeVar("View", bound=Callable[..., Any])

DESCRIPTION = """\
Queues image generation on one GPU and forecasts when each image is done.

The usual way: **POST /generate** gives a `task_id`; **GET /status** gives position and remaining
seconds until its `status` is `done`; **GET /image** returns the image and removes it.

Every route also exists under `/api`, except those of the other APIs: `/v1` (OpenAI), `/sdapi/v1`
(AUTOMATIC1111), `/mcp`, and `/api` (Ollama; its POST /api/generate is recognized by the fields
`stream`, `options` and `keep_alive`). Errors are JSON:
`{"error": {"code", "message", "field"}}`.
"""


@dataclass(frozen=True)
class ErrorShape:
    """How an API answers errors."""

    schema: str
    """Of the body."""
    body: Callable[[Problem], dict[str, Any]]
    status: Callable[[int], int]
    """HTTP status of an error that the native API answers with this one."""


NATIVE_ERRORS = ErrorShape(
    "ErrorAnswer",
    lambda problem: {"error": {"code": problem.code, "message": problem.message}},
    status=int,
)
ForeignSchemas = tuple[tuple[type[BaseModel], Literal["validation", "serialization"]], ...]


def documented(
    summary: str,
    *,
    tag: str,
    description: str = "",
    parameters: Iterable[dict[str, Any]] = (),
    body: str | None = None,
    example: dict[str, Any] | None = None,
    answers: dict[int, dict[str, Any]],
    errors: Iterable[type[ServerError]],
    shape: ErrorShape = NATIVE_ERRORS,
    content: dict[str, Any] | None = None,
) -> Callable[[View], View]:
    """Describe a route.

    Args:
        tag: heading under which the page lists it.
        body: name of the request body's schema.
        example: of a request body.
        answers: HTTP status -> OpenAPI response.
        shape: of the errors.
        content: of the request body by media type, in place of `body`.
    """
    responses = {str(status): answer for status, answer in answers.items()}
    for error in errors:
        status = str(shape.status(error.http_status))
        entry = responses.setdefault(status, _error_response(shape.schema))
        message = error.default_message.replace("{field}", "guidance")
        error_body = shape.body(Problem(error.http_status, error.code, message))
        entry["content"]["application/json"]["examples"][error.code] = {"value": error_body}
        if issubclass(error, TryLater):
            entry["headers"] = {"Retry-After": RETRY_AFTER}
        lines = [entry["description"], f"`{error.code}`: {message}"]
        entry["description"] = "\n\n".join(line for line in lines if line)
    specification: dict[str, Any] = {
        "tags": [tag],
        "summary": summary,
        "description": description,
        "parameters": list(parameters),
        "responses": responses,
    }
    if body:
        content = {
            "application/json": {"schema": {"$ref": SCHEMAS + body}, "example": example},
            "multipart/form-data": {"schema": {"$ref": SCHEMAS + body + "Form"}},
        }
    if content:
        specification["requestBody"] = {"required": True, "content": content}

    def describe(view: View) -> View:
        described: View = swag_from(specification)(view)
        return described

    return describe


def json_answer(answer: type[BaseModel], description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": SCHEMAS + answer.__name__}}}
    return {"description": description, "content": content}


def jpeg_answer(description: str) -> dict[str, Any]:
    content = {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}
    return {"description": description, "content": content}


def query(
    name: str, description: str, schema: dict[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "description": description,
        "required": required,
        "schema": schema,
    }


def in_path(name: str, description: str, most_chars: int = 200) -> dict[str, Any]:
    """A part of the path."""
    return {
        "name": name,
        "in": "path",
        "description": description,
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": most_chars},
    }


TASK_ID = query(
    "task_id",
    "The id that /generate gave.",
    {"type": "string", "minLength": 1, "maxLength": 64},
    required=True,
)
INDEX = query(
    "index",
    "Which image of the task, from 0.",
    {"type": "integer", "default": 0, "minimum": 0, "maximum": 999},
)
READING_ERRORS = (InvalidInput, UnknownTask, NotReady, Gone, StorageUnavailable)
"""Of routes that show an image."""

WAIT = query(
    "wait",
    "Seconds for which the answer may wait (long-poll); at once when too many wait already.",
    {"type": "integer", "default": 0, "minimum": 0, "maximum": 300},
)

IDEMPOTENCY_KEY = {
    **query(
        "Idempotency-Key",
        "The same key answers with the same task, also after a restart of the server; with another "
        "request it is refused (422). The key is free again once its task has failed, was "
        "cancelled, or was removed with its images.",
        {"type": "string", "minLength": 1, "maxLength": 200},
    ),
    "in": "header",
}


def install_docs(app: Flask, limits: Limits, foreign: ForeignSchemas = ()) -> None:
    """Serve the specification and the page. Call it after the routes are registered.

    Args:
        foreign: the models that the foreign APIs name.
    """
    page = {
        "openapi": "3.0.3",
        "uiversion": 3,
        "auth": {},  # else flasgger's page writes Python's None into its script
        "title": "mflux-server",
        "specs_route": PAGE_ROUTE,
        "static_url_path": STATIC_ROUTE,
        "ui_params_text": PAGE_SCRIPT,
        **{name: f"{STATIC_ROUTE[1:]}/{file}" for name, file in STATIC_FILES.items()},
        "headers": [],
        "specs": [
            {
                "endpoint": "openapi",
                "route": SPEC_ROUTE,
                "rule_filter": lambda rule: not rule.endpoint.startswith("api_"),
            }
        ],
    }
    template = {
        "info": {"title": "mflux-server", "version": "1", "description": DESCRIPTION},
        "components": {"schemas": _schemas(limits, foreign)},
    }
    Swagger(app, config=page, template=template)

    @app.before_request
    def one_address_of_the_page() -> BaseResponse | None:
        """The addresses of its files are relative, because a proxy may serve it below a path."""
        return redirect(f"..{PAGE_ROUTE}") if request.path == f"{PAGE_ROUTE}/" else None


class _AnswerSchemas(GenerateJsonSchema):
    """Answers leave out fields that are None: those with another default are always there."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        default = field["schema"].get("default")
        return super().field_is_required(field, total) or (
            self.mode == "serialization" and default is not None
        )


def _schemas(limits: Limits, foreign: ForeignSchemas) -> dict[str, Any]:
    request = request_schema(limits, SCHEMAS + "{model}")
    schemas = {
        **request.pop("$defs"),
        "GenerateRequest": request,
        "GenerateRequestForm": _as_form(request),
    }
    return {**answer_schemas(foreign), **_all_openapi_3_0(schemas)}


@cache
def answer_schemas(foreign: ForeignSchemas) -> dict[str, Any]:
    """Schemas of all answers and of the foreign APIs, which no option changes."""
    _, generated = models_json_schema(
        [*((answer, "serialization") for answer in ANSWERS), *foreign],
        ref_template=SCHEMAS + "{model}",
        schema_generator=_AnswerSchemas,
    )
    return _all_openapi_3_0(generated["$defs"])


def _as_form(request: dict[str, Any]) -> dict[str, Any]:
    """The same fields as the parts of a form, in which pictures are files."""
    form = {**request, "description": "The same as a form, with pictures as files."}
    form["properties"] = {name: _as_part(field) for name, field in request["properties"].items()}
    return form


def _as_part(field: dict[str, Any]) -> dict[str, Any]:
    if ENCODED not in str(field):
        return field
    file = {"type": "string", "format": "binary"}
    if "array" in str(field):
        return {"type": "array", "items": file, "description": field["description"]}
    return {**file, "description": field["description"]}


def _all_openapi_3_0(schemas: dict[str, Any]) -> dict[str, Any]:
    return {name: _openapi_3_0(schema) for name, schema in schemas.items()}


def _openapi_3_0(schema: Any) -> Any:
    """pydantic writes JSON Schema 2020-12; OpenAPI 3.0 knows no type null, no `examples`, and an
    exclusive bound as a flag beside the bound."""
    if isinstance(schema, list):
        return [_openapi_3_0(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _openapi_3_0(part) for key, part in schema.items()}
    if isinstance(schema.get("examples"), list):
        schema["example"] = schema.pop("examples")[0]
    if schema.get("default", ...) is None:
        del schema["default"]
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in schema:
            schema[bound], schema[exclusive] = schema[exclusive], True
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    if "$ref" in schema and len(schema) > 1:
        schema["allOf"] = [{"$ref": schema.pop("$ref")}]
    choices = [choice for choice in schema.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1 and "$ref" in choices[0]:
        schema["allOf"] = choices
    elif len(choices) == 1:
        schema = {**choices[0], **schema}
    elif choices:
        schema["anyOf"] = choices
    return schema


def _error_response(name: str) -> dict[str, Any]:
    schema = {"$ref": SCHEMAS + name}
    return {"description": "", "content": {"application/json": {"schema": schema, "examples": {}}}}
