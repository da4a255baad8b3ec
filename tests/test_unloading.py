"""What was loaded is freed: MLX's arrays of each family, and the memory of the process."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from conftest import allow, params_for, slow_except
from on_its_thread import OnItsThread

from fields import Takes
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec

FAMILIES = [
    model.name
    for model in read_catalog().models
    if model.tiny and not model.upscaler and not model.pipelines[0].needs - {Takes.PROMPT}
]
COMPILED = ("flux2", "z-image", "krea2", "anima", "ernie", "qwen21")
"""Families whose steps mflux compiles: MLX used to lose about one in ten, with all its weights."""


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

    generating = OnItsThread(data_dir)
    model = allow(name).default
    weights = LoadSpec(model, model.pipelines[0], None)
    active = []
    for number in range(8 if name.removeprefix("noise-") in COMPILED else 2):
        for prompt in (f"one of {number}", f"two of {number}"):
            generating.draw(weights, params_for(prompt, steps=2, width=32, height=32))
        loaded_bytes = generating.generator.memory.weights_bytes
        generating.run(generating.generator.unload)
        active.append(generating.run(mx.get_active_memory))
    return active, loaded_bytes


@pytest.mark.parametrize("name", slow_except(["noise-flux1"], FAMILIES))
def test_a_model_that_was_unloaded_leaves_no_arrays(
    process: ProcessPoolExecutor, data_dir: Path, name: str
) -> None:
    active, loaded_bytes = process.submit(after_rounds, name, data_dir).result()
    assert active[-1] - active[0] < 0.01 * loaded_bytes


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
