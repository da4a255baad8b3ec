"""The routes with which clients keep pictures: pinning them, and downloading many at once."""

import re
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import IO, cast

from flask import Response, request
from pydantic import Field
from werkzeug.wsgi import wrap_file

import errors
from api.answers import Answer, json_response
from api.api_docs import (
    READING_ERRORS,
    TASK_ID,
    ForeignSchemas,
    documented,
    json_answer,
    query,
)
from api.client_queue import ClientQueue, OwnQueue
from api.query_values import task_id_value
from api.routes import route
from api.waiting_places import RETRY_AFTER_S, WaitingPlaces
from images import EXTENSIONS, zip_entry
from task import GenerationParams, Task

MOST_ZIP_TASKS = 300
MOST_ZIP_BYTES = 1_000_000_000
ZIPS_AT_A_TIME = 4
"""Each is a file on disk until its client has read it."""
ZIPS_OF_A_CLIENT = 2
"""One that reads slowly leaves places to others."""
NAME_CHARS = 50
"""Of a prompt in the name of a file, which may have 255 bytes: 4 for some characters."""
PICTURE = re.compile(r"([^:]{1,64})(?::(\d{1,3}))?")


class KeepAnswer(Answer):
    task_id: str = Field(description="The id that /generate gave.", examples=["1fc9cc4f9d3b27a1"])
    kept: bool = Field(description="Whether it is pinned now.")
    expires_at: float | None = Field(
        None,
        description="Unix seconds, UTC, at which it is removed. Absent while it is kept.",
        examples=[1725397915.5],
    )
    kept_pictures: int = Field(description="Pictures that are kept for its client.", examples=[12])
    max_kept_pictures: int = Field(description="Most that the operator allows.", examples=[200])


class KeptTasksAnswer(Answer):
    task_ids: list[str] = Field(
        description="One's own kept tasks, the latest first; GET /status describes each.",
        examples=[["1fc9cc4f9d3b27a1"]],
    )
    kept_pictures: int = Field(description="Their pictures.", examples=[12])
    max_kept_pictures: int = Field(description="Most that the operator allows.", examples=[200])


KEEP_SCHEMAS: ForeignSchemas = (
    (KeepAnswer, "serialization"),
    (KeptTasksAnswer, "serialization"),
)
KEEP_ERRORS = (
    errors.InvalidInput,
    errors.UnknownTask,
    errors.WrongStatus,
    errors.Gone,
    errors.TooManyWaiting,
    errors.StorageUnavailable,
)


