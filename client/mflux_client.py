"""A client for mflux-server, in one file: copy it. It needs Python 3.9 or newer, and requests.

    client = Client("http://localhost:4030")
    task = client.submit("a lighthouse", steps=4)
    status = client.wait(task.task_id)
    if status.status == "done":
        client.image(task.task_id).save("lighthouse.jpg")

AsyncClient has the same calls for asyncio, with httpx in place of requests. As a command:

    python3 mflux_client.py "a lighthouse" steps=4 -o lighthouse.jpg

Guarantees:

- It never submits twice. Each submit has a key of its own (Idempotency-Key), under which the server
  accepts one task, however often the request has to be sent.
- It retries after temporary failures: a broken connection, a restart, a full queue. All calls
  are repeated, with growing pauses, for `retry_s` seconds after the first failure.
- It never loses a picture. Fetching one leaves it on the server, so that a lost answer costs
  nothing; `cancel` removes it when you have saved it, else the server does in time (--keep-s).

Everything that fails raises MfluxError. Answers keep what the server sent in `raw`, fields that
this version does not know included.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import sys
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field, fields
from email.utils import parsedate_to_datetime
from functools import wraps
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Protocol, TextIO, TypedDict, TypeVar, Union, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage
    from typing_extensions import Concatenate, ParamSpec, Unpack

    _P = ParamSpec("_P")

__all__ = [
    "AsyncClient",
    "Client",
    "Estimate",
    "Event",
    "Fields",
    "Image",
    "ImageOf",
    "Lora",
    "MfluxError",
    "Model",
    "Models",
    "Params",
    "Queue",
    "QueuedTask",
    "Status",
    "Task",
    "TimedOut",
    "Unreachable",
]

_T = TypeVar("_T")
DEFAULT_URL = "http://localhost:4030"
CONNECT_S = 10.0
LONG_POLL_S = 30
"""Seconds. Proxies often close connections that are silent for 60 s."""
SILENCE_S = 45.0
"""Seconds of silence after which a stream is considered broken; the server sends every 15 s."""
RETRIED = (429, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
ENDED = ("done", "failed", "cancelled")
LAST_KINDS = (*ENDED, "removed")
"""Events that end a task."""


class MfluxError(Exception):
    """An error.

    code: for programs: the server's (invalid_input, unknown_task, gone, queue_full, ...), or
        unreachable, timed_out, not_mflux, cannot_ask.
    message: for people.
    field: the field of the request at fault, where there is one.
    http_status: of the server's answer; None if there was none.
    retry_after_s: seconds after which the server said that trying again makes sense.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        field: str | None = None,
        http_status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.http_status = http_status
        self.retry_after_s = retry_after_s


class Unreachable(MfluxError):
    """No answer came, for `retry_s` seconds."""


class TimedOut(MfluxError):
    """The task had not ended when the time of `wait` was up; it goes on."""


# -- requests ------------------------------------------------------------------------------


class ImageOf(TypedDict, total=False):
    """A picture that the server made: `task_id`, and `index` if it made several."""

    task_id: str
    index: int


class Lora(TypedDict, total=False):
    """A LoRA and its scale (1: as trained)."""

    name: str
    scale: float


Picture = Union[str, "os.PathLike[str]", bytes, "Image", "PillowImage", ImageOf]
"""A path, a data URL, the bytes of a file, what `image` returned, a Pillow image, or ImageOf."""


class Passed(TypedDict, total=False):
    """Fields of a request that the params of its answer repeat."""

    guidance: float
    format: str
    quality: int
    quantize: int
    background: str
    negative_prompt: str
    scheduler: str
    preset: str
    image_strength: float
    mask_feather: int
    control_strength: float
    control_type: str
    control_types: list[str]
    control_strengths: list[float]
    upscale: float
    upscaler: str
    softness: float
    reference_strengths: list[float]
    edit_strength: float
    auto_mask: str
    verify_retries: int
    output_resolution: int
    lora_style: str
    step_cache: float
    cfg_end: float
    skip_layers: list[int]
    expand: bool
    tags: list[str]
    max_age_s: float
    keep_alive_s: float


class Fields(Passed, total=False):
    """Fields of a request, besides the prompt. The server chooses those that are absent; its README
    and /swagger say what they mean."""

    seed: int | str
    width: int
    height: int
    steps: int
    priority: bool | int
    user: str
    model: str
    count: int
    expand_wildcards: bool
    init_image: Picture
    images: list[Picture]
    mask: Picture
    control_image: Picture
    control_images: list[Picture]
    loras: list[str | Lora]
    metadata: bool
    callback_url: str


