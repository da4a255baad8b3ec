"""An application in this process that draws at once, for clients of foreign APIs.

Its generator draws plain pictures and has a preview of each step; all else is real.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from conftest import PlayedQueue, allow
from fake_generator import FakeGenerator
from PIL import Image

from api.client_queue import own_queue_of
from api.generate_request import Limits
from api.identity import Identity
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from application import create_app
from generation.previews import Previews
from key_file import KeyFile
from storage.task_store import TaskStore
from task import GenerationParams, Memory, Phase, Report
from timing_model import TimingModel
from workers.worker import Worker

STEP_COLOURS = ("red", "green", "blue", "white")
"""Of the previews, by step."""


class PlainGenerator(FakeGenerator):
    def __init__(self) -> None:
        super().__init__(self._plain)
        self.failure = ""
        """If it is set, pictures fail with it."""
        self.memory = Memory(total_bytes=1000, active_bytes=600)
        self.preview: bytes | None = None

    def _plain(self, params: GenerationParams, report: Report) -> Image.Image:
        if self.failure:
            raise RuntimeError(self.failure)
        for step in range(params.steps):
            self.preview = png("RGB", STEP_COLOURS[step % len(STEP_COLOURS)])
            report(Phase.DENOISING, step, params.steps)
        return Image.new("RGB", (params.width, params.height), (params.seed % 256, 0, 0))


class _LatestOf(Previews):
    def __init__(self, generator: PlainGenerator) -> None:
        super().__init__(on=False)
        self._generator = generator

    def look(self, task_id: str) -> bytes | None:
        return self._generator.preview


class DrawingApp:
    """
    Args:
        folder: for its data.
        keys: name and key of each client; none: everyone is trusted.
    """

    def __init__(self, folder: Path, *models: str, keys: dict[str, str] | None = None) -> None:
        self.generator = PlainGenerator()
        self.store = TaskStore(folder / "data")
        allowed = allow(*models)
        self.queue = PlayedQueue(allowed, TimingModel(), self.store)
        own_queue, places = own_queue_of(self.queue), WaitingPlaces(8)
        self.worker = Worker(self.queue.worker, self.generator, lambda error: None)
        submission = Submission(own_queue, allowed, Limits(), self.generator.refusal, places=places)
        self.app = create_app(
            self.queue,
            self.worker,
            self.generator,
            submission,
            places=places,
            previews=_LatestOf(self.generator),
            data_dir=folder,
            max_body_bytes=1_000_000,
            identity=_identity(folder, keys) if keys else None,
        )
        self.http = self.app.test_client()

    def params(self, task_id: str) -> dict[str, Any]:
        """The params of a task."""
        answer = self.http.get("/status", query_string={"task_id": task_id})
        params: dict[str, Any] = answer.get_json()["params"]
        return params

    def transport(self) -> httpx.Client:
        """A client whose requests this application answers, for packages that take one."""
        return httpx.Client(transport=httpx.WSGITransport(app=self.app))


@contextmanager
def drawing_app(folder: Path, *models: str, **options: Any) -> Iterator[DrawingApp]:
    app = DrawingApp(folder, *models, **options)
    app.worker.start()
    try:
        yield app
    finally:
        app.worker.stop(10, 0)
        app.store.close()


def _identity(folder: Path, keys: dict[str, str]) -> Identity:
    path = folder / "keys.toml"
    path.write_text("".join(f'[{name}]\nkey = "{key}"\n' for name, key in keys.items()))
    return Identity(KeyFile(path), trusted=True, secret=b"s")


def png(mode: str = "RGB", colour: Any = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def shown(text: str | None) -> Image.Image:
    """The picture in base64 or in a data URL."""
    assert text
    return Image.open(BytesIO(base64.b64decode(text.rpartition(",")[2], validate=True)))