class KeepRoutes:
    """Args:
    spool: folder for archives while they are sent.
    """

    def __init__(self, own_queue: OwnQueue, places: WaitingPlaces, spool: Path) -> None:
        self._own_queue = own_queue
        self._places = places
        self._spool = spool
        self._lock = Lock()  # the archives that are being sent
        self._zips: Counter[str] = Counter()

    @route("GET", "/keep")
    @documented(
        "List your kept tasks",
        tag="images",
        description="For a second browser or program of the same client.",
        answers={200: json_answer(KeptTasksAnswer, "The tasks.")},
        errors=READING_ERRORS,
    )
    def kept(self) -> Response:
        task_ids, pictures, most = self._own_queue().kept()
        return json_response(
            KeptTasksAnswer(task_ids=task_ids, kept_pictures=pictures, max_kept_pictures=most)
        )

    @route("POST", "/keep")
    @documented(
        "Keep the pictures of a task",
        tag="images",
        description="Pins an ended task: it does not expire, makes no room for newer ones, and "
        "stays when its pictures are fetched, until it is released (DELETE) or deleted. The "
        "operator limits the pictures that one client may pin.",
        parameters=[TASK_ID],
        answers={200: json_answer(KeepAnswer, "It is kept.")},
        errors=(*KEEP_ERRORS, errors.KeepLimit),
    )
    def keep(self) -> Response:
        return self._keep(True)

    @route("DELETE", "/keep")
    @documented(
        "Release the pictures of a task",
        tag="images",
        description="The task expires like others again; its time begins now.",
        parameters=[TASK_ID],
        answers={200: json_answer(KeepAnswer, "It is not kept any more.")},
        errors=KEEP_ERRORS,
    )
    def release(self) -> Response:
        return self._keep(False)

    @route("GET", "/zip")
    @documented(
        "Download pictures of several tasks",
        tag="images",
        description="One zip archive with one's own pictures; it removes nothing. At most "
        f"{MOST_ZIP_TASKS} tasks or pictures and {MOST_ZIP_BYTES // 10**9} GB.",
        parameters=[
            query(
                "task_id",
                "Comes several times: the id of a task, for all its pictures that are stored; or "
                "id:index, for one of them.",
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": 68},
                    "minItems": 1,
                    "maxItems": MOST_ZIP_TASKS,
                },
                required=True,
            )
        ],
        answers={
            200: {
                "description": "The archive.",
                "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
        errors=(*READING_ERRORS, errors.TooManyWaiting),
    )
    def zip(self) -> Response:
        queue = self._own_queue()
        pictures = _pictures(queue, _wanted())
        with ExitStack() as unless_sent, self._places.place():
            unless_sent.callback(self._begin_zip(queue.client.name))
            file = unless_sent.enter_context(self._spooled(queue, pictures))
            size = file.tell()
            file.seek(0)
            archive = cast(IO[bytes], _Archive(file, unless_sent.pop_all().close))
            answer = Response(wrap_file(request.environ, archive), direct_passthrough=True)
        answer.content_type, answer.content_length = "application/zip", size
        answer.headers["Content-Disposition"] = 'attachment; filename="pictures.zip"'
        answer.headers["Cache-Control"] = "no-store"
        return answer

    def _begin_zip(self, client: str) -> Callable[[], None]:
        """Returns what is to be called when the archive is sent. Raises: TooManyWaiting."""

        def end() -> None:
            with self._lock:
                self._zips -= Counter([client])  # which keeps no zeros

        with self._lock:
            most = ZIPS_OF_A_CLIENT if client else ZIPS_AT_A_TIME
            if self._zips.total() >= ZIPS_AT_A_TIME or self._zips[client] >= most:
                raise errors.TooManyWaiting(retry_after_s=RETRY_AFTER_S)
            self._zips[client] += 1
        return end

    def _keep(self, kept: bool) -> Response:
        task_id = task_id_value()
        with self._places.place_for_change():
            task, pictures, most = self._own_queue().keep(task_id, kept)
        left_s = task.expires_in_s
        return json_response(
            KeepAnswer(
                task_id=task_id,
                kept=task.kept,
                expires_at=None if left_s is None else time.time() + left_s,
                kept_pictures=pictures,
                max_kept_pictures=most,
            )
        )

    def _spooled(self, queue: ClientQueue, pictures: list[tuple[Task, int]]) -> IO[bytes]:
        """An archive as a file without a name. It holds one picture in memory at a time.

        Raises:
            Gone: a picture was removed meanwhile.
            StorageUnavailable: the disk is full.
        """
        names: Counter[str] = Counter()
        with ExitStack() as unless_written:
            try:
                file = unless_written.enter_context(tempfile.TemporaryFile(dir=self._spool))
                with zipfile.ZipFile(file, "w") as archive:
                    for task, index in pictures:
                        image, params = queue.image(task.task_id, index)
                        archive.writestr(zip_entry(_new_name(params, index, names)), image)
            except OSError as error:
                raise errors.StorageUnavailable(
                    f"The archive cannot be written: {error.strerror}."
                ) from error
            unless_written.pop_all()
        return file


class _Archive:
    """A file that calls `on_close` when it is closed."""

    def __init__(self, file: IO[bytes], on_close: Callable[[], None]) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
        self.close = on_close


def _wanted() -> list[tuple[str, int | None]]:
    """The ids of the query, and the index of an image (None: all). Raises InvalidInput."""
    texts = list(dict.fromkeys(text.strip() for text in request.args.getlist("task_id")))
    found = [PICTURE.fullmatch(text) for text in texts]
    if not 1 <= len(texts) <= MOST_ZIP_TASKS or not all(found):
        raise errors.InvalidInput(
            f"task_id must come 1 to {MOST_ZIP_TASKS} times: an id that /generate gave, or "
            "id:index.",
            field="task_id",
        )
    return [(match[1], int(match[2]) if match[2] else None) for match in found if match]


def _pictures(queue: ClientQueue, wanted: list[tuple[str, int | None]]) -> list[tuple[Task, int]]:
    """Raises: UnknownTask, Gone, NotReady, InvalidInput: they are too large together."""
    pictures = []
    for task_id, index in wanted:
        task = queue.status(task_id)
        first = index or 0
        if first >= task.images_done:
            queue.image(task_id, first)  # says why there is none
            task = queue.status(task_id)  # it has come meanwhile
        indexes = range(task.images_done) if index is None else (index,)
        pictures += [(task, one) for one in indexes]
    if sum(task.image_sizes[index] for task, index in pictures) > MOST_ZIP_BYTES:
        raise errors.InvalidInput(
            f"task_id: these pictures take more than {MOST_ZIP_BYTES // 10**9} GB: choose fewer.",
            field="task_id",
        )
    return pictures


def _new_name(params: GenerationParams, index: int, names: Counter[str]) -> str:
    """A name made of prompt and seed that is not in `names` yet: "a lighthouse 42.png"."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", params.prompt_of(index))).strip()
    name = f"{words[:NAME_CHARS].strip() or 'picture'} {params.seed_of(index)}"
    same = name.casefold()  # a file system may not tell them apart
    names[same] += 1
    number = f" ({names[same]})" if names[same] > 1 else ""
    return f"{name}{number}.{EXTENSIONS[params.format]}"
