"""A queue with its thread of downloads. The downloads are real processes that fill a real cache
folder, and wait there until the test lets them end."""

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for
from fake_generator import FakeGenerator
from huggingface_hub import constants
from mflux.models.common.resolution.model_revisions import ModelRevisions
from PIL import Image

from models.hub_cache import needs_download, partial_files
from models.model_catalog import LoadSpec, Model
from models.repositories import loaded_patterns
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import GenerationParams, Phase, Report, Task
from timing_model import TimingModel
from workers import downloader
from workers.downloader import Downloader
from workers.worker import Worker

OFFER = allow("noise-flux1", "schnell", "dev", "noise-flux2", "seedvr2-3b")

DOWNLOAD = """
import os, sys, time
from pathlib import Path

repository, revision, gate = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
blob = repository / "blobs" / f"abc.{os.getpid()}.incomplete"
blob.parent.mkdir(parents=True, exist_ok=True)
blob.write_bytes(bytes(1000))
while not gate.exists():
    time.sleep(0.01)
if error := gate.read_text():
    print("Some warning.\\nserver.py: " + error, file=sys.stderr)
    sys.exit(1)
weights = [repository / "snapshots" / revision / name for name in sys.argv[4:]]
for path in weights[1:]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
weights[0].parent.mkdir(parents=True, exist_ok=True)
blob.rename(weights[0])
"""


def model(name: str) -> Model:
    return OFFER.model(name)


class Desk:
    """A queue with its worker, driven by the test, and its thread of downloads."""

    def __init__(self, folder: Path, cache: Path, **rules: Any) -> None:
        self.folder, self.cache = folder, cache
        self.at = 1000.0
        self.order: list[str] = []
        self.store = TaskStore(folder / "data")
        self.queue = PlayedQueue(
            OFFER,
            TimingModel(),
            self.store,
            QueueLimits(**rules),
            needs_download=partial(needs_download, folder / "data"),
            monotonic=lambda: self.at,
            now=lambda: self.at,
        )
        self.worker = Worker(self.queue.worker, FakeGenerator(self._draw), lambda error: None)
        self.downloader = Downloader(self.queue.downloads, self._command)
        self.worker.load()

    def submit(self, name: str, *, priority: int = 0, **changes: Any) -> Task:
        return self.queue.submit(params_for(model=name, **changes), priority=priority)[0]

    def run_all(self) -> list[str]:
        """The models of the tasks that ran, in this order."""
        self.order = []
        while self.worker.run_once(0):
            pass
        self._wait_until(lambda: self.queue.health().running == 0)  # the encoder is through
        return self.order

    def gate(self, name: str, error: str = "") -> None:
        """Let the download of a model end."""
        self._gate_of(name).write_text(error)

    def wait_until_held(self, number: int) -> None:
        """So many tasks wait for a download."""
        self._wait_until(
            lambda: (
                sum(view.waits_for_download for view in self.queue.unfinished(100, 0)[0]) == number
            )
        )

    def wait_for_bytes(self, name: str, number: int) -> None:
        """The download of a model has come so far."""

        def there() -> bool:
            answer = self.queue.health().download
            return bool(answer and (answer.spec.model.name, answer.bytes_done) == (name, number))

        self._wait_until(there)

    def close(self) -> None:
        self.queue.scheduler.stop()
        assert self.downloader.stop(GIVE_UP_S)
        self.worker.stop(1)
        self.store.close()

    def _wait_until(self, there: Callable[[], bool]) -> None:
        pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
        while not there():
            assert time.monotonic() < deadline, self.queue.health()
            pause.wait(0.01)

    def partial_files(self, name: str) -> list[str]:
        return [path.name for path in partial_files(model(name))]

    def _draw(self, params: GenerationParams, report: Report) -> Image.Image:
        self.order.append(params.model)
        report(Phase.DENOISING, 0, params.steps)
        return Image.new("RGB", params.final_size)

    def _command(self, weights: LoadSpec) -> list[str]:
        name = weights.model.name
        repository = weights.model.repositories[0]
        folder = self.cache / f"models--{repository.replace('/', '--')}"
        revision, gate = str(ModelRevisions.get(repository)), str(self._gate_of(name))
        patterns = loaded_patterns(weights.model, repository)
        files = [pattern.replace("*", "model") for pattern in patterns]
        return [sys.executable, "-c", DOWNLOAD, str(folder), revision, gate, *files]

    def _gate_of(self, name: str) -> Path:
        return self.folder / f"{name}.gate"


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the folder the cache of the hub; downloads report often."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(downloader, "PROGRESS_EVERY_S", 0.01)
    return folder
