"""MCP, the Model Context Protocol, at /mcp: assistants draw here (Streamable HTTP).

Every call is a POST of its own, and no state is kept between calls. The Mcp-Session-Id of the older
revisions only keeps apart the requests of several connections of one client, for
`notifications/cancelled`. There are no notifications but progress, so GET is answered with 405, as
the specification allows.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flask import Response, request, stream_with_context

import errors
from api.api_docs import SCHEMAS, ErrorShape, ForeignSchemas, documented
from api.client_queue import ClientQueue
from api.query_values import gone_check
from api.request_body import json_body
from api.routes import route
from compat.mcp_messages import (
    HANDSHAKE,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MODERN,
    PARSE_ERROR,
    RESOURCE_NOT_FOUND,
    SERVER_INFO,
    Message,
    RpcError,
    error_of,
    id_in,
    negotiated,
    progress_of,
    read_message,
    result_of,
)
from compat.mcp_results import URI, Results, in_words, refusal
from compat.mcp_schemas import INSTRUCTIONS, TOOLS, McpAnswer, McpMessage, tools_list
from compat.mcp_tools import McpTools, Waiting
from compat.streams import stream_of
from compat.sync_calls import LOOK_S, SyncCalls
from images import CONTENT_TYPES, to_base64
from task import Task

PATH = "/mcp"
TAG = "MCP"
SCHEMAS_OF_MCP: ForeignSchemas = ((McpMessage, "validation"), (McpAnswer, "serialization"))
CAPABILITIES: dict[str, Any] = {"tools": {}, "resources": {}}
SESSION = "Mcp-Session-Id"
PICTURE = re.compile(re.escape(URI) + r"([0-9a-f]{1,64})/([0-9]{1,3})")
FIXED_MS = 300_000
"""Milliseconds for which clients may cache what changes with the server's options alone."""
TEMPLATE = {
    "uriTemplate": URI + "{task_id}/{index}",
    "name": "picture",
    "title": "A finished picture",
    "description": "Of one of your tasks; index counts its pictures from 0.",
}
PROGRESS_S = 1.0
"""Least seconds between two notifications of one call."""
ANSWERED = {
    "description": "The answer; of a tool that waits, with a `progressToken`, a stream.",
    "content": {
        "application/json": {"schema": {"$ref": SCHEMAS + "McpAnswer"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


def mcp_error_body(problem: errors.Problem) -> dict[str, Any]:
    code = INTERNAL_ERROR if problem.http_status >= 500 else INVALID_REQUEST
    data = {"code": problem.code} | ({"field": problem.field} if problem.field else {})
    return error_of(None, RpcError(code, problem.message, data=data))


def mcp_error(problem: errors.Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of a request that did not get as far as its message."""
    return mcp_error_body(problem), problem.http_status, problem.headers


MCP_ERRORS = ErrorShape("McpAnswer", mcp_error_body, int)


CallKey = tuple[str, str, object]
"""Client, session and request."""


@dataclass
class InFlight:
    """A call that has no answer yet. The thread of the call and that of a notification both write
    their own field first and then read the other's, so that one of them cancels the task."""

    task_id: str = ""
    """The task that it has ordered; empty: none yet."""
    cancelled: bool = False


class McpRoutes:
    def __init__(self, calls: SyncCalls, results: Results) -> None:
        self._calls = calls
        self._results = results
        self._tools = McpTools(calls)
        self._tools_list = tools_list(calls.limits)
        self._in_flight: dict[CallKey, InFlight] = {}
        """Calls of the older revisions to which a notification may still refer."""

    @route("POST", PATH)
    @documented(
        "A message of the Model Context Protocol",
        tag=TAG,
        description=f"Streamable HTTP, stateless. Revisions: {', '.join([*MODERN, *HANDSHAKE])}. "
        f"Tools: {', '.join(TOOLS)}. Resources: one's own finished pictures.",
        content={"application/json": {"schema": {"$ref": SCHEMAS + "McpMessage"}}},
        answers={
            200: ANSWERED,
            202: {"description": "A notification was accepted."},
            404: {
                "description": "There is no such method.",
                "content": {
                    "application/json": {
                        "schema": {"$ref": SCHEMAS + "McpAnswer"},
                        "examples": {
                            "method": {
                                "value": error_of(
                                    1, RpcError(METHOD_NOT_FOUND, "There is no method x.")
                                )
                            }
                        },
                    }
                },
            },
        },
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.TooManyWaiting,
        ),
        shape=MCP_ERRORS,
    )
    def post(self) -> Response:
        queue, request_id, status = self._calls.own_queue(), None, 400
        try:
            with self._calls.room_for_the_body(request.content_length):
                body = _body()
                request_id = id_in(body)
                message = read_message(body, request.headers)
                if message.request_id is None:
                    self._note(queue, message)
                    return Response(status=202)
                status = 400 if message.modern else 200
                found = self._answer(queue, message)
                message.params.clear()  # pictures are freed while the caller waits
                body.clear()
        except RpcError as error:
            return _json(error_of(request_id, error), error.status if status == 400 else 200)
        if isinstance(found, Waiting):
            return self._waited(queue, message, found)
        answer = _json(result_of(message, found))
        if message.method == "initialize":
            answer.headers[SESSION] = secrets.token_hex(16)
        return answer

    def _note(self, queue: ClientQueue, message: Message) -> None:
        """A notification: a caller that does not wait any more cancels the task of its call."""
        if message.method != "notifications/cancelled":
            return
        number = message.params.get("requestId")
        if not isinstance(number, str | int):
            return
        key = queue.client.name, request.headers.get(SESSION, ""), number
        if call := self._in_flight.get(key):
            call.cancelled = True
            if call.task_id:
                self._cancel(queue, call.task_id)

    def _answer(self, queue: ClientQueue, message: Message) -> Waiting | dict[str, Any]:
        """Raises: RpcError."""
        method, about = message.method, {"capabilities": CAPABILITIES, "instructions": INSTRUCTIONS}
        if method == "tools/call":
            return self._called(queue, message)
        if method == "tools/list":
            return {"tools": self._tools_list, **message.cached(FIXED_MS)}
        if method == "resources/list":
            return {"resources": self._results.listed(queue), **message.cached(0)}
        if method == "resources/templates/list":
            return {"resourceTemplates": [TEMPLATE], **message.cached(FIXED_MS)}
        if method == "resources/read":
            return {"contents": [self._read(queue, message)], **message.cached(0)}
        if method == "server/discover" and message.modern:
            versions = {"supportedVersions": [*MODERN, *HANDSHAKE]}
            return {**versions, **about, **message.cached(FIXED_MS)}
        if method == "initialize" and not message.modern:
            version = negotiated(message.params)
            return {"protocolVersion": version, "serverInfo": SERVER_INFO, **about}
        if method == "ping" and not message.modern:
            return {}
        raise RpcError(METHOD_NOT_FOUND, f"There is no method {method[:100]}.", status=404)

    def _called(self, queue: ClientQueue, message: Message) -> Waiting | dict[str, Any]:
        name = message.params.get("name")
        if not isinstance(name, str) or name not in TOOLS:
            raise RpcError(INVALID_PARAMS, f"There is no tool {str(name)[:100]}.")
        arguments = message.params.get("arguments")
        call, key, orders = InFlight(), _call_key(queue, message), False
        _, session, _ = key
        if session and not message.modern:  # else no notification can refer to it
            self._in_flight[key] = call
        try:
            found = self._tools.call(queue, name, {} if arguments is None else arguments)
            if orders := isinstance(found, Waiting) and found.own:
                call.task_id = found.task_id
                if call.cancelled:
                    self._cancel(queue, call.task_id)
            return found
        except errors.ServerError as error:
            return refusal(error.problem)
        finally:
            if not orders:
                self._in_flight.pop(key, None)

    def _read(self, queue: ClientQueue, message: Message) -> dict[str, Any]:
        """The content of a resource: a finished picture, whole."""
        uri = message.params.get("uri")
        found = PICTURE.fullmatch(uri) if isinstance(uri, str) else None
        code = INVALID_PARAMS if message.modern else RESOURCE_NOT_FOUND
        if found is None:
            raise RpcError(code, "There is no such resource: resources/list names them.")
        try:
            image, params = queue.image(found[1], int(found[2]))
        except errors.ServerError as error:
            raise RpcError(code, error.message, data={"uri": uri}) from None
        kind = CONTENT_TYPES[params.format]
        return {"uri": uri, "mimeType": kind, "blob": to_base64(image)}

    # -- waiting for a task -----------------------------------------------------------------------

    def _waited(self, queue: ClientQueue, message: Message, waiting: Waiting) -> Response:
        key = _call_key(queue, message)
        answers = self._answers(queue, message, waiting, gone_check())

        def left() -> None:
            self._in_flight.pop(key, None)
            if waiting.own and not waiting.answered:
                self._cancel(queue, waiting.task_id)

        wants_stream = "text/event-stream" in request.headers.get("Accept", "")
        if message.progress_token is None or not wants_stream:
            try:
                *_, last = answers
            finally:
                left()
            return _json(last)
        texts = (f"event: message\ndata: {json.dumps(one)}\n\n" for one in answers)
        return stream_of(stream_with_context(texts), "text/event-stream", left)

    def _answers(
        self, queue: ClientQueue, message: Message, waiting: Waiting, gone: Callable[[], bool]
    ) -> Iterator[dict[str, Any]]:
        """Notifications of progress, if the client wants them, then the answer."""
        began_at, sent_at = time.monotonic(), -PROGRESS_S
        try:
            for task in self._views(queue, waiting, gone):
                passed_s = time.monotonic() - began_at
                if message.progress_token is None or passed_s - sent_at < PROGRESS_S:
                    continue
                sent_at = passed_s
                left_s = task.forecast.end_s if task.forecast else 0.0
                total_s = round(passed_s + left_s, 3)
                yield progress_of(
                    message.progress_token, round(passed_s, 3), total_s, in_words(task)
                )
            waiting.answered = not waiting.abandoned
            task = queue.status(waiting.task_id)
            yield result_of(message, self._results.of(queue, task, waiting.notes))
        except errors.ServerError as error:
            yield result_of(message, refusal(error.problem))

    def _views(
        self, queue: ClientQueue, waiting: Waiting, gone: Callable[[], bool]
    ) -> Iterator[Task]:
        """The task as it stands, each time that something has happened and at least each LOOK_S,
        until it has ended or the call should wait no longer."""
        until, after = time.monotonic() + waiting.wait_s, queue.events.last_id
        with suppress(errors.TooManyWaiting), self._calls.places.place():
            while not (task := queue.status(waiting.task_id)).ended:
                yield task
                waiting.abandoned = gone()  # which is asked once: a reset is seen only then
                left_s = until - time.monotonic()
                if left_s <= 0 or waiting.abandoned or queue.events.closed:
                    return
                happened = queue.events.wait(after, min(left_s, LOOK_S), (waiting.task_id,))
                if happened:
                    after = happened[-1].id

    def _cancel(self, queue: ClientQueue, task_id: str) -> None:
        """Nobody waits for this task any more."""
        with suppress(errors.ServerError):
            if not queue.status(task_id).ended and not queue.events.closed:
                queue.delete(task_id, only_unfinished=True)


def _call_key(queue: ClientQueue, message: Message) -> CallKey:
    return queue.client.name, request.headers.get(SESSION, ""), message.request_id


def _body() -> dict[str, Any]:
    try:
        return json_body()
    except errors.InvalidInput as error:
        raise RpcError(PARSE_ERROR, error.message) from None


def _json(message: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(message), status, mimetype="application/json")
