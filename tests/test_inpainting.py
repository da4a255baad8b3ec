"""Masks for models without inpainting weights: the source is kept outside the mask."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import allow, params_for
from masks import BOX, HEIGHT, MASK, SOURCE, TINY, WIDTH, box_of
from PIL import Image

from fields import Takes
from generation.inpainting import feathered, keeping_source
from generation.pipelines import arguments, build
from generation.previews import Previews
from generation.prompt_cache import PromptCache
from generation.step_hook import StepHook
from generator import MfluxGenerator
from images import to_png
from models import left_out
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Model, Pipeline
from task import InputImage, Phase, Stage

# -- the mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize("feather", [0, 1, 2, 7, 8])
def test_the_edge_of_a_mask_fades_outwards_over_exactly_the_pixels_asked_for(feather: int) -> None:
    greys = np.asarray(feathered(MASK, feather)).astype(int)
    left, top, right, bottom = BOX
    assert (greys[top:bottom, left:right] == 255).all()
    line = greys[32, right : right + feather + 1]
    assert line[-1] == 0
    assert (line[:-1] > 0).all()
    assert (np.diff([255, *line]) <= 0).all()
    outside = box_of((left - feather, top - feather, right + feather, bottom + feather))
    assert (greys[np.asarray(outside) == 0] == 0).all()


def test_a_mask_at_the_edge_of_the_picture_stays_white_there() -> None:
    greys = np.asarray(feathered(box_of((0, 0, 48, HEIGHT)), 8))
    assert (greys[:, :48] == 255).all()
    assert (greys[:, 56:] == 0).all()


def test_grey_values_count_as_black_or_white_as_in_mflux() -> None:
    for grey, expected in ((127, 0), (128, 255)):
        assert feathered(Image.new("L", (32, 32), grey), 0).getextrema() == (expected, expected)


FIBO = "fibo-lite"
"""The only family without a tiny model."""


class Networks:
    """Stands for the weights of FIBO. All else is mflux's own code."""

    def encode(self, image: Any) -> Any:
        import mlx.core as mx

        height, width = (side // 16 for side in image.shape[-2:])
        return mx.random.normal((1, 48, height, width), key=mx.random.key(7))

    def decode(self, latents: Any) -> Any:
        import mlx.core as mx

        return mx.zeros((1, 3, HEIGHT, WIDTH))

    def __call__(self, *, hidden_states: Any, **_: Any) -> Any:
        import mlx.core as mx

        return 5 * mx.sin(5 * hidden_states)


def inpainting_of(model: Model) -> Pipeline:
    (pipeline,) = (pipeline for pipeline in model.pipelines if pipeline.inpaints)
    return pipeline


def fibo_without_weights(model: Model, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object of mflux's class whose networks are replaced."""
    from mflux.callbacks.callback_registry import CallbackRegistry
    from mflux.models.common.config.model_config import AVAILABLE_MODELS
    from mflux.models.fibo.variants.txt2img import fibo

    pipeline = fibo.FIBO.__new__(fibo.FIBO)
    networks = Networks()
    parts: dict[str, Any] = {
        "vae": networks,
        "transformer": networks,
        "text_encoder": None,
        "tokenizers": {"fibo": None},
        "callbacks": CallbackRegistry(),
        "model_config": AVAILABLE_MODELS[model.name],
        "bits": None,
        "tiling_config": None,
    }
    for name, part in parts.items():
        object.__setattr__(pipeline, name, part)

    def encoded(prompt: str, **_: Any) -> tuple[str, None, None]:
        return prompt, None, None

    monkeypatch.setattr(fibo.PromptEncoder, "encode_prompt", staticmethod(encoded))
    return pipeline


class Spy:
    """Notes latents and noise levels, after the hook of the server."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, np.ndarray[Any, Any]]] = []

    def note(self, latents: Any, sigma: Any) -> None:
        import mlx.core as mx

        self.seen.append((float(sigma), np.array(latents.astype(mx.float32))))

    def call_before_loop(self, *, latents: Any, config: Any, **_: Any) -> None:
        self.note(latents, config.scheduler.sigmas[config.init_time_step])

    def call_in_loop(self, *, t: int, latents: Any, config: Any, **_: Any) -> None:
        self.note(latents, config.scheduler.sigmas[t + 1])


def latents_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Draws a picture with a mask; returns the latents of each step."""
    prepare_mlx()
    model = allow(name).default
    spec = LoadSpec(model, inpainting_of(model), None)
    for file, picture in (("source", SOURCE), ("mask", MASK)):
        (folder / f"{file}.png").write_bytes(to_png(picture))
    params = params_for(
        width=WIDTH,
        height=HEIGHT,
        steps=6,
        init_image=InputImage("source", WIDTH, HEIGHT),
        mask=InputImage("mask", WIDTH, HEIGHT),
        image_strength=0.2,
        mask_feather=0,
    )
    stage = Stage(spec, params)
    pipeline = build(spec, folder)[0] if model.tiny else fibo_without_weights(model, monkeypatch)
    hook, spy = StepHook(PromptCache(1000), lambda: None, Previews(on=False)), Spy()
    pipeline.callbacks.register(hook)
    pipeline.callbacks.register(spy)
    with keeping_source(stage, folder) as kept, hook.picture(lambda *_: None, kept):
        pipeline.generate_image(**arguments(stage, folder))
    return spy


@pytest.mark.parametrize("name", [*TINY, FIBO])
def test_latents_outside_the_mask_are_those_of_the_source_at_the_noise_of_each_step(
    name: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is what is left at the end, the noise what the first latents add to it."""
    with ThreadPoolExecutor(1) as thread:  # MLX wants one of its own
        seen = thread.submit(latents_of, name, data_dir, monkeypatch).result().seen
    assert [sigma for sigma, _ in seen] == sorted({sigma for sigma, _ in seen}, reverse=True)
    assert len(seen) == 6
    (first_sigma, first), (last_sigma, clean) = seen[0], seen[-1]
    assert last_sigma == 0
    noise = (first - (1 - first_sigma) * clean) / first_sigma
    rows, columns = (HEIGHT // 16, WIDTH // 16) if clean.ndim == 3 else clean.shape[-2:]
    box = MASK.resize((columns, rows), Image.Resampling.BOX)
    inside = np.asarray(box) > 0
    inside = inside.reshape((1, -1, 1) if clean.ndim == 3 else (1, 1, rows, columns))
    inside = np.broadcast_to(inside, clean.shape)
    off = [np.abs(latents - (1 - sigma) * clean - sigma * noise) for sigma, latents in seen[1:]]
    assert max(step[~inside].max() for step in off) < 0.08  # bfloat16 in some families
    assert max(step[inside].max() for step in off) > 0.3


def drawn_twice(folder: Path) -> tuple[bytes, bytes]:
    """The same picture, alone and with others drawn between its steps."""
    prepare_mlx()
    model = allow("noise-flux1").default
    spec = LoadSpec(model, inpainting_of(model), None)
    for file, picture in (("source", SOURCE), ("mask", MASK), ("other", SOURCE.rotate(180))):
        (folder / f"{file}.png").write_bytes(to_png(picture))
    params = params_for(
        width=WIDTH,
        height=HEIGHT,
        init_image=InputImage("source", WIDTH, HEIGHT),
        mask=InputImage("mask", WIDTH, HEIGHT),
        image_strength=0.3,
        mask_feather=4,
    )
    other = params.model_copy(
        update={"seed": 9, "init_image": InputImage("other", WIDTH, HEIGHT), "prompt": "a fox"}
    )
    plain = other.model_copy(update={"mask": None, "mask_feather": None})
    generator = MfluxGenerator(folder)
    generator.load(spec)

    def draw_others(phase: Phase, done: int, total: int) -> None:
        if phase is Phase.DENOISING:
            for stage in (
                Stage(spec, other),
                Stage(LoadSpec(model, model.pipelines[0], None), plain),
            ):
                generator.generate(stage, folder, lambda *_: None)

    alone = generator.generate(Stage(spec, params), folder, lambda *_: None)
    preempted = generator.generate(Stage(spec, params), folder, draw_others)
    generator.unload()
    return alone.picture.tobytes(), preempted.picture.tobytes()


def test_pictures_drawn_between_two_steps_change_nothing(data_dir: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        alone, preempted = thread.submit(drawn_twice, data_dir).result()
    assert alone == preempted


def test_the_families_that_are_drawn_are_all_that_inpaint() -> None:
    families = {
        model.family
        for model in read_catalog().models
        if any(pipeline.inpaints for pipeline in model.pipelines)
    }
    assert families == {allow(name).default.family for name in (*TINY, FIBO)}


def test_each_class_of_mflux_takes_a_mask_or_it_is_said_why_not() -> None:
    drawing = {p.name: p for model in read_catalog().models for p in model.pipelines}
    masked = {
        pipeline.name
        for model in read_catalog().models
        for pipeline in model.pipelines
        if Takes.MASK in pipeline.takes
    }
    assert set(left_out.MASKS) == set(drawing) - masked
    for name in left_out.MASKS:
        assert Takes.IMAGE_STRENGTH not in drawing[name].takes
    for model in read_catalog().models:
        own = [p for p in model.pipelines if Takes.MASK in p.takes and not p.inpaints]
        for pipeline in own:
            given = pipeline.needs | {Takes.PROMPT, Takes.MASK}
            assert model.pipeline_for(given) is pipeline
