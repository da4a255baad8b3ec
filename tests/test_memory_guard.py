"""Which pictures fit into memory, and which are decoded in tiles: the figures, and real mflux on
tiny models."""

import ast
import importlib.util
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

from errors import DoesNotFit
from fields import Takes
from generation import memory_guard
from generation.memory_guard import MemoryGuard, Plan
from generation.picture_memory import (
    ACTIVATION_BYTES,
    ARCHITECTURES,
    ENCODED_IN_TILES,
    STRIPS,
    TILES,
    PictureMemory,
    encoding_of_pictures,
    picture_memory,
)
from generation.process_memory import (
    PROCESS_BYTES,
    available_bytes,
    free_of_vm_stat,
    machine_bytes,
    used_bytes,
)
from generator import MfluxGenerator
from models.build_options import BuildOptions
from models.mflux_registry import find_model, read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Pipeline
from storage.state_store import WEIGHTS
from storage.task_store import TaskStore
from task import Drawn, InputImage, Stage

GB = 1e9


def stage_of(name: str, side: int = 1024, **params: Any) -> Stage:
    model = find_model(name)
    assert model
    pipeline = next(pipeline for pipeline in model.pipelines if not pipeline.inpaints)
    asked = params_for(model=name, width=side, height=side, **params)
    return Stage(LoadSpec(model, pipeline, None), asked)


def peak_gb(name: str, side: int, *, tile: int | None = None) -> float:
    return max(picture_memory(stage_of(name, side), tile, gpu=True)) / GB


# -- the figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "side", "weights_gb", "peak"),
    [
        ("anima-turbo", 1024, 5.6, 14.3),
        ("anima-turbo", 1024, 4.0, 12.7),
        ("anima-turbo", 1024, 3.1, 11.8),
        ("schnell", 1024, 0.17, 7.3),
        ("ming-image-design", 1024, 8.2, 14.5),
    ],
)
def test_the_peaks_that_mflux_publishes_are_met_within_a_quarter(
    model: str, side: int, weights_gb: float, peak: float
) -> None:
    assert weights_gb + peak_gb(model, side) == pytest.approx(peak, rel=0.25)


@pytest.mark.parametrize(("side", "peak"), [(1024, 1.6), (2048, 5.6)])
def test_decoders_that_work_in_strips_take_what_mflux_publishes(side: int, peak: float) -> None:
    decoding = picture_memory(stage_of("z-image-turbo", side), None, gpu=True).decoding
    assert 0.17 + decoding / GB == pytest.approx(peak, rel=0.25)


def test_a_tiled_decoder_takes_a_tile_and_the_finished_picture() -> None:
    whole, tiled = peak_gb("anima-turbo", 2048), peak_gb("anima-turbo", 2048, tile=512)
    assert whole > 30
    assert tiled < 5


# -- pictures that others are made from ------------------------------------------------------------

SOURCE = InputImage("a", 64, 64)


@pytest.mark.parametrize(
    ("name", "side", "megabytes"),
    [
        ("flux2-klein-4b", 256, 509),
        ("flux2-klein-4b", 384, 1001),
        ("qwen-image-edit", 256, 955),
        ("qwen-image-edit", 384, 1991),
    ],
)
def test_encoding_a_picture_takes_what_was_measured_at_real_size(
    name: str, side: int, megabytes: float
) -> None:
    """In 32 bits without a GPU (benchmarks/results/real_size.md)."""
    stage = stage_of(name, side, images=(InputImage("a", side, side),))
    encoding = encoding_of_pictures(stage, None, gpu=False)
    assert encoding / 1e6 == pytest.approx(megabytes, rel=0.25)


def test_a_source_is_encoded_whole_though_its_decoder_works_in_strips() -> None:
    alone, made = (
        picture_memory(stage_of("z-image-turbo", 2048, **given), None, gpu=True)
        for given in ({}, {"init_image": SOURCE, "image_strength": 0.5})
    )
    assert made.decoding == alone.decoding
    assert made.encoding > 2 * max(alone)


