"""AUTOMATIC1111's API: hires fix, and pictures that are upscaled alone."""

import base64
from collections.abc import Iterator
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from a1111_calls import api_of, draw, encoded
from conftest import ServerProcess, StartServer, allow
from PIL import Image
from served import served

from compat.a1111_fields import upscaler_of
from compat.a1111_shapes import TextToImage
from compat.bodies import read_body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = "noise-flux1,noise-flux2,noise-fill,noise-z-image,noise-seedvr2"
    yield from served(tmp_path_factory.mktemp("server"), "--models", models)


@pytest.fixture
def api(server: ServerProcess) -> Any:
    return api_of(server)


PICTURE = encoded(Image.new("RGB", (64, 64), "red"))


def test_hires_fix_uses_the_operators_upscaler(server: ServerProcess) -> None:
    [image] = draw(server, enable_hr=True, hr_scale=2).json()["images"]
    assert Image.open(BytesIO(base64.b64decode(image))).size == (128, 128)


def test_hires_fix_by_an_upscaler_takes_this_one() -> None:
    allowed: Any = allow("noise-flux1", "seedvr2-3b", "seedvr2-7b")
    calls: Any = SimpleNamespace(allowed=allowed)
    for name, expected in (("seedvr2-7b", "seedvr2-7b"), ("Latent", None), ([], None), ("", None)):
        assert upscaler_of(read_body(TextToImage, {"hr_upscaler": name}), calls) == expected


def test_a_picture_is_upscaled_by_a_factor_or_to_a_size(server: ServerProcess, api: Any) -> None:
    picture = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    twice = api.extra_single_image(picture, upscaling_resize=2, upscaler_1="noise-seedvr2")
    assert twice.image.size == (192, 128)
    for crop, size in ((True, (160, 160)), (False, (240, 160))):
        sized = api.extra_single_image(
            picture,
            resize_mode=1,
            upscaling_resize_w=160,
            upscaling_resize_h=160,
            upscaling_crop=crop,
            upscaler_1="R-ESRGAN 4x+",
        )
        assert sized.image.size == size


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "image"),
        ({"image": "aGVsbG8="}, "image"),
        ({"image": "http://10.0.0.1/"}, "image"),
        ({"image": PICTURE, "upscaling_resize": 1}, "upscaling_resize"),
        ({"image": PICTURE, "upscaling_resize": 5}, "upscaling_resize"),
        ({"image": PICTURE, "upscaling_resize": "big"}, "upscaling_resize"),
        ({"image": PICTURE, "resize_mode": 2}, "resize_mode"),
        ({"image": PICTURE, "resize_mode": 1}, "upscaling_resize_w"),
        (
            {
                "image": PICTURE,
                "resize_mode": 1,
                "upscaling_resize_w": 8192,
                "upscaling_resize_h": 8192,
            },
            "upscaling_resize_w",
        ),
    ],
)
def test_a_picture_that_cannot_be_upscaled_is_refused_by_name(
    server: ServerProcess, fields: dict[str, Any], word: str
) -> None:
    url = server.url + "/sdapi/v1/extra-single-image"
    answer = requests.post(url, json=fields, timeout=60)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["detail"]


def test_without_an_upscaler_nothing_is_upscaled(start_server: StartServer) -> None:
    url = start_server("--model", "noise-flux1").url + "/sdapi/v1/extra-single-image"
    answer = requests.post(url, json={"image": PICTURE}, timeout=60)
    assert answer.status_code == 422
    assert "upscaler" in answer.json()["detail"]
