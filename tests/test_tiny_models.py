"""The tiny models in mflux's own classes: each draws, repeats itself, heeds what it is asked."""

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_except
from PIL import Image, ImageChops, ImageDraw

from models import tiny_models
from models.mflux_registry import TINY_LORAS
from models.mlx_setup import prepare_mlx

Draw = Callable[..., Image.Image]
Request = dict[str, Any]

NAMES = tiny_models.ALL_TINY_MODELS
USUAL = ("noise-flux1", "noise-flux2")
WITH_LORA = [name for name in NAMES if tiny_models.PIPELINES[name].split(".")[2] in TINY_LORAS]


def load(name: str, data_dir: Path, quantize: int | None = None, **arguments: Any) -> Any:
    prepare_mlx()
    import mlx.core as mx
    from mflux.models.common.config.model_config import ModelConfig

    module, class_name = tiny_models.PIPELINES[name].split(":")
    with tiny_models.small_modules(name):
        pipeline = getattr(importlib.import_module(module), class_name)(
            quantize=quantize,
            model_path=str(tiny_models.ensure_checkpoint(name, data_dir)),
            model_config=ModelConfig(**tiny_models.TINY_CONFIGS[name]),
            **arguments,
        )
    tiny_models.slim(pipeline, name)
    mx.eval(pipeline.parameters())
    return pipeline


@pytest.fixture(scope="module")
def loaded(data_dir: Path) -> Callable[[str], Any]:
    """The unquantized models, each loaded once."""
    return cache(lambda name: load(name, data_dir))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files, because some of mflux's classes read an image's metadata from its path."""
    folder = tmp_path_factory.mktemp("images")
    circle, triangle = (Image.new("RGB", (64, 64), colour) for colour in ("white", "navy"))
    ImageDraw.Draw(circle).ellipse((8, 8, 40, 40), fill="black")
    ImageDraw.Draw(triangle).polygon((8, 60, 40, 4, 60, 60), fill="red")
    upper, left = Image.new("L", (64, 64), 0), Image.new("L", (64, 64), 0)
    upper.paste(255, (0, 0, 64, 32))
    left.paste(255, (0, 0, 32, 64))
    paths = {}
    for name, image in (
        ("circle", circle),
        ("triangle", triangle),
        ("upper", upper),
        ("left", left),
    ):
        paths[name] = str(folder / f"{name}.png")
        image.save(paths[name])
    return paths


def request_of(name: str, images: dict[str, str]) -> Request:
    """What generate_image() of this model's class needs."""
    circle = images["circle"]
    if name == "noise-seedvr2":
        return {"seed": 1, "image_path": circle, "resolution": 128}
    needed: dict[str, Request] = {
        "noise-kontext": {"image_path": circle},
        "noise-fill": {"image_path": circle, "masked_image_path": images["upper"]},
        "noise-redux": {"redux_image_paths": [circle]},
        "noise-controlnet": {"controlnet_image_path": circle},
        "noise-flux2-edit": {"image_paths": [circle]},
        "noise-z-image": {"guidance": 4.0},
        "noise-qwen": {"guidance": 4.0},
        "noise-krea2": {"guidance": 4.0},
        "noise-anima": {"guidance": 4.0},
        "noise-flux3": {"guidance": 4.0},
        "noise-flux3-edit": {"guidance": 4.0, "image_paths": [circle]},
        "noise-ernie": {"guidance": 4.0},
        "noise-qwen21": {"guidance": 4.0, "negative_prompt": "blue"},
        "noise-fibo2": {"guidance": 4.0},
        "noise-fibo2-edit": {"guidance": 4.0, "image_paths": [circle]},
    }
    text = {"seed": 1, "prompt": "a lighthouse", "num_inference_steps": 3}
    return {**text, "width": 64, "height": 64, **needed.get(name, {})}


def changes_of(name: str, images: dict[str, str]) -> list[Request]:
    """Each of them has to change the picture."""
    circle, triangle = images["circle"], images["triangle"]
    if name == "noise-seedvr2":
        return [{"seed": 2}, {"image_path": triangle}, {"resolution": 96}, {"softness": 0.5}]
    always: list[Request] = [
        {"seed": 2},
        {"prompt": "a fox"},
        {"num_inference_steps": 4},
        {"width": 96},
    ]
    img2img: list[Request] = [
        {"image_path": circle, "image_strength": 0.4},
        {"image_path": triangle, "image_strength": 0.4},
        {"image_path": circle, "image_strength": 0.7},
    ]
    guidance: Request = {"guidance": 2.5}
    own: dict[str, list[Request]] = {
        "tiny": img2img,
        "noise-flux1": img2img,
        "noise-kontext": [guidance, {"image_path": triangle}],
        "noise-fill": [
            guidance,
            {"image_path": triangle},
            {"masked_image_path": images["left"]},
        ],
        "noise-redux": [
            guidance,
            {"redux_image_paths": [triangle]},
            {"redux_image_paths": [circle, triangle]},
            {"redux_image_strengths": [0.3]},
        ],
        "noise-controlnet": [
            guidance,
            {"controlnet_image_path": triangle},
            {"controlnet_strength": 0.5},
        ],
        "noise-flux2": [guidance, *img2img],
        "noise-flux2-edit": [
            guidance,
            {"image_paths": [triangle]},
            {"image_paths": [circle, triangle]},
        ],
        "noise-z-image": [guidance, {"negative_prompt": "red"}, *img2img],
        "noise-qwen": [guidance, {"negative_prompt": "red"}, *img2img],
        "noise-krea2": [guidance, {"negative_prompt": "red"}, {"scheduler": "euler"}, *img2img],
        "noise-anima": [guidance, {"negative_prompt": "red"}, {"scheduler": "euler"}],
        "noise-flux3": [guidance],
        "noise-flux3-edit": [
            guidance,
            {"image_paths": [triangle]},
            {"image_paths": [circle, triangle]},
        ],
        "noise-ernie": [guidance, {"negative_prompt": "red"}, *img2img],
        "noise-qwen21": [guidance, {"negative_prompt": "red"}, *img2img],
        "noise-fibo2": [guidance, {"negative_prompt": "red"}, {"cfg_end": 0.4}],
        "noise-fibo2-edit": [
            guidance,
            {"negative_prompt": "red"},
            {"image_paths": [triangle]},
            {"mask_path": images["upper"]},
        ],
    }
    return [*always, *own[name]]


