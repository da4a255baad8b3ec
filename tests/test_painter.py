"""The built-in model: its pictures, its checkpoint in mflux's classes, its trainer, its measure."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageStat

from models.mlx_setup import prepare_mlx
from models.painter import batches, checkpoint, evaluation, patches, style, training, vocabulary
from models.painter.captions import caption
from models.painter.dimensions import Dimensions
from models.painter.grammar import NAMES, Scene, Thing, completed, placed_things, random_scene
from models.painter.layout import COUNT, MIDDLE, Layout, layout_of
from models.painter.rendering import render
from models.painter.style import INKS, woodcut

SMALL = Dimensions(width=64, heads=2, layers=2, clip_layers=1, t5_layers=1)
PROMPT = "a red ball to the left of a blue star"


@pytest.fixture(scope="module")
def transform() -> patches.Patches:
    return training.fit_patches((60, 60, 10))


@pytest.fixture(scope="module")
def folder(transform: patches.Patches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painter")
    weights = checkpoint.initial_weights(SMALL, transform, seed=3)
    checkpoint.pack(folder / "weights.safetensors", weights)
    checkpoint.unpack(folder / "model", folder / "weights.safetensors")
    return folder / "model"


@pytest.fixture(scope="module")
def flux(folder: Path) -> Any:
    prepare_mlx()
    return checkpoint.load(folder, SMALL)


def pictures(count: int, side: int, *, first: int = 5000) -> Any:
    drawn = [
        render(random_scene(Random(number)), side, side, layout(number))
        for number in range(first, first + count)
    ]
    return np.stack([np.asarray(picture, np.float32) / 127.5 - 1 for picture in drawn])


def layout(seed: int) -> Layout:
    random = Random(seed)
    return Layout(tuple(random.uniform(-1, 1) for _ in range(COUNT)))


def difference(one: Image.Image, other: Image.Image) -> float:
    means = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return sum(means) / len(means)


def test_the_same_seed_gives_the_same_scene_caption_and_picture() -> None:
    drawn = []
    for _ in range(2):
        random = Random(7)
        scene = random_scene(random)
        drawn.append((scene, caption(scene, random), render(scene, 96, 64, layout(7)).tobytes()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_looks_the_same_at_each_size(name: str) -> None:
    scene = Scene("meadow", "sunset", ("clouds",), (Thing(name, "red"),))
    small, large = (render(scene, side, side, layout(1)) for side in (128, 512))
    assert difference(small, large.resize((128, 128), Image.Resampling.BOX)) < 3


def test_the_noise_decides_what_the_caption_leaves_open() -> None:
    noise = np.random.default_rng(5).standard_normal((200, 4, 64), np.float32)
    layouts = [layout_of(picture) for picture in noise]
    values = np.array([one.values for one in layouts])
    assert values.shape == (200, COUNT)
    assert np.abs(values).max() < 1
    assert np.abs(np.quantile(values, [0.25, 0.5, 0.75]) - [-0.5, 0, 0.5]).max() < 0.03

    ball = Scene("meadow", things=(Thing("ball", "red"),))
    places = {placed_things(ball, one)[0].x for one in layouts}
    assert len(places) == 200
    grounds = {completed(Scene(""), one).ground for one in layouts}
    assert grounds == {"meadow", "sea", "snow", "mountains"}
    named = Scene("sea", "night", ("moon",))
    assert all(completed(named, one) == named for one in layouts)


@pytest.mark.parametrize("size", [(16, 16), (336, 64), (64, 336), (1024, 576)])
def test_scenes_are_drawn_in_any_format(size: tuple[int, int]) -> None:
    for number in range(6):
        assert render(random_scene(Random(number)), *size, layout(number)).size == size


def test_edges_are_smooth() -> None:
    scene = Scene("plain", things=(Thing("ball", "black"),), plain="white")
    colours = render(scene, 128, 128, MIDDLE).convert("L").getcolors()
    assert colours is not None
    assert len(colours) > 30


def test_each_word_of_the_captions_is_one_token_for_both_tokenizers(flux: Any) -> None:
    assert {"red", "lighthouse", "sunset", "left"} < set(vocabulary.words())
    for word in vocabulary.words():
        for form in (word, word.capitalize(), word.upper()):
            t5 = flux.tokenizers["t5"].tokenize(form).input_ids[0].tolist()
            assert t5[1:3] == [vocabulary.END, vocabulary.PAD], form
            clip = flux.tokenizers["clip"].tokenize(form).input_ids[0].tolist()
            assert len(set(clip)) == 3, form  # start, word, end


def test_captions_fit_into_the_text_of_the_model(flux: Any) -> None:
    random = Random(1)
    cut, strange, used = 0, 0, set()
    for _ in range(600):
        scene = random_scene(random)
        words = caption(scene, random).split()
        known = [word for word in words if word in vocabulary.words()]
        used.update(known)
        strange += len(known) < len(words)
        tokens = flux.tokenizers["t5"].tokenize(" ".join(known) or "sea").input_ids[0].tolist()
        cut += tokens[-1] not in {vocabulary.PAD, vocabulary.END}
    assert cut <= 6
    assert 20 < strange < 120, "some captions hold words that nobody knows"
    assert used == set(vocabulary.words())


def test_words_that_no_caption_holds_are_read_letter_by_letter(flux: Any) -> None:
    tokens = flux.tokenizers["t5"].tokenize("zzyx").input_ids[0].tolist()
    assert tokens.index(vocabulary.END) == 5  # the space, four letters
    assert vocabulary.UNKNOWN not in tokens


@pytest.mark.parametrize(("side", "least"), [(128, 29), (256, 32), (512, 34)])
def test_the_patch_transform_keeps_pictures(
    transform: patches.Patches, side: int, least: float
) -> None:
    shown = pictures(8, side)
    again = transform.decode(transform.encode(shown)).clip(-1, 1)
    decibels = -10 * np.log10(np.mean((shown - again) ** 2) / 4)  # of a range of -1 to 1
    assert decibels > least


def test_mfluxs_vae_computes_the_patch_transform(flux: Any, transform: patches.Patches) -> None:
    import mlx.core as mx

    shown = pictures(1, 64)
    latents = flux.vae.encode(mx.array(shown.transpose(0, 3, 1, 2)))
    expected = transform.encode(shown)
    found = np.array(latents)[:, :, 0].transpose(0, 2, 3, 1)
    assert np.abs(found - expected).max() < 0.01
    decoded = np.array(flux.vae.decode(latents))[:, :, 0].transpose(0, 2, 3, 1)
    assert np.abs(decoded - transform.decode(expected)).max() < 0.03


def test_batches_are_computed_as_mflux_computes_single_prompts(flux: Any) -> None:
    import mlx.core as mx

    from models.painter.batched import encode_clip, encode_t5

    prompts = [PROMPT, "the sea at night"]
    tokens = {n: flux.tokenizers[n].tokenize(prompts).input_ids for n in ("t5", "clip")}
    t5 = encode_t5(flux.t5_text_encoder, tokens["t5"])
    clip = encode_clip(flux.clip_text_encoder, tokens["clip"])
    for layer in flux.clip_text_encoder.text_model.encoder.layers:
        layer.self_attn.batch_size = 1
    for number in range(2):
        one = flux.t5_text_encoder(tokens["t5"][number : number + 1])
        assert mx.allclose(t5[number], one[0], atol=1e-3)
        pooled = flux.clip_text_encoder(tokens["clip"][number : number + 1])
        assert mx.allclose(clip[number], pooled[0], atol=1e-3)


@pytest.mark.parametrize(("width", "height"), [(128, 64), (304, 272)])
def test_a_trained_prediction_is_what_mflux_draws_with(flux: Any, width: int, height: int) -> None:
    import mlx.core as mx
    from mflux.models.common.config.config import Config

    from models.painter.batched import predict, rotary_table

    config = Config(
        width=width, height=height, model_config=flux.model_config, num_inference_steps=4
    )
    mx.random.seed(1)
    texts = mx.random.normal((1, vocabulary.T5_LENGTH, SMALL.text_width))
    pooled = mx.random.normal((1, SMALL.text_width))
    noise = mx.random.normal((1, width * height // 256, 64))
    expected = flux.transformer(
        t=1, config=config, hidden_states=noise, prompt_embeds=texts, pooled_prompt_embeds=pooled
    )
    sigmas = batches.schedule(4)
    assert np.allclose(sigmas, np.array(config.scheduler.sigmas)[:4], atol=1e-5)
    table = rotary_table(flux.transformer, height, width, vocabulary.T5_LENGTH)
    found = predict(flux.transformer, noise, mx.array(sigmas[1:2]), texts, pooled, table)
    # mflux rounds the noise level to half precision.
    assert mx.abs(found - expected).max() < 0.02 * mx.abs(expected).max()


def test_fast_functions_and_their_slopes_are_those_of_mlx() -> None:
    prepare_mlx()
    import mlx.core as mx
    from mlx import nn

    from models.painter.functions import fast_gelu, fast_softmax

    values = mx.linspace(-30, 30, 5001)
    scores = mx.random.normal((5, 40), key=mx.random.key(1)) * 10
    weights = mx.random.normal((5, 40), key=mx.random.key(2))
    for fast, exact, given, factor in (
        (fast_gelu, nn.gelu_approx, values, mx.sin(values)),
        (fast_softmax, partial(mx.softmax, axis=-1), scores, weights),
    ):
        assert mx.allclose(fast(given), exact(given), atol=3e-4)
        found, expected = (
            mx.grad(lambda x, function=function, factor=factor: (function(x) * factor).sum())(given)
            for function in (fast, exact)
        )
        assert mx.allclose(found, expected, atol=5e-3)


def test_latents_are_packed_as_mflux_packs_them() -> None:
    prepare_mlx()
    import mlx.core as mx
    from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

    latents = np.arange(4 * 6 * 16, dtype=np.float32).reshape(1, 4, 6, 16)
    expected = FluxLatentCreator.pack_latents(mx.array(latents.transpose(0, 3, 1, 2)), 32, 48)
    assert np.array_equal(batches.packed(latents), np.array(expected))


def test_attention_in_small_pictures_is_that_of_flux(flux: Any) -> None:
    import mlx.core as mx
    from mflux.models.flux.model.flux_transformer.single_block_attention import (
        SingleBlockAttention,
    )

    from models.painter.batched import rotary_table

    attention = flux.transformer.single_transformer_blocks[1].attn
    original = SingleBlockAttention()
    original.num_heads, original.head_dimension = SMALL.heads, SMALL.width // SMALL.heads
    for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
        setattr(original, name, getattr(attention, name))
    table = rotary_table(flux.transformer, 256, 256, vocabulary.T5_LENGTH)
    hidden = mx.random.normal((1, vocabulary.T5_LENGTH + 256, SMALL.width))
    assert mx.allclose(attention(hidden, table), original(hidden, table), atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (272, 64), (576, 320)])
def test_flux1_draws_with_the_checkpoint_at_any_size(flux: Any, size: tuple[int, int]) -> None:
    width, height = size
    drawn = [
        flux.generate_image(
            seed=seed, prompt=PROMPT, num_inference_steps=1, width=width, height=height
        ).image
        for seed in (1, 1, 2)
    ]
    assert drawn[0].size == size
    assert drawn[0].tobytes() == drawn[1].tobytes() != drawn[2].tobytes()


@pytest.mark.slow
def test_training_lowers_the_loss_and_goes_on_where_it_stopped(
    transform: patches.Patches, tmp_path: Path
) -> None:
    prepare_mlx()
    narrow = Dimensions(width=64, heads=2, layers=1, clip_layers=1, t5_layers=1)
    size = batches.Bucket(32, 32, 16)
    plan = training.Plan(16, rate=3e-3, warm_up=4, lessons=2, size=size)
    whole = training.Trainer(tmp_path / "whole", plan, narrow, transform)
    losses = [whole.train_step()[0] for _ in range(16)]
    assert sum(losses[-5:]) < sum(losses[:5])

    first = training.Trainer(tmp_path / "parts", plan, narrow, transform)
    begun = [first.train_step()[0] for _ in range(5)]
    first.save()
    second = training.Trainer(tmp_path / "parts", plan, narrow, transform)
    continued = [second.train_step()[0] for _ in range(5)]
    assert np.allclose(begun + continued, losses[:10], rtol=1e-3)

    whole.export()
    plan = replace(plan, start=tmp_path / "whole" / "weights.safetensors")
    training.Trainer(tmp_path / "further", plan, narrow, transform).export()
    from mlx.utils import tree_flatten

    before, after = (
        dict(tree_flatten(checkpoint.load(tmp_path / name / "model", narrow).parameters()))
        for name in ("whole", "further")
    )
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name


def test_things_with_hard_outlines_are_in_more_pictures_of_the_training() -> None:
    random = Random(5)

    def share(draw: Callable[[Random], Scene]) -> float:
        scenes = [draw(random) for _ in range(400)]
        return sum(any(thing.name in batches.HARD for thing in s.things) for s in scenes) / 400

    assert share(batches.training_scene) > 1.2 * share(random_scene)


def rendered(
    scenes: list[tuple[Scene, str]], size: tuple[int, int], _: str, number: int
) -> Image.Image:
    return render(scenes[number][0], *size, layout(number + 500))


@pytest.mark.slow
def test_the_measure_finds_what_is_there() -> None:
    scenes = evaluation.named_scenes(50, seed=11)
    for size in ((128, 128), (160, 96)):
        scores = evaluation.evaluate(partial(rendered, scenes, size), scenes)
        assert (scores.colour, scores.found, scores.side) == (1, 1, 1)


@pytest.mark.slow
def test_the_measure_finds_nothing_in_noise_and_little_in_pictures_of_something_else() -> None:
    scenes = evaluation.named_scenes(50, seed=11)
    random = np.random.default_rng(1)

    def noise(_: str, number: int) -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8))

    def another(_: str, number: int) -> Image.Image:
        return render(scenes[number - 1][0], 128, 128, layout(number))

    for draw in (noise, another):
        scores = evaluation.evaluate(draw, scenes)
        assert scores.colour < 0.15
        assert scores.found < 0.08
        assert scores.side < 0.15


def test_the_woodcut_has_four_inks() -> None:
    printed = woodcut(render(random_scene(Random(3)), 128, 128, MIDDLE))
    colours = printed.getcolors()
    assert colours is not None
    assert {colour for _, colour in colours} <= {tuple(ink) for ink in INKS.tolist()}
    assert len(colours) > 1


@pytest.mark.slow
def test_a_style_is_learned_and_mflux_applies_it(
    folder: Path, flux: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(style, "load", partial(checkpoint.load, dimensions=SMALL))
    trainer = style.StyleTrainer(folder, rate=1e-2)
    losses = [trainer.train_step(batches.Bucket(32, 32, 16)) for _ in range(12)]
    assert sum(losses[-4:]) < sum(losses[:4])
    trainer.save(tmp_path / "style.safetensors")
    with_style = checkpoint.load(folder, SMALL, lora=tmp_path / "style.safetensors")
    asked = {"seed": 1, "prompt": PROMPT, "num_inference_steps": 1, "width": 64, "height": 64}
    assert difference(flux.generate_image(**asked).image, with_style.generate_image(**asked).image)
