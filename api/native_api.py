"""The native API: submitting tasks and fetching images.

A route reads, calls, answers; rules live in the QueueManager.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, jsonify, request

import errors
from api.answers import ErrorAnswer, ErrorBody, json_response
from api.api_docs import (
    IDEMPOTENCY_KEY,
    INDEX,
    READING_ERRORS,
    TASK_ID,
    WAIT,
    documented,
    json_answer,
    query,
)
from api.generate_request import GenerateRequest, Limits, parse_form, parse_request
from api.long_poll import watch
from api.models_api import download_answer
from api.query_values import (
    MAX_ID,
    MOST_WAIT_S,
    flag_value,
    gone_check,
    number_value,
    task_id_value,
)
from api.request_body import form_body, whole_body
from api.submission import Submission, check_same, ignored_fields
from api.task_answers import (
    EstimateAnswer,
    GenerateAnswer,
    ImageAnswer,
    ImagesAnswer,
    StatusAnswer,
    estimate_fields,
    params_answer,
    status_answer,
)
from api.waiting_places import WaitingPlaces
from images import (
    CONTENT_TYPES,
    EXTENSIONS,
    read_metadata,
    to_base64,
    zip_of,
)
from queue_manager import QueueManager
from scheduler.health import ServerState
from task import GenerationParams, Task

log = logging.getLogger(__name__)

SEND_BYTES = 64 * 1024
EXAMPLE = {"prompt": "A beautiful landscape", "width": 1024, "height": 1024, "steps": 4}


def native_routes(
    queue: QueueManager,
    submission: Submission,
    places: WaitingPlaces,
) -> Blueprint:
    routes = Blueprint("native", __name__)

    @routes.post("/generate")
    @documented(
        "Ask for an image",
        tag="images",
        description="Puts a task into the queue and answers at once.",
        parameters=[IDEMPOTENCY_KEY],
        body="GenerateRequest",
        example=EXAMPLE,
        answers={200: json_answer(GenerateAnswer, "The task is in the queue.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.ModelNotAllowed,
            errors.NotSupported,
            errors.UnusableAdapter,
            errors.KeyReused,
            errors.UnknownTask,
            errors.NotReady,
            errors.Gone,
            errors.DoesNotFit,
            errors.TooManyWaiting,
            errors.QueueFull,
            errors.InputsFull,
            errors.InputsTooLarge,
            errors.StorageUnavailable,
            errors.NoWorker,
        ),
    )
    def generate() -> Response:
        with submission.room_for_the_body(request.content_length):
            asked = _read_request(submission.limits)
            task, others = _submitted(asked, queue, submission, places)
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

    @routes.post("/estimate")
    @documented(
        "Forecast without asking",
        tag="images",
        description="Takes the body of /generate and answers the forecast; nothing is submitted.",
        body="GenerateRequest",
        example=EXAMPLE,
        answers={200: json_answer(EstimateAnswer, "The forecast.")},
        errors=(
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
        ),
    )
    def estimate() -> Response:
        with submission.room_for_the_body(request.content_length):
            asked = _read_request(submission.limits)
            prepared = submission.prepare(asked)
        wait, others = queue.estimate(prepared.params, priority=int(asked.priority or 0))
        return json_response(
            EstimateAnswer(
                **estimate_fields(wait, others, time.time()),
                params=params_answer(prepared.params, bool(asked.priority)),
                ignored_fields=prepared.ignored_fields,
                warnings=list(prepared.params.warnings) or None,
                server=queue.state(),
            )
        )

    @routes.get("/status")
    @documented(
        "How far a task is",
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
    def status() -> Response:
        task_id, wait_s = task_id_value(), number_value("wait", 0, 0, MOST_WAIT_S)
        since = number_value("since", queue.events.version(task_id), 0, MAX_ID)
        if since > queue.events.last_id:  # of another data dir: nothing is known of this client
            since = -1
        view, version = watch(
            queue,
            places,
            task_id,
            wait_s=wait_s,
            enough=lambda view, version: version > since,
            is_gone=gone_check(),
        )
        state = queue.state()
        may_wait_for_it = view.waits_for_download or state is ServerState.LOADING
        download = download_answer(queue.health()) if may_wait_for_it else None
        return json_response(status_answer(view, state, time.time(), download, version=version))

    @routes.get("/image")
    @documented(
        "Fetch an image",
        tag="images",
        description="By default this removes the image, once its bytes were sent. Several images "
        "of a task are fetched one by one (`index`), each as soon as it is stored, also while the "
        "others are drawn; or all at once (`all`) when the task has ended. A cancelled or failed "
        "task keeps the images that were stored before. With `wait` the answer comes when the "
        "image is stored (with `all`: when the task has ended).",
        parameters=[
            TASK_ID,
            WAIT,
            INDEX,
            query(
                "all",
                "Answer all images of an ended task: a zip archive, or with base64=true JSON.",
                {"type": "boolean", "default": False},
            ),
            query(
                "metadata",
                "Answer how the image was made, as JSON, instead of the image; removes nothing.",
                {"type": "boolean", "default": False},
            ),
            query(
                "base64",
                "Answer base64 text instead of the bytes.",
                {"type": "boolean", "default": False},
            ),
            query(
                "delete",
                "Remove the image after it was sent.",
                {"type": "boolean", "default": True},
            ),
        ],
        answers={
            200: {
                "description": "The image; base64 text if that was asked for.",
                "content": {
                    **{
                        content_type: {"schema": {"type": "string", "format": "binary"}}
                        for content_type in CONTENT_TYPES.values()
                    },
                    "text/plain": {"schema": {"type": "string", "format": "byte"}},
                    "application/zip": {"schema": {"type": "string", "format": "binary"}},
                    "application/json": {"schema": {"type": "object"}},
                },
            }
        },
        errors=(*READING_ERRORS, errors.TooManyWaiting),
    )
    def image() -> Response:
        task_id, index = task_id_value(), number_value("index", 0, 0, 999)
        as_base64, delete = flag_value("base64", False), flag_value("delete", True)
        if wait_s := number_value("wait", 0, 0, MOST_WAIT_S):
            whole = flag_value("all", False)
            watch(
                queue,
                places,
                task_id,
                wait_s=wait_s,
                enough=lambda task, version: not whole and task.images_done > index,
                is_gone=gone_check(),
            )
        if flag_value("metadata", False):
            image, params = queue.image(task_id, index)
            return jsonify(read_metadata(image) or _metadata_of(params, index))
        if flag_value("all", False):
            with places.place():
                images, params = queue.all_images(task_id)
                data, content_type, name = _bundle(task_id, images, params, as_base64)
            fetched = None
        else:
            data, params = queue.image(task_id, index)
            content_type, fetched = CONTENT_TYPES[params.format], index
            name = _file_name(task_id, index, params)
            if as_base64:
                data, content_type = to_base64(data).encode("ascii"), "text/plain"

        def send() -> Iterator[bytes]:
            for start in range(0, len(data), SEND_BYTES):
                yield data[start : start + SEND_BYTES]
            if delete:
                note_fetched(queue, places, task_id, fetched)

        answer = Response(send())
        answer.content_type = content_type
        answer.content_length = len(data)
        answer.headers["Content-Disposition"] = f'inline; filename="{name}"'
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return routes


def _submitted(
    asked: GenerateRequest, queue: QueueManager, submission: Submission, places: WaitingPlaces
) -> tuple[Task, int]:
    """What QueueManager.submit answers. A submit that is repeated needs its earlier results no
    more."""
    header_key = _idempotency_key()
    client_key = header_key or asked.client_task_id
    key_name = "Idempotency-Key" if header_key else "client_task_id"
    if client_key and (known := queue.submitted_as(client_key)):
        submission.check_repeated(asked, known[0].params, key_name)
        return known
    prepared = submission.prepare(asked)
    with places.place_for_change():
        task, others = queue.submit(
            prepared.params,
            priority=int(asked.priority or 0),
            client_key=client_key,
            inputs=prepared.inputs,
            callback_url=asked.callback_url,
        )
    check_same(task.params, prepared.params, key_name)  # another may have come first with this key
    return task, others


def _read_request(limits: Limits) -> GenerateRequest:
    """The body of this request, JSON or a form."""
    if request.is_json:
        return parse_request(whole_body(), limits)
    if request.mimetype != "multipart/form-data":
        raise errors.UnsupportedMediaType
    form = form_body()
    return parse_form(form.texts, form.files, limits)


def _bundle(
    task_id: str, images: list[bytes], params: GenerationParams, as_base64: bool
) -> tuple[bytes, str, str]:
    """All images of a task in one: the bytes, their content type, a name for the file."""
    names = [_file_name(task_id, index, params) for index in range(len(images))]
    if as_base64:
        answer = ImagesAnswer(
            images=[
                ImageAnswer(
                    index=index,
                    seed=str(params.seed_of(index)),
                    content_type=CONTENT_TYPES[params.format],
                    base64=to_base64(image),
                )
                for index, image in enumerate(images)
            ]
        )
        return answer.as_json().encode(), "application/json", f"{task_id}.json"
    archive = zip_of(list(zip(names, images, strict=True)))
    return archive, "application/zip", f"{task_id}.zip"


def _file_name(task_id: str, index: int, params: GenerationParams) -> str:
    number = f"-{index}" if params.count > 1 else ""
    return f"{task_id}{number}.{EXTENSIONS[params.format]}"


def _metadata_of(params: GenerationParams, index: int) -> dict[str, Any]:
    """Of an image whose file has none."""
    fields = params.model_dump(
        mode="json", exclude={"format", "quality", "count", "metadata", "asked"}, exclude_none=True
    )
    return {**fields, "seed": params.seed_of(index)}


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= 200:
        raise errors.InvalidInput(
            "Idempotency-Key must be of 1 to 200 characters.", field="Idempotency-Key"
        )
    return key


def note_fetched(
    queue: QueueManager, places: WaitingPlaces, task_id: str, index: int | None = None
) -> None:
    """Note that an image of a task was sent and may go; None: all its images.

    An error is logged: the answer is sent already, and the image is kept as if it was not fetched.
    """
    try:
        with places.place_for_change():
            queue.fetched(task_id, index)
    except (errors.StorageUnavailable, errors.TooManyWaiting) as error:
        log.warning("the fetched image of task %s stays: %s", task_id, error)


def error_answer(status: int, code: str, message: str, field: str | None = None) -> Response:
    error = ErrorBody(code=code, message=message, field=field)
    return json_response(ErrorAnswer(error=error), status)
