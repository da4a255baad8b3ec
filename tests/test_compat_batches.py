"""Several images in one call of a foreign API: each is there once it is stored, and stopping keeps
those that are."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from batch_calls import draw_image, stop_after, until_stored
from conftest import GIVE_UP_S
from live import SteppedServer
from PIL import Image

from compat import streams

OPENAI = {"prompt": "x", "size": "64x64", "steps": 1, "n": 3, "seed": 7}
A1111 = {"prompt": "x", "width": 64, "height": 64, "steps": 1, "seed": 7, "batch_size": 3}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    """Its streams begin with a sign of life after one quiet second."""
    monkeypatch.setattr(streams, "SIGN_OF_LIFE_AFTER", 1)
    server = SteppedServer(tmp_path, sync_max_wait_s=0)
    yield server
    server.close()


class Stream:
    """The events of POST /v1/images/generations with `stream`."""

    def __init__(self, server: SteppedServer, **fields: Any) -> None:
        self._answer = requests.post(
            server.url + "/v1/images/generations",
            json={**OPENAI, "stream": True, **fields},
            stream=True,
            timeout=GIVE_UP_S,
        )
        self._lines = self._answer.iter_lines(chunk_size=1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._lines:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def running(server: SteppedServer) -> str:
    """The task that runs, once one does."""
    while True:
        for task in server.get("/queue").json()["tasks"]:
            if task["status"] == "running":
                return str(task["task_id"])


def test_a_stream_sends_each_image_when_it_is_stored(server: SteppedServer) -> None:
    stream = Stream(server)
    events, task_id = iter(stream), running(server)
    seeds = []
    for number in range(3):
        assert server.status(task_id)["images_done"] == number
        draw_image(server)
        event = next(events)
        assert event["type"] == "image_generation.completed"
        seeds.append(event["seed"])
    assert seeds == ["7", "8", "9"]
    assert list(events) == []


def test_a_stream_of_a_task_that_is_stopped_ends_with_the_images_that_are_stored(
    server: SteppedServer,
) -> None:
    events = iter(Stream(server))
    task_id = running(server)
    draw_image(server)
    assert next(events)["seed"] == "7"
    stop_after(server, task_id)
    draw_image(server)
    assert [event.get("seed") for event in events] == ["8"]


def test_a_stream_of_a_task_without_an_image_ends_with_an_error(server: SteppedServer) -> None:
    events, task_id = iter(Stream(server)), running(server)
    requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)
    [answer] = events
    assert answer["error"]["code"] == "gone"


@pytest.mark.parametrize("stored", [0, 2])
def test_an_interrupted_call_answers_the_stored_images_and_their_infotexts(
    server: SteppedServer, stored: int
) -> None:
    session = requests.Session()

    def post(path: str, **body: Any) -> requests.Response:
        return session.post(server.url + path, json=body, timeout=GIVE_UP_S)

    with ThreadPoolExecutor(1) as other:
        drawn: Future[requests.Response] = other.submit(post, "/sdapi/v1/txt2img", **A1111)
        task_id = running(server)
        for _ in range(stored):
            draw_image(server)
        until_stored(server, task_id, stored)
        assert session.post(server.url + "/sdapi/v1/interrupt", timeout=GIVE_UP_S).json() == {}
        answer = drawn.result(GIVE_UP_S).json()
    texts = json.loads(answer["info"])["infotexts"]
    assert len(answer["images"]) == len(texts) == stored
    for seed, image, text in zip(range(7, 9), answer["images"], texts, strict=False):
        assert f"Seed: {seed}, " in text
        with Image.open(BytesIO(base64.b64decode(image))) as picture:
            assert picture.text["parameters"] == text  # type: ignore[attr-defined]
