"""Answers of the OpenAI Images API: images, or a stream of events."""

import time
from collections.abc import Callable

import errors
from compat.openai_errors import openai_error_body
from compat.openai_shapes import (
    ImageData,
    ImageEvent,
    ImagesResponse,
    OpenAIError,
    Usage,
)
from compat.streams import StreamFormat
from compat.sync_calls import Finished
from images import EXTENSIONS, has_alpha, to_base64
from task import GenerationParams, Task

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
        background=background_of(finished.images[0]),
        size=size_of(params),
        data=[
            ImageData(
                url=url_of(index, extension) if url_of else None,
                b64_json=None if url_of else to_base64(image),
                seed=str(params.seed_of(index)),
            )
            for index, image in enumerate(finished.images)
        ],
    )


class ImagesStream(StreamFormat):
    """The events of the Images API.

    Args:
        kind: image_generation or image_edit.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def partial(self, task: Task, index: int, preview: bytes) -> str:
        event = _image_event(f"{self._kind}.partial_image", preview, task.params)
        return _event(event.model_copy(update={"partial_image_index": index}))

    def image(self, task: Task, index: int, image: bytes) -> str:
        event = _image_event(f"{self._kind}.completed", image, task.params)
        seed = str(task.params.seed_of(index))
        return _event(event.model_copy(update={"usage": Usage(), "seed": seed}))

    def failed(self, error: errors.ServerError) -> str:
        body = OpenAIError.model_validate(openai_error_body(error.problem))
        return f"event: error\ndata: {body.model_dump_json()}\n\n"


def background_of(image: bytes) -> str:
    return "transparent" if has_alpha(image) else "opaque"


def _image_event(kind: str, image: bytes, params: GenerationParams) -> ImageEvent:
    is_preview = kind.endswith("partial_image")  # which are JPEG
    return ImageEvent(
        type=kind,
        b64_json=to_base64(image),
        created_at=int(time.time()),
        size=size_of(params),
        background="opaque" if is_preview else background_of(image),
        output_format="jpeg" if is_preview else params.format.lower(),
    )


def _event(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def size_of(params: GenerationParams) -> str:
    width, height = params.final_size
    return f"{width}x{height}"
