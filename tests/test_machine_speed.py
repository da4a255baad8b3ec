"""The speed of the machine is measured once, and the first forecasts use it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import GIVE_UP_S, PlayedQueue, StartServer, allow, forecast_of, params_for
from fake_generator import FakeGenerator
from memory_stores import memory_store

from generation import machine_speed
from models.build_options import BuildOptions
from models.model_catalog import LoadSpec
from models.weight_files import are_float32
from scheduler.estimates import Estimates
from storage.task_store import TaskStore
from timing.speeds import Product, Speeds
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


@pytest.mark.parametrize("convolution", [0.5, 1.0], ids=["half as quick", "as quick"])
@pytest.mark.parametrize("mac", PUBLISHED)
def test_the_first_forecast_is_within_a_factor_of_two_of_what_mflux_publishes(
    mac: str, convolution: float
) -> None:
    peak, seconds = PUBLISHED[mac]
    speed = OF_PEAK * peak * 1e12
    timing = TimingModel()
    timing.calibrate({Product.BF16: speed, Product.CONVOLUTION: convolution * speed})
    forecast = timing.durations(Work("schnell", 12.0, 4096, 2, "PNG", prompt_tokens=16))
    assert seconds / 2 < forecast.total_s < seconds * 2
    assert forecast.confidence is Confidence.NONE


@pytest.mark.parametrize(("side", "seconds"), [(256, 0.143), (512, 0.591), (1024, 2.72)])
@pytest.mark.parametrize("product", [Product.BF16, Product.FLOAT32])
def test_the_first_forecast_of_the_built_in_model_is_within_a_factor_of_two_on_a_cpu(
    product: Product, side: int, seconds: float
) -> None:
    """The seconds of benchmarks/results/built_in_model.md, and the speeds of the same machine."""
    timing, model = TimingModel(), allow("tiny").default
    timing.calibrate(
        {Product.BF16: 7.7e9, Product.FLOAT32: 6.4e9, Product.CONVOLUTION: 3.8e9},
    )
    tokens, steps = (side // 16) ** 2, model.default_steps
    work = Work("tiny", model.parameters_b, tokens, steps, "PNG", prompt_tokens=16, product=product)
    assert seconds / 2 < timing.durations(work).gpu_s < seconds * 2


def test_each_kind_of_product_is_measured_within_the_possible() -> None:
    speeds = machine_speed.measure()
    assert set(speeds) == set(Product)
    assert all(1e5 < speed < 1e15 for speed in speeds.values())


def test_a_kind_of_product_is_measured_in_few_calls_however_slow_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that only products move: one of the smallest takes ten seconds."""
    at, calls = 0.0, 0

    def product(kind: Product, side: int) -> Callable[[], object]:
        def compute() -> list[object]:
            nonlocal at, calls
            at, calls = at + 10.0, calls + 1
            return []

        return compute

    monkeypatch.setattr(machine_speed, "_product", product)
    monkeypatch.setattr(machine_speed, "_convolution", lambda side: product(Product.Q4, side))
    monkeypatch.setattr(machine_speed, "time", SimpleNamespace(perf_counter=lambda: at))
    speeds = machine_speed.measure()
    assert calls == len(Product)
    assert speeds[Product.Q4] == pytest.approx(2 * machine_speed.SMALLEST**3 / 10.0)


MEASURED = {
    Product.BF16: 1e9,
    Product.FLOAT32: 50e9,
    Product.Q4: 0.04e9,
    Product.Q8: 0.08e9,
    Product.CONVOLUTION: 20e9,
}
"""FLOP/s of a CPU."""


@pytest.mark.parametrize("product", [p for p in Product if p is not Product.CONVOLUTION])
def test_a_first_forecast_takes_the_speed_of_its_precision_and_of_convolutions(
    product: Product,
) -> None:
    timing, usual = TimingModel(), TimingModel()
    timing.calibrate(MEASURED)
    usual.calibrate({Product.BF16: 1e9})
    work = Work("anima", 2.0, 4096, 3, "PNG", product=product)
    here, there = timing.durations(work), usual.durations(work)
    ratio = 1e9 / MEASURED[product]
    assert here.step_s == pytest.approx(ratio * there.step_s, rel=0.05)
    assert here.text_encoding_s == pytest.approx(ratio * there.text_encoding_s, rel=0.05)
    assert here.decoding_s == pytest.approx(there.decoding_s / 20, rel=0.01)


SPEC = LoadSpec(allow("noise-flux1").default, allow("noise-flux1").default.pipelines[0], None)