def test_a_source_that_does_not_fit_whole_is_encoded_in_tiles() -> None:
    guard = MemoryGuard(int(21 * GB), gpu=True)
    stage = stage_of("z-image-turbo", 2048, init_image=SOURCE, image_strength=0.5)
    guard.learn_weights(stage.load_spec, int(12 * GB))
    plan = guard.plan(stage)
    assert (plan.tile, plan.refusal) == (512, None)
    whole = MemoryGuard(int(21 * GB), gpu=True, tiling="off")
    whole.learn_weights(stage.load_spec, int(12 * GB))
    assert "A picture of 2048 x 2048 needs about" in (whole.plan(stage).refusal or "")
    assert guard.plan(stage_of("z-image-turbo", 2048)).tile is None


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("qwen-image-2.1", {"images": (SOURCE,)}),
        ("dev-controlnet-canny", {"control_image": SOURCE}),
        ("dev-fill", {"init_image": SOURCE, "mask": SOURCE}),
    ],
)
def test_what_mflux_encodes_whole_is_counted_so_in_tiles_too(
    name: str, given: dict[str, Any]
) -> None:
    stage = stage_of(name, 1024, **given)
    whole, tiled = (encoding_of_pictures(stage, tile, gpu=True) for tile in (None, 256))
    assert whole == tiled > GB


def test_reference_images_that_take_the_memory_are_named() -> None:
    guard = MemoryGuard(int(12 * GB), gpu=True)
    images = (InputImage("a", 1024, 1024),) * 4
    stage = stage_of("flux2-klein-4b", 64, images=images)
    guard.learn_weights(stage.load_spec, int(8 * GB))
    plan = guard.plan(stage)
    assert plan.field == "images"
    assert "A picture of 64 x 64, made from 4 reference images, needs" in (plan.refusal or "")
    assert "ask for fewer or smaller reference images" in (plan.refusal or "")
    assert guard.plan(stage_of("flux2-klein-4b", 64)).refusal is None


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("flux2-klein-4b", 64 * 64),
        ("qwen-image-edit", 512 * 512),
        ("dev-kontext", 512 * 512),
        ("qwen-image-2.1", 1024 * 1024),
    ],
)
def test_reference_pictures_count_with_the_size_that_mflux_gives_them(
    name: str, pixels: int
) -> None:
    alone, two, four = (
        picture_memory(stage_of(name, 512, images=(SOURCE,) * number), None, gpu=True).denoising
        for number in (0, 2, 4)
    )
    token = (four - two) / (2 * pixels / 256)
    assert two - alone == pytest.approx(2 * pixels / 256 * token)
    assert token == ARCHITECTURES[stage_of(name).load_spec.model.family].width * ACTIVATION_BYTES


def test_reference_pictures_take_memory_while_denoising() -> None:
    picture = (InputImage("a", 1024, 1024),)
    alone = picture_memory(stage_of("flux2-klein-4b", 512), None, gpu=True)
    with_reference = picture_memory(stage_of("flux2-klein-4b", 512, images=picture), None, gpu=True)
    assert with_reference.denoising > 2 * alone.denoising
    assert with_reference.decoding == alone.decoding


@pytest.mark.parametrize(
    ("tokens", "megabytes"), [(512, 110), (1024, 258), (2500, 868), (4096, 1502)]
)
def test_encoding_a_text_takes_what_was_measured_at_real_size(
    tokens: int, megabytes: float
) -> None:
    """Anima's encoder, in 32 bits without a GPU (benchmarks/results/real_size.md)."""
    text = picture_memory(stage_of("anima-turbo"), None, gpu=False, text_tokens=tokens).encoding
    assert text / 1e6 == pytest.approx(megabytes, rel=0.25)


def test_the_memory_of_a_text_depends_on_its_tokens_and_the_family() -> None:
    def of(name: str, prompt: str, **params: Any) -> float:
        stage = stage_of(name, prompt=prompt, **params)
        return picture_memory(stage, None, gpu=True).encoding

    long = 10_000 * "a"
    assert of("anima-turbo", long) > 20 * of("anima-turbo", "a lake")
    assert of("anima-turbo", "a lake", negative_prompt=long) == of("anima-turbo", long)
    assert of("z-image-turbo", long) == of("z-image-turbo", "a lake"), "it is filled up"
    kept, dropped = of("krea-2", long), of("ernie-image", long)
    assert kept / 1024 > dropped / 2048, "all layers of one are kept, of the other none"


def with_options(stage: Stage, **options: Any) -> Stage:
    model = replace(stage.load_spec.model, options=BuildOptions(**options))
    return replace(stage, load_spec=replace(stage.load_spec, model=model))


