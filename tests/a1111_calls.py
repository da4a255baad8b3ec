"""Calls of AUTOMATIC1111's API that draw."""

import base64
import json
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import requests
import webuiapi
from conftest import GIVE_UP_S, ServerProcess
from PIL import Image

SIDES = {"width": 64, "height": 64}
TINY = {**SIDES, "steps": 1}


def encoded(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURE = Image.radial_gradient("L").resize((96, 64)).convert("RGB")


def ask(server: ServerProcess, path: str, **fields: Any) -> requests.Response:
    return requests.post(server.url + path, json={**TINY, **fields}, timeout=GIVE_UP_S)


def drawn(server: ServerProcess, path: str, **fields: Any) -> dict[str, Any]:
    """The info of a picture, with the size that it really has."""
    answer = ask(server, f"/sdapi/v1/{path}", **fields)
    assert answer.status_code == 200, (answer.text, fields)
    info: dict[str, Any] = json.loads(answer.json()["info"])
    picture = Image.open(BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert picture.size == (info["width"], info["height"])
    assert f"Size: {info['width']}x{info['height']}" in picture.info["parameters"]
    return info


def img2img(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    fields = {"init_images": [encoded(PICTURE)], "steps": 4, **fields}
    return drawn(server, "img2img", **fields)


def api_of(server: ServerProcess) -> Any:
    address = urlsplit(server.url)
    return webuiapi.WebUIApi(host=address.hostname, port=address.port)


def draw(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {"prompt": "x", **SIDES, **fields}
    return requests.post(server.url + "/sdapi/v1/txt2img", json=body, timeout=GIVE_UP_S)
