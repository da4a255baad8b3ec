"""The built-in model over HTTP: its pictures show what was asked for."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, ServerProcess
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from served import served

from images import to_base64, to_png
from models.painter.grammar import COLOURS

Pixels = NDArray[np.float64]
SIDE = 256
NAMED = ("red", "green", "blue", "yellow", "purple", "pink")
LORAS = ROOT / "models" / "painter" / "loras"


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(tmp_path_factory.mktemp("painter"), "--model", "tiny")


def drawn(server: ServerProcess, prompt: str, count: int = 1, **fields: Any) -> list[Pixels]:
    """Returns the pictures (height, width, 3) with values from 0 to 255."""
    asked = {"width": SIDE, "height": SIDE, "steps": 4, "seed": 1, "format": "PNG", **fields}
    task_id = server.submit(prompt, count=count, **asked)["task_id"]
    assert server.wait_until_ended(task_id)["status"] == "done"
    files = [
        server.get("/image", task_id=task_id, index=index, delete="false").content
        for index in range(count)
    ]
    return [np.asarray(Image.open(BytesIO(file)).convert("RGB"), np.float64) for file in files]


def like(pixels: Pixels, colour: str, near: float = 80.0) -> NDArray[np.bool_]:
    """Says which pixels have about this colour (distance in RGB)."""
    is_near: NDArray[np.bool_] = np.linalg.norm(pixels - COLOURS[colour], axis=-1) < near
    return is_near


def share(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean())


def column(mask: NDArray[np.bool_]) -> float:
    """Returns where the pixels are: 0 is left, 1 is right."""
    return float(mask.nonzero()[1].mean() / mask.shape[1])


def greens(pixels: Pixels) -> NDArray[np.bool_]:
    return (pixels[..., 1] > pixels[..., 0] + 20) & (pixels[..., 1] > pixels[..., 2] + 20)


def blues(pixels: Pixels) -> NDArray[np.bool_]:
    return pixels[..., 2] > pixels[..., 0] + 10


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (448, 256)])
def test_a_red_ball_on_green_grass_is_red_on_green_below_a_blue_sky(
    painter: ServerProcess, size: tuple[int, int]
) -> None:
    width, height = size
    (picture,) = drawn(painter, "a red ball on green grass", width=width, height=height)
    red = like(picture, "red")
    assert 0.02 < share(red) < 0.2
    assert share(red[:, : width // 5]) < 0.01
    assert share(blues(picture[: height // 3])) > 0.9
    assert share(greens(picture[-height // 6 :])) > 0.9


@pytest.mark.parametrize("name", ["ball", "star", "square"])
@pytest.mark.parametrize("colour", NAMED)
def test_a_thing_has_the_colour_that_is_asked_for(
    painter: ServerProcess, name: str, colour: str
) -> None:
    (picture,) = drawn(painter, f"a {colour} {name} on a white background", seed=3)
    areas = {other: share(like(picture, other)) for other in NAMED}
    assert max(areas, key=lambda other: areas[other]) == colour
    assert areas[colour] > 0.02


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_thing_is_on_the_side_that_is_asked_for(painter: ServerProcess, side: str) -> None:
    (picture,) = drawn(painter, f"a red ball on the {side} in the snow")
    assert (column(like(picture, "red")) < 0.4) == (side == "left")
    assert (column(like(picture, "red")) > 0.6) == (side == "right")


@pytest.mark.parametrize(("first", "second"), [("red", "blue"), ("blue", "red")])
def test_of_two_things_each_has_its_own_colour_and_side(
    painter: ServerProcess, first: str, second: str
) -> None:
    prompt = f"a {first} ball to the left of a {second} square on a white background"
    (picture,) = drawn(painter, prompt)
    assert share(like(picture, first)) > 0.02
    assert share(like(picture, second)) > 0.02
    assert column(like(picture, first)) < 0.4
    assert column(like(picture, second)) > 0.6


def test_seeds_and_batches_give_different_pictures_and_repeat(painter: ServerProcess) -> None:
    prompt = "a white house in the mountains"
    batch = drawn(painter, prompt, count=3, seed=5)
    single = [drawn(painter, prompt, seed=seed)[0] for seed in (5, 6, 7)]
    for one, other in zip(batch, single, strict=True):
        assert (one == other).all()
    assert np.abs(batch[0] - batch[1]).mean() > 3
    assert np.abs(batch[1] - batch[2]).mean() > 3


def test_day_sunset_and_night_differ_in_light(painter: ServerProcess) -> None:
    skies = [
        drawn(painter, f"the sea {time}")[0][: SIDE // 4].mean()
        for time in ("by day", "at sunset", "at night")
    ]
    assert skies[0] > skies[1] + 20
    assert skies[1] > skies[2] + 20


@pytest.mark.parametrize("prompt", ["A beautiful landscape", "qwxz vrrp"])
def test_words_that_it_does_not_know_give_a_landscape(painter: ServerProcess, prompt: str) -> None:
    (picture,) = drawn(painter, prompt)
    assert share(blues(picture[: SIDE // 5])) > 0.8


def test_an_input_image_keeps_its_layout(painter: ServerProcess) -> None:
    source = Image.new("RGB", (SIDE, SIDE), COLOURS["white"])
    ImageDraw.Draw(source).ellipse((20, 90, 100, 170), fill=COLOURS["red"])
    image = to_base64(to_png(source))
    (picture,) = drawn(
        painter, "a red ball on a white background", init_image=image, image_strength=0.5
    )
    red = like(picture, "red")
    assert 0.02 < share(red) < 0.2
    assert column(red) < 0.4


def test_a_mask_changes_only_what_is_inside(painter: ServerProcess) -> None:
    (source,) = drawn(painter, "green grass")
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).rectangle((64, 80, 191, 223), fill=255)
    files: dict[str, Any] = {
        "init_image": to_base64(to_png(Image.fromarray(source.astype(np.uint8)))),
        "mask": to_base64(to_png(mask)),
        "mask_feather": 0,
        "image_strength": 0.05,
        "steps": 20,
    }
    (picture,) = drawn(painter, "a red ball", **files)
    outside = np.asarray(mask) == 0
    assert (picture[outside] == source[outside]).all()
    assert share(like(picture, "red")[~outside]) > 0.05


def test_quantized_it_draws_the_same_scene(
    painter: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (whole,) = drawn(painter, "a blue boat on the sea at sunset")
    server = ServerProcess(
        tmp_path_factory.mktemp("quantized"), "--model", "tiny", "--quantize", "8"
    )
    (quantized,) = drawn(server, "a blue boat on the sea at sunset")
    server.stop()
    assert 0 < np.abs(whole - quantized).mean() < 10


def test_a_lora_changes_the_style_and_not_the_scene(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("style")
    server = ServerProcess(folder, "--model", "tiny", "--lora-dir", str(LORAS))
    prompt = "a red ball on green grass"
    (plain,) = drawn(server, prompt)
    (halfway,) = drawn(server, prompt, loras=[{"name": "woodcut", "scale": 0.5}])
    (printed,) = drawn(server, prompt, loras=["woodcut"])
    (again,) = drawn(server, prompt)
    server.stop()
    assert (again == plain).all()
    assert 0 < np.abs(halfway - plain).mean() < np.abs(printed - plain).mean()
    assert share(blues(plain)) > 0.4
    assert share(blues(printed)) < 0.02, "none of the inks is blue"
    # The ball is where it was: it is darker than the sky, as before.
    ball = like(plain, "red")
    assert printed[ball].mean() < printed[: SIDE // 3].mean() - 30
