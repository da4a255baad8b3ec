"""The routes of one task: submitting it, its forecast, its status."""

import time

from flask import Response, request

import errors
from api.answers import json_response
from api.api_docs import IDEMPOTENCY_KEY, TASK_ID, WAIT, documented, json_answer, query
from api.client_queue import ClientQueue, OwnQueue
from api.generate_request import GenerateRequest, Limits, parse_form, parse_request
from api.long_poll import watch
from api.model_answers import DownloadAnswer
from api.models_api import download_answer
from api.query_values import MAX_ID, MOST_WAIT_S, is_gone, number_value, task_id_value
from api.request_body import form_body, whole_body
from api.routes import route
from api.submission import Submission, check_same, ignored_fields
from api.task_answers import (
    EstimateAnswer,
    GenerateAnswer,
    StatusAnswer,
    estimate_fields,
    params_answer,
    status_answer,
)
from api.waiting_places import WaitingPlaces
from scheduler.health import ServerState
from task import Task

EXAMPLE = {"prompt": "A beautiful landscape", "width": 1024, "height": 1024, "steps": 4}
REQUEST_ERRORS = (
    errors.InvalidInput,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.ModelNotAllowed,
    errors.NotSupported,
    errors.UnusableAdapter,
    errors.UnknownTask,
    errors.NotReady,
    errors.Gone,
    errors.DoesNotFit,
    errors.TooManyWaiting,
    errors.StorageUnavailable,
)
"""Of each route that takes the body of /generate."""


class TaskRoutes:
    def __init__(self, own_queue: OwnQueue, submission: Submission, places: WaitingPlaces) -> None:
        self._own_queue = own_queue
        self._submission = submission
        self._places = places

    @route("POST", "/generate")
    @documented(
        "Submit a task",
        tag="images",
        description="Puts a task into the queue and answers at once.",
        parameters=[IDEMPOTENCY_KEY],
        body="GenerateRequest",
        example=EXAMPLE,
        answers={200: json_answer(GenerateAnswer, "The task is in the queue.")},
        errors=(
            *REQUEST_ERRORS,
            errors.KeyReused,
            errors.QueueFull,
            errors.ClientLimit,
            errors.InputsFull,
            errors.InputsTooLarge,
            errors.NoWorker,
        ),
    )
    def generate(self) -> Response:
        queue = self._own_queue()
        with self._submission.room_for_the_body(request.content_length):
            asked = _read_request(self._submission.limits)
            task, others = self._submitted(queue, asked)
        return json_response(
            GenerateAnswer(
                task_id=task.task_id,
                status=task.status,
                **estimate_fields(task.forecast, others, time.time()),
                params=params_answer(task.params, task.priority),
                ignored_fields=ignored_fields(asked, task.params),
                warnings=list(task.params.warnings) or None,
                server=queue.state(),
            )
        )

    @route("POST", "/estimate")
    @documented(
        "Forecast a task without submitting it",
        tag="images",
        description="Takes the body of /generate and answers the forecast; nothing is submitted.",
        body="GenerateRequest",
        example=EXAMPLE,
        answers={200: json_answer(EstimateAnswer, "The forecast.")},
        errors=REQUEST_ERRORS,
    )
    def estimate(self) -> Response:
        queue = self._own_queue()
        with self._submission.room_for_the_body(request.content_length):
            asked = _read_request(self._submission.limits)
            prepared = self._submission.prepare(asked)
        wait, others = queue.for_user(asked.user).estimate(
            prepared.params, priority=int(asked.priority or 0)
        )
        return json_response(
            EstimateAnswer(
                **estimate_fields(wait, others, time.time()),
                params=params_answer(prepared.params, int(asked.priority or 0)),
                ignored_fields=prepared.ignored_fields,
                warnings=list(prepared.params.warnings) or None,
                server=queue.state(),
            )
        )

    @route("GET", "/status")
    @documented(
        "Status of a task",
        tag="images",
        description="Good enough to drive a progress bar. Ask again after `poll_after_s`, or each "
        "second; or let the answer wait for something new: `wait=60`, and from then on "
        "`wait=60&since=` with the `version` of the answer before, so that nothing is missed.",
        parameters=[
            TASK_ID,
            WAIT,
            query(
                "since",
                "With `wait`: answer once `version` is above this. The present version when "
                "absent.",
                {"type": "integer", "minimum": 0},
            ),
        ],
        answers={200: json_answer(StatusAnswer, "The task as it stands.")},
        errors=(errors.InvalidInput, errors.UnknownTask, errors.Gone, errors.StorageUnavailable),
    )
    def status(self) -> Response:
        queue = self._own_queue()
        task_id, wait_s = task_id_value(), number_value("wait", 0, 0, MOST_WAIT_S)
        since = number_value("since", queue.events.version(task_id), 0, MAX_ID)
        if since > queue.events.last_id:  # of another data dir: nothing is known of this client
            since = -1
        view, version = watch(
            queue,
            self._places,
            task_id,
            wait_s=wait_s,
            enough=lambda view, version: version > since,
            is_gone=is_gone,
        )
        state = queue.state()
        may_wait_for_it = view.waits_for_download or state is ServerState.LOADING
        download = download_answer(queue.health()) if may_wait_for_it else None
        if remote := queue.download_for(task_id):
            download = DownloadAnswer.of(*remote)
        answer = status_answer(
            view, state, time.time(), download, version=version, paused=queue.paused
        )
        return json_response(answer)

    def _submitted(self, queue: ClientQueue, asked: GenerateRequest) -> tuple[Task, int]:
        """What QueueManager.submit answers. A submit that is repeated needs its earlier results no
        more."""
        header_key = _idempotency_key()
        client_key = header_key or asked.client_task_id
        key_name = "Idempotency-Key" if header_key else "client_task_id"
        if client_key and (known := queue.submitted_as(client_key)):
            self._submission.check_repeated(asked, known[0].params, key_name)
            return known
        prepared = self._submission.prepare(asked)
        with self._places.place_for_change():
            task, others = queue.for_user(asked.user).submit(
                prepared.params,
                priority=int(asked.priority or 0),
                client_key=client_key,
                inputs=prepared.inputs,
                callback_url=asked.callback_url,
            )
        if client_key:  # another request may have come first with it
            check_same(task.params, prepared.params, key_name)
        return task, others


def _read_request(limits: Limits) -> GenerateRequest:
    """The body of this request, JSON or a form."""
    if request.is_json:
        return parse_request(whole_body(), limits)
    if request.mimetype != "multipart/form-data":
        raise errors.UnsupportedMediaType
    form = form_body()
    return parse_form(form.texts, form.files, limits)


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= 200:
        raise errors.InvalidInput(
            "Idempotency-Key must be of 1 to 200 characters.", field="Idempotency-Key"
        )
    return key