# -- answers ---------------------------------------------------------------------------


class Params(Passed, total=False):
    """The complete parameters of a task: defaults filled in, size rounded."""

    model: str
    prompt: str
    prompts: list[str]
    """Of each image, where they differ; `prompt` is the first one."""
    count: int
    seed: str
    width: int
    height: int
    steps: int
    metadata: bool
    priority: bool


class ErrorBody(TypedDict, total=False):
    code: str
    message: str


@dataclass(frozen=True)
class Estimate:
    """The forecast for a request."""

    task_length: int
    """Number of other unfinished tasks."""
    expected_time_seconds: float
    """Seconds until the image is ready, median estimate."""
    wait_p90_s: float
    """Seconds within which it is ready in 9 of 10 cases."""
    expected_start_at: float
    """Unix seconds."""
    expected_end_at: float
    """Unix seconds."""
    confidence: str
    """none, low or high."""
    pos: int
    """Number of tasks that wait before it."""
    params: Params
    ignored_fields: list[str]
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Task(Estimate):
    """A task that the server has accepted."""

    task_id: str
    status: str
    """waiting; or a later status, if the key was used before."""
    idempotency_key: str = ""
    """Its idempotency key: submitting with it again returns this task."""


@dataclass(frozen=True)
class Status:
    """The status of a task. Fields that do not apply are None."""

    task_id: str
    status: str
    """waiting, running, done, failed or cancelled."""
    progress: float
    """Share of the running time that is over, 0 to 1."""
    steps_done: int
    steps_total: int
    images_done: int
    """Number of stored images: `image` fetches them, also while the task runs."""
    params: Params
    server: str
    """State of the server: loading, ready, busy, draining, failed."""
    raw: dict[str, Any] = field(repr=False)
    pos: int | None = None
    """Number of tasks that wait before it."""
    wait_remaining: int | None = None
    """Seconds until the image is ready, median estimate."""
    wait_p90_s: float | None = None
    expected_start_at: float | None = None
    expected_end_at: float | None = None
    confidence: str | None = None
    reason: str | None = None
    """Why the task ends later than was forecast before."""
    poll_after_s: float | None = None
    phase: str | None = None
    """loading, text_encoding, denoising, paused, decoding or image_encoding."""
    last_image: int | None = None
    """Index of the image after which it is cancelled."""
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    expires_at: float | None = None
    """Unix seconds at which it is removed. None: it has not ended, or is kept."""
    kept: bool | None = None
    """True: it is pinned, and does not expire."""
    error: ErrorBody | None = None
    version: int | None = None
    """Grows with each change. None: the server cannot wait for changes."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Image:
    """A picture from the server."""

    data: bytes = field(repr=False)
    content_type: str
    task_id: str
    index: int

    @property
    def extension(self) -> str:
        """jpg, png or webp."""
        return {"image/jpeg": "jpg"}.get(self.content_type, self.content_type.rpartition("/")[2])

    @property
    def file_name(self) -> str:
        """A name made of the id. It leads into no other folder, whatever the server says."""
        return re.sub(r"[^\w.-]", "_", f"{self.task_id}.{self.extension}").lstrip(".")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the bytes to a file."""
        path = Path(path)
        path.write_bytes(self.data)
        return path

    def pil(self) -> PillowImage:
        """Returns a Pillow image; needs Pillow."""
        from PIL import Image as pillow

        return pillow.open(BytesIO(self.data))


@dataclass(frozen=True)
class QueuedTask:
    status: str
    pos: int
    wait_remaining: int
    created_at: float
    params: Params
    """Without prompt for tasks of other clients."""
    raw: dict[str, Any] = field(repr=False)
    task_id: str | None = None
    """None for tasks of other clients."""
    mine: bool = True


@dataclass(frozen=True)
class Queue:
    """The unfinished tasks in the order in which they run."""

    length: int
    """Their total number, which may be larger than that of `tasks`."""
    tasks: list[QueuedTask]
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Model:
    name: str
    title: str
    default_steps: int
    takes: list[str]
    """Fields that this model takes and others may not."""
    needs: list[str]
    """Required fields."""
    allowed: bool
    """Whether tasks may name it."""
    loaded: bool
    present: bool
    """Whether its weights are on the server's disk."""
    raw: dict[str, Any] = field(repr=False)
    default_guidance: float | None = None


