"""The routes about the queue: listing it, and taking tasks out of it."""

from flask import Response, jsonify

import errors
from api.answers import json_response
from api.api_docs import SCHEMAS, TASK_ID, documented, json_answer, query
from api.client_queue import OwnQueue
from api.operator_answers import ClearedAnswer
from api.query_values import flag_value, number_value, task_id_value, text_value
from api.queue_answers import DeleteAnswer, QueueAnswer, original_tasks, queue_answer
from api.routes import route
from api.task_answers import whole_seconds
from api.waiting_places import WaitingPlaces
from scheduler.stopping import Stopping
from task import Phase, TaskStatus

MUST_END = {
    Phase.LOADING: "The part of its weights that is being read",
    Phase.TEXT_ENCODING: "The encoding of its prompt",
    Phase.DECODING: "The decoding of its image",
}


class QueueRoutes:
    def __init__(self, own_queue: OwnQueue, places: WaitingPlaces) -> None:
        self._own_queue = own_queue
        self._places = places

    @route("GET", "/queue")
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
            query("tag", "Only tasks that have this among their `tags`.", {"type": "string"}),
        ],
        answers={200: json_answer(QueueAnswer, "The queue.")},
        errors=(errors.InvalidInput,),
    )
    def list_queue(self) -> Response:
        limit = number_value("limit", 100, 1, 1000)
        offset = number_value("offset", 0, 0, 10_000_000)
        tag = text_value("tag")
        tagged = (lambda task: tag in (task.params.tags or ())) if tag else None
        queue = self._own_queue()
        views, length = queue.unfinished(limit, offset, tagged)
        names = queue.client.operator
        return json_response(
            queue_answer(views, length, queue.owns, paused=queue.paused, names=names)
        )

    @route("GET", "/tasks")
    @documented(
        "List your tasks",
        tag="queue",
        description="As the original mflux-server lists them: at most 1000 that are not finished, "
        "in the order in which they run. GET /queue says more.",
        answers={
            200: {
                "description": "The tasks.",
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "array",
                            "items": {"$ref": f"{SCHEMAS}OriginalTask"},
                        }
                    }
                },
            }
        },
        errors=(),
    )
    def list_tasks(self) -> Response:
        views, _ = self._own_queue().unfinished(1000, 0, lambda task: True)
        return jsonify(original_tasks(views))

    @route("DELETE", "/clear")
    @route("POST", "/clear")
    @documented(
        "Cancel all your waiting tasks",
        tag="queue",
        answers={200: json_answer(ClearedAnswer, "They are cancelled.")},
        errors=(errors.TooManyWaiting, errors.StorageUnavailable),
    )
    def clear(self) -> Response:
        with self._places.place_for_change():
            return json_response(ClearedAnswer(cancelled=self._own_queue().clear()))

    @route("GET", "/cancel")
    @route("POST", "/cancel")
    @route("DELETE", "/cancel")
    @route("DELETE", "/delete")
    @route("POST", "/delete")
    @documented(
        "Cancel or remove a task",
        tag="queue",
        description="Takes a waiting task out of the queue, stops a running one at its next step, "
        "removes one that has ended, with its images. The images that a cancelled task has stored "
        "can be fetched, and are kept like those of a finished one. /cancel is what the original "
        "mflux-server calls it.",
        parameters=[
            TASK_ID,
            query(
                "after_current",
                "Of a running task with several images: cancel it when the image that is being "
                "drawn is stored (`last_image` of /status). A task that waits, or whose images "
                "are still to be upscaled, is cancelled at once. A task that has ended stays as "
                "it is.",
                {"type": "boolean", "default": False},
            ),
        ],
        answers={200: json_answer(DeleteAnswer, "What happened.")},
        errors=(
            errors.InvalidInput,
            errors.UnknownTask,
            errors.Gone,
            errors.TooManyWaiting,
            errors.StorageUnavailable,
        ),
    )
    def delete(self) -> Response:
        task_id = task_id_value()
        with self._places.place_for_change():
            after_current = flag_value("after_current", False)
        queue = self._own_queue()
        was = queue.delete(task_id, after_current=after_current)
        message = {
            TaskStatus.WAITING: "The task was taken out of the queue.",
            TaskStatus.RUNNING: "The task was cancelled.",
            TaskStatus.DONE: "The image was removed.",
        }.get(was, "The record of the task was removed.")
        if after_current and was is TaskStatus.RUNNING:
            message = "The task ends when the image that is being drawn is stored."
        elif after_current and was is not TaskStatus.WAITING:
            message = "The task had ended already; nothing was changed."
        stopping = queue.stopping(task_id)
        if stopping:
            message += _must_end_first(stopping, image=after_current)
        seconds = stopping.seconds if stopping else None
        return json_response(
            DeleteAnswer(task_id=task_id, was=was, message=message, stopping_s=seconds)
        )


def _must_end_first(stopping: Stopping, *, image: bool) -> str:
    """A sentence about what a cancelled task still keeps the GPU busy with."""
    what = "The image" if image else MUST_END.get(stopping.phase, "Its present step")
    return f" {what} must end first, in about {whole_seconds(stopping.seconds)} s."
