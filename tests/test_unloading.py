"""What was loaded is freed: MLX's arrays of each family, and the memory of the process."""

import gc
import importlib.util
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import allow, params_for, slow_except
from on_its_thread import FILES, OnItsThread
from PIL import Image
from small_classes import SMALL, small_classes

from fields import Takes
from generation.compiling import compile_without_weights
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec

UPSCALER = "noise-seedvr2"
TINY = [
    model.name
    for model in read_catalog().models
    if model.tiny and not model.upscaler and not model.pipelines[0].needs - {Takes.PROMPT}
]
MODELS = [*TINY, UPSCALER, *SMALL]
COMPILED = ("flux2", "z-image", "krea2", "anima", "ernie", "qwen21")
"""Families whose steps mflux compiles: MLX used to lose about one in ten, with all its weights."""

WITH_TINY_MODELS = {
    "anima",
    "ernie_image",
    "flux2_klein",
    "flux2_klein_edit",
    "krea2",
    "qwen21_transformer",
    "z_image",
}
"""Modules of mflux that compile them."""
EDIT_COMPILED = ("noise-flux2",)
"""Models whose second class has a step of its own."""
PICTURES: dict[str, Any] = {
    Takes.INIT_IMAGE: FILES["start"],
    Takes.IMAGES: (FILES["start"],),
    Takes.UPSCALE: 2.0,
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """MLX counts the arrays of all tests of a process together."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
        yield one


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def after_rounds(name: str, data_dir: Path) -> tuple[list[int], int]:
    """MLX's active bytes after each round of loading, drawing and unloading; bytes of weights."""
    import mlx.core as mx

    Image.new("RGB", (64, 64)).save(data_dir / f"{FILES['start'].file}.png")
    generating = OnItsThread(data_dir)
    model = allow(name).default
    faces = model.pipelines[:2] if name in EDIT_COMPILED else model.pipelines[:1]
    active = []
    with small_classes() if name in SMALL else nullcontext():
        for number in range(8 if name.removeprefix("noise-") in COMPILED else 2):
            for prompt, face in product((f"one of {number}", f"another of {number}"), faces):
                pictures = {field: PICTURES[field] for field in face.needs}
                asked = params_for(prompt, steps=2, width=32, height=32, **pictures)
                generating.draw(LoadSpec(model, face, None), asked)
            loaded_bytes = generating.generator.memory.weights_bytes
            generating.run(generating.generator.unload)
            active.append(generating.run(mx.get_active_memory))
    return active, loaded_bytes


def test_every_family_is_counted_here() -> None:
    counted = {allow(name).default.family for name in MODELS}
    families = {model.family for model in read_catalog().models}
    assert families == counted | set(STEPS_WITHOUT_TINY_MODELS) & families


@pytest.mark.parametrize("name", slow_except(["noise-flux1", "lens-turbo"], MODELS))
def test_a_model_that_was_unloaded_leaves_no_arrays(
    process: ProcessPoolExecutor, data_dir: Path, name: str
) -> None:
    active, loaded_bytes = process.submit(after_rounds, name, data_dir).result()
    assert active[-1] - active[0] < 0.01 * loaded_bytes


STEPS_WITHOUT_TINY_MODELS = ("ideogram4", "krea2_controlnet")
"""Modules of mflux whose steps are compiled and whose classes no tiny model has."""


def after_steps(module: str) -> tuple[int, int]:
    """MLX's active bytes that are left of the steps of some pictures, each of other weights, and
    the bytes of one picture's weights."""
    import mlx.core as mx
    from mflux.models.ideogram4.variants.txt2img.ideogram4 import Ideogram4
    from mflux.models.krea2.variants.controlnet.krea2_controlnet import Krea2Controlnet
    from mlx import nn

    class Transformer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.ones((64, 4096))
            mx.eval(self.weight)

        def __call__(self, *values: Any, **named: Any) -> Any:
            text = values[2] if values else named["llm_features"]
            latents = values[0] if values else named["x"]
            first, second = mx.split(latents * self.weight[0, 0] + text.sum(), 2)
            return first + second

    compile_without_weights()
    latents, text, negative = (number * mx.ones((2, 8, 4)) for number in range(3))
    mx.eval(latents, text, negative)
    names = ("llm_features", "position_ids", "segment_ids", "indicator")
    inputs = {**dict.fromkeys(names, text), "max_text_tokens": 8}

    def step() -> Any:
        if module == "krea2_controlnet":
            predict = Krea2Controlnet._predict(Transformer(), text, negative, 2.0, text)
            return predict(latents, mx.array(1.0))
        values = {"z": latents, "t": mx.array(1.0)}
        conditional = Ideogram4._predict_conditional(Transformer())
        unconditional = Ideogram4._predict_unconditional(Transformer())
        given = {"text_z_padding": text, "llm_features": text, "inputs": inputs}
        return conditional(**values, **given) + unconditional(**values, negative_inputs=inputs)

    mx.eval(step())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(60):
        mx.eval(step())
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory() - before, Transformer().weight.nbytes


@pytest.mark.parametrize("module", STEPS_WITHOUT_TINY_MODELS)
def test_the_compiled_steps_of_each_class_leave_no_weights(
    process: ProcessPoolExecutor, module: str
) -> None:
    left, weights_bytes = process.submit(after_steps, module).result()
    assert left < weights_bytes


def test_every_class_whose_step_mflux_compiles_is_tested_here() -> None:
    spec = importlib.util.find_spec("mflux.models")
    assert spec
    assert spec.submodule_search_locations
    files = Path(next(iter(spec.submodule_search_locations))).rglob("*.py")
    # MLX keeps what a function of a module is compiled to: it refers to no weights.
    harmless = re.compile(r"^@partial\(mx\.compile,.*\)\ndef |#.*", re.MULTILINE)
    compiled = {file.stem for file in files if "mx.compile" in harmless.sub("", file.read_text())}
    assert compiled == {*WITH_TINY_MODELS, *STEPS_WITHOUT_TINY_MODELS}


def memory_of_rounds(data_dir: Path) -> list[int]:
    """Bytes of the process after each round of two models."""
    held = []
    generating = OnItsThread(data_dir)
    for _ in range(4):
        for name in ("noise-flux1", "noise-flux2"):
            model = allow(name).default
            asked = params_for(steps=1, width=512, height=512)
            generating.draw(LoadSpec(model, model.pipelines[0], None), asked)
            generating.run(generating.generator.unload)
        held.append(resident_bytes())
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_memory_of_the_process_returns_after_unloading(
    process: ProcessPoolExecutor, data_dir: Path
) -> None:
    _, first, *later = process.submit(memory_of_rounds, data_dir).result()  # one to warm up
    assert len(later) >= 2
    # What stays for good is there after each round; other threads hold more for a moment.
    assert min(later) < 1.1 * first
