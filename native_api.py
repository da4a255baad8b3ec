"""The native API: the routes of the original README and what grew around them.

A route reads, calls, answers; rules live in the QueueManager.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from flask import Blueprint, Response, request

import errors
from answers import (
    Answer,
    DeleteAnswer,
    ErrorAnswer,
    ErrorBody,
    EstimateAnswer,
    GenerateAnswer,
    HealthAnswer,
    MemoryAnswer,
    QueueAnswer,
    StatsAnswer,
    StatusAnswer,
    estimate_fields,
    params_answer,
    queue_answer,
    stats_answer,
    status_answer,
)
from api_docs import IDEMPOTENCY_KEY, TASK_ID, documented, json_answer, query
from images import CONTENT_TYPES, EXTENSIONS, to_base64
from queue_manager import QueueManager, ServerState
from task import GenerateRequest, GenerationParams, Limits, TaskStatus, parse_request, resolve
from worker import Generator, Worker

log = logging.getLogger(__name__)

SEND_BYTES = 64 * 1024


def native_routes(
    queue: QueueManager, worker: Worker, generator: Generator, data_dir: Path, limits: Limits
) -> Blueprint:
    routes = Blueprint("native", __name__)
    started_at = time.monotonic()

    def _asked() -> tuple[GenerateRequest, GenerationParams]:
        # A browser lets no foreign page send this header without this server's consent, which it
        # does not give; a page that got itself our host name is stopped by --allowed-hosts.
        if not request.is_json:
            raise errors.UnsupportedMediaType
        asked = parse_request(request.get_data(), limits)
        params = resolve(asked, queue.model, limits)
        if refusal := generator.refusal(params):
            raise errors.DoesNotFit(refusal, field="width")
        return asked, params

    @routes.post("/generate")
    @documented(
        "Ask for an image",
        tag="images",
        description="Puts a task into the queue and answers at once.",
        parameters=[IDEMPOTENCY_KEY],
        body="GenerateRequest",
        answers={200: json_answer(GenerateAnswer, "The task is in the queue.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.Gone,
            errors.DoesNotFit,
            errors.QueueFull,
            errors.StorageUnavailable,
            errors.NoWorker,
        ),
    )
    def generate() -> Response:
        asked, params = _asked()
        client_key = _idempotency_key() or asked.client_task_id
        urgent = bool(asked.priority)
        task, others = queue.submit(params, urgent=urgent, client_key=client_key)
        return _json(
            GenerateAnswer(
                task_id=task.task_id,
                status=task.status,
                **estimate_fields(task.wait, others, time.time()),
                params=params_answer(task.params, task.urgent),
                ignored_fields=_ignored(asked, params),
                server=queue.state(),
            )
        )

    @routes.post("/estimate")
    @documented(
        "Forecast without asking",
        tag="images",
        description="Takes the body of /generate and answers the forecast; nothing is submitted.",
        body="GenerateRequest",
        answers={200: json_answer(EstimateAnswer, "The forecast.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.DoesNotFit,
        ),
    )
    def estimate() -> Response:
        asked, params = _asked()
        wait, others = queue.estimate(params, urgent=bool(asked.priority))
        return _json(
            EstimateAnswer(
                **estimate_fields(wait, others, time.time()),
                params=params_answer(params, bool(asked.priority)),
                ignored_fields=_ignored(asked, params),
                server=queue.state(),
            )
        )

    @routes.get("/status")
    @documented(
        "How far a task is",
        tag="images",
        description="Good enough to drive a progress bar. Ask again after `poll_after_s`, or each "
        "second.",
        parameters=[TASK_ID],
        answers={200: json_answer(StatusAnswer, "The task as it stands.")},
        errors=(errors.InvalidInput, errors.UnknownTask, errors.Gone, errors.StorageUnavailable),
    )
    def status() -> Response:
        view = queue.status(_task_id())
        return _json(status_answer(view, queue.state(), time.time()))

    @routes.get("/image")
    @documented(
        "Fetch an image",
        tag="images",
        description="By default this removes the image, once its bytes were sent.",
        parameters=[
            TASK_ID,
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
                },
            }
        },
        errors=(
            errors.InvalidInput,
            errors.UnknownTask,
            errors.NotReady,
            errors.Gone,
            errors.StorageUnavailable,
        ),
    )
    def image() -> Response:
        task_id = _task_id()
        as_base64, delete = _flag("base64", False), _flag("delete", True)
        data, params = queue.image(task_id)
        if as_base64:
            data = to_base64(data).encode("ascii")

        def send() -> Iterator[bytes]:
            for start in range(0, len(data), SEND_BYTES):
                yield data[start : start + SEND_BYTES]
            if delete:
                _after_sending(queue, task_id)

        answer = Response(send())
        answer.content_type = "text/plain" if as_base64 else CONTENT_TYPES[params.format]
        answer.content_length = len(data)
        name = f"{task_id}.{EXTENSIONS[params.format]}"
        answer.headers["Content-Disposition"] = f'inline; filename="{name}"'
        answer.headers["Cache-Control"] = "no-store"
        return answer

    @routes.get("/queue")
    @documented(
        "List the queue",
        tag="queue",
        description="The tasks that are not finished, in the order in which they run.",
        parameters=[
            query(
                "limit",
                "Most tasks in the answer.",
                {"type": "integer", "default": 100, "minimum": 1, "maximum": 1000},
            ),
            query(
                "offset",
                "Tasks to pass over.",
                {"type": "integer", "default": 0, "minimum": 0, "maximum": 10_000_000},
            ),
        ],
        answers={200: json_answer(QueueAnswer, "The queue.")},
        errors=(errors.InvalidInput,),
    )
    def list_queue() -> Response:
        limit, offset = _number("limit", 100, 1, 1000), _number("offset", 0, 0, 10_000_000)
        return _json(queue_answer(*queue.queue(limit, offset)))

    @routes.delete("/delete")
    @routes.post("/delete")
    @documented(
        "Cancel or remove a task",
        tag="queue",
        description="Takes a waiting task out of the queue, stops a running one at its next step, "
        "removes a finished one with its image.",
        parameters=[TASK_ID],
        answers={200: json_answer(DeleteAnswer, "What happened.")},
        errors=(errors.InvalidInput, errors.UnknownTask, errors.Gone, errors.StorageUnavailable),
    )
    def delete() -> Response:
        task_id = _task_id()
        was = queue.delete(task_id)
        message = {
            TaskStatus.WAITING: "The task was taken out of the queue.",
            TaskStatus.RUNNING: "The task was cancelled; its generation ends at the next step.",
            TaskStatus.DONE: "The image was removed.",
        }.get(was, "The record of the task was removed.")
        return _json(DeleteAnswer(task_id=task_id, was=was, message=message))

    @routes.get("/stats")
    @documented(
        "What was learned about time",
        tag="server",
        description="Learned seconds by size, the error of the forecasts so far, and how busy the "
        "GPU is.",
        answers={200: json_answer(StatsAnswer, "The figures.")},
        errors=(),
    )
    def stats() -> Response:
        return _json(stats_answer(queue.stats()))

    @routes.get("/health")
    @documented(
        "Health of the server",
        tag="server",
        answers={
            200: json_answer(HealthAnswer, "loading, ready or busy."),
            503: json_answer(HealthAnswer, "draining or failed."),
        },
        errors=(),
    )
    def tell_health() -> Response:
        health = queue.health()
        done, images_bytes = queue.images()
        memory = generator.memory
        answer = HealthAnswer(
            status=health.state,
            model=queue.model.name,
            model_title=queue.model.title,
            quantize=health.quantize,
            uptime_s=time.monotonic() - started_at,
            worker_restarts=worker.restarts,
            last_error=health.last_error,
            memory=MemoryAnswer(
                active_bytes=memory.active_bytes,
                peak_bytes=memory.peak_bytes,
                cache_bytes=memory.cache_bytes,
            ),
            disk_free_bytes=_free_bytes(data_dir),
            waiting=health.waiting,
            running=health.running,
            done=done,
            images_bytes=images_bytes,
        )
        works = health.state not in (ServerState.DRAINING, ServerState.FAILED)
        return _json(answer, 200 if works else 503)

    return routes


def _json(answer: Answer, status: int = 200) -> Response:
    return Response(answer.as_json(), status, mimetype="application/json")


def _ignored(asked: GenerateRequest, params: GenerationParams) -> list[str]:
    return ["guidance"] if asked.guidance is not None and params.guidance is None else []


def _task_id() -> str:
    task_id = request.args.get("task_id", "").strip()
    if not 1 <= len(task_id) <= 64:
        raise errors.InvalidInput(
            "task_id is required in the query: the id that /generate gave, 1 to 64 characters.",
            field="task_id",
        )
    return task_id


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= 200:
        raise errors.InvalidInput(
            "Idempotency-Key must be of 1 to 200 characters.", field="Idempotency-Key"
        )
    return key


def _number(name: str, default: int, minimum: int, maximum: int) -> int:
    text = request.args.get(name, "")
    if text == "":
        return default
    if not (text.isascii() and text.isdigit() and minimum <= int(text[:20]) <= maximum):
        raise errors.InvalidInput(
            f"{name} must be a whole number from {minimum} to {maximum}.", field=name
        )
    return int(text)


def _after_sending(queue: QueueManager, task_id: str) -> None:
    try:
        queue.fetched(task_id)
    except errors.StorageUnavailable:
        log.warning("the fetched image of task %s stays: the disk refuses", task_id)


def _flag(name: str, default: bool) -> bool:
    text = request.args.get(name, "").lower()
    if text == "":
        return default
    if text not in ("true", "1", "false", "0"):
        raise errors.InvalidInput(f"{name} must be true or false.", field=name)
    return text in ("true", "1")


def error_answer(status: int, code: str, message: str, field: str | None = None) -> Response:
    error = ErrorBody(code=code, message=message, field=field)
    return _json(ErrorAnswer(error=error), status)
