"""Which pictures fit into memory, and which are decoded in tiles: the figures, and real mflux on
tiny models."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import allow, params_for
from PIL import Image
from stages import GB, stage_of

from errors import DoesNotFit
from fields import Takes
from generation import memory_guard
from generation.memory_guard import MemoryGuard, Plan
from generation.picture_memory import TILES, PictureMemory, picture_memory
from generation.process_memory import (
    PROCESS_BYTES,
    available_bytes,
    free_of_vm_stat,
    machine_bytes,
    used_bytes,
)
from generator import MfluxGenerator
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Pipeline
from storage.state_store import WEIGHTS
from storage.task_store import TaskStore
from task import Drawn, InputImage, Stage

# -- the decision ----------------------------------------------------------------------------------


def guard_of(limit_gb: float, **options: Any) -> MemoryGuard:
    guard = MemoryGuard(int(limit_gb * GB), gpu=True, **options)
    guard.learn_weights(stage_of("anima-turbo").load_spec, int(5.6 * GB))
    return guard


@pytest.mark.parametrize(
    ("limit_gb", "side", "tile"),
    [(24, 1024, None), (14, 1024, 512), (9, 1024, 512), (8, 1024, 256), (24, 2048, 512)],
)
def test_what_does_not_fit_whole_is_decoded_in_tiles(
    limit_gb: float, side: int, tile: int | None
) -> None:
    plan = guard_of(limit_gb).plan(stage_of("anima-turbo", side))
    assert (plan.tile, plan.refusal) == (tile, None)
    assert plan.picture_bytes + 5.6 * GB + PROCESS_BYTES <= limit_gb * GB


def test_what_does_not_fit_in_tiles_either_is_refused_with_the_figure() -> None:
    plan = guard_of(7).plan(stage_of("anima-turbo"))
    assert plan.field == "width"
    refusal = plan.refusal or ""
    assert refusal.startswith("A picture of 1024 x 1024, decoded in tiles of 256, needs about 7.")
    assert refusal.endswith("ask for a smaller picture, or start the server with --quantize 8.")
    assert "5.6 GB for the weights of anima-turbo" in refusal
    assert "7.0 GB" in refusal


def test_without_tiles_and_in_strips_the_whole_picture_counts() -> None:
    off = guard_of(9, tiling="off").plan(stage_of("anima-turbo"))
    assert off.tile is None
    assert off.refusal
    klein = MemoryGuard(int(10 * GB), gpu=True).plan(stage_of("flux2-klein-4b", 4096))
    assert klein.tile is None
    assert klein.refusal


def test_the_operator_chooses_tiles_for_all_pictures_larger_than_one() -> None:
    guard = guard_of(100, tiling=384)
    assert guard.plan(stage_of("anima-turbo", 1024)).tile == 384
    assert guard.plan(stage_of("anima-turbo", 256)).tile is None
    assert guard.plan(stage_of("flux2-klein-4b", 1024)).tile is None


def test_nothing_is_refused_when_the_check_is_off() -> None:
    plan = guard_of(1, on=False).plan(stage_of("anima-turbo", 4096))
    assert plan.refusal is None


def test_weights_count_before_they_were_loaded_once() -> None:
    refusal = MemoryGuard(int(20 * GB), gpu=True).plan(stage_of("schnell", 256)).refusal
    assert refusal
    assert "GB for the weights of schnell" in refusal


def _measured(stage: Stage, factor: float) -> PictureMemory:
    figures = picture_memory(stage, None, gpu=True)
    return PictureMemory(*(factor * figure for figure in figures))


def test_a_request_gets_the_same_answer_before_and_after_other_pictures() -> None:
    guard = guard_of(15)
    stages = [stage_of("anima-turbo", side) for side in (512, 768, 1008, 1024, 1536, 4096)]
    before = [guard.plan(stage) for stage in stages]
    for factor in (0.85, 1.2, 1.0):
        for stage in stages:
            guard.learn(stage, None, _measured(stage, factor))
    assert [guard.plan(stage) for stage in stages] == before


@pytest.mark.parametrize("factor", [0.5, 1.6])
def test_what_was_measured_replaces_a_wrong_figure_for_all_sizes(factor: float) -> None:
    guard, right = guard_of(100), guard_of(100)
    guard.learn(stage_of("anima-turbo", 512), None, _measured(stage_of("anima-turbo", 512), factor))
    large = stage_of("anima-turbo", 1024)
    assert guard.plan(large).picture_bytes == pytest.approx(
        factor * right.plan(large).picture_bytes
    )


def test_small_pictures_teach_nothing_about_large_ones() -> None:
    guard = guard_of(100)
    before = guard.plan(stage_of("anima-turbo"))
    guard.learn(stage_of("anima-turbo", 64), None, PictureMemory(1e8, 2e8, 2.5e8))
    assert guard.plan(stage_of("anima-turbo")) == before


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    stage = stage_of("anima-turbo")
    store = TaskStore(tmp_path)
    guard = guard_of(100)
    guard.restore(store.state)
    guard.learn(stage, None, _measured(stage, 2.0))
    guard.learn_weights(stage.load_spec, int(3.1 * GB))
    store.state.keep_memory(f"{WEIGHTS}{stage.load_spec.key}", int(3.1 * GB))
    store.close()
    store = TaskStore(tmp_path)
    again = MemoryGuard(int(100 * GB), gpu=True)
    again.restore(store.state)
    store.close()
    assert again.plan(stage) == guard.plan(stage)
    assert again.weights_bytes(stage.load_spec) == int(3.1 * GB)


def test_free_pages_of_macos_are_counted() -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10000.\n"
        "Pages active:                            400000.\n"
        "Pages inactive:                           20000.\n"
        "Pages speculative:                         3000.\n"
        "Pages throttled:                              0.\n"
        "Pages wired down:                        100000.\n"
        "Pages purgeable:                           4000.\n"
    )
    assert free_of_vm_stat(text) == 37000 * 16384
    assert free_of_vm_stat("nothing") is None


def test_the_memory_of_this_machine_and_process_is_known() -> None:
    prepare_mlx()
    available = available_bytes()
    assert 10**8 < machine_bytes(gpu=False) < 2**50
    assert available is None or 0 < available < 2**50
    assert used_bytes() > 10**7


# -- for real --------------------------------------------------------------------------------------


class OnItsThread:
    """A generator on one thread of its own, as MLX wants it."""

    def __init__(self, data_dir: Path, inputs: Path | None = None, **options: Any) -> None:
        prepare_mlx()
        self._thread = ThreadPoolExecutor(1)
        self.generator = MfluxGenerator(data_dir, **options)
        self._inputs = inputs or data_dir

    def load(self, stage: Stage) -> None:
        if stage.load_spec.key not in self.generator.resident:
            self._thread.submit(self.generator.load, stage.load_spec).result()

    def draw(self, stage: Stage) -> Drawn:
        self.load(stage)
        generate: Callable[..., Drawn] = self.generator.generate
        return self._thread.submit(generate, stage, self._inputs, lambda *_: None).result()

    def close(self) -> None:
        self._thread.submit(self.generator.unload).result()
        self._thread.shutdown()


@pytest.fixture
def make_generator(data_dir: Path) -> Iterator[Callable[..., OnItsThread]]:
    made: list[OnItsThread] = []

    def make(**options: Any) -> OnItsThread:
        made.append(OnItsThread(data_dir, **options))
        return made[-1]

    yield make
    for generator in made:
        generator.close()


@pytest.mark.parametrize(
    "name", ["noise-flux1", "noise-qwen", "noise-krea2", "noise-anima", "noise-qwen21"]
)
def test_a_picture_in_tiles_looks_like_the_whole_one(
    name: str, make_generator: Callable[..., OnItsThread]
) -> None:
    stage = stage_of(name, 256, steps=2)
    made = make_generator(guard=MemoryGuard(10**12, gpu=False))
    whole = made.draw(stage)
    made.generator.guard = MemoryGuard(10**12, gpu=False, tiling=128)
    tiled = made.draw(stage)
    again = made.draw(stage)
    made.generator.guard = MemoryGuard(10**12, gpu=False)
    assert made.draw(stage).picture.tobytes() == whole.picture.tobytes()
    assert tiled.picture.tobytes() == again.picture.tobytes()
    assert tiled.picture.size == whole.picture.size
    difference = np.abs(np.asarray(whole.picture, int) - np.asarray(tiled.picture, int)).mean()
    assert 0 < difference < np.asarray(whole.picture).std()
    assert "vae_tiling" not in (whole.metadata or {})
    assert (tiled.metadata or {})["vae_tiling"] == 128


ENCODES = [
    (name, pipeline)
    for name in ("noise-z-image", "noise-flux2", "noise-flux3", "noise-fibo2", "noise-ernie")
    for pipeline in allow(name).default.pipelines
    if not pipeline.inpaints and {Takes.IMAGES, Takes.INIT_IMAGE} & pipeline.takes
]
"""Families whose decoders work in strips."""


@pytest.mark.parametrize(("name", "pipeline"), ENCODES)
def test_a_source_is_encoded_in_the_tiles_of_the_plan(
    name: str,
    pipeline: Pipeline,
    make_generator: Callable[..., OnItsThread],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mflux.models.common.vae.vae_tiler import VAETiler

    sizes: list[tuple[int, ...]] = []
    encode = VAETiler.encode_image_tiled

    def noted(*, image: Any, tile_size: tuple[int, int], **others: Any) -> Any:
        sizes.append((image.shape[-1], *tile_size))
        return encode(image=image, tile_size=tile_size, **others)

    monkeypatch.setattr(VAETiler, "encode_image_tiled", noted)
    Image.new("RGB", (128, 128), "red").save(tmp_path / "a.png")
    picture = InputImage("a", 128, 128)
    given: dict[str, Any] = {"images": (picture,)}
    if Takes.IMAGES not in pipeline.takes:
        given = {"init_image": picture, "image_strength": 0.5}
    params = params_for(model=name, width=128, height=128, steps=2, **given)
    made = make_generator(guard=MemoryGuard(10**12, gpu=False, tiling=64), inputs=tmp_path)
    made.draw(Stage(LoadSpec(allow(name).default, pipeline, None), params))
    assert sizes
    assert all(size == (128, 64, 64) for size in sizes)


def test_every_size_up_to_the_limit_is_drawn_or_refused_with_the_figure(
    make_generator: Callable[..., OnItsThread],
) -> None:
    """The limit lets pass 256 x 256 pixels whole, 512 in tiles and 2048 not at all."""
    sizes = {side: stage_of("noise-flux1", side, steps=1) for side in (256, 512, 2048)}
    limit = int(1.05 * (PROCESS_BYTES + 1.1 * decoding_of(sizes[512], 256) + 1e7))
    made = make_generator(guard=MemoryGuard(10**12, gpu=False))
    made.load(sizes[256])
    made.generator.guard = guard = Anywhere(limit)
    guard.learn_weights(sizes[256].load_spec, made.generator.memory.weights_bytes)
    assert made.draw(sizes[256]).metadata == made.draw(sizes[256]).metadata
    assert (made.draw(sizes[512]).metadata or {})["vae_tiling"] == 256
    with pytest.raises(DoesNotFit, match="2048 x 2048, decoded in tiles of 256, needs about"):
        made.draw(sizes[2048])
    assert made.generator.refusal(sizes[2048])
    assert made.draw(sizes[256]).picture.size == (256, 256)


def decoding_of(stage: Stage, tile: int | None) -> float:
    return picture_memory(stage, tile, gpu=False).decoding


class Anywhere(MemoryGuard):
    """A guard that looks only at the limit: the process of the tests has memory of other tests."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes, gpu=False)

    def _free_bytes(self) -> float:
        return math.inf

    def learn(self, stage: Stage, tile: object, measured: PictureMemory) -> None:
        """The peak of this process is that of other tests, too."""


