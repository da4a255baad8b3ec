"""The routes that follow tasks: the stream of events, previews, thumbnails."""

from contextlib import ExitStack

from flask import Response, request

import errors
from api.answers import jpeg_response
from api.api_docs import INDEX, READING_ERRORS, TASK_ID, documented, jpeg_answer, query
from api.client_queue import OwnQueue
from api.event_stream import EventStream
from api.event_texts import EventTexts
from api.query_values import (
    MAX_ID,
    gone_check,
    half_closed_check,
    number_value,
    task_id_value,
    text_value,
    whole_number,
)
from api.routes import route
from api.thumbnails import Thumbnails
from api.waiting_places import RETRY_AFTER_S, WaitingPlaces
from decoding.decoder import PictureDecoder
from generation.previews import FAMILIES, Previews
from queue_manager import QueueManager
from scheduler.events import EventKind
from task import TaskStatus

MOST_TASKS = 100
"""That one stream may name."""
THUMBNAIL_SIDE = 256

EXAMPLE = (
    "retry: 2000\n\n"
    "id: 1725311497004\nevent: step\n"
    'data: {"task_id":"1fc9cc4f9d3b27a1","status":"running","pos":0,"wait_remaining":15,'
    '"wait_p90_s":17.5,"phase":"denoising","progress":0.35,"steps_done":1,"steps_total":4,'
    '"images_done":0,"version":1725311497004}\n\n'
)


EVENT = {
    "type": "object",
    "description": "One server-sent event.",
    "properties": {
        "id": {"type": "string", "description": "Of this event: to send as Last-Event-ID."},
        "event": {"type": "string", "enum": [*EventKind, "queue"], "description": "Its kind."},
        "data": {"type": "string", "description": "JSON."},
    },
}


class LiveRoutes:
    def __init__(
        self,
        queue: QueueManager,
        own_queue: OwnQueue,
        places: WaitingPlaces,
        previews: Previews,
        decoder: PictureDecoder,
    ) -> None:
        self._own_queue = own_queue
        self._places = places
        self._previews = previews
        self._texts = EventTexts(queue)
        self._thumbnails = Thumbnails(queue, decoder, places)

    @route("GET", "/events")
    @documented(
        "Stream the events of tasks",
        tag="queue",
        description="A stream of server-sent events. Of one task: `waiting`, `running`, `step`, "
        "`image` (one of several is stored; the last one comes with `done`), `preview` (GET "
        "/preview has a newer picture), `done`, `failed`, "
        "`cancelled`, `removed`; their data are fields of GET /status. Of the queue: `queue`, when "
        "its order or length has changed, at most once a second. The stream of named tasks begins "
        "with each as it stands and ends when all have ended; without names it is of all tasks and "
        "has no end. A client that comes back with Last-Event-ID, as browsers do, misses nothing; "
        "after too long an absence a `queue` event asks it to read the state again.",
        parameters=[
            {
                **query(
                    "task_id",
                    f"Of the tasks to watch, up to {MOST_TASKS}. All when absent.",
                    {
                        "type": "array",
                        "items": {"type": "string", "minLength": 1, "maxLength": 64},
                        "maxItems": MOST_TASKS,
                    },
                ),
                "style": "form",
                "explode": True,
            },
            query(
                "last_event_id",
                "Like the header Last-Event-ID: begin with what came after this event.",
                {"type": "integer", "minimum": 0},
            ),
        ],
        answers={
            200: {
                "description": "The stream.",
                "content": {"text/event-stream": {"schema": EVENT, "example": EXAMPLE}},
            },
            204: {"description": "All named tasks have ended, and the client knows it."},
        },
        errors=(
            errors.InvalidInput,
            errors.UnknownTask,
            errors.Gone,
            errors.TooManyListeners,
            errors.StorageUnavailable,
        ),
    )
    def events(self) -> Response:
        stream = EventStream(
            self._own_queue(),
            self._texts,
            _asked_tasks(),
            _last_event_id(),
            is_gone=gone_check(),
            half_closed=half_closed_check(),
        )
        if stream.is_over:
            return Response(status=204)
        place = ExitStack()
        full = errors.TooManyListeners(retry_after_s=RETRY_AFTER_S)
        place.enter_context(self._places.place(full))
        answer = Response(iter(stream), mimetype="text/event-stream")
        answer.call_on_close(place.close)
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["X-Accel-Buffering"] = "no"  # else nginx holds it back
        return answer

    @route("GET", "/preview")
    @documented(
        "Preview of a running task",
        tag="images",
        description="A small JPEG of what a running task will show, as far as can be seen yet: "
        "an eighth of its width and height, in colours that are near the real ones once the server "
        "has made some pictures. The first request has previews made, with the next step, and for "
        "as long as a client asks; /events announces each new one (`preview`). 204 while a task "
        "runs and there is none: not yet, or never, where the server makes none of this model. 409 "
        "while a task waits. Of a finished task: its thumbnail.",
        parameters=[TASK_ID],
        answers={
            200: jpeg_answer("The picture so far."),
            204: {"description": "The task runs, and there is no preview of it."},
        },
        errors=(*READING_ERRORS, errors.TooManyWaiting),
    )
    def preview(self) -> Response:
        task_id = task_id_value()
        queue = self._own_queue()
        view = queue.status(task_id)
        if view.ended:
            return jpeg_response(self._thumbnails.get(view, 0, THUMBNAIL_SIDE))
        family = queue.allowed.model(view.params.model).family
        why = "There is no preview of this task yet: it comes once it runs."
        if not self._previews.on:
            why = "This server makes no previews (--previews off)."
        elif family not in FAMILIES:
            why = f"There are no previews for the models of the family {family}."
        elif jpeg := self._previews.look(task_id):
            return jpeg_response(jpeg)
        if view.status is TaskStatus.WAITING:
            raise errors.NotReady(why)
        return Response(status=204, headers={"Cache-Control": "no-store"})

    @route("GET", "/thumbnail")
    @documented(
        "Thumbnail of an image",
        tag="images",
        description="A JPEG of a finished image; removes nothing.",
        parameters=[
            TASK_ID,
            INDEX,
            query(
                "size",
                "Pixels of its longest side, if the image has as many.",
                {"type": "integer", "default": THUMBNAIL_SIDE, "minimum": 64, "maximum": 1024},
            ),
        ],
        answers={200: jpeg_answer("The small copy.")},
        errors=(*READING_ERRORS, errors.TooManyWaiting),
    )
    def thumbnail(self) -> Response:
        task_id, index = task_id_value(), number_value("index", 0, 0, 999)
        task = self._own_queue().status(task_id)
        max_side = number_value("size", THUMBNAIL_SIDE, 64, 1024)
        return jpeg_response(self._thumbnails.get(task, index, max_side))


def _asked_tasks() -> frozenset[str]:
    task_ids = frozenset(task_id.strip() for task_id in request.args.getlist("task_id"))
    if len(task_ids) > MOST_TASKS or not all(1 <= len(task_id) <= 64 for task_id in task_ids):
        raise errors.InvalidInput(
            f"task_id must be of 1 to 64 characters, and at most {MOST_TASKS} of them.",
            field="task_id",
        )
    return task_ids


def _last_event_id() -> int | None:
    name, text = "last_event_id", text_value("last_event_id")
    if not text:
        name, text = "Last-Event-ID", request.headers.get("Last-Event-ID", "")
    return whole_number(text, name, 0, MAX_ID) if text else None
