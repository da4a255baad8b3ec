"""Requests that are submitted without a server."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, seen_by_all
from memory_stores import memory_store
from PIL import Image

from api.generate_request import Limits, parse_request
from api.submission import Prepared, Submission
from api.waiting_places import WaitingPlaces
from api.wildcards import Wildcards
from decoding.decoder import PictureDecoder
from errors import InvalidInput, ServerError
from images import to_base64, to_png
from task import GenerationParams
from timing_model import TimingModel

DECODER = PictureDecoder()
SCHNELL, DEV = allow("schnell", "dev").models


def picture_of(width: int = 64, height: int = 64, colour: str = "navy") -> bytes:
    return to_png(Image.new("RGB", (width, height), colour))


PICTURE = to_base64(picture_of())


class Desk:
    """What a server would say to a request, without the server."""

    def __init__(
        self,
        *names: str,
        limits: Limits | None = None,
        wildcards: Path | None = None,
        expands: bool = False,
        **options: Any,
    ) -> None:
        self.limits = limits or Limits()
        self.allowed = allow(*names, **options)
        self.queue = PlayedQueue(self.allowed, TimingModel(), memory_store())
        self.present = set(names)
        """Models whose weights are on disk."""
        self._desk = Submission(
            seen_by_all(self.queue),
            self.allowed,
            self.limits,
            lambda params: None,
            places=WaitingPlaces(1),
            decoder=DECODER,
            wildcards=Wildcards(wildcards),
            expands=expands,
            is_present=lambda model: model.name in self.present,
        )

    def prepare(self, **fields: Any) -> Prepared:
        body = json.dumps({"prompt": "x", **fields}).encode()
        return self._desk.prepare(parse_request(body, self.limits))

    def params(self, **fields: Any) -> GenerationParams:
        return self.prepare(**fields).params

    def refusal(self, **fields: Any) -> tuple[str, str | None, str]:
        with pytest.raises(ServerError) as caught:
            self.prepare(**fields)
        error = caught.value
        assert error.http_status in (400, 422)
        assert (error.http_status == 400) is isinstance(error, InvalidInput)
        return error.code, error.field, error.message

    def refusal_of_task(self, task_id: str, index: int) -> tuple[int, str, str | None]:
        with pytest.raises(ServerError) as caught:
            self.prepare(init_image={"task_id": task_id, "index": index})
        return caught.value.http_status, caught.value.code, caught.value.field

    def submit(self, **fields: Any) -> str:
        prepared = self.prepare(**fields)
        return self.queue.submit(prepared.params, priority=0, inputs=prepared.inputs)[0].task_id

    def finish(self, task_id: str, *images: bytes) -> None:
        assert self.queue.claim(0)
        assert self.queue.finish(task_id, images)