def test_models_are_unloaded_to_make_a_picture_fit(
    make_generator: Callable[..., OnItsThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stage_of("noise-flux1", 64, steps=1), stage_of("noise-flux2", 64, steps=1)
    made = make_generator(models_in_memory=2, guard=MemoryGuard(10**12, gpu=False))
    made.load(first)
    made.load(second)
    generator = made.generator
    assert set(generator.resident) == {first.load_spec.key, second.load_spec.key}

    def available() -> int:
        return 10**12 if len(generator.resident) == 1 else 0

    monkeypatch.setattr(memory_guard, "available_bytes", available)
    assert made.draw(second).picture.size == (64, 64)
    assert list(generator.resident) == [second.load_spec.key]


def test_a_picture_is_refused_when_other_programs_use_the_memory(
    make_generator: Callable[..., OnItsThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of("noise-flux1", 64, steps=1)
    made = make_generator(guard=MemoryGuard(10**12, gpu=False))
    made.load(stage)
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: 1000)
    assert made.generator.refusal(stage) is None
    with pytest.raises(DoesNotFit, match=r"0\.0 GB are free: other programs"):
        made.draw(stage)
    monkeypatch.undo()
    assert made.draw(stage).picture.size == (64, 64)


def test_the_tiles_of_a_plan_are_mfluxs_own_first() -> None:
    from mflux.models.common.vae.tiling_config import TilingConfig

    assert TILES[0] == TilingConfig().vae_decode_tile_size
    assert replace(Plan(), tile=TILES[0]).tile == 512
