"""Real mflux on the tiny models: same seed same picture, true timings, stopping early."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import params_for, slow_except
from PIL import Image, ImageChops

from errors import ModelLoadError
from generation.prompt_cache import PromptCache
from generator import MfluxGenerator
from models import tiny_models
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Model
from task import GenerationParams, Phase, Report, Stage

Result = TypeVar("Result")


class OnItsThread:
    """A generator, loaded and used on one thread of its own, as MLX wants it."""

    def __init__(self, name: str, data_dir: Path, quantize: int | None = None) -> None:
        prepare_mlx()
        self._thread = ThreadPoolExecutor(1)
        self.generator = MfluxGenerator(data_dir)
        model = model_of(name)
        self.weights = LoadSpec(model, model.pipelines[0], quantize)
        self.bits = self._thread.submit(self.generator.load, self.weights).result()
        self.inputs = data_dir

    def generate(self, params: GenerationParams, report: Report = lambda *_: None) -> Image.Image:
        stage = Stage(self.weights, params)
        return (
            self._thread.submit(self.generator.generate, stage, self.inputs, report)
            .result()
            .picture
        )

    @property
    def loaded(self) -> Any:
        return self.generator._loaded[self.weights.key]


MODELS = ("noise-flux1", "noise-flux2")


def model_of(name: str) -> Model:
    model = find_model(name)
    assert model is not None
    return model


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, data_dir: Path) -> OnItsThread:
    return OnItsThread(request.param, data_dir)


def test_the_same_params_give_the_same_picture(tiny: OnItsThread) -> None:
    first, second = tiny.generate(params_for()), tiny.generate(params_for())
    assert first.size == (64, 64)
    assert first.tobytes() == second.tobytes()


def test_seed_prompt_steps_and_size_change_the_picture(tiny: OnItsThread) -> None:
    variants = [
        params_for(),
        params_for(seed=2),
        params_for("a fox"),
        params_for(steps=3),
        params_for(width=80),
    ]
    pictures = {tiny.generate(params).tobytes() for params in variants}
    assert len(pictures) == len(variants)


def test_the_picture_is_neither_black_nor_constant(tiny: OnItsThread) -> None:
    picture = tiny.generate(params_for(width=128, height=128))
    for low, high in picture.convert("RGB").getextrema():  # type: ignore[misc]
        assert high - low > 60
    assert ImageChops.invert(picture).getbbox()


def test_phases_and_steps_are_reported_in_order(tiny: OnItsThread) -> None:
    seen: list[tuple[Phase, int, int]] = []
    tiny.generate(params_for(steps=3), lambda *event: seen.append(event))
    assert seen == [
        (Phase.DENOISING, 0, 3),
        (Phase.DENOISING, 1, 3),
        (Phase.DENOISING, 2, 3),
        (Phase.DENOISING, 3, 3),
        (Phase.DECODING, 3, 3),
    ]


def test_each_report_comes_when_its_work_is_done(tiny: OnItsThread) -> None:
    """Nothing of a step may be left for the next one: evaluating the latents again is free."""
    at: list[float] = []
    tiny.generate(params_for(width=512, height=512), lambda *_: at.append(time.perf_counter()))
    steps = [later - earlier for earlier, later in pairwise(at)][:-1]
    # Left to MLX's laziness, the first step takes next to no time and decoding takes the last one.
    assert steps[0] > 0.2 * steps[1]
    assert at[5] - at[4] < 0.5 * steps[-1]


def test_an_error_of_a_report_ends_only_the_current_picture(tiny: OnItsThread) -> None:
    class LeftEarly(Exception):
        pass

    reference = tiny.generate(params_for("reference")).tobytes()
    for point in range(6):
        seen = 0

        def leave(*_: object, point: int = point) -> None:
            nonlocal seen
            if seen == point:
                raise LeftEarly
            seen += 1

        with pytest.raises(LeftEarly):
            tiny.generate(params_for("left early"), leave)
    assert tiny.generate(params_for("reference")).tobytes() == reference
    again = tiny.generate(params_for("left early")).tobytes()
    tiny.loaded.hook.prompt_cache.clear()
    assert tiny.generate(params_for("left early")).tobytes() == again


@pytest.mark.parametrize("name", slow_except(["noise-flux1"], MODELS))
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_the_tiny_models_are_quantized_for_real(data_dir: Path, name: str, bits: int) -> None:
    quantized = OnItsThread(name, data_dir, quantize=bits)
    assert quantized.bits == bits
    unquantized = OnItsThread(name, data_dir).generate(params_for())
    assert quantized.generate(params_for()).tobytes() != unquantized.tobytes()


def test_the_text_embeddings_kept_are_those_used_last_up_to_a_size() -> None:
    cache = PromptCache(max_bytes=10)
    entry = (memoryview(b"12"), [memoryview(b"34")])  # 4 bytes
    for prompt in ("a", "b"):
        cache[prompt] = entry
    assert cache["a"] == entry  # used: "b" is the oldest now
    cache["c"] = entry
    assert (set(cache), cache.currsize) == ({"a", "c"}, 8)
    cache["large"] = memoryview(b"x" * 100)
    assert (set(cache), cache.currsize) == ({"large"}, 10)
    del cache["large"]
    assert (len(cache), cache.currsize) == (0, 0)


def test_mflux_fills_and_reads_our_prompt_cache(data_dir: Path) -> None:
    tiny = OnItsThread("noise-flux1", data_dir)
    first = tiny.generate(params_for("once"))
    cache = tiny.loaded.pipeline.prompt_cache
    assert isinstance(cache, PromptCache)
    assert list(cache) == ["once"]
    assert cache.currsize > 0
    assert tiny.generate(params_for("once")).tobytes() == first.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only mlx for Linux links a slow BLAS")
def test_the_fast_blas_is_in_place() -> None:
    prepare_mlx()
    assert "opencv_python.libs/libopenblas" in Path("/proc/self/maps").read_text()


def test_the_memory_of_weights_and_pictures_is_measured(data_dir: Path) -> None:
    tiny = OnItsThread("noise-flux1", data_dir)
    weights = tiny.generator.memory.weights_bytes
    files = tiny_models.ensure_checkpoint("noise-flux1", data_dir).rglob("*.safetensors")
    assert weights == pytest.approx(sum(file.stat().st_size for file in files), rel=0.3)
    assert tiny.generator.guard.weights_bytes(tiny.weights) == weights
    tiny.generate(params_for(width=512, height=512))
    assert tiny.generator.memory.peak_bytes > weights


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_models_are_built_the_same_everywhere(name: str, tmp_path: Path) -> None:
    folders = [tiny_models.ensure_checkpoint(name, tmp_path / str(n)) for n in range(2)]
    files = [sorted(f.relative_to(d) for f in d.rglob("*") if f.is_file()) for d in folders]
    assert files[0] == files[1]
    for file in files[0]:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    assert sum((folders[0] / file).stat().st_size for file in files[0]) < 10_000_000


def test_a_path_without_weights_is_one_clear_sentence(tmp_path: Path) -> None:
    prepare_mlx()
    model = replace(model_of("schnell"), path=str(tmp_path / "nothing"))
    with pytest.raises(ModelLoadError, match=r"cannot be read from .*--path"):
        MfluxGenerator(tmp_path).load(LoadSpec(model, model.pipelines[0], None))