@dataclass(frozen=True)
class Models:
    default: str
    """The model of tasks that name none."""
    models: list[Model]
    loras: list[str]
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Event:
    """An event of a task or of the queue."""

    id: int | None
    """Increasing id; None if the server sent none."""
    kind: str
    """waiting, running, step, image, preview, done, failed, cancelled, removed; queue."""
    data: dict[str, Any]
    """Of a task: as in Status. Of the queue: its length."""

    @property
    def task_id(self) -> str | None:
        return self.data.get("task_id")


# -- the calls ----------------------------------------------------------------------------------


class _Calls:
    """All calls, written once. AsyncClient awaits them. Client runs them to their end at once: its
    transport waits inside of a call, so that there is nothing to be awaited."""

    def __init__(
        self,
        transport: _Transport,
        sleep: Callable[[float], Awaitable[object]],
        url: str | None,
        *,
        timeout_s: float = 60.0,
        retry_s: float = 60.0,
        on_retry: Callable[[MfluxError, float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        url = (url or os.environ.get("MFLUX_SERVER_URL") or DEFAULT_URL).strip().rstrip("/")
        self.url = url if "://" in url else f"http://{url}"
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self._on_retry = on_retry
        self._sleep = sleep
        self._clock = clock
        self._transport = transport

    async def submit(
        self,
        prompt: str | list[str] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[Fields],
    ) -> Task:
        """Put a task into the queue, once.

        Pictures are paths, bytes, Pillow images, or results of the server; they travel as files of
        a form, or, next to such results, as base64.

        Args:
            prompt: what the picture shows; a list: one picture of each. Only upscalers do without.
            idempotency_key: yours, 1 to 200 characters, if this must be safe to repeat even after
                your own program has ended. Absent: a random one.
        """
        given: dict[str, Any] = {"prompt": prompt, **fields}
        key = idempotency_key or given.pop("client_task_id", None) or uuid.uuid4().hex
        headers = {"Idempotency-Key": key}
        answer = await self._json("POST", "/generate", headers=headers, **_body(given))
        return _built(Task, {**answer, "idempotency_key": key})

    async def estimate(
        self, prompt: str | list[str] | None = None, **fields: Unpack[Fields]
    ) -> Estimate:
        """Returns the forecast that `submit` would get, without submitting."""
        given: dict[str, Any] = {"prompt": prompt, **fields}
        return _built(Estimate, await self._json("POST", "/estimate", **_body(given)))

    async def status(
        self, task_id: str, *, wait_s: int | None = None, since: int | None = None
    ) -> Status:
        """Returns the status of a task.

        Args:
            wait_s: answer only when something has changed, or after so many seconds (to 300). A
                server that cannot do so answers at once.
            since: the `version` after which a change counts; absent: the version now.
        """
        query: dict[str, Any] = {"task_id": task_id}
        if wait_s is not None:
            query["wait"] = wait_s
        if since is not None:
            query["since"] = since
        read_s = self.timeout_s + (wait_s or 0)
        return _built(Status, await self._json("GET", "/status", params=query, read_s=read_s))

    async def wait(
        self,
        task_id: str,
        *,
        timeout_s: float | None = None,
        on_status: Callable[[Status], object] | None = None,
    ) -> Status:
        """Waits until a task is done, failed or cancelled; returns its last status.

        A restart of the server in the middle is waited for too, for `retry_s` seconds.

        Args:
            on_status: called with each status that comes in between, and the last.

        Raises:
            TimedOut: after timeout_s seconds.
        """
        ends_at = None if timeout_s is None else self._clock() + timeout_s

        def left(seconds: float) -> float:
            return seconds if ends_at is None else min(seconds, ends_at - self._clock())

        status = await self.status(task_id)
        while True:
            if on_status:
                on_status(status)
            if status.ended:
                return status
            if left(1) <= 0:
                raise TimedOut("timed_out", f"Task {task_id} is {status.status} still.")
            version, poll_after_s = status.version, status.poll_after_s or 1
            if version is not None:
                asked_at, wait_s = self._clock(), max(int(left(LONG_POLL_S)), 0)
                status = await self.status(task_id, wait_s=wait_s, since=version)
                waited_s = self._clock() - asked_at
                if status.ended or status.version != version or waited_s * 2 > wait_s > 0:
                    continue
                # The server answered at once: too many requests wait there.
            await self._sleep(max(left(poll_after_s), 0))
            status = await self.status(task_id)

    async def _next_status(self, status: Status) -> Status:
        """The status once it has changed, or after a while."""
        if status.version is None:  # the server cannot wait for changes
            await self._sleep(status.poll_after_s or 1)
            return await self.status(status.task_id)
        asked_at = self._clock()
        later = await self.status(status.task_id, wait_s=LONG_POLL_S, since=status.version)
        if later.version == status.version and self._clock() - asked_at < LONG_POLL_S / 2:
            await self._sleep(1)  # the server answered at once: too many requests wait there
        return later

    async def image(self, task_id: str, index: int = 0) -> Image:
        """Waits for one picture and returns it. It stays on the server (see above)."""
        query = {"task_id": task_id, "index": index, "delete": "false"}
        answer = await self._call("GET", "/image", params=query)
        content_type = answer.headers.get("Content-Type", "")
        if not content_type.startswith("image/"):
            raise _not_mflux(f"{self.url} answers /image, but not with an image.")
        return Image(answer.content, content_type, task_id, index)

    async def images(self, task_id: str) -> list[Image]:
        """Fetches all stored pictures of a task, one by one."""
        stored = (await self.status(task_id)).images_done
        return [await self.image(task_id, index) for index in range(stored)]

    async def images_as_stored(self, task_id: str) -> AsyncIterator[Image]:
        """The pictures of a task, each as soon as it is stored, until the task has ended.

        A task that is cancelled or fails gives those that were stored before; `status` says which.
        """
        index = 0
        while True:
            status = await self.status(task_id)
            while index >= status.images_done and not status.ended:
                status = await self._next_status(status)
            while index < status.images_done:
                yield await self.image(task_id, index)
                index += 1
            if status.ended:
                return

    async def preview(self, task_id: str) -> bytes | None:
        """A small JPEG of the picture so far of a running task; None while there is none.

        Asking has the server make them, with the next step and for some seconds. Of a finished
        task: its thumbnail.

        Raises:
            MfluxError: `not_ready` while the task waits.
        """
        return (await self._call("GET", "/preview", params={"task_id": task_id})).content or None

    async def archive(self, task_id: str) -> bytes:
        """Returns all pictures of an ended task as a zip file."""
        query = {"task_id": task_id, "all": "true", "delete": "false"}
        return (await self._call("GET", "/image", params=query)).content

    async def keep(self, task_id: str) -> int:
        """Pin the pictures of an ended task, so that they do not expire. Returns how many pictures
        the server keeps for this client.

        Raises:
            MfluxError: `keep_limit` when the operator allows no more.
        """
        answer = await self._json("POST", "/keep", params={"task_id": task_id})
        return int(answer["kept_pictures"])

    async def release(self, task_id: str) -> int:
        """Let the pictures of a task expire again, from now. Returns how many are still kept."""
        answer = await self._json("DELETE", "/keep", params={"task_id": task_id})
        return int(answer["kept_pictures"])

    async def zip(self, *task_ids: str) -> bytes:
        """Returns the stored pictures of these tasks as one zip file; "ID:INDEX" is a single
        one."""
        return (await self._call("GET", "/zip", params={"task_id": list(task_ids)})).content

    async def cancel(self, task_id: str, *, after_current: bool = False) -> str:
        """Take a waiting task out of the queue, stop a running one, remove an ended one with its
        pictures. The pictures that a cancelled task has stored can be fetched.

        Args:
            after_current: cancel a running task once the picture that is being drawn is stored; an
                ended one stays as it is.

        Returns:
            The status that the task had before.
        """
        if after_current:  # safe to repeat: it removes nothing
            query = {"task_id": task_id, "after_current": "true"}
            return str((await self._json("DELETE", "/delete", params=query)).get("was"))
        was = (await self.status(task_id)).status

        async def look() -> None:
            """Checks whether the last try worked, because another one would remove the record."""
            try:
                status = (await self.status(task_id)).status
            except MfluxError as error:
                if error.http_status != 410:
                    raise
                raise _ItWorked from None
            if status == "cancelled" != was:
                raise _ItWorked

        try:
            answer = await self._json(
                "DELETE", "/delete", params={"task_id": task_id}, before_retry=look
            )
        except _ItWorked:
            return was
        return str(answer.get("was", was))

    async def queue(self, limit: int = 100, offset: int = 0, tag: str | None = None) -> Queue:
        """The tasks that are not finished; with `tag`, those that have it among their tags."""
        query: dict[str, Any] = {"limit": limit, "offset": offset}
        if tag is not None:
            query["tag"] = tag
        answer = await self._json("GET", "/queue", params=query)
        tasks = [_built(QueuedTask, task) for task in _list(answer, "tasks")]
        return _built(Queue, {**answer, "tasks": tasks}, answer)

    async def models(self) -> Models:
        """Returns all models of mflux; those that tasks may name (`allowed`) come first."""
        answer = await self._json("GET", "/models")
        models = [_built(Model, model) for model in _list(answer, "models")]
        loras = [str(lora.get("name")) for lora in _list(answer, "loras")]
        return _built(Models, {**answer, "models": models, "loras": loras}, answer)

    async def events(
        self, *task_ids: str, last_event_id: int | None = None
    ) -> AsyncIterator[Event]:
        """Yields events, across broken connections and restarts of the server.

        Of some tasks: first each as it stands, then what happens until all of them have ended. Of
        the whole queue: without end. Leaving the loop closes the connection.

        Args:
            last_event_id: go on after this one; the server keeps the latest thousands.
        """
        open_tasks = dict.fromkeys(task_ids)
        while True:
            stream = _EventStream(last_event_id)
            answer = await self._listen(open_tasks, last_event_id)
            try:
                if answer.status == 204:  # there is nothing to come
                    return
                async for chunk in answer.chunks:
                    for event in stream.read(chunk):
                        if event.kind in LAST_KINDS:
                            open_tasks.pop(event.task_id or "", None)
                        yield event
                        if task_ids and not open_tasks:
                            return
            finally:
                await answer.close()
            last_event_id = stream.last_id
            await self._sleep(stream.retry_s)

    async def _listen(self, task_ids: Iterable[str], last_event_id: int | None) -> _Answer:
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = str(last_event_id)
        query = [("task_id", task_id) for task_id in task_ids]
        return await self._call(
            "GET", "/events", params=query, headers=headers, read_s=SILENCE_S, stream=True
        )

    async def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        body = (await self._call(method, path, **request)).json()
        if not isinstance(body, dict):
            raise _not_mflux(f"{self.url} answers {path}, but not as mflux-server does.")
        return body

    async def _call(
        self,
        method: str,
        path: str,
        *,
        read_s: float | None = None,
        before_retry: Callable[[], Awaitable[None]] | None = None,
        **request: Any,
    ) -> _Answer:
        """The answer, once it is 200 or 204.

        Args:
            read_s: seconds of silence, if not timeout_s.
            before_retry: called after each failure; may end the tries by raising.
        """
        give_up_at: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                answer = await self._transport.ask(
                    method, self.url + path, read_s or self.timeout_s, **request
                )
                if answer.status in (200, 204):
                    return answer
                failure = _refusal(answer)
                if answer.status not in RETRIED:
                    raise failure
            except _NoAnswer as error:
                why = f"No answer from {self.url}: {_reason_of(error.cause)}."
                failure = Unreachable("unreachable", why)
                if error.is_final:
                    raise failure from error.cause
            except (_CannotAsk, ValueError) as error:
                raise MfluxError("cannot_ask", f"{self.url} cannot be asked: {error}") from error
            now = self._clock()
            give_up_at = now + self.retry_s if give_up_at is None else give_up_at
            this_pause_s = max(
                pause_s * random.uniform(0.5, 1.0),  # many clients must not come back at once
                failure.retry_after_s or 0.0,
            )
            if now + this_pause_s > give_up_at:
                raise failure
            if self._on_retry:
                self._on_retry(failure, this_pause_s)
            await self._sleep(this_pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            if before_retry:
                await before_retry()


class AsyncClient(_Calls):
    """A client of one server, for asyncio; it needs httpx. The calls and arguments of Client, but
    to be awaited, or to be iterated with `async for`. Callbacks are plain functions."""

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__(_Httpx(key), sleep, url, **options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()


def _now(
    call: Callable[Concatenate[_Calls, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Client, _P], _T]:
    """A call of AsyncClient as one of Client."""

    @wraps(call)
    def at_once(client: Client, /, *args: _P.args, **named: _P.kwargs) -> _T:
        return _result(call(client._calls, *args, **named))

    return at_once


def _one_by_one(
    call: Callable[Concatenate[_Calls, _P], AsyncIterator[_T]],
) -> Callable[Concatenate[Client, _P], Iterator[_T]]:
    """The same for a call that yields."""

    @wraps(call)
    def iterate(client: Client, /, *args: _P.args, **named: _P.kwargs) -> Iterator[_T]:
        found = cast("AsyncGenerator[_T, None]", call(client._calls, *args, **named))
        try:
            while True:
                try:
                    yield _result(found.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            _result(found.aclose())

    return iterate


def _result(awaitable: Awaitable[_T]) -> _T:
    """What a coroutine returns that awaits nothing from outside."""
    try:
        awaitable.__await__().send(None)
    except StopIteration as ended:
        return cast("_T", ended.value)
    raise RuntimeError("a call of Client waits for an event loop")


class Client:
    """A client of one server. Not thread-safe.

    Args:
        url: of the server; absent: MFLUX_SERVER_URL, or http://localhost:4030.
        key: sent as `Authorization: Bearer KEY`.
        options: timeout_s, seconds for which one answer may be silent (60); retry_s, seconds for
            which a call that failed is tried again (60; 0: not at all); on_retry, called with the
            failure and the seconds until the next try.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        sleep: Callable[[float], object] = time.sleep,
        **options: Unpack[_Options],
    ) -> None:
        async def pause(seconds: float) -> None:
            sleep(seconds)

        self._calls = _Calls(_Requests(key), pause, url, **options)
        self.url = self._calls.url

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        _result(self._calls._transport.close())

    submit = _now(_Calls.submit)
    estimate = _now(_Calls.estimate)
    status = _now(_Calls.status)
    wait = _now(_Calls.wait)
    image = _now(_Calls.image)
    images = _now(_Calls.images)
    images_as_stored = _one_by_one(_Calls.images_as_stored)
    preview = _now(_Calls.preview)
    archive = _now(_Calls.archive)
    keep = _now(_Calls.keep)
    release = _now(_Calls.release)
    zip = _now(_Calls.zip)
    cancel = _now(_Calls.cancel)
    queue = _now(_Calls.queue)
    models = _now(_Calls.models)
    events = _one_by_one(_Calls.events)


# -- transports ---------------------------------------------------------------------------------


class _Options(TypedDict, total=False):
    timeout_s: float
    retry_s: float
    on_retry: Callable[[MfluxError, float], object] | None
    clock: Callable[[], float]


class _ItWorked(Exception):
    """The try whose answer was lost has worked."""


class _NoAnswer(Exception):
    """The connection failed or broke; is_final: it would again."""

    def __init__(self, cause: BaseException, *, is_final: bool = False) -> None:
        super().__init__(str(cause))
        self.cause, self.is_final = cause, is_final


class _CannotAsk(Exception):
    """The request cannot be sent."""


@dataclass
class _Answer:
    """Of the server, or of a proxy before it."""

    status: int
    reason: str
    url: str
    headers: Mapping[str, str]
    content: bytes
    """Empty if `chunks` are read instead."""
    chunks: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]

    def json(self) -> Any:
        """None if it is no JSON."""
        try:
            return json.loads(self.content)
        except ValueError:
            return None


class _Transport(Protocol):
    async def ask(
        self, method: str, url: str, read_s: float, *, stream: bool = False, **request: Any
    ) -> _Answer:
        """
        Args:
            read_s: seconds for which the answer may be silent.
            stream: leave the body to `chunks`.
            request: headers, params, json, data and files, as requests and httpx have them.

        Raises:
            _NoAnswer, _CannotAsk, ValueError.
        """

    async def close(self) -> None: ...


class _Requests:
    def __init__(self, key: str | None) -> None:
        import requests

        self._library, self._session = requests, requests.Session()

        def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        self._session.auth = bearer  # also without a key: requests else sends what ~/.netrc holds

    async def ask(
        self, method: str, url: str, read_s: float, *, stream: bool = False, **request: Any
    ) -> _Answer:
        library = self._library.exceptions
        try:
            answer = self._session.request(
                method,
                url,
                timeout=(CONNECT_S, read_s),
                allow_redirects=False,  # they would make a GET of a POST
                stream=stream,
                **request,
            )
            content = b"" if stream and answer.ok else answer.content
        except (
            library.ConnectionError,
            library.Timeout,
            library.ChunkedEncodingError,  # the answer has begun
            library.ContentDecodingError,
        ) as error:
            raise _NoAnswer(error, is_final=isinstance(error, library.SSLError)) from error
        except library.RequestException as error:
            raise _CannotAsk(str(error)) from error

        async def chunks() -> AsyncIterator[bytes]:
            try:
                for chunk in answer.iter_content(1):  # more would wait for more
                    yield chunk
            except library.RequestException:
                return

        async def close() -> None:
            answer.close()

        reason, headers = answer.reason, answer.headers
        return _Answer(answer.status_code, reason, answer.url, headers, content, chunks(), close)

    async def close(self) -> None:
        self._session.close()


class _Httpx:
    def __init__(self, key: str | None) -> None:
        import httpx

        self._library = httpx
        self._client = httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"} if key else {})

    async def ask(
        self, method: str, url: str, read_s: float, *, stream: bool = False, **request: Any
    ) -> _Answer:
        library, timeout = self._library, self._library.Timeout(read_s, connect=CONNECT_S)
        urlsplit(url)  # httpx looks up names that cannot be
        try:
            ready = self._client.build_request(method, url, timeout=timeout, **request)
            answer = await self._client.send(ready, stream=True)
            content = b"" if stream and answer.is_success else await answer.aread()
        except library.UnsupportedProtocol as error:
            raise _CannotAsk(str(error)) from error
        except (library.TransportError, library.DecodingError) as error:
            raise _NoAnswer(error, is_final="SSL" in str(error)) from error
        except (library.HTTPError, library.InvalidURL) as error:
            raise _CannotAsk(str(error)) from error

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_bytes():
                    yield chunk
            except library.HTTPError:
                return

        reason, headers = answer.reason_phrase, answer.headers
        return _Answer(
            answer.status_code, reason, str(answer.url), headers, content, chunks(), answer.aclose
        )

    async def close(self) -> None:
        await self._client.aclose()


class _EventStream:
    """A parser of server-sent events."""

    def __init__(self, last_id: int | None) -> None:
        self.last_id = last_id
        self.retry_s = 2.0
        """Seconds after which to connect again."""
        self._line = bytearray()
        self._kind = ""
        self._data: list[str] = []
        self._id: int | None = None

    def read(self, chunk: bytes) -> Iterator[Event]:
        """The events that end with these bytes of the stream."""
        for byte in chunk:
            if byte != 0x0A:
                self._line.append(byte)
                continue
            text = self._line.decode("utf-8", "replace").rstrip("\r")
            self._line.clear()
            if text:
                self._take(text)
            elif event := self._dispatch():
                yield event

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id" and value.isdigit():
            self._id = int(value)
        elif name == "retry" and value.isdigit():
            self.retry_s = int(value) / 1000

    def _dispatch(self) -> Event | None:
        kind, text, number = self._kind, "\n".join(self._data), self._id
        self._kind, self._data, self._id = "", [], None
        if number is not None:
            self.last_id = number
        if not text:
            return None
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise _not_mflux(f"This is no event of mflux-server: {text[:100]}")
        return Event(number, kind or "message", data)


# -- requests and answers -----------------------------------------------------------------------

PICTURES = ("init_image", "mask", "control_image")
PICTURE_LISTS = ("images", "control_images")


def _body(given: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request, as arguments for requests.

    A form if there are pictures and all of them are files, else JSON: lists of a form put texts
    before files, which would change the order of pictures.
    """
    texts = {name: value for name, value in given.items() if value is not None}
    pictures: dict[str, list[Any]] = {}
    for name in PICTURES:
        if name in texts:
            pictures[name] = [_file(texts.pop(name))]
    for name in PICTURE_LISTS:
        if texts.get(name):
            pictures[name] = [_file(picture) for picture in texts.pop(name)]
    flat = [(name, picture) for name, listed in pictures.items() for picture in listed]
    if flat and all(isinstance(picture, bytes) for _, picture in flat):
        return {"data": _form(texts), "files": [(name, (name, data)) for name, data in flat]}
    for name, listed in pictures.items():
        encoded = [
            base64.b64encode(picture).decode("ascii") if isinstance(picture, bytes) else picture
            for picture in listed
        ]
        texts[name] = encoded if name in PICTURE_LISTS else encoded[0]
    return {"json": texts}


def _form(texts: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        name: [one if isinstance(one, str) else json.dumps(one) for one in _listed(value)]
        for name, value in texts.items()
    }


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _file(picture: Any) -> Any:
    """Returns the bytes of a picture, or its reference on the server."""
    if isinstance(picture, Image):
        return picture.data
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, Mapping):
        return dict(picture)
    if isinstance(picture, str) and picture.startswith("data:"):
        return picture
    if isinstance(picture, (str, os.PathLike)):
        return Path(picture).read_bytes()
    if hasattr(picture, "save") and hasattr(picture, "mode"):
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        buffer = BytesIO()
        picture.save(buffer, format="PNG")
        return buffer.getvalue()
    raise TypeError(
        "a picture is a path, bytes, a Pillow image, an Image of this client or "
        f"{{'task_id': ...}}, not {type(picture).__name__}"
    )


def _built(cls: type[_T], answer: Mapping[str, Any], raw: Mapping[str, Any] | None = None) -> _T:
    """An answer as its dataclass, without the fields that this does not know."""
    build = cast("Any", cls)
    known = {one.name for one in fields(build)} - {"raw"}
    values = {name: value for name, value in answer.items() if name in known}
    try:
        return cast("_T", build(**values, raw=dict(answer if raw is None else raw)))
    except TypeError as error:
        raise _not_mflux(f"The answer is not mflux-server's: {error}") from None


def _list(answer: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = answer.get(name, [])
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _not_mflux(message: str) -> MfluxError:
    return MfluxError("not_mflux", message)


def _refusal(answer: _Answer) -> MfluxError:
    """Returns the error of an answer other than 200, from the server or a proxy."""
    status = answer.status
    try:
        error = answer.json()["error"]
        code, message, at = str(error["code"]), str(error["message"]), error.get("field")
    except (KeyError, TypeError, AttributeError):
        code, message, at = (
            f"http_{status}",
            f"{answer.url} answers {status} {answer.reason}.",
            None,
        )
        if 300 <= status < 400:
            message += f" It leads to {answer.headers.get('Location')}: use that as the URL."
    return MfluxError(
        code,
        message,
        field=at,
        http_status=status,
        retry_after_s=_retry_after_s(answer.headers),
    )


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Retry-After: seconds, or a date, by the clock of the server if it sends its own date."""
    text = headers.get("Retry-After", "")
    if text.strip().isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text).timestamp()
        date = headers.get("Date")
        return max(until - (parsedate_to_datetime(date).timestamp() if date else time.time()), 0.0)
    except (TypeError, ValueError, IndexError):
        return None


def _reason_of(error: BaseException) -> str:
    """Returns the message of the system, which requests wraps several times."""
    if "Timeout" in type(error).__name__:
        return "it takes too long"
    inner: Any = error
    for _ in range(10):
        if isinstance(inner, OSError) and inner.strerror:
            number = inner.errno or 0  # asyncio puts the address into strerror
            text = os.strerror(number) if number > 0 else inner.strerror
            return text[:1].lower() + text[1:]
        wrapped = next((one for one in inner.args if isinstance(one, BaseException)), None)
        inner = getattr(inner, "reason", None) or wrapped or inner.__cause__ or inner.__context__
        if not isinstance(inner, BaseException):
            break
    return "the connection broke"


# -- the command --------------------------------------------------------------------------------

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that change a terminal, and those that cannot be written."""


def harmless(text: str) -> str:
    """A text of the server or of other people without what changes a terminal."""
    return CONTROLS.sub("\ufffd", text)


def say(text: object, stream: TextIO | None = None) -> None:
    """Print a line on a terminal; None: on stdout."""
    print(harmless(str(text)), file=stream, flush=True)


def free_name(path: Path) -> Path:
    """This name, or with the first number that makes it a new one; an empty file has it now."""
    for number in count():
        name = path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            name.touch(exist_ok=False)
        except FileExistsError:
            continue
        return name
    raise AssertionError


def main(arguments: list[str] | None = None) -> int:
    """The command of this one file; the folder client/ of the repository has one with more."""
    parser = argparse.ArgumentParser(description="Draws a picture with an mflux-server.")
    parser.add_argument("prompt", help="what the picture shows; - reads it from the input")
    parser.add_argument(
        "fields", nargs="*", metavar="NAME=VALUE", help="as in steps=4 or init_image=photo.jpg"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: named by its id"
    )
    parser.add_argument("--url", help=f"of the server; else MFLUX_SERVER_URL, or {DEFAULT_URL}")
    parser.add_argument("--key", default=os.environ.get("MFLUX_SERVER_KEY"), help="of this client")
    options = parser.parse_intermixed_args(arguments)
    fields: dict[str, Any] = {}
    for text in options.fields:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(f"{text!r} must be NAME=VALUE")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    if options.output:
        ending = options.output.suffix.lower().lstrip(".")
        fields.setdefault("format", {"jpg": "JPEG"}.get(ending, ending.upper()))
    try:
        with Client(options.url, key=options.key) as client:
            prompt = sys.stdin.read().strip() if options.prompt == "-" else options.prompt
            task = client.submit(prompt, **fields)
            say(f"task {task.task_id}: {task.expected_time_seconds:.0f} s", sys.stderr)
            for image in client.images_as_stored(task.task_id):
                name = options.output or Path(image.file_name)
                say(image.save(free_name(name)))
            status = client.status(task.task_id)
    except (MfluxError, OSError, ModuleNotFoundError) as error:
        say(error, sys.stderr)
        return 1
    seconds = (status.ended_at or 0.0) - (status.created_at or 0.0)
    why = (status.error or {}).get("message", "")
    say(f"{status.status}, seed {status.params.get('seed')}, {seconds:.1f} s {why}", sys.stderr)
    return 0 if status.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
