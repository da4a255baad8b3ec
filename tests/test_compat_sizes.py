"""The size of a picture by AUTOMATIC1111's API: given, left out, following a picture, upscaled."""

from collections.abc import Iterator
from typing import Any

import pytest
from a1111_calls import ask, drawn, img2img
from conftest import ServerProcess, StartServer
from served import served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(tmp_path_factory.mktemp("server"), "--models", "noise-flux1,noise-flux2")


@pytest.fixture(scope="module")
def upscaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = "noise-flux1,noise-z-image,noise-seedvr2"
    yield from served(tmp_path_factory.mktemp("server"), "--models", models)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"width": None, "height": None}, (96, 64)),
        ({"width": 96, "height": None}, (96, 64)),
        ({"width": None, "height": 64}, (96, 64)),
        ({"width": 192, "height": 0}, (192, 128)),
        ({"width": 0, "height": 0}, (96, 64)),
        ({"width": 50.7, "height": 50.2}, (48, 48)),
    ],
)
def test_img2img_follows_the_picture_where_a_side_is_not_given(
    server: ServerProcess, sides: dict[str, Any], expected: tuple[int, int]
) -> None:
    info = img2img(server, prompt="x", **sides)
    assert (info["width"], info["height"]) == expected


def test_txt2img_without_a_side_draws_512_or_what_the_operator_allows(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1", "--max-pixels", str(128 * 128))
    for sides, expected in (
        ({"width": None, "height": None}, (128, 128)),
        ({"width": 256, "height": None}, (256, 64)),
        ({"width": None, "height": 64}, (128, 64)),
    ):
        info = drawn(server, "txt2img", prompt="x", **sides)
        assert (info["width"], info["height"]) == expected
    info = drawn(server, "txt2img", prompt="x", enable_hr=True, hr_scale=2)  # no upscaler here
    assert (info["width"], info["height"]) == (64, 64)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (128, 128)),
        ({"hr_scale": 0}, (64, 64)),
        ({"hr_scale": 1}, (64, 64)),
        ({"hr_scale": 1.5}, (96, 96)),
        ({"hr_scale": 9}, (256, 256)),
        ({"hr_scale": 0, "hr_resize_x": 128, "hr_resize_y": 128}, (128, 128)),
        ({"hr_scale": 2, "hr_resize_x": 96, "hr_resize_y": 96}, (96, 96)),
        ({"hr_resize_x": 160, "hr_resize_y": 0}, (160, 160)),
        ({"hr_resize_x": 0, "hr_resize_y": 96}, (96, 96)),
        ({"hr_resize_x": 0, "hr_resize_y": 0, "hr_scale": 2}, (128, 128)),
        ({"hr_resize_x": 160, "hr_resize_y": 100}, (160, 100)),
        ({"hr_resize_x": 101, "hr_resize_y": 133}, (101, 133)),
        ({"hr_resize_x": 32, "hr_resize_y": 48}, (32, 48)),
        ({"width": 128, "hr_resize_x": 256}, (256, 128)),
        ({"width": 128, "hr_resize_y": 96}, (192, 96)),
        ({"width": 256, "height": 16, "hr_resize_x": 5}, (5, 1)),
    ],
)
def test_hires_fix_makes_the_size_that_automatic1111_makes(
    upscaling: ServerProcess, fields: dict[str, Any], expected: tuple[int, int]
) -> None:
    info = drawn(upscaling, "txt2img", prompt="x", enable_hr=True, **fields)
    assert (info["width"], info["height"]) == expected


def test_a_hires_size_is_bounded(upscaling: ServerProcess) -> None:
    fields = {"enable_hr": True, "hr_resize_x": 8192, "hr_resize_y": 8192}
    answer = ask(upscaling, "/sdapi/v1/txt2img", prompt="x", **fields)
    assert answer.status_code == 400
    assert "hr_resize_x x hr_resize_y must be at most" in answer.json()["detail"]


@pytest.mark.parametrize("size", ["64x64", "64X64", " 64 x 64 ", "64*64", "64\u00d764"])
def test_a_size_may_be_written_in_several_ways(server: ServerProcess, size: str) -> None:
    answer = ask(server, "/v1/images/generations", prompt="x", size=size)
    assert answer.json()["size"] == "64x64"
