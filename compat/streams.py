"""Answers that are written while a task is drawn, whatever form an API gives them."""

from collections.abc import Callable, Iterable, Iterator

from flask import Response

import errors
from api.query_values import half_closed_check
from compat.sync_calls import Call
from task import Task

SIGN_OF_LIFE_AFTER = 15
"""Looks at a quiet task, of a second each, after which a stream says that it is alive."""

Preview = Callable[[str], bytes | None]
"""Returns the preview of a running task by task_id, or None."""


class StreamFormat:
    """What an API writes about a task. Each method returns a text; an empty one is not sent."""

    mimetype = "text/event-stream"

    def opening(self) -> str:
        """Before anything else."""
        return ""

    def running(self, task: Task) -> str:
        """Whenever the unfinished task was looked at."""
        return ""

    def partial(self, task: Task, index: int, preview: bytes) -> str:
        """A preview of the task, which is a JPEG; `index` counts them from 0."""
        return ""

    def image(self, task: Task, index: int, image: bytes) -> str:
        """An image has been stored."""
        raise NotImplementedError

    def closing(self, task: Task) -> str:
        """After the last image."""
        return ""

    def failed(self, error: errors.ServerError) -> str:
        """The task failed or has gone: the last text."""
        raise NotImplementedError

    def alive(self, task: Task) -> str:
        """A sign of life."""
        return ":\n\n"


def streamed(call: Call, form: StreamFormat, most_partial: int, preview: Preview) -> Response:
    """A stream: previews, and each image as soon as it is stored. Closing it closes the call.

    Args:
        most_partial: previews, at most.
    """
    half_closed = half_closed_check()

    def texts() -> Iterator[str]:
        try:
            for text in _texts(call, form, Previews(most_partial, preview), half_closed):
                if text:
                    yield text
            call.fetched()
        except errors.ServerError as error:
            yield form.failed(error)

    return stream_of(texts(), form.mimetype, call.close)


def stream_of(texts: Iterable[str], mimetype: str, at_end: Callable[[], object]) -> Response:
    """An answer that is sent as it is written. `at_end` is called once, also when the client has
    gone."""
    answer = Response(texts, mimetype=mimetype)
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Accel-Buffering"] = "no"  # else nginx holds it back
    answer.call_on_close(at_end)
    return answer


def _texts(
    call: Call, form: StreamFormat, previews: "Previews", half_closed: Callable[[], bool]
) -> Iterator[str]:
    """A client that has closed its half of the connection gets signs of life: if it has gone, it
    answers them with a reset."""
    yield form.opening()
    sent = quiet = 0
    for task in call.views():
        quiet += 1
        news = [form.running(task)]
        for index in range(sent, task.images_done):
            yield form.image(task, index, call.image(index))
            sent, quiet = index + 1, 0
        if (preview := previews.next(task)) is not None:
            news.append(form.partial(task, *preview))
        if any(news):
            yield from news
            quiet = 0
        if quiet >= SIGN_OF_LIFE_AFTER or (quiet and half_closed()):
            yield form.alive(task)
            quiet = 0
    task = call.ended()
    for index in range(sent, task.images_done):
        yield form.image(task, index, call.image(index))
    yield form.closing(task)


class Previews:
    """Previews of a task at even intervals."""

    def __init__(self, most: int, preview: Preview) -> None:
        self._most, self._preview = most, preview
        self._sent = 0
        self._latest: bytes | None = None

    def next(self, task: Task) -> tuple[int, bytes] | None:
        """Returns the index and the JPEG of the next preview if it is due."""
        if self._sent >= self._most:
            return None
        picture = self._preview(task.task_id)  # which are made as long as a client asks
        due = task.steps_total * (self._sent + 1) / (self._most + 1)
        if picture is None or picture == self._latest or task.steps_done < due:
            return None
        self._sent, self._latest = self._sent + 1, picture
        return self._sent - 1, picture
