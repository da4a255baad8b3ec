"""Answers of the OpenAI Images API: images, or a stream of events."""

import time
from collections.abc import Callable, Iterator

from flask import Response

import errors
from api.query_values import half_closed_check
from compat.openai_errors import openai_error_body
from compat.openai_shapes import (
    ImageData,
    ImageEvent,
    ImagesResponse,
    OpenAIError,
    Usage,
)
from compat.sync_calls import Call, Finished
from images import EXTENSIONS, has_alpha, to_base64
from task import GenerationParams, Task

SIGN_OF_LIFE_AFTER = 15
"""Looks at a quiet task, of a second each, after which a stream says that it is alive."""

Preview = Callable[[str], bytes | None]
"""Returns the preview of a running task by task_id, or None."""


UrlOf = Callable[[int, str], str]
"""Returns the URL of an image by its index and the extension of its file."""


def images_response(finished: Finished, url_of: UrlOf | None) -> ImagesResponse:
    """
    Args:
        url_of: None: answer the images themselves.
    """
    params = finished.params
    extension = EXTENSIONS[params.format]
    return ImagesResponse(
        created=int(time.time()),
        output_format=params.format.lower(),
        background=_background(finished.images[0]),
        size=_size(params),
        data=[
            ImageData(
                url=url_of(index, extension) if url_of else None,
                b64_json=None if url_of else to_base64(image),
                seed=str(params.seed_of(index)),
            )
            for index, image in enumerate(finished.images)
        ],
    )


def streamed(call: Call, most_partial: int, kind: str, preview: Preview) -> Response:
    """A stream of events: partial images, and each image as soon as it is stored.

    Args:
        most_partial: partial images, at most.
        kind: image_generation or image_edit.
    """
    half_closed = half_closed_check()

    def texts() -> Iterator[str]:
        try:
            yield from _events(call, _PartialImages(most_partial, kind, preview), kind, half_closed)
            call.fetched()
        except errors.ServerError as error:
            body = OpenAIError.model_validate(openai_error_body(error.problem))
            yield f"event: error\ndata: {body.model_dump_json()}\n\n"

    answer = Response(texts(), mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Accel-Buffering"] = "no"
    answer.call_on_close(call.close)
    return answer


def _events(
    call: Call, partial: "_PartialImages", kind: str, half_closed: Callable[[], bool]
) -> Iterator[str]:
    """A client that has closed its half of the connection gets comments: if it has gone, it answers
    them with a reset."""
    completed = quiet = 0
    for task in call.views():
        quiet += 1
        for index in range(completed, task.images_done):
            yield _completed(call, task, index, kind)
            completed, quiet = index + 1, 0
        if text := partial.next(task):
            yield text
            quiet = 0
        if quiet >= SIGN_OF_LIFE_AFTER or (quiet and half_closed()):
            yield ":\n\n"
            quiet = 0
    task = call.ended()
    for index in range(completed, task.images_done):
        yield _completed(call, task, index, kind)


class _PartialImages:
    """Previews of a task at even intervals."""

    def __init__(self, most: int, kind: str, preview: Preview) -> None:
        self._most, self._kind, self._preview = most, kind, preview
        self._sent = 0
        self._latest: bytes | None = None

    def next(self, task: Task) -> str | None:
        """Returns the event of the next preview if it is due."""
        if self._sent >= self._most:
            return None
        picture = self._preview(task.task_id)  # which are made as long as a client asks
        due = task.steps_total * (self._sent + 1) / (self._most + 1)
        if picture is None or picture == self._latest or task.steps_done < due:
            return None
        event = _image_event(f"{self._kind}.partial_image", picture, task.params)
        event = event.model_copy(update={"partial_image_index": self._sent})
        self._sent, self._latest = self._sent + 1, picture
        return _event(event)


def _completed(call: Call, task: Task, index: int, kind: str) -> str:
    event = _image_event(f"{kind}.completed", call.image(index), task.params)
    seed = str(task.params.seed_of(index))
    return _event(event.model_copy(update={"usage": Usage(), "seed": seed}))


def _background(image: bytes) -> str:
    return "transparent" if has_alpha(image) else "opaque"


def _image_event(kind: str, image: bytes, params: GenerationParams) -> ImageEvent:
    is_preview = kind.endswith("partial_image")  # which are JPEG
    return ImageEvent(
        type=kind,
        b64_json=to_base64(image),
        created_at=int(time.time()),
        size=_size(params),
        background="opaque" if is_preview else _background(image),
        output_format="jpeg" if is_preview else params.format.lower(),
    )


def _event(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def _size(params: GenerationParams) -> str:
    width, height = params.final_size
    return f"{width}x{height}"
