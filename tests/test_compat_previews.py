"""Pictures on the way, with a generator that keeps its latest one."""

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from conftest import GIVE_UP_S, ROOT, PlayedQueue, allow, seen_by_all
from fake_generator import FakeGenerator
from flask.testing import FlaskClient
from memory_stores import memory_store
from PIL import Image

from api.generate_request import Limits
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from application import create_app
from compat.mcp_messages import INTERNAL_ERROR
from errors import ServerError
from generation.previews import Previews
from task import GenerationParams, Phase, Report, Stage
from timing_model import TimingModel
from workers.worker import Worker


class PreviewGenerator(FakeGenerator):
    """Makes each of its four steps when the test allows it."""

    def __init__(self) -> None:
        super().__init__(self._steps)
        self.go_on = [Event() for _ in range(5)]
        self.latest: bytes | None = None

    def why_not(self, stage: Stage) -> ServerError | None:
        return self.refusal(stage)

    def preview(self, task_id: str) -> bytes | None:
        return self.latest

    def _steps(self, params: GenerationParams, report: Report) -> Image.Image:
        for step in range(4):
            self.latest = b"step %d" % step if step else None
            report(Phase.DENOISING, step, 4)
            assert self.go_on[step].wait(GIVE_UP_S)
        return Image.new("RGB", (16, 16))


class LatestOf(Previews):
    """Shows what the generator above has."""

    def __init__(self, generator: PreviewGenerator) -> None:
        super().__init__(on=False)
        self._generator = generator

    def look(self, task_id: str) -> bytes | None:
        return self._generator.preview(task_id)


@pytest.fixture
def generator() -> PreviewGenerator:
    return PreviewGenerator()


@pytest.fixture
def client(generator: PreviewGenerator) -> Iterator[FlaskClient]:
    allowed = allow("noise-flux1")
    queue = PlayedQueue(allowed, TimingModel(), memory_store())
    worker = Worker(queue.worker, generator, lambda error: None)
    app = create_app(
        queue,
        worker,
        generator,
        Submission(
            seen_by_all(queue), allowed, Limits(), generator.why_not, places=WaitingPlaces(10)
        ),
        places=WaitingPlaces(10),
        previews=LatestOf(generator),
        data_dir=ROOT,
        max_body_bytes=1_000_000,
    )
    worker.start()
    yield app.test_client()
    worker.stop(10, 0)


IMAGES, RESPONSES = "/v1/images/generations", "/v1/responses"
CALLED = {IMAGES: "image_generation", RESPONSES: "image_generation_call"}
SentEvent = tuple[str, dict[str, Any]]


def events_of(
    client: FlaskClient, path: str, partial_images: int, after: Callable[[SentEvent], None]
) -> list[str]:
    """Kinds of the events of a stream that are about its picture; `after` sees each before the next
    one is read."""
    how = {"size": "16x16", "partial_images": partial_images}
    tool = {"type": "image_generation", **how}
    body = {"input": "x", "tools": [tool]} if path == RESPONSES else {"prompt": "x", **how}
    answer = client.post(path, json={**body, "stream": True}, buffered=False)
    kinds = []
    for event in (one for text in answer.iter_encoded() for one in text.decode().split("\n\n")):
        if event and not event.startswith(":"):
            first, second = event.split("\n")
            kind = first.removeprefix("event: ").removeprefix("response.")
            if path == IMAGES or kind in (
                f"{CALLED[path]}.partial_image",
                f"{CALLED[path]}.completed",
            ):
                kinds.append(kind)
            after((kind, json.loads(second.removeprefix("data: "))))
    answer.close()
    return kinds


@pytest.mark.parametrize("path", [IMAGES, RESPONSES])
def test_partial_images_come_one_by_one_and_never_more_than_asked_for(
    client: FlaskClient, generator: PreviewGenerator, path: str
) -> None:
    pictures: list[bytes] = []

    def after(answer: SentEvent) -> None:
        kind, data = answer
        if kind.endswith(".partial_image"):
            assert data["partial_image_index"] == len(pictures)
            text = data["partial_image_b64" if path == RESPONSES else "b64_json"]
            pictures.append(base64.b64decode(text))
            generator.go_on[len(pictures) + 1].set()

    for event in generator.go_on[:2]:
        event.set()
    kinds = events_of(client, path, 2, after)
    assert kinds == [f"{CALLED[path]}.partial_image"] * 2 + [f"{CALLED[path]}.completed"]
    assert pictures == [b"step 2", b"step 3"]


@pytest.mark.parametrize("path", [IMAGES, RESPONSES])
def test_without_partial_images_there_is_only_the_end(
    client: FlaskClient, generator: PreviewGenerator, path: str
) -> None:
    for event in generator.go_on:
        event.set()
    assert events_of(client, path, 0, lambda answer: None) == [f"{CALLED[path]}.completed"]


def test_progress_shows_the_picture_so_far_when_asked(
    client: FlaskClient, generator: PreviewGenerator
) -> None:
    url, body = "/sdapi/v1/progress", {"prompt": "x", "width": 16, "height": 16}
    for event in generator.go_on[:2]:
        event.set()
    with ThreadPoolExecutor(1) as other:
        drawn = other.submit(client.application.test_client().post, "/sdapi/v1/txt2img", json=body)
        shown = None
        while shown is None or base64.b64decode(shown) != b"step 2":
            assert not drawn.done()
            shown = client.get(url).get_json()["current_image"]
        answer = client.get(url, query_string={"skip_current_image": "true"}).get_json()
        assert answer["current_image"] is None
        assert 0 < answer["progress"] < 1
        for event in generator.go_on:
            event.set()
        assert drawn.result().status_code == 200
    assert client.get(url).get_json()["progress"] == 0


MESSAGES = [{"role": "user", "content": "x"}]
CALL = {"name": "generate_image", "arguments": {"prompt": "x"}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (IMAGES, {"prompt": "x"}),
        (RESPONSES, {"input": "x", "tools": [{"type": "image_generation"}], "stream": True}),
        ("/v1/chat/completions", {"modalities": ["image"], "messages": MESSAGES}),
        ("/sdapi/v1/txt2img", {"prompt": "x"}),
        ("/api/generate", {"model": "noise-flux1", "prompt": "x", "stream": True}),
        ("/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": CALL}),
    ],
)
def test_an_unexpected_error_is_a_500_in_the_form_of_the_api_and_not_retried(
    client: FlaskClient, generator: PreviewGenerator, path: str, body: dict[str, Any]
) -> None:
    def refusal(stage: Stage, *, memory: bool = True) -> ServerError | None:
        raise RuntimeError("nobody expected this")

    generator.refusal = refusal  # type: ignore[method-assign]
    answer = client.post(path, json=body)
    assert answer.status_code == 500
    said = answer.get_json()["error"]
    assert "nobody expected" not in answer.text
    if path.startswith("/v1"):
        assert said["code"] == "internal_error"
        assert answer.headers["x-should-retry"] == "false"
    elif path == "/mcp":
        assert said["code"] == INTERNAL_ERROR
    elif path == "/api/generate":
        assert "error of its own" in said
    else:
        assert said == "internal_error"
