"""Masks for models without inpainting weights: the source is kept outside the mask."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ServerProcess, allow, params_for
from PIL import Image

from fields import MASK_FEATHER, Takes
from generation.inpainting import feathered, keeping_source
from generation.pipelines import arguments, build
from generation.previews import Previews
from generation.prompt_cache import PromptCache
from generation.step_hook import StepHook
from generator import MfluxGenerator
from images import read_metadata, to_base64, to_png
from models import left_out, tiny_models
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Model, Pipeline
from task import InputImage, Phase, Stage

WIDTH, HEIGHT = 96, 64
BOX = (32, 16, 64, 48)
"""Left, upper, right, lower edge of what is redrawn: whole latents of every family."""


def box_of(box: tuple[int, int, int, int], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


SOURCE = Image.merge(
    "RGB", [Image.radial_gradient("L").rotate(90 * n).resize((WIDTH, HEIGHT)) for n in range(3)]
)
MASK = box_of(BOX)


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


# -- the latents, in the loops of mflux ------------------------------------------------------------


TINY = (
    "noise-flux1",
    "noise-flux2",
    "noise-z-image",
    "noise-qwen",
    "noise-krea2",
    "noise-ernie",
    "noise-qwen21",
)
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


# -- through the whole server ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    loras = tmp_path_factory.mktemp("loras")
    tiny_models.write_lora(loras / "wild.safetensors", "noise-flux1")
    process = ServerProcess(
        tmp_path_factory.mktemp("server"),
        *("--models", ",".join((*TINY, "noise-seedvr2"))),
        *("--models-in-memory", "8"),
        *("--lora-dir", str(loras)),
    )
    yield process
    assert process.stop() == 0
    assert "Traceback" not in "".join(process.log)


ASKED: dict[str, Any] = {
    "prompt": "a door",
    "width": WIDTH,
    "height": HEIGHT,
    "steps": 4,
    "seed": 1,
    "format": "PNG",
    "init_image": to_base64(to_png(SOURCE)),
    "mask": to_base64(to_png(MASK)),
}


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {name: value for name, value in (ASKED | fields).items() if value is not None}
    return requests.post(server.url + "/generate", json=body, timeout=60)


def files_of(server: ServerProcess, **fields: Any) -> list[bytes]:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    task_id = answer.json()["task_id"]
    assert server.wait_until_ended(task_id)["status"] == "done"
    return [
        server.get("/image", task_id=task_id, index=index, delete="false").content
        for index in range(fields.get("count", 1))
    ]


def pixels(file: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(file)).convert("RGB"))


def inside(feather: int = 0) -> np.ndarray[Any, Any]:
    left, top, right, bottom = BOX
    return (
        np.asarray(box_of((left - feather, top - feather, right + feather, bottom + feather))) > 0
    )


def keeps_source(file: bytes, feather: int = MASK_FEATHER) -> bool:
    outside = ~inside(feather)
    return bool((pixels(file)[outside] == np.asarray(SOURCE)[outside]).all())


@pytest.mark.parametrize("model", TINY)
def test_pixels_outside_the_feathered_mask_are_those_of_the_source(
    server: ServerProcess, model: str
) -> None:
    (file,) = files_of(server, model=model)
    drawn = pixels(file)
    assert keeps_source(file)
    changed = (drawn != np.asarray(SOURCE)).any(axis=2)
    assert changed[inside()].mean() > 0.9
    assert changed[inside(MASK_FEATHER) & ~inside()].any()
    assert files_of(server, model=model) == [file]
    other_seed, other_prompt, hard_edge, plain = (
        files_of(server, model=model, **change)[0]
        for change in ({"seed": 2}, {"prompt": "a fox"}, {"mask_feather": 0}, {"mask": None})
    )
    assert keeps_source(other_seed)
    assert (pixels(other_seed)[inside()] != drawn[inside()]).any()
    assert (pixels(other_prompt)[inside()] != drawn[inside()]).any()
    assert keeps_source(hard_edge, feather=0)
    assert not keeps_source(plain)
    metadata = read_metadata(file)
    assert metadata
    assert (metadata["image_strength"], metadata["mask_feather"]) == (0.4, MASK_FEATHER)
    assert metadata["masked_image_path"].endswith(".png")


def test_each_picture_of_a_task_keeps_the_source(server: ServerProcess) -> None:
    first, second = files_of(server, model="noise-flux1", count=2)
    assert keeps_source(first)
    assert keeps_source(second)
    assert (pixels(first) != pixels(second)).any()
    assert files_of(server, model="noise-flux1", seed=2)[0] == second


def test_a_lora_draws_inside_the_mask_only(server: ServerProcess) -> None:
    (plain,) = files_of(server, model="noise-flux1")
    (styled,) = files_of(server, model="noise-flux1", loras=["wild"])
    assert keeps_source(styled)
    assert (pixels(styled)[inside()] != pixels(plain)[inside()]).any()


def test_what_was_inpainted_is_upscaled(server: ServerProcess) -> None:
    (plain,) = files_of(server, model="noise-flux1")
    (enlarged,) = files_of(server, model="noise-flux1", upscale=2)
    (apart,) = files_of(
        server,
        model="noise-seedvr2",
        init_image=to_base64(plain),
        upscale=2,
        **dict.fromkeys(("prompt", "mask", "width", "height", "steps")),
    )
    assert pixels(enlarged).shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert (pixels(enlarged) == pixels(apart)).all()


def test_mask_and_source_are_scaled_to_the_result(server: ServerProcess) -> None:
    (file,) = files_of(server, model="noise-flux1")
    twice = box_of((64, 32, 128, 96), (2 * WIDTH, 2 * HEIGHT))
    (scaled,) = files_of(server, model="noise-flux1", mask=to_base64(to_png(twice)))
    assert (pixels(scaled) == pixels(file)).all()
    large = SOURCE.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST)
    (small,) = files_of(server, model="noise-flux1", init_image=to_base64(to_png(large)))
    difference = pixels(small).astype(int) - np.asarray(SOURCE)
    assert np.abs(difference[~inside(MASK_FEATHER)]).mean() < 3


def test_a_black_mask_returns_the_source_and_a_white_one_redraws_all(
    server: ServerProcess,
) -> None:
    black, white = (Image.new("L", (WIDTH, HEIGHT), grey) for grey in (0, 255))
    (kept,) = files_of(server, model="noise-flux1", mask=to_base64(to_png(black)))
    assert (pixels(kept) == np.asarray(SOURCE)).all()
    (drawn,) = files_of(server, model="noise-flux1", mask=to_base64(to_png(white)))
    (plain,) = files_of(server, model="noise-flux1", mask=None)
    assert (pixels(drawn) == pixels(plain)).all()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"init_image": None}, "init_image"),
        ({"mask": None, "mask_feather": 4}, "mask"),
        ({"mask_feather": -1}, "mask_feather"),
        ({"mask_feather": 257}, "mask_feather"),
        ({"steps": 1}, "steps"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(
    server: ServerProcess, fields: dict[str, Any], field: str
) -> None:
    answer = post(server, model="noise-flux1", **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


def test_models_lists_the_mask_and_the_answer_its_defaults(server: ServerProcess) -> None:
    models = {model["name"]: model for model in server.get("/models").json()["models"]}
    for name in TINY:
        assert {"mask", "mask_feather", "image_strength"} <= set(models[name]["takes"])
        assert models[name]["needs"] == []
    assert models["noise-flux1"]["classes"] == ["Flux1"]
    assert "mask" not in models["noise-seedvr2"]["takes"]
    assert "mask_feather" not in models["dev-fill"]["takes"]
    params = post(server, model="noise-flux1", upscale=2).json()["params"]
    assert (params["image_strength"], params["mask_feather"]) == (0.4, MASK_FEATHER)


def test_the_mask_of_automatic1111_works_with_every_img2img_model(server: ServerProcess) -> None:
    body = {
        **{name: ASKED[name] for name in ("prompt", "seed", "steps", "width", "height", "mask")},
        "init_images": [ASKED["init_image"]],
        "denoising_strength": 0.6,
        "mask_blur": 4,
    }
    answer = requests.post(server.url + "/sdapi/v1/img2img", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["images"]
    assert json.loads(answer.json()["info"])["denoising_strength"] == 0.6
    (same,) = files_of(server, model="noise-flux1", image_strength=0.4, mask_feather=4)
    assert (pixels(base64.b64decode(image)) == pixels(same)).all()
    refused = requests.post(
        server.url + "/sdapi/v1/img2img", json={**body, "mask_blur": "much"}, timeout=60
    )
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith("mask_blur")


def test_an_openai_edit_with_a_mask_works_with_every_img2img_model(server: ServerProcess) -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), BOX)
    fields = {"prompt": "a door", "seed": 1, "size": f"{WIDTH}x{HEIGHT}", "output_format": "png"}
    answer = requests.post(
        server.url + "/v1/images/edits",
        data=fields,
        files={"image": ("a.png", to_png(SOURCE)), "mask": ("b.png", to_png(clear))},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    image = base64.b64decode(answer.json()["data"][0]["b64_json"])
    (same,) = files_of(server, model="noise-flux1")
    assert (pixels(image) == pixels(same)).all()
