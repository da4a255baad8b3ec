"""LoRAs on a loaded model: the same pictures as after a fresh load, and nothing stays of them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for, slow_except
from memory_stores import memory_store
from on_its_thread import PROMPTED, OnItsThread
from safetensors.numpy import save_file

import generator
from errors import UnusableAdapter
from fields import Takes
from generation import pipelines
from models import tiny_models
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec, Lora
from models.weights_cache import WeightsCache
from scheduler.limits import QueueLimits
from task import Stage
from timing_model import TimingModel

CASES = [
    *(
        (model.name, None)
        for model in read_catalog().models
        if model.tiny and not model.upscaler and not model.pipelines[0].needs - {Takes.PROMPT}
    ),
    *((name, 8) for name in ("noise-flux1", "noise-flux2", "noise-qwen")),
]


RANK = 4


def spec_of(name: str, *loras: Lora, quantize: int | None = None) -> LoadSpec:
    model = allow(name).default
    return LoadSpec(model, model.pipelines[0], quantize, loras)


@pytest.fixture
def generating(data_dir: Path) -> Iterator[OnItsThread]:
    one = OnItsThread(data_dir)
    yield one
    one.run(one.generator.unload)


def drawn(generating: OnItsThread, weights: LoadSpec) -> bytes:
    name = weights.model.name
    asked = params_for(model=name, steps=2, width=32, height=32, **PROMPTED.get(name, {}))
    return generating.draw(weights, asked).tobytes()


def loaded_of(generating: OnItsThread, weights: LoadSpec) -> Any:
    return generating.generator._loaded[weights.key]


def some_layer(
    generating: OnItsThread, weights: LoadSpec
) -> tuple[dict[str, str], tuple[int, int]]:
    """A layer of this model that can have a LoRA: keys by matrix, and its size."""
    loaded = loaded_of(generating, weights)
    layers: dict[str, dict[str, str]] = {}
    for pattern, matches in loaded._loras.places[0].keys.items():
        for match in matches:
            if match.transform is None:
                layers.setdefault(match.target_path, {}).setdefault(match.matrix_name, pattern)
    for layer, keys in layers.items():
        size = loaded.layer_sizes.get(layer.replace("{block}", "0"))
        if size and keys.keys() & {"lora_A", "lokr_w1"}:
            return keys, size
    raise AssertionError(f"no layer of {weights.model.name} takes a LoRA")


def write_lora(path: Path, keys: dict[str, str], size: tuple[int, int], seed: int) -> None:
    """Writes a LoRA, or a LoKr where mflux knows no other kind."""
    values = np.random.default_rng(seed)
    outputs, inputs = size
    shapes = {"lora_B": (outputs, RANK), "lora_A": (RANK, inputs)}
    if "lora_A" not in keys:
        shapes = {"lokr_w1": (8, 8), "lokr_w2": (outputs // 8, inputs // 8)}
    arrays = {
        keys[matrix].replace("{block}", "0"): values.normal(0.0, 0.1, shape).astype(np.float32)
        for matrix, shape in shapes.items()
    }
    save_file(arrays, path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Lora]:
    def written(
        generating: OnItsThread, weights: LoadSpec, seed: int, *, name: str = "", scale: float = 1.0
    ) -> Lora:
        path = tmp_path / f"{name or seed}.safetensors"
        write_lora(path, *some_layer(generating, weights), seed)
        return Lora(str(path), scale)

    return written


@pytest.mark.parametrize(("name", "quantize"), slow_except([("noise-flux1", 8)], CASES))
def test_switching_draws_what_a_fresh_load_draws_and_loads_nothing(
    generating: OnItsThread,
    data_dir: Path,
    write: Callable[..., Lora],
    name: str,
    quantize: int | None,
) -> None:
    plain = spec_of(name, quantize=quantize)
    without = drawn(generating, plain)
    one, two = (write(generating, plain, seed) for seed in (1, 2))
    choices = [(one,), (Lora(one.name, 0.5), two), (), (one,)]
    with patch.object(generator, "build", side_effect=AssertionError("loaded again")):
        first, both, none, again = (
            drawn(generating, spec_of(name, *loras, quantize=quantize)) for loras in choices
        )
    assert (none, again) == (without, first)
    assert len({first, both, none}) == 3
    fresh = OnItsThread(data_dir)
    assert drawn(fresh, spec_of(name, *choices[1], quantize=quantize)) == both
    fresh.run(fresh.generator.unload)


def test_the_picture_is_that_of_mflux_with_loras_that_are_not_baked(
    generating: OnItsThread, data_dir: Path, write: Callable[..., Lora]
) -> None:
    plain = spec_of("noise-flux2")
    drawn(generating, plain)
    lora = write(generating, plain, 1, scale=0.7)
    picture = drawn(generating, spec_of("noise-flux2", lora))
    config = tiny_models.TINY_CONFIGS["noise-flux2"]

    def by_mflux() -> bytes:
        from mflux.models.common.config.model_config import ModelConfig

        path = str(tiny_models.ensure_checkpoint("noise-flux2", data_dir))
        klein = pipelines._class_of(plain.pipeline)(
            model_config=ModelConfig(**config),
            model_path=path,
            lora_paths=[lora.name],
            lora_scales=[0.7],
            bake_lora=False,
        )
        tiny_models.slim(klein, "noise-flux2")
        asked = params_for(model="noise-flux2", steps=2, width=32, height=32)
        stage = Stage(plain, asked)
        image = klein.generate_image(**pipelines.arguments(stage, data_dir)).image
        return bytes(image.tobytes())

    assert generating.run(by_mflux) == picture


def test_a_removed_lora_leaves_no_memory_and_a_present_one_is_counted(
    generating: OnItsThread, write: Callable[..., Lora]
) -> None:
    plain = spec_of("noise-flux2")
    drawn(generating, plain)
    before = generating.generator.memory.weights_bytes
    lora = write(generating, plain, 1)
    outputs, inputs = some_layer(generating, plain)[1]
    drawn(generating, spec_of("noise-flux2", lora))
    added = generating.generator.memory.weights_bytes - before
    assert added == 4 * RANK * (outputs + inputs)
    assert generating.generator.memory.loaded_bytes["noise-flux2"] == before + added
    drawn(generating, plain)
    assert generating.generator.memory.weights_bytes == before


def test_a_file_that_was_replaced_is_read_again(
    generating: OnItsThread, write: Callable[..., Lora]
) -> None:
    plain = spec_of("noise-flux1")
    drawn(generating, plain)
    first = drawn(generating, spec_of("noise-flux1", write(generating, plain, 1, name="x")))
    second = drawn(generating, spec_of("noise-flux1", write(generating, plain, 2, name="x")))
    assert first != second


def test_another_class_on_the_same_modules_draws_with_the_loras_too(
    generating: OnItsThread, write: Callable[..., Lora]
) -> None:
    plain = spec_of("noise-flux2")
    drawn(generating, plain)
    lora = write(generating, plain, 1)
    changed = drawn(generating, spec_of("noise-flux2", lora))
    edit = generating.run(loaded_of(generating, plain).face, plain.model.pipelines[1])
    assert (edit.lora_paths, edit.lora_scales) == ([lora.name], [1.0])
    assert edit.transformer is generating.pipeline(plain).transformer
    assert drawn(generating, spec_of("noise-flux2", lora)) == changed


def test_patches_of_vectors_are_applied_and_removed(
    generating: OnItsThread, tmp_path: Path
) -> None:
    plain = spec_of("noise-z-image")
    without = drawn(generating, plain)
    layer = loaded_of(generating, plain)._loras.places[0].transformer.cap_embedder[0]
    path = tmp_path / "patch.safetensors"
    weight = np.random.default_rng(1).normal(0.0, 50.0, layer.weight.shape).astype(np.float32)
    save_file({"diffusion_model.cap_embedder.0.diff": weight}, path)
    assert drawn(generating, spec_of("noise-z-image", Lora(str(path)))) != without
    assert drawn(generating, plain) == without


def test_a_lora_that_fails_half_way_leaves_the_model_without_any(
    generating: OnItsThread, write: Callable[..., Lora], tmp_path: Path
) -> None:
    plain = spec_of("noise-flux1")
    without = drawn(generating, plain)
    good = write(generating, plain, 1)
    bad = tmp_path / "bad.safetensors"
    layer = "transformer.single_transformer_blocks.99.proj_mlp"  # there is no such block
    arrays = {f"{layer}.lora_{one}.weight": np.ones((4, 4), np.float32) for one in "AB"}
    save_file(arrays, bad)
    drawn(generating, spec_of("noise-flux1", good))
    with pytest.raises(UnusableAdapter, match="bad"):
        drawn(generating, spec_of("noise-flux1", good, Lora(str(bad))))
    assert generating.generator.resident == ("noise-flux1",)
    assert drawn(generating, plain) == without


def test_a_copy_of_quantized_weights_holds_no_lora(
    data_dir: Path, tmp_path: Path, write: Callable[..., Lora]
) -> None:
    checkpoint = tmp_path / "klein"
    shutil.copytree(tiny_models.ensure_checkpoint("noise-flux2", data_dir), checkpoint)
    cache = WeightsCache(tmp_path / "weights", 10**9)
    generating = OnItsThread(data_dir, weights_cache=cache)
    model = replace(allow("noise-flux2").default, path=str(checkpoint))
    plain = LoadSpec(model, model.pipelines[0], 8)
    without = drawn(generating, plain)
    with_lora = LoadSpec(model, model.pipelines[0], 8, (write(generating, plain, 1),))
    changed = drawn(generating, with_lora)
    assert generating.run(generating.generator.save_copies, lambda: True)
    assert drawn(generating, with_lora) == changed
    generating.run(generating.generator.unload)
    assert cache.find(plain)
    assert drawn(generating, with_lora) == changed
    assert drawn(generating, plain) == without
    generating.run(generating.generator.unload)


# -- the forecast ---------------------------------------------------------------------------------


def test_tasks_with_other_loras_need_no_load_and_keep_their_order() -> None:
    queue = PlayedQueue(
        allow("noise-flux1", allow_lora_repos=True), TimingModel(), memory_store(), QueueLimits()
    )
    queue.load()
    choices = ((), (("org/one", 1.0),), (("org/two", 1.0),), (("org/one", 0.5),), ())
    tasks = [queue.submit(params_for(model="noise-flux1", loras=loras))[0] for loras in choices]
    listed, _ = queue.unfinished(10, 0)
    assert [task.task_id for task in listed] == [task.task_id for task in tasks]
    assert [forecast_of(task).switches for task in listed] == [0] * len(tasks)
