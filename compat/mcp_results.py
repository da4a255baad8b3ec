"""What the tools of MCP answer: JSON as text, and finished pictures.

Hosts accept about 1 MB for each answer: pictures beyond that are shown as smaller JPEGs, and a link
leads to each full one. There is no `structuredContent`, because some hosts that see it drop the
pictures beside it.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from api.client_queue import ClientQueue
from api.links import LINK_S, Links
from api.task_answers import whole_seconds
from decoding.decoder import PictureDecoder
from errors import Gone, InvalidInput, NotReady, Problem, TryLater
from images import CONTENT_TYPES, EXTENSIONS, to_base64
from task import Phase, Task, TaskStatus

MOST_INLINE_BYTES = 700_000
"""Of all pictures of an answer together; base64 adds a third."""
INLINE_SIDES = (1024, 768, 512, 384, 256, 128)
"""Pixels of the longest side of a smaller copy: the first one that fits is shown."""
URI = "mflux://pictures/"
MOST_LISTED = 100
DOING = {
    Phase.LOADING: "Loading the model",
    Phase.TEXT_ENCODING: "Reading the prompt",
    Phase.PAUSED: "Paused: an urgent picture is drawn first",
    Phase.DECODING: "Finishing the picture",
    Phase.IMAGE_ENCODING: "Finishing the picture",
    Phase.PROMPT_EXPANSION: "The prompt is being written",
}


def text_result(answer: dict[str, Any], *, failed: bool = False) -> dict[str, Any]:
    """A result of one text: JSON."""
    text = json.dumps(answer, ensure_ascii=False)
    return {"content": [{"type": "text", "text": text}], "isError": failed}


def refusal(problem: Problem) -> dict[str, Any]:
    about: dict[str, Any] = {"code": problem.code, "message": problem.message}
    if problem.field is not None:
        about["field"] = problem.field
    if problem.retry_after_s is not None:
        about["retry_after_s"] = problem.retry_after_s
    return text_result({"error": about}, failed=True)


def in_words(task: Task) -> str:
    """What an unfinished task does, and for how long: for notifications of progress."""
    left = whole_seconds(task.forecast.end_s) if task.forecast else 0
    if task.status is TaskStatus.WAITING and task.phase is None:
        doing = f"Waiting, {task.pos or 0} before it"
    elif task.phase is Phase.DENOISING or task.phase is None:
        doing = f"Drawing, step {task.steps_done} of {task.steps_total}"
    else:
        doing = DOING[task.phase]
    return f"{doing}: about {left} s left"


class Results:
    """Args: decoder: makes the smaller copies."""

    def __init__(self, links: Links, decoder: PictureDecoder) -> None:
        self._links = links
        self._decoder = decoder

    def of(self, queue: ClientQueue, task: Task, notes: dict[str, Any]) -> dict[str, Any]:
        """The result of a call that has waited for a task.

        Args:
            notes: about the request, to be repeated.
        """
        answer = {"task_id": task.task_id, "status": task.status.value, **notes}
        if not task.ended:
            return text_result(answer | _still_to_come(task, paused=queue.paused))
        if task.error:
            answer["error"] = {"code": task.error_code, "message": task.error}
        if not task.images_done:
            return text_result(answer, failed=True)
        width, height = task.params.final_size
        pictures, expire = self._links_to(task)
        answer |= {
            "model": task.params.model,
            "width": width,
            "height": height,
            "steps": task.params.steps,
            "pictures": pictures,
            "message": "Each url leads to the full picture and works without a key"
            + (f" for {LINK_S // 60} minutes." if expire else "."),
        }
        if task.params.warnings:
            answer["warnings"] = list(task.params.warnings)
        result = text_result(answer, failed=task.status is TaskStatus.FAILED)
        result["content"] += self._inline(queue, task)
        return result

    def listed(self, queue: ClientQueue) -> list[dict[str, Any]]:
        """The latest finished pictures of a client as resources."""
        found = [
            {
                "uri": f"{URI}{task.task_id}/{index}",
                "name": f"{task.task_id}_{index}.{EXTENSIONS[task.params.format]}",
                "title": task.params.prompt_of(index)[:100],
                "description": f"{width} x {height}, {task.params.model}, seed "
                f"{task.params.seed_of(index)}",
                "mimeType": CONTENT_TYPES[task.params.format],
                "size": size,
            }
            for task in queue.newest_done(MOST_LISTED)
            for width, height in (task.params.final_size,)
            for index, size in enumerate(task.image_sizes)
        ]
        return found[:MOST_LISTED]

    def _links_to(self, task: Task) -> tuple[list[dict[str, Any]], bool]:
        """The pictures of a task, and whether the links to them expire."""
        extension, expires, found = EXTENSIONS[task.params.format], None, []
        for index in range(task.images_done):
            url, expires = self._links.to(f"{task.task_id}_{index}.{extension}")
            found.append(
                {
                    "index": index,
                    "seed": str(task.params.seed_of(index)),
                    "url": url,
                    "resource": f"{URI}{task.task_id}/{index}",
                }
            )
        return found, expires is not None

    def _inline(self, queue: ClientQueue, task: Task) -> Iterator[dict[str, Any]]:
        """The pictures, those left out that cannot be made small enough now."""
        left, sides = MOST_INLINE_BYTES, list(INLINE_SIDES)
        for index in range(task.images_done):
            most = left // (task.images_done - index)
            with suppress(InvalidInput, TryLater, Gone, NotReady):
                image = queue.image(task.task_id, index)[0]
                is_small = task.params.format == "JPEG" and len(image) <= most
                jpeg = image if is_small else self._small_jpeg(image, sides, most)
                if jpeg:
                    left -= len(jpeg)
                    yield {"type": "image", "data": to_base64(jpeg), "mimeType": "image/jpeg"}

    def _small_jpeg(self, image: bytes, sides: list[int], most: int) -> bytes | None:
        """
        Args:
            sides: to try. Those that are too large are removed: the other pictures of
                the task are of this kind, and each try decodes a whole picture.
            most: bytes.
        """
        with self._decoder.reading() as reader:
            while True:
                jpeg = reader.thumbnail(image, sides[0])
                if len(jpeg) <= most:
                    return jpeg
                if len(sides) == 1:
                    return None
                del sides[0]


def _still_to_come(task: Task, *, paused: bool) -> dict[str, Any]:
    left = whole_seconds(task.forecast.end_s) if task.forecast else 1
    answer: dict[str, Any] = {"seconds_left": left}
    if task.forecast:
        answer["seconds_left_p90"] = whole_seconds(task.forecast.p90_s)
    if task.status is TaskStatus.WAITING:
        answer["tasks_before_it"] = task.pos or 0
    answer["message"] = f"{in_words(task)}. Call check_image, which waits for the picture."
    if paused and task.status is TaskStatus.WAITING:
        answer["message"] = "The operator has paused the queue. Call check_image later."
    return answer
