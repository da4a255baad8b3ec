"""The route that answers images."""

import logging
from collections.abc import Iterator
from typing import Any

from flask import Response, jsonify

import errors
from api.answers import json_response
from api.api_docs import INDEX, READING_ERRORS, TASK_ID, WAIT, documented, json_answer, query
from api.client_queue import ClientQueue, OwnQueue
from api.links import Links
from api.long_poll import watch
from api.query_values import MOST_WAIT_S, flag_value, is_gone, number_value, task_id_value
from api.routes import route
from api.task_answers import ImageAnswer, ImagesAnswer, LinkAnswer
from api.waiting_places import WaitingPlaces
from images import CONTENT_TYPES, EXTENSIONS, read_metadata, to_base64, zip_of
from task import GenerationParams

log = logging.getLogger(__name__)

SEND_BYTES = 64 * 1024


class ImageRoutes:
    def __init__(self, own_queue: OwnQueue, places: WaitingPlaces, links: Links) -> None:
        self._own_queue = own_queue
        self._places = places
        self._links = links

    @route("GET", "/image")
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
    def image(self) -> Response:
        queue = self._own_queue()
        task_id, index = task_id_value(), number_value("index", 0, 0, 999)
        as_base64, delete = flag_value("base64", False), flag_value("delete", True)
        all_of_them = flag_value("all", False)
        if wait_s := number_value("wait", 0, 0, MOST_WAIT_S):
            self._wait(queue, task_id, None if all_of_them else index, wait_s)
        if flag_value("metadata", False):
            image, params = queue.image(task_id, index)
            return jsonify(read_metadata(image) or _metadata_of(params, index))
        if all_of_them:
            with self._places.place():
                images, params = queue.all_images(task_id)
                data, content_type, name = _bundle(task_id, images, params, as_base64)
        else:
            data, params = queue.image(task_id, index)
            content_type, name = CONTENT_TYPES[params.format], _file_name(task_id, index, params)
            if as_base64:
                data, content_type = to_base64(data).encode("ascii"), "text/plain"
        answer = Response(self._sent(queue, data, task_id, None if all_of_them else index, delete))
        answer.content_type = content_type
        answer.content_length = len(data)
        answer.headers["Content-Disposition"] = f'inline; filename="{name}"'
        answer.headers["Cache-Control"] = "no-store"
        return answer

    @route("POST", "/image/link")
    @documented(
        "Get a link to an image",
        tag="images",
        description="A URL that shows one of your images to everybody who has it, without a key, "
        "for an hour. It removes nothing.",
        parameters=[TASK_ID, INDEX],
        answers={200: json_answer(LinkAnswer, "The link.")},
        errors=READING_ERRORS,
    )
    def link(self) -> Response:
        task_id, index = task_id_value(), number_value("index", 0, 0, 999)
        _, params = self._own_queue().image(task_id, index)
        url, expires_at = self._links.to(f"{task_id}_{index}.{EXTENSIONS[params.format]}")
        return json_response(LinkAnswer(url=url, expires_at=expires_at))

    def _wait(self, queue: ClientQueue, task_id: str, index: int | None, wait_s: float) -> None:
        """Wait until this image is stored; None: until the task has ended."""
        watch(
            queue,
            self._places,
            task_id,
            wait_s=wait_s,
            enough=lambda task, version: index is not None and task.images_done > index,
            is_gone=is_gone,
        )

    def _sent(
        self, queue: ClientQueue, data: bytes, task_id: str, index: int | None, delete: bool
    ) -> Iterator[bytes]:
        for start in range(0, len(data), SEND_BYTES):
            yield data[start : start + SEND_BYTES]
        if delete:
            note_fetched(queue, self._places, task_id, index)


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
    left_out = {"format", "quality", "count", "metadata", "asked", "prompts", "expand"}
    fields = params.model_dump(mode="json", exclude=left_out, exclude_none=True)
    return {**fields, "prompt": params.prompt_of(index), "seed": params.seed_of(index)}


def note_fetched(
    queue: ClientQueue, places: WaitingPlaces, task_id: str, index: int | None = None
) -> None:
    """Note that an image of a task was sent and may go; None: all its images.

    An error is logged: the answer is sent already, and the image is kept as if it was not fetched.
    """
    try:
        with places.place_for_change():
            queue.fetched(task_id, index)
    except (errors.StorageUnavailable, errors.TooManyWaiting) as error:
        log.warning("the fetched image of task %s stays: %s", task_id, error)
