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
    OpenAIGeneration,
    Usage,
)
from compat.sync_calls import Call, Finished
from images import EXTENSIONS, has_alpha, to_base64
from task import GenerationParams

SIGN_OF_LIFE_AFTER = 15
"""Looks at a quiet task, of a second each, after which a stream says that it is alive."""

Preview = Callable[[str], bytes | None]
"""The picture of a running task so far, by task_id, where there is one."""


def images_response(finished: Finished, url: str | None) -> ImagesResponse:
    """
    Args:
        url: of an image, with {index} and {extension}; None: answer the images themselves.
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
                url=url.format(index=index, extension=extension) if url else None,
                b64_json=None if url else to_base64(image),
                seed=str(params.seed_of(index)),
            )
            for index, image in enumerate(finished.images)
        ],
    )


def streamed(
    call: Call, asked: OpenAIGeneration, params: GenerationParams, kind: str, preview: Preview
) -> Response:
    half_closed = half_closed_check()

    def events() -> Iterator[str]:
        try:
            yield from _partial_images(
                call,
                asked.partial_images,
                params,
                kind,
                preview=preview,
                half_closed=half_closed,
            )
            finished = call.result()
            for index, image in enumerate(finished.images):
                yield _event(
                    _image_event(f"{kind}.completed", image, finished.params).model_copy(
                        update={"usage": Usage(), "seed": str(finished.params.seed_of(index))}
                    )
                )
            call.fetched()
        except errors.ServerError as error:
            body = OpenAIError.model_validate(openai_error_body(error.problem))
            yield f"event: error\ndata: {body.model_dump_json()}\n\n"

    answer = Response(events(), mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Accel-Buffering"] = "no"
    answer.call_on_close(call.close)
    return answer


def _partial_images(
    call: Call,
    most: int,
    params: GenerationParams,
    kind: str,
    *,
    preview: Preview,
    half_closed: Callable[[], bool],
) -> Iterator[str]:
    """Previews at even distances, as far as there are any, until the task has ended. A client that
    has closed its half of the connection gets comments: one that has gone answers with a reset."""
    sent, quiet, latest = 0, 0, None
    for view in call.views():
        quiet += 1
        due = view.steps_total * (sent + 1) / (most + 1)
        picture = preview(call.task_id) if sent < most else None  # made for those who look
        if view.steps_done >= due and picture is not None and picture != latest:
            event = _image_event(f"{kind}.partial_image", picture, params)
            yield _event(event.model_copy(update={"partial_image_index": sent}))
            sent, quiet, latest = sent + 1, 0, picture
        elif quiet >= SIGN_OF_LIFE_AFTER or half_closed():
            yield ":\n\n"
            quiet = 0


def _background(image: bytes) -> str:
    return "transparent" if has_alpha(image) else "opaque"


def _image_event(kind: str, image: bytes, params: GenerationParams) -> ImageEvent:
    return ImageEvent(
        type=kind,
        b64_json=to_base64(image),
        created_at=int(time.time()),
        size=_size(params),
        background=_background(image),
        output_format="jpeg" if kind.endswith("partial_image") else params.format.lower(),
    )


def _event(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def _size(params: GenerationParams) -> str:
    width, height = params.final_size
    return f"{width}x{height}"
