"""Which models are in memory together: real mflux, real sizes, what clients are answered."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, forecast_of, params_for, until
from flask.testing import FlaskClient

from allowed import Allowed
from api.client_queue import own_queue_of
from api.generate_request import Limits
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from application import create_app
from errors import ModelLoadError
from generation.previews import Previews
from generator import MfluxGenerator
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import Task, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

TWO = allow("noise-flux1", "noise-flux2")
CRAMPED, USUAL = 1e-9, 0.75
"""Shares of the memory that the weights of several models may fill."""


def fail_to_load(error: ModelLoadError) -> None:
    pytest.fail(str(error))


class Noting(MfluxGenerator):
    """Notes what it loads."""

    def __init__(self, data_dir: Path, *, models_in_memory: int) -> None:
        super().__init__(data_dir, models_in_memory=models_in_memory)
        self.loads: list[str] = []

    def load(self, weights: LoadSpec, report: object = None) -> int | None:
        self.loads.append(weights.key)
        return super().load(weights)

    @property
    def in_memory(self) -> list[str]:
        return list(self.resident)


class Studio:
    """Queue, worker, mflux and the application, in this process. The test moves the worker."""

    def __init__(self, folder: Path, allowed: Allowed) -> None:
        prepare_mlx()
        self.store = TaskStore(folder / "data")
        self.queue = PlayedQueue(
            allowed, TimingModel(), self.store, QueueLimits(models_in_memory=2)
        )
        self.generator = Noting(folder, models_in_memory=2)
        self.loads = self.generator.loads
        self.worker = Worker(self.queue.worker, self.generator, fail_to_load)
        own_queue, places = own_queue_of(self.queue), WaitingPlaces(8)
        app = create_app(
            self.queue,
            self.worker,
            self.generator,
            Submission(own_queue, allowed, Limits(), self.generator.refusal, places=places),
            places=places,
            previews=Previews(on=False),
            data_dir=folder,
            max_body_bytes=1_000_000,
        )
        self.http: FlaskClient = app.test_client()

    def submit(self, model: str) -> Task:
        return self.queue.submit(params_for(model=model))[0]

    def draw(self, model: str) -> None:
        task_id = self.submit(model).task_id
        assert self.worker.run_once(0)
        until(lambda: self.queue.status(task_id).status is TaskStatus.DONE)

    def answered(self) -> set[str]:
        """The models that GET /models says are loaded."""
        models: list[dict[str, Any]] = self.http.get("/models").get_json()["models"]
        return {model["name"] for model in models if model["loaded"]}

    def close(self) -> None:
        self.worker.stop(GIVE_UP_S)
        self.generator.unload()
        self.store.close()


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    one = Studio(tmp_path, TWO)
    yield one
    one.close()


def test_after_one_eviction_two_models_stay_and_no_switch_is_forecast_with_a_load(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generator.SHARE_FOR_WEIGHTS", CRAMPED)
    assert studio.worker.load()
    studio.draw("noise-flux2")
    assert studio.generator.in_memory == ["noise-flux2"], "the other one had to make room"
    assert studio.answered() == {"noise-flux2"}
    monkeypatch.setattr("generator.SHARE_FOR_WEIGHTS", USUAL)
    studio.draw("noise-flux1")
    assert studio.generator.in_memory == ["noise-flux1", "noise-flux2"]
    assert studio.answered() == {"noise-flux1", "noise-flux2"}
    assert studio.loads == ["noise-flux1", "noise-flux2", "noise-flux1"]
    waiting = [studio.submit(model) for model in ("noise-flux2", "noise-flux1") * 3]
    switches = [forecast_of(studio.queue.status(task.task_id)).switches for task in waiting]
    assert switches == [0] * 6
    for _ in waiting:
        assert studio.worker.run_once(0)
    until(lambda: all(studio.queue.status(t.task_id).status is TaskStatus.DONE for t in waiting))
    assert studio.loads == ["noise-flux1", "noise-flux2", "noise-flux1"], "and none came"


def test_the_next_start_knows_what_each_model_takes(studio: Studio, tmp_path: Path) -> None:
    """A download of 31 GB that takes 9 GB when it is loaded stays beside another model."""
    assert studio.worker.load()
    studio.draw("noise-flux2")
    measured = dict(studio.generator.memory.loaded_bytes)
    assert measured.keys() == {"noise-flux1", "noise-flux2"}
    assert studio.store.state.loaded_bytes() == measured
    studio.store.close()
    studio.store = TaskStore(tmp_path / "data")
    large = [replace(model, weights_gb=31.0) for model in TWO.models]
    queue = PlayedQueue(
        replace(TWO, default=large[0], models=tuple(large)),
        TimingModel(),
        studio.store,
        QueueLimits(models_in_memory=2),
    )
    sizes = queue.scheduler.machine.resident.sizes
    specs = [LoadSpec(model, model.pipelines[0], None) for model in large]
    assert [sizes.of(spec) for spec in specs] == [measured[spec.key] for spec in specs]
    other = LoadSpec(large[0], large[0].pipelines[0], 8)
    assert sizes.of(other) > 1e9, "it was never loaded: its download counts"


def test_weights_that_are_stored_quantized_are_not_scaled_once_more() -> None:
    model = replace(TWO.default, weights_gb=9.0)
    stored = replace(model, stored_bits=4)
    assert LoadSpec(model, model.pipelines[0], 4).expected_bytes == 9e9 * 4.5 / 16
    assert LoadSpec(stored, stored.pipelines[0], 4).expected_bytes == 9e9