def draw(pipeline: Any, request: Request) -> Image.Image:
    picture: Image.Image = pipeline.generate_image(**request).image
    return picture


@pytest.mark.parametrize("name", slow_except(USUAL, NAMES))
def test_the_same_request_gives_the_same_picture(
    name: str, loaded: Callable[[str], Any], images: dict[str, str], data_dir: Path
) -> None:
    request = request_of(name, images)
    first = draw(loaded(name), request)
    assert draw(loaded(name), request).tobytes() == first.tobytes()
    assert draw(load(name, data_dir), request).tobytes() == first.tobytes()


@pytest.mark.parametrize("name", slow_except(USUAL, NAMES))
def test_the_picture_heeds_all_that_its_class_takes(
    name: str, loaded: Callable[[str], Any], images: dict[str, str]
) -> None:
    request = request_of(name, images)
    pictures = [draw(loaded(name), request)]
    for change in changes_of(name, images):
        picture = draw(loaded(name), {**request, **change})
        assert all(picture.tobytes() != other.tobytes() for other in pictures), change
        pictures.append(picture)
    assert len(pictures) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_neither_black_nor_constant(
    name: str, loaded: Callable[[str], Any], images: dict[str, str]
) -> None:
    size: Request = {"width": 128, "height": 128} if name != "noise-seedvr2" else {}
    picture = draw(loaded(name), {**request_of(name, images), **size})
    assert picture.size == (128, 128)
    for low, high in picture.convert("RGB").getextrema():  # type: ignore[misc]
        assert high - low > 60
    assert ImageChops.invert(picture).getbbox()


@pytest.mark.parametrize("name", slow_except(USUAL, NAMES))
@pytest.mark.parametrize("bits", [4, 8])
def test_they_are_quantized_for_real(
    name: str,
    bits: int,
    loaded: Callable[[str], Any],
    images: dict[str, str],
    data_dir: Path,
) -> None:
    request = request_of(name, images)
    quantized = load(name, data_dir, bits)
    assert quantized.bits == bits
    assert draw(quantized, request).tobytes() != draw(loaded(name), request).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_in_memory_that_is_not_stored(
    name: str, loaded: Callable[[str], Any], data_dir: Path
) -> None:
    pipeline = loaded(name)  # prepares mlx
    from mlx.utils import tree_flatten

    stored = sum(f.stat().st_size for f in files_of(tiny_models.ensure_checkpoint(name, data_dir)))
    held = sum(
        array.nbytes
        for name, array in tree_flatten(pipeline.parameters())
        if not name.startswith("prompt_cache")
    )
    # The built-in model is stored in half precision.
    assert 0 < held < (2 if name == tiny_models.BUILT_IN else 1) * stored + 50_000


def test_they_are_built_the_same_everywhere_and_small(tmp_path: Path) -> None:
    for name in NAMES:
        for side in ("here", "there"):
            tiny_models.ensure_checkpoint(name, tmp_path / side)
    here, there = (files_of(tmp_path / side) for side in ("here", "there"))
    assert [f.relative_to(tmp_path / "here") for f in here] == [
        f.relative_to(tmp_path / "there") for f in there
    ]
    for one, other in zip(here, there, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert sum(file.stat().st_size for file in here) < 31_000_000


def test_nothing_but_whole_checkpoints_is_left_behind(tmp_path: Path) -> None:
    folders = {tiny_models.ensure_checkpoint(name, tmp_path) for name in NAMES}
    assert set((tmp_path / "tiny-models").iterdir()) == folders


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", slow_except(USUAL, WITH_LORA))
def test_a_lora_changes_the_picture_as_far_as_its_scale_says(
    name: str,
    loaded: Callable[[str], Any],
    images: dict[str, str],
    data_dir: Path,
    tmp_path: Path,
) -> None:
    lora = tmp_path / "lora.safetensors"
    tiny_models.write_lora(lora, name)
    assert lora.stat().st_size < 10_000

    def drawn_at(scale: float, bake: bool) -> Image.Image:
        pipeline = load(name, data_dir, lora_paths=[str(lora)], lora_scales=[scale], bake_lora=bake)
        return draw(pipeline, request_of(name, images))

    plain = draw(loaded(name), request_of(name, images))
    for bake in (True, False):
        assert drawn_at(0, bake).tobytes() == plain.tobytes()
        difference = ImageChops.difference(drawn_at(1, bake), plain).convert("L")
        assert sum(difference.tobytes()) / (64 * 64) > 4


def test_a_lora_is_written_the_same_everywhere_or_refused(tmp_path: Path) -> None:
    paths = [tmp_path / side for side in ("here", "there")]
    for name in WITH_LORA:
        for path in paths:
            tiny_models.write_lora(path, name)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert set(NAMES) > set(WITH_LORA)
    for name in set(NAMES) - set(WITH_LORA):
        with pytest.raises(ValueError, match="takes no LoRA"):
            tiny_models.write_lora(paths[0], name)
