"""What a picture takes of the memory: the figures that mflux publishes, and what was measured."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import params_for
from stages import GB, stage_of

from generation import memory_guard
from generation.memory_guard import MemoryGuard
from generation.picture_memory import (
    ACTIVATION_BYTES,
    ARCHITECTURES,
    ENCODED_IN_TILES,
    FEATURE_BYTES,
    STRIPS,
    PictureMemory,
    encoding_of_pictures,
    picture_memory,
)
from models.build_options import BuildOptions
from models.family_work import FAMILIES
from models.mflux_registry import find_model, read_catalog
from models.model_catalog import LoadSpec
from task import InputImage, Stage


def peak_gb(name: str, side: int, *, tile: int | None = None) -> float:
    return max(picture_memory(stage_of(name, side), tile, gpu=True)) / GB


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


@pytest.mark.parametrize(
    ("width", "tokens", "megabytes"),
    [(256, 1224, 48), (512, 1224, 104), (512, 2504, 207), (256, 4296, 175)],
)
def test_the_text_encoder_of_ideogram_takes_what_was_measured(
    width: int, tokens: int, megabytes: float
) -> None:
    """mflux's class of this width on a CPU, without the scores of its attention."""
    figures = ARCHITECTURES["ideogram4"]
    assert figures.features % 4096 == 0
    taken = tokens * (figures.features / 4096 * width) * FEATURE_BYTES.encoding
    assert taken / 1e6 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.parametrize(
    ("width", "tokens", "megabytes"), [(256, 1224, 104), (512, 1224, 213), (512, 2504, 434)]
)
def test_the_transformers_of_ideogram_take_what_was_measured(
    width: int, tokens: int, megabytes: float
) -> None:
    """mflux's class of this width on a CPU, with two layers or twelve."""
    figures = ARCHITECTURES["ideogram4"]
    features = figures.features / figures.width * width
    taken = tokens * features * FEATURE_BYTES.denoising
    assert taken / 1e6 == pytest.approx(megabytes, rel=0.1)


def test_ideogram_encodes_the_tokens_of_the_picture_too() -> None:
    from mflux.models.ideogram4.model.ideogram4_text_encoder import Ideogram4PromptEncoder
    from mflux.models.ideogram4.model.ideogram4_transformer.config import Ideogram4Config

    tokenizer: Any = SimpleNamespace(tokenize_one=lambda prompt: np.arange(20))
    encoded = [
        Ideogram4PromptEncoder.build_inputs(tokenizer, ["a"], height=side, width=side)
        for side in (512, 1024)
    ]
    lengths = [inputs["token_ids"].shape[1] for inputs in encoded]
    assert lengths == [20 + 1024, 20 + 4096]
    features = ARCHITECTURES["ideogram4"].features
    assert features == Ideogram4Config().llm_features_dim
    small, large = (
        picture_memory(stage_of("ideogram-4-fp8", side), None, gpu=True, text_tokens=20)
        for side in (512, 1024)
    )
    for of_small, of_large in (
        (small.encoding, large.encoding),
        (small.denoising, large.denoising),
    ):
        assert of_large / of_small == pytest.approx(lengths[1] / lengths[0])
    assert large.encoding == lengths[1] * features * FEATURE_BYTES.encoding
    assert [f for f, one in ARCHITECTURES.items() if one.features] == [
        family for family, work in FAMILIES.items() if work.text_with_picture
    ]


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
