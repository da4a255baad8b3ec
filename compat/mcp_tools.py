"""The tools of MCP: what they do.

A tool answers at once, or has put a task into the queue that its call waits for (`Waiting`; mcp.py
does the waiting). A refusal is a result that a language model can read: code, message, and the name
of the argument.
"""

from dataclasses import dataclass, field
from typing import Any

from api.client_queue import ClientQueue
from api.models_api import model_answer
from api.submission import Prepared
from api.task_answers import whole_seconds
from compat.mcp_results import text_result
from compat.mcp_schemas import EDIT_FIELDS, GENERATE_FIELDS, MOST_WAIT_S, OWN_ARGUMENTS, TOOLS
from compat.pictures import EDIT, START, place_pictures
from compat.sync_calls import SyncCalls
from errors import InvalidInput, ServerError
from images import decode_base64
from task import Task, TaskStatus

ABOUT_MODELS = {
    "name",
    "title",
    "default_steps",
    "default_guidance",
    "takes",
    "needs",
    "loaded",
    "present",
}
"""What list_models repeats of GET /models."""

MOST_NAME_CHARS = 200
"""Of a model, as in /generate."""


@dataclass
class Waiting:
    """A task that a call waits for."""

    task_id: str
    wait_s: float
    own: bool = False
    """Whether this call has submitted it, so that nobody else knows its id yet."""
    notes: dict[str, Any] = field(default_factory=dict)
    """About the request, for the answer."""
    abandoned: bool = False
    """Whether its caller has gone meanwhile."""
    answered: bool = False
    """Whether it has waited as long as it should."""


class McpTools:
    """Each tool is the method of its name. They raise the errors of the server."""

    def __init__(self, calls: SyncCalls) -> None:
        self._calls = calls

    def call(self, queue: ClientQueue, name: str, arguments: Any) -> Waiting | dict[str, Any]:
        """
        Args:
            name: one of TOOLS.
        """
        tool = TOOLS[name]
        given = _given(name, arguments, {*tool.fields, *tool.own})
        for required in tool.required:
            if required not in given:
                raise InvalidInput("{field} is required.", field=required)
        found: Waiting | dict[str, Any] = getattr(self, name)(queue, given)
        return found

    def generate_image(self, queue: ClientQueue, given: dict[str, Any]) -> Waiting:
        wait_s = _wait_s(given)
        return self._submitted(queue, self._calls.prepare(_fields(given, GENERATE_FIELDS)), wait_s)

    def edit_image(self, queue: ClientQueue, given: dict[str, Any]) -> Waiting:
        wait_s, calls = _wait_s(given), self._calls
        picture, name = _picture(given)
        mask = given.get("mask")
        model = _text(given, "model", MOST_NAME_CHARS) if "model" in given else None
        from_it = mask is not None or "image_strength" in given
        placed = place_pictures(
            calls,
            model,
            [picture],
            decode_base64(_text(given, "mask", 10**9), "mask") if mask is not None else None,
            ways=(START, EDIT) if from_it else (EDIT, START),
            field=name,
        )
        fields = _fields(given, EDIT_FIELDS) | placed
        prepared = calls.prepare(fields, {"images": name, "init_image": name})
        return self._submitted(queue, prepared, wait_s)

    def check_image(self, queue: ClientQueue, given: dict[str, Any]) -> Waiting:
        return Waiting(_task_of(queue, given).task_id, _wait_s(given))

    def cancel(self, queue: ClientQueue, given: dict[str, Any]) -> dict[str, Any]:
        task = _task_of(queue, given)
        was = task.status
        if not task.ended:
            with self._calls.places.place_for_change():
                was = queue.delete(task.task_id, only_unfinished=True)
        message = "The task had ended already. Nothing was changed."
        if was in (TaskStatus.WAITING, TaskStatus.RUNNING):
            message = "The task is cancelled."
        return text_result({"task_id": task.task_id, "was": was.value, "message": message})

    def list_models(self, queue: ClientQueue, given: dict[str, Any]) -> dict[str, Any]:
        allowed, health = self._calls.allowed, queue.health()
        models = [
            model_answer(model, allowed, health).model_dump(
                mode="json", include=ABOUT_MODELS, exclude_none=True
            )
            for model in allowed.models
        ]
        return text_result(
            {"default": allowed.default.name, "models": models, "loras": list(allowed.loras())}
        )

    def estimate(self, queue: ClientQueue, given: dict[str, Any]) -> dict[str, Any]:
        prepared = self._calls.prepare(given)
        forecast, others = queue.estimate(prepared.params)
        return text_result(
            {
                "seconds": whole_seconds(forecast.end_s),
                "seconds_p90": whole_seconds(forecast.p90_s),
                "confidence": forecast.confidence.value,
                "tasks_before_it": forecast.pos,
                "unfinished_tasks": others,
                **_notes(prepared),
            }
        )

    def _submitted(self, queue: ClientQueue, prepared: Prepared, wait_s: float) -> Waiting:
        with self._calls.places.place_for_change():
            task, _ = queue.submit(prepared.params, inputs=prepared.inputs)
        return Waiting(task.task_id, wait_s, own=True, notes=_notes(prepared))


def _notes(prepared: Prepared) -> dict[str, Any]:
    return {"ignored_fields": prepared.ignored_fields} if prepared.ignored_fields else {}


def _given(tool: str, arguments: Any, known: set[str]) -> dict[str, Any]:
    """The arguments that are not null. Raises: InvalidInput: one is not known."""
    if not isinstance(arguments, dict):
        raise InvalidInput("arguments must be an object.", field="arguments")
    for name in arguments:
        if name not in known:
            raise InvalidInput(
                f"{name[:100]} is not an argument of {tool}. Its arguments: "
                f"{', '.join(sorted(known)) or 'none'}.",
                field=name[:100],
            )
    return {name: value for name, value in arguments.items() if value is not None}


def _fields(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _picture(given: dict[str, Any]) -> tuple[object, str]:
    """The picture to edit, and the argument that gives it. Raises: InvalidInput."""
    if ("image" in given) == ("task_id" in given):
        raise InvalidInput("Either image or task_id is required.", field="image")
    if "image" in given:
        return decode_base64(_text(given, "image", 10**9), "image"), "image"
    index = given.get("index", 0)
    most = OWN_ARGUMENTS["index"]["maximum"]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= most:
        raise InvalidInput(f"{{field}} must be a whole number from 0 to {most}.", field="index")
    return {"task_id": _text(given, "task_id"), "index": index}, "task_id"


def _task_of(queue: ClientQueue, given: dict[str, Any]) -> Task:
    try:
        return queue.status(_text(given, "task_id"))
    except ServerError as error:
        error.field = "task_id"
        raise


def _text(given: dict[str, Any], name: str, most: int = 64) -> str:
    text = given[name]
    if not (isinstance(text, str) and 1 <= len(text) <= most):
        what = f"a text of 1 to {most} characters" if most < 1000 else "a text"
        raise InvalidInput(f"{{field}} must be {what}.", field=name)
    return text


def _wait_s(given: dict[str, Any]) -> float:
    seconds = given.get("wait_s", MOST_WAIT_S)
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (is_number and 0 <= seconds <= MOST_WAIT_S):
        raise InvalidInput(f"{{field}} must be a number from 0 to {MOST_WAIT_S}.", field="wait_s")
    return float(seconds)
