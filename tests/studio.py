"""A queue and its worker with a clock and a generator of the test."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, params_for
from fake_generator import FakeGenerator
from memory_stores import memory_store
from PIL import Image

from allowed import Allowed
from errors import ModelLoadError
from models.helpers import HELPERS
from models.model_catalog import LoadSpec
from scheduler.limits import QueueLimits
from supervision import SupervisedQueue
from task import Drawn, InputImage, Phase, Report, Stage, Task
from timing_model import TimingModel
from workers.worker import Worker

OFFER = allow("noise-flux1", "noise-flux2", "noise-qwen", "noise-seedvr2")
MAKING = tuple(HELPERS.values())


class Clock:
    """Time passes when the generator works, and not else."""

    at = 1000.0

    def __call__(self) -> float:
        return self.at


class Gpu(FakeGenerator):
    """Loads and draws by the clock, and notes what it did."""

    LOAD_S, STEP_S, HELPER_S = 7.0, 1.0, 20.0

    def __init__(self, clock: Clock, models_in_memory: int) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.drawn: list[tuple[str, str, int]] = []
        self.broken: set[str] = set()
        self.bytes_of: dict[str, int] = {}
        self.prepared: list[tuple[str, str]] = []
        self._encoded: set[tuple[str, str]] = set()
        self.on_step: Callable[[Stage, int], None] = lambda stage, step: None
        self._clock = clock
        self._models_in_memory = models_in_memory

    def load(self, weights: LoadSpec, report: object = None) -> int | None:
        kept = list(self.resident[: self._models_in_memory - 1])
        while self.memory.room_bytes and kept and self._bytes(weights.key, *kept) > 10:
            kept.pop()
        self.resident = tuple(kept)
        loaded = {key: self._bytes(key) for key in (*self.memory.loaded_bytes, weights.key)}
        self.memory = replace(self.memory, loaded_bytes=loaded)
        self._clock.at += self.LOAD_S
        self.loads.append(weights.key)
        if weights.model.name in self.broken:
            raise ModelLoadError(f"There are no weights of {weights.model.name}.")
        self.resident = (weights.key, *self.resident)
        return None

    def _bytes(self, *keys: str) -> int:
        return sum(self.bytes_of.get(key, 0) for key in keys)

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        key, steps = stage.load_spec.key, stage.params.steps
        assert key in self.resident
        self.resident = (key, *(other for other in self.resident if other != key))
        if stage.load_spec.model.upscaler:
            assert (inputs / f"{_init_image(stage).file}.png").is_file()
        if stage.load_spec.model.upscaler or (key, stage.params.prompt) not in self._encoded:
            self._clock.at += 0.5
        self._encoded.add((key, stage.params.prompt))
        report(Phase.DENOISING, 0, steps)
        for step in range(1, steps + 1):
            self._clock.at += self.STEP_S
            self.on_step(stage, step)
            report(Phase.DENOISING, step, steps)
        report(Phase.DECODING, steps, steps)
        self._clock.at += 0.5
        self.drawn.append((key, stage.params.prompt, stage.params.seed))
        return Drawn(Image.new("RGB", stage.params.final_size), {"seed": stage.params.seed})

    def prepare(self, stage: Stage, inputs: Path, report: Report) -> str | Image.Image:
        report(Phase.DENOISING, 0, 1)
        self._clock.at += self.HELPER_S
        report(Phase.DENOISING, 1, 1)
        report(Phase.DECODING, 1, 1)
        self.prepared.append((stage.load_spec.key, stage.params.prompt))
        if stage.load_spec.model.makes == "prompt":
            return '{"short_description": "written"}'
        return Image.new("RGB", (32, 32), "white")


def _init_image(stage: Stage) -> InputImage:
    assert stage.params.init_image
    return stage.params.init_image


class AtOnce(SupervisedQueue[Any]):
    """Encodes an image where it was drawn, while the clock stands still."""

    def put(self, item: Any) -> None:
        self._handle(item)


class Studio:
    """A queue and its worker, whose thread is the test's own."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        allowed: Allowed = OFFER,
        *,
        in_memory: int = 1,
        max_delay_s: float = 0.0,
        unload_after_s: float = 0.0,
    ) -> None:
        self.clock = Clock()
        self.submitted = 0
        self.gpu = Gpu(self.clock, in_memory)
        rules = QueueLimits(models_in_memory=in_memory, max_delay_s=max_delay_s)
        self.queue = PlayedQueue(
            allowed, TimingModel(), memory_store(), rules, monotonic=self.clock, now=self.clock
        )
        monkeypatch.setattr("workers.worker.time.monotonic", self.clock)
        self.failures: list[ModelLoadError] = []
        self.worker = Worker(
            self.queue.worker, self.gpu, self.failures.append, unload_after_s=unload_after_s
        )
        encoder = self.worker._encoder
        encoder._pictures = AtOnce("encoder", encoder.encode, lambda item: None)

    def submit(self, model: str, prompt: str = "", *, priority: int = 0, **fields: Any) -> Task:
        self.submitted += 1
        params = params_for(prompt or str(self.submitted), model=model, **fields)
        return self.queue.submit(params, priority=priority)[0]

    def run_one(self) -> bool:
        """One task or load; whether there was one."""
        return self.worker.run_once(0)

    def run_all(self) -> None:
        while self.run_one():
            pass

    def status(self, task_id: str) -> Task:
        return self.queue.status(task_id)

    @property
    def order(self) -> list[str]:
        return [prompt for _, prompt, _ in self.gpu.drawn]


StudioOf = Callable[..., Studio]


@pytest.fixture
def studio_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[StudioOf]:
    """Starts studios that offer OFFER, or these models with all helpers, which are downloaded."""
    started: list[Studio] = []

    def start(*names: str, **options: Any) -> Studio:
        allowed = allow(*names, helpers=MAKING) if names else OFFER
        if names:
            monkeypatch.setattr("workers.worker.is_present", lambda model: True)
        started.append(Studio(monkeypatch, allowed, **options))
        started[-1].worker.load()
        return started[-1]

    yield start
    for studio in started:
        studio.worker.stop(0)