@pytest.mark.parametrize(
    ("bits", "float32", "precision", "product"),
    [
        (None, False, None, Product.BF16),
        (None, True, None, Product.FLOAT32),
        (None, False, "float32", Product.FLOAT32),
        (None, False, "float16", Product.BF16),
        (3, False, None, Product.Q4),
        (4, True, None, Product.Q4),
        (8, False, "float32", Product.Q8),
    ],
)
def test_the_precision_of_a_model_is_known_before_it_is_loaded(
    bits: int | None, float32: bool, precision: str | None, product: Product
) -> None:
    built = replace(SPEC.pipeline, options=frozenset({"compute_precision"}))
    options = BuildOptions(compute_precision=precision)
    model = replace(SPEC.model, float32=float32, options=options)
    assert Estimates(TimingModel()).product(LoadSpec(model, built, bits)) is product


@pytest.mark.parametrize("saved_by_mflux", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_headers_say_whether_weights_have_32_bits_in_memory(
    tmp_path: Path, dtype: mx.Dtype, saved_by_mflux: bool
) -> None:
    """mflux gives 16 bits to weights that it has not saved itself."""
    metadata = {"quantization_level": "None"} if saved_by_mflux else {}
    path, broken = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((64, 64), dtype)}, metadata)
    for content in (b"<html>", bytes(100), b"\x05\0\0\0\0\0\0\0[[[[["):
        broken.write_bytes(content)
        assert are_float32([path, broken]) is (saved_by_mflux and dtype == mx.float32)


def test_speeds_of_an_earlier_version_are_used_until_all_kinds_are_measured(
    tmp_path: Path,
) -> None:
    store, timing = TaskStore(tmp_path), TimingModel()
    with store._database.transaction() as connection:
        connection.execute("INSERT INTO speeds (machine, flop_per_s) VALUES ('local', 2e9)")
    store.timings.teach(timing)
    assert timing.speeds == {Product.BF16: 2e9}
    queue = PlayedQueue(allow("noise-flux1"), timing, store)
    queue.worker.calibrate(lambda: MEASURED, "1.0")
    assert store.timings.speeds() == timing.speeds == MEASURED
    store.close()


def test_another_version_of_mlx_is_measured_again() -> None:
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), memory_store())
    quicker = {product: 2 * speed for product, speed in MEASURED.items()}
    for measured, version in ((MEASURED, "1.0"), (quicker, "1.0"), (quicker, "1.1")):
        queue.worker.calibrate(lambda: measured, version)  # noqa: B023
        expected = quicker if version == "1.1" else MEASURED
        assert queue.scheduler.timing.speeds == expected


class Loads(FakeGenerator):
    """Sets an event when it has loaded."""

    def __init__(self, loaded: threading.Event) -> None:
        super().__init__()
        self._loaded = loaded

    def load(self, weights: LoadSpec, report: object = None) -> int | None:
        self._loaded.set()
        return super().load(weights)


def test_the_worker_measures_before_it_loads_and_the_next_start_knows_it(tmp_path: Path) -> None:
    measured: list[Speeds] = []

    def measure() -> Speeds:
        measured.append(MEASURED)
        return MEASURED

    for _ in range(2):
        store, timing, loaded = TaskStore(tmp_path), TimingModel(), threading.Event()
        queue = PlayedQueue(allow("noise-flux1"), timing, store)
        worker = Worker(
            queue.worker,
            Loads(loaded),
            lambda error: pytest.fail(str(error)),
            before_loading=lambda: queue.worker.calibrate(measure),  # noqa: B023
        )
        worker.start()
        assert loaded.wait(GIVE_UP_S)
        assert timing.speeds == MEASURED
        assert worker.stop(GIVE_UP_S)
        store.close()
    assert measured == [MEASURED]


def test_a_new_speed_changes_the_forecast_of_tasks_that_wait() -> None:
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), memory_store())
    task, _ = queue.submit(params_for(width=1024, height=1024), priority=0)
    before = forecast_of(queue.status(task.task_id)).end_s
    queue.worker.calibrate(lambda: {Product.BF16: 1e6})
    assert forecast_of(queue.status(task.task_id)).end_s > 10 * before


def test_a_server_measures_its_machine_and_keeps_the_result(
    tmp_path: Path, start_server: StartServer
) -> None:
    server = start_server("--model", "noise-flux1")
    server.wait_until_ended(server.submit()["task_id"])
    server.stop()
    store = TaskStore(tmp_path / "server")
    assert set(store.timings.speeds(mlx=machine_speed.mlx_version())) == set(Product)
    store.close()
