"""Transparent pictures and masks, on every path that takes one; and pictures in data URLs."""

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess
from PIL import Image
from served import served

from images import to_base64

SIZE = (96, 64)
COLOURS = Image.merge("RGB", [Image.radial_gradient("L").resize(SIZE)] * 3)


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def half(mode: str, left: Any, right: Any) -> bytes:
    picture = Image.new(mode, SIZE, right)
    picture.paste(left, (0, 0, SIZE[0] // 2, SIZE[1]))
    return png(picture)


def clear_on_the_left() -> Image.Image:
    picture = COLOURS.convert("RGBA")
    picture.putalpha(Image.open(BytesIO(half("L", 0, 255))))
    return picture


CLEAR = png(clear_on_the_left())
ON_WHITE = png(Image.alpha_composite(Image.new("RGBA", SIZE, "white"), clear_on_the_left()))
OPAQUE = png(COLOURS)
LEFT, NOTHING = half("L", 255, 0), half("L", 0, 0)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = "noise-flux1,noise-flux2,noise-fill,noise-controlnet"
    yield from served(tmp_path_factory.mktemp("desk") / "data", "--models", models)


def drawn(server: ServerProcess, answer: requests.Response) -> bytes:
    """The picture of an answer of /generate."""
    assert answer.status_code == 200, answer.text
    task_id = answer.json()["task_id"]
    assert server.wait_until_ended(task_id)["status"] == "done"
    return server.get("/image", task_id=task_id).content


def native(server: ServerProcess, **pictures: Any) -> bytes:
    """Drawn from pictures as JSON."""
    texts = {
        name: to_base64(value) if isinstance(value, bytes) else value
        for name, value in pictures.items()
    }
    body = {"prompt": "x", "seed": 1, "steps": 2, "format": "PNG", "width": 64, "height": 64}
    url = server.url + "/generate"
    return drawn(server, requests.post(url, json=body | texts, timeout=GIVE_UP_S))


def native_form(server: ServerProcess, init_image: bytes) -> bytes:
    fields = {"prompt": "x", "seed": 1, "steps": 2, "format": "PNG", "width": 64, "height": 64}
    files = {"init_image": ("a.png", init_image)}
    url = server.url + "/generate"
    return drawn(server, requests.post(url, data=fields, files=files, timeout=GIVE_UP_S))


def openai(server: ServerProcess, image: bytes, mask: bytes | None = None) -> bytes:
    fields = {"prompt": "x", "seed": 1, "steps": 2, "size": "64x64", "output_format": "png"}
    files = {"image": ("a.png", image)} | ({"mask": ("b.png", mask)} if mask else {})
    url = server.url + "/v1/images/edits"
    answer = requests.post(url, data=fields, files=files, timeout=GIVE_UP_S)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def a1111(server: ServerProcess, image: bytes | str, **fields: Any) -> bytes:
    """The pixels that img2img draws."""
    sent = to_base64(image) if isinstance(image, bytes) else image
    body = {"prompt": "x", "seed": 1, "steps": 4, "init_images": [sent], **fields}
    url = server.url + "/sdapi/v1/img2img"
    answer = requests.post(url, json=body, timeout=GIVE_UP_S)
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["images"][0])
    return Image.open(BytesIO(data)).convert("RGB").tobytes()


WAYS: dict[str, Callable[[ServerProcess, bytes], bytes]] = {
    "init_image": lambda server, data: native(server, init_image=data),
    "init_image in a form": native_form,
    "images": lambda server, data: native(server, model="noise-flux2", images=[to_base64(data)]),
    "control_image": lambda server, data: native(
        server, model="noise-controlnet", control_image=data
    ),
    "OpenAI edit": openai,
    "AUTOMATIC1111 img2img": a1111,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_transparent_picture_counts_as_lying_on_white_on_every_path(
    desk: ServerProcess, way: str
) -> None:
    assert WAYS[way](desk, CLEAR) == WAYS[way](desk, ON_WHITE)
    assert WAYS[way](desk, CLEAR) != WAYS[way](desk, OPAQUE)


def test_the_transparency_of_a_native_mask_is_ignored(desk: ServerProcess) -> None:
    def repainted(mask: bytes) -> bytes:
        return native(desk, model="noise-fill", init_image=OPAQUE, mask=mask)

    white_on_nothing = half("RGBA", (255, 255, 255, 255), (0, 0, 0, 0))
    assert repainted(white_on_nothing) == repainted(LEFT)
    assert repainted(LEFT) != repainted(NOTHING)


def test_an_openai_mask_repaints_what_is_transparent(desk: ServerProcess) -> None:
    black, white = (0, 0, 0), (255, 255, 255)
    expected = openai(desk, OPAQUE, LEFT)
    for colour in (black, white):
        clear = half("RGBA", (*colour, 0), (*colour, 255))
        assert openai(desk, OPAQUE, clear) == expected
    opaque = half("RGBA", (*white, 255), (*black, 255))
    assert openai(desk, OPAQUE, opaque) == expected  # nothing is transparent: white counts
    assert openai(desk, OPAQUE, NOTHING) != expected


def test_a_mask_of_automatic1111_that_is_not_opaque_is_its_alpha(desk: ServerProcess) -> None:
    expected = a1111(desk, OPAQUE, mask=to_base64(LEFT))
    assert a1111(desk, OPAQUE, mask=to_base64(NOTHING)) != expected
    for colour in ((0, 0, 0), (255, 0, 0), (255, 255, 255)):  # strokes of any colour on nothing
        strokes = to_base64(half("RGBA", (*colour, 255), (0, 0, 0, 0)))
        assert a1111(desk, OPAQUE, mask=strokes) == expected
    opaque = to_base64(half("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)))
    assert a1111(desk, OPAQUE, mask=opaque) == expected
    kept = to_base64(half("RGBA", (0, 0, 0, 0), (9, 9, 9, 255)))
    assert a1111(desk, OPAQUE, mask=kept, inpainting_mask_invert=1) == expected


def test_a_data_url_may_have_any_type_or_none(desk: ServerProcess) -> None:
    text = to_base64(OPAQUE)
    types = ("", "image/png", "image/jpeg", "application/octet-stream", "text/plain;charset=utf-8")
    urls = [f"data:{kind};base64,{text}" for kind in types]
    assert {native(desk, init_image=url) for url in urls} == {native(desk, init_image=OPAQUE)}
    assert {a1111(desk, url) for url in urls} == {a1111(desk, OPAQUE)}
    body = {"prompt": "x", "init_image": "data:image/png;base64," + to_base64(b"no picture")}
    refused = requests.post(desk.url + "/generate", json=body, timeout=GIVE_UP_S)
    assert refused.status_code == 400
    assert refused.json()["error"]["field"] == "init_image"
