"""Copies of quantized weights: saved once, loaded instead of the originals, never in the way."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for, slow_except, until
from copied_weights import PLENTY, spec_of
from fake_generator import FakeGenerator
from memory_stores import memory_store
from on_its_thread import OnItsThread

from errors import LoadStopped, UnusableAdapter, WeightsTooLarge
from models import weights_cache
from models.model_catalog import LoadSpec
from models.tiny_models import ensure_checkpoint
from models.weights_cache import MIN_FREE_BYTES, WeightsCache
from task import TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

SMALL = params_for(width=64, height=64, steps=2)


@pytest.fixture
def checkpoint(data_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ensure_checkpoint("noise-flux2", data_dir), tmp_path / "mine")


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "weights", 10**9, free_bytes=lambda folder: PLENTY)


@pytest.fixture
def generating(data_dir: Path, cache: WeightsCache) -> Iterator[OnItsThread]:
    one = OnItsThread(data_dir, weights_cache=cache)
    yield one
    one.run(one.generator.unload)


def save(generating: OnItsThread, may_continue: Callable[[], bool] = lambda: True) -> bool:
    return generating.run(generating.generator.save_copies, may_continue)


def loads_from(generating: OnItsThread, spec: LoadSpec) -> list[str]:
    """Loads once more; returns the folders that mflux has built the class from, one a try."""
    from generation.pipelines import build

    built: list[str] = []

    def noted(spec: LoadSpec, *values: object, **named: object) -> object:
        built.append(spec.model.path or "")
        return build(spec, *values, **named)  # type: ignore[arg-type]

    generating.run(generating.generator.unload)
    with patch("generator.build", noted):
        generating.load(spec)
    return built


@pytest.mark.parametrize(
    ("model", "bits"),
    slow_except(
        [("noise-z-image", 4)],
        [
            *product(["noise-flux2", "noise-flux1", "noise-anima", "noise-krea2"], [4, 8]),
            ("noise-z-image", 4),
            ("noise-qwen", 8),
        ],
    ),
)
def test_a_copy_draws_the_same_bytes_and_is_loaded_by_the_next_start(
    model: str, bits: int, generating: OnItsThread, data_dir: Path, tmp_path: Path
) -> None:
    spec = spec_of(ensure_checkpoint(model, data_dir), bits, model)
    assert generating.load(spec) == bits
    before = generating.draw(spec, SMALL)
    assert save(generating)
    assert not save(generating), "it is saved once"
    generating.run(generating.generator.unload)
    again = OnItsThread(data_dir, weights_cache=WeightsCache(tmp_path / "weights", 10**9))
    (source,) = loads_from(again, spec)
    assert Path(source).parent == tmp_path / "weights"
    assert again.generator.resident == (f"{model}/q{bits}",)
    assert again.pipeline(spec).bits == bits
    assert again.draw(spec, SMALL).tobytes() == before.tobytes()
    again.run(again.generator.unload)


def test_a_server_that_is_never_idle_saves_what_makes_room(
    generating: OnItsThread, checkpoint: Path, cache: WeightsCache
) -> None:
    spec = spec_of(checkpoint)
    generating.load(spec)
    assert not cache.keys
    generating.load(spec_of(None, None, "noise-flux1"))
    assert cache.keys == {spec.key}
    assert generating.generator.resident == ("noise-flux1",)


def is_touched(checkpoint: Path, copy: Path) -> None:
    os.utime(checkpoint / "transformer" / "0.safetensors", ns=(1, 1))


def has_a_new_file(checkpoint: Path, copy: Path) -> None:
    (checkpoint / "transformer" / "notes.txt").write_text("changed")


def is_of_another_mflux(checkpoint: Path, copy: Path) -> None:
    record = json.loads((copy / "copy.json").read_text())
    (copy / "copy.json").write_text(json.dumps({**record, "source": "0" * 64}))


def is_truncated(checkpoint: Path, copy: Path) -> None:
    file = copy / "transformer" / "0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lacks_a_file(checkpoint: Path, copy: Path) -> None:
    (copy / "transformer" / "0.safetensors").unlink()


def has_a_broken_record(checkpoint: Path, copy: Path) -> None:
    (copy / "copy.json").write_text("{")


def has_a_strange_record(checkpoint: Path, copy: Path) -> None:
    (copy / "copy.json").write_text('{"key": "x"}')


@pytest.mark.parametrize(
    "change",
    [
        is_touched,
        has_a_new_file,
        is_of_another_mflux,
        is_truncated,
        lacks_a_file,
        has_a_broken_record,
        has_a_strange_record,
    ],
)
def test_a_copy_that_is_broken_or_of_other_files_is_removed_and_the_original_loaded(
    change: Callable[[Path, Path], None],
    generating: OnItsThread,
    checkpoint: Path,
    cache: WeightsCache,
    tmp_path: Path,
) -> None:
    spec = spec_of(checkpoint)
    generating.load(spec)
    assert save(generating)
    (copy,) = (tmp_path / "weights").iterdir()
    change(checkpoint, copy)
    assert loads_from(generating, spec) == [str(checkpoint)]
    assert not copy.exists()
    assert not cache.keys
    assert save(generating), "and there is a new one"
    assert loads_from(generating, spec) == [str(copy)]


def test_a_copy_that_mflux_cannot_load_is_removed_and_the_task_gets_the_original(
    generating: OnItsThread,
    checkpoint: Path,
    cache: WeightsCache,
    tmp_path: Path,
) -> None:
    """As if its files were whole and of another model."""
    spec = spec_of(checkpoint)
    generating.load(spec)
    assert save(generating)
    (copy,) = (tmp_path / "weights").iterdir()
    shutil.copy(copy / "vae" / "0.safetensors", copy / "transformer" / "0.safetensors")
    record = json.loads((copy / "copy.json").read_text())
    files = weights_cache._files(copy)
    (copy / "copy.json").write_text(json.dumps({**record, "files": files}))
    built = loads_from(generating, spec)
    assert built == [str(copy), str(checkpoint)]
    assert not copy.exists()
    assert not cache.keys


@pytest.mark.parametrize(
    "error",
    [UnusableAdapter("of another model"), WeightsTooLarge("9 GB"), MemoryError(), LoadStopped()],
    ids=lambda error: type(error).__name__,
)
def test_a_load_that_fails_for_another_reason_costs_no_copy(
    error: BaseException, generating: OnItsThread, checkpoint: Path, cache: WeightsCache
) -> None:
    spec = spec_of(checkpoint)
    generating.load(spec)
    assert save(generating)
    tried: list[LoadSpec] = []

    def fail(source: LoadSpec) -> int:
        tried.append(source)
        raise error

    with pytest.raises(type(error)):
        generating.run(generating.generator._copies.load, spec, fail)
    assert len(tried) == 1
    assert tried[0].model.path != str(checkpoint)
    assert cache.keys == {spec.key}


def test_a_copy_that_differs_from_what_is_loaded_is_not_kept(
    generating: OnItsThread, checkpoint: Path, cache: WeightsCache, tmp_path: Path
) -> None:
    spec = spec_of(checkpoint)
    generating.load(spec)

    def change() -> None:
        import mlx.core as mx

        pipeline = generating.pipeline(spec)
        own_save = pipeline.save_model

        def save_and_change(folder: str) -> None:
            own_save(folder)
            norm = pipeline.transformer.norm_out.linear
            norm.scales = mx.array(norm.scales) + 1

        pipeline.save_model = save_and_change

    generating.run(change)
    assert not save(generating)
    assert not cache.keys
    assert list((tmp_path / "weights").iterdir()) == []


def test_saving_makes_way_for_a_task_and_begins_again(
    generating: OnItsThread, checkpoint: Path, cache: WeightsCache, tmp_path: Path
) -> None:
    spec = spec_of(checkpoint)
    generating.load(spec)
    answers = iter([True, True, False])
    assert not save(generating, lambda: next(answers))
    assert list((tmp_path / "weights").iterdir()) == []
    assert not save(generating, lambda: False)
    assert save(generating, lambda: False), "the third time it is saved to its end"
    assert cache.keys == {spec.key}


@pytest.mark.parametrize(
    ("most_bytes", "free"),
    [(0, PLENTY), (1000, PLENTY), (10**9, MIN_FREE_BYTES)],
    ids=["off", "too small", "disk nearly full"],
)
def test_nothing_is_saved_where_there_is_no_room(
    most_bytes: int, free: int, data_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    cache = WeightsCache(tmp_path / "weights", most_bytes, free_bytes=lambda folder: free)
    generating = OnItsThread(data_dir, weights_cache=cache)
    spec = spec_of(checkpoint)
    generating.load(spec)
    assert not save(generating)
    assert not cache.keys
    assert generating.draw(spec, SMALL).size == (64, 64)
    generating.run(generating.generator.unload)


def test_a_disk_that_refuses_while_a_copy_is_written_costs_nothing(
    generating: OnItsThread,
    checkpoint: Path,
    cache: WeightsCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(checkpoint)
    before = generating.draw(spec, SMALL)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.weights_cache._sync", full)
    assert not save(generating)
    assert not cache.keys
    assert list((tmp_path / "weights").iterdir()) == []
    assert generating.draw(spec, SMALL).tobytes() == before.tobytes()


def test_a_class_that_decides_something_by_its_folder_has_no_copy(
    generating: OnItsThread, checkpoint: Path, cache: WeightsCache
) -> None:
    spec = spec_of(checkpoint)
    generating.load(spec)
    copies = generating.generator._copies
    build = copies._build

    def build_a_variant(source: LoadSpec) -> Any:
        pipeline = build(source)
        pipeline.variant = "base"
        return pipeline

    generating.pipeline(spec).variant = "turbo"
    copies._build = build_a_variant
    assert not save(generating)
    assert not cache.keys


def test_an_idle_worker_saves_copies_until_there_is_work() -> None:
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), memory_store())
    saving, submitted = threading.Event(), threading.Event()
    answers: list[bool] = []

    class Saving(FakeGenerator):
        def save_copies(self, may_continue: Callable[[], bool]) -> bool:
            if not answers:
                answers.append(may_continue())
                saving.set()
                assert submitted.wait(GIVE_UP_S)
                answers.append(may_continue())
            return True

    worker = Worker(queue.worker, Saving(), lambda error: None, unload_after_s=0.01)
    worker.start()
    assert saving.wait(GIVE_UP_S)
    task_id = queue.submit(params_for())[0].task_id
    submitted.set()
    until(lambda: queue.status(task_id).status is TaskStatus.DONE)
    assert answers == [True, False]
    assert worker.stop(GIVE_UP_S)


def test_the_time_of_loading_a_copy_is_learned_by_itself() -> None:
    copies: set[str] = set()
    allowed = allow("schnell", quantize=4)
    at = [0.0]
    queue = PlayedQueue(
        allowed,
        TimingModel(),
        memory_store(),
        monotonic=lambda: at[0],
        has_copy=copies.__contains__,
    )
    spec = queue.scheduler.allowed.first_spec

    def load(seconds: float) -> None:
        queue.worker.load_started(spec)
        at[0] += seconds
        queue.loaded(spec, 4)

    load(17.0)
    estimates = queue.scheduler.estimates
    assert estimates.load_s(spec) == 17.0
    copies.add(spec.key)
    queue.worker.copies_saved()
    first = estimates.load_s(spec)
    assert first < 17.0, "a quarter of the bytes is read, before it was measured"
    load(4.0)
    assert estimates.load_s(spec) == 4.0
    copies.clear()
    assert estimates.load_s(spec) == 17.0