@pytest.mark.parametrize(("side", "peak"), [(1024, 1.2), (2048, 4.3)])
def test_the_small_decoder_takes_what_mflux_publishes(side: int, peak: float) -> None:
    stage = with_options(stage_of("flux2-klein-4b", side), small_decoder=True)
    decoding = picture_memory(stage, None, gpu=True).decoding
    assert 0.12 + decoding / GB == pytest.approx(peak, rel=0.25)


def test_the_small_text_encoder_takes_less_than_the_models_own() -> None:
    stage = stage_of("flux2-klein-4b")
    small = picture_memory(with_options(stage, small_text_encoder=True), None, gpu=True)
    assert small.encoding < picture_memory(stage, None, gpu=True).encoding / 4


def test_with_low_ram_ming_draws_without_its_text_encoder_in_memory() -> None:
    """mflux has measured 14.5 GB, for weights of about 19.3 GB."""
    stage = stage_of("ming-image-design")
    low = with_options(stage, low_ram=True)
    guard = MemoryGuard(int(22 * GB), gpu=True)
    for one in (stage, low):
        guard.learn_weights(one.load_spec, int(19.3 * GB))
    assert guard.plan(stage).tile == 512
    plan = guard.plan(low)
    assert (plan.tile, plan.refusal) == (None, None)
    assert 19.3 + plan.picture_bytes / GB < 22

    before = guard.plan(low)
    figures = picture_memory(low, None, gpu=True)
    released = 0.72 * 19.3 * GB
    measured = PictureMemory(figures.encoding, 0.0, max(figures.decoding - released, 0.0))
    guard.learn(low, None, measured)
    assert guard.plan(low) == before


def test_weights_that_were_released_need_their_room_again_for_the_next_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low = with_options(stage_of("ming-image-design"), low_ram=True)
    guard = MemoryGuard(int(22 * GB), gpu=True)
    guard.learn_weights(low.load_spec, int(19.3 * GB))
    monkeypatch.setattr(memory_guard, "used_bytes", lambda: int(6 * GB))
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: int(10 * GB))
    assert guard.plan_now(low, iter(())).refusal is None
    assert guard.plan_now(low, iter(()), 13.9 * GB).refusal


def test_a_prompt_that_is_too_long_for_the_memory_is_named_with_its_tokens() -> None:
    guard = MemoryGuard(int(6.7 * GB), gpu=False)
    stage = stage_of("anima-turbo", 64, prompt=20_000 * "a", steps=1)
    guard.learn_weights(stage.load_spec, int(5.6 * GB))
    plan = guard.plan(stage)
    refusal = plan.refusal or ""
    assert plan.field == "prompt"
    assert refusal.startswith("The text encoder with a prompt of 4096 tokens needs about 8.")
    assert "ask for a shorter prompt" in refusal
    guard.count_tokens = lambda model, text: 20
    assert guard.plan(stage).refusal is None


def test_two_pictures_beside_each_other_take_the_memory_of_both() -> None:
    dev = find_model("dev")
    assert dev
    alone, pair = (LoadSpec(dev, p, None) for p in dev.pipelines if not p.inpaints)
    params = params_for(model="dev", width=1024, height=1024)
    single, double = (picture_memory(Stage(w, params), None, gpu=True) for w in (alone, pair))
    assert double.decoding == 2 * single.decoding


def _sources(family: str) -> str:
    spec = importlib.util.find_spec(f"mflux.models.{family}")
    assert spec
    assert spec.submodule_search_locations
    files = Path(next(iter(spec.submodule_search_locations))).rglob("*.py")
    used = (file for file in files if "training" not in str(file))
    return "\n".join(ast.unparse(ast.parse(file.read_text())) for file in used)


@pytest.mark.parametrize("family", sorted({m.family for m in read_catalog().models if not m.tiny}))
def test_the_table_has_the_decoder_that_mflux_gives_each_family(family: str) -> None:
    source, figures = _sources(family), ARCHITECTURES[family]
    strips = "vae.decode_mode = " in source and "LOW_MEMORY" in source
    tiled = (not strips and "tiling_config=self.tiling_config)" in source.replace("\n", "")) or (
        "self.tiling_config)" in source and not strips
    )
    assert (figures.decoder_bytes == STRIPS) == strips
    assert figures.tiles == tiled
    assert figures.always_tiled == ("tiling_config = TilingConfig()" in source)
    assert (family in ENCODED_IN_TILES) == ("tiling_config = TilingConfig(" in source)


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
