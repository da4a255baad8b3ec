"""The speed of the machine is measured once, and the first forecasts use it."""

import threading
from pathlib import Path

import pytest
from conftest import FakeGenerator, PlayedQueue, StartServer, allow, forecast_of, params_for

from generation import machine_speed
from models.model_catalog import LoadSpec
from storage.task_store import TaskStore
from timing_model import Confidence, TimingModel, Work
from workers.worker import Worker

PUBLISHED = {
    "M2 Ultra": (27.2, 15),
    "M4 Max": (18.4, 19),
    "M3 Max": (14.2, 20),
    "M2 Max": (13.6, 25),
    "M4 Pro": (9.2, 34),
    "M2 Pro": (6.8, 54),
    "M1 Max": (10.4, 55),
}
"""Peak TFLOP/s of the GPU in float32, and seconds of FLUX.1 schnell with 2 steps at 1024 x 1024,
loading included, from mflux's README (release 0.10, "Image generation speed")."""
OF_PEAK = 0.8


@pytest.mark.parametrize("mac", PUBLISHED)
def test_the_first_forecast_is_within_a_factor_of_two_of_what_mflux_publishes(mac: str) -> None:
    peak, seconds = PUBLISHED[mac]
    timing = TimingModel()
    timing.calibrate(OF_PEAK * peak * 1e12)
    forecast = timing.durations(Work("schnell", 12.0, 4096, 2, "PNG", prompt_tokens=16))
    assert seconds / 2 < forecast.total_s < seconds * 2
    assert forecast.confidence is Confidence.NONE


def test_products_of_matrices_are_measured_within_the_possible() -> None:
    assert 1e7 < machine_speed.measure() < 1e15


class Loads(FakeGenerator):
    """Sets an event when it has loaded."""

    def __init__(self, loaded: threading.Event) -> None:
        super().__init__()
        self._loaded = loaded

    def load(self, weights: LoadSpec, report: object = None) -> int | None:
        self._loaded.set()
        return super().load(weights)


def test_the_worker_measures_before_it_loads_and_the_next_start_knows_it(tmp_path: Path) -> None:
    measured: list[float] = []

    def measure() -> float:
        measured.append(3e12)
        return 3e12

    for _ in range(2):
        store, timing, loaded = TaskStore(tmp_path), TimingModel(), threading.Event()
        queue = PlayedQueue(allow("tiny"), timing, store)
        worker = Worker(
            queue.worker,
            Loads(loaded),
            lambda error: pytest.fail(str(error)),
            before_loading=lambda: queue.worker.calibrate(measure),  # noqa: B023
        )
        worker.start()
        assert loaded.wait(60)
        assert timing.flop_per_s == 3e12
        assert worker.stop(60)
        store.close()
    assert measured == [3e12]


def test_a_new_speed_changes_the_forecast_of_tasks_that_wait() -> None:
    queue = PlayedQueue(allow("tiny"), TimingModel(), TaskStore(None))
    task, _ = queue.submit(params_for(width=1024, height=1024), priority=0)
    before = forecast_of(queue.status(task.task_id)).end_s
    queue.worker.calibrate(lambda: 1e6)
    assert forecast_of(queue.status(task.task_id)).end_s > 10 * before


def test_a_server_measures_its_machine_and_keeps_the_result(
    tmp_path: Path, start_server: StartServer
) -> None:
    server = start_server("--model", "tiny")
    server.wait_until_ended(server.submit()["task_id"])
    server.stop()
    store = TaskStore(tmp_path / "server")
    assert (store.timings.speed() or 0.0) > 1e7
    store.close()
