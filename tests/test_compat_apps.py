"""What real apps send, written down from their public code, answered with what they read."""

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ROOT, ServerProcess, slow_except
from PIL import Image

from compat.a1111_shapes import ImageToImage
from compat.openai_chat import ChatRequest
from compat.openai_responses_shapes import ResponsesRequest, ResponsesTool
from compat.openai_shapes import OpenAIGeneration

APPS: list[dict[str, Any]] = json.loads((ROOT / "tests/data/apps.json").read_text())
LONG = ("n8n", "LobeChat")
"""Apps with many large pictures."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = ServerProcess(tmp_path_factory.mktemp("apps"), "--models", "noise-flux1,noise-flux2")
    yield server.url
    server.stop()


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    return buffer.getvalue()


def with_picture(body: Any) -> Any:
    """The body with a data URL where it says PICTURE."""
    text = "data:image/png;base64," + base64.b64encode(png()).decode()
    return json.loads(json.dumps(body).replace("PICTURE", text))


def send(url: str, call: dict[str, Any]) -> requests.Response:
    files = [(name, ("upload.png", png(), "image/png")) for name in call.get("files", ())]
    return requests.request(
        call["method"],
        url + call["path"],
        json=with_picture(call.get("json")),
        data=call.get("form"),
        files=files or None,
        headers=call.get("headers"),
        timeout=GIVE_UP_S,
    )


@pytest.mark.parametrize(
    "app",
    slow_except([one for one in APPS if not one["app"].startswith(LONG)], APPS),
    ids=lambda app: app["app"],
)
def test_every_call_of_an_app_is_answered_with_what_it_reads(url: str, app: dict[str, Any]) -> None:
    assert app["calls"]
    for call in app["calls"]:
        answer = send(url, call)
        assert answer.status_code == 200, (call, answer.text)
        asked = call.get("json") or call.get("form") or {}
        body = {} if asked.get("stream") else answer.json()
        if call["path"].startswith(("/v1/images/", "/v1//images/")):
            assert len(body["data"]) == int(asked.get("n") or 1)
            for image in body["data"]:
                as_url = asked.get("response_format") == "url" or (
                    "response_format" not in asked and asked["model"].startswith("dall-e")
                )
                assert ("url" in image) == as_url
                assert ("b64_json" in image) != as_url
                shown = Image.open(BytesIO(bytes_of(image)))
                assert shown.format == asked.get("output_format", "png").upper()
                if "x" in asked.get("size", ""):
                    assert "{}x{}".format(*shown.size) == asked["size"]
        elif call["path"].endswith("/responses"):
            [item] = [
                event["item"]
                for event in events_of(answer.text)
                if event["type"] == "response.output_item.done"
            ]
            assert item["type"] == "image_generation_call"
            shown = Image.open(BytesIO(base64.b64decode(item["result"], validate=True)))
            assert shown.format == item["output_format"].upper()
            assert "{}x{}".format(*shown.size) == item["size"]
            assert item["action"] == ("edit" if "PICTURE" in json.dumps(asked) else "generate")
        elif call["path"].endswith("/chat/completions"):
            [image] = body["choices"][0]["message"]["images"]
            data = image["image_url"]["url"].partition(",")[2]
            assert Image.open(BytesIO(base64.b64decode(data, validate=True))).format == "PNG"
        elif call["path"].endswith("/tags"):
            names = [one["name"] for one in body["models"] if "image" in one["capabilities"]]
            assert names == ["noise-flux1:latest", "noise-flux2:latest"]
        elif call["path"].endswith(("txt2img", "img2img")):
            [image] = body["images"]
            shown = Image.open(BytesIO(base64.b64decode(image, validate=True)))
            assert shown.size == (asked["width"], asked["height"])
            info = json.loads(body["info"])
            assert info["steps"] == min(asked["steps"], 8)
            assert [name for name in asked.get("alwayson_scripts", {}) if name != "controlnet"] == [
                name for name in ("ADetailer",) if name in "".join(info["warnings"])
            ]
            assert info["seed"] >= 0
            assert info["infotexts"][0].split("\n")[-1].startswith("Steps: ")
        elif call["path"].endswith("options") and call["method"] == "GET":
            assert body["sd_model_checkpoint"] == "noise-flux1"
        elif call["path"].endswith("sd-models"):
            assert [model["title"] for model in body] == ["noise-flux1", "noise-flux2"]
        elif call["path"].endswith("progress"):
            assert (body["progress"], body["state"]["job_count"]) == (0, 0)


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of the events of a stream."""
    lines = [line for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def bytes_of(image: dict[str, Any]) -> bytes:
    if "url" in image:
        return requests.get(image["url"], timeout=GIVE_UP_S).content
    return base64.b64decode(image["b64_json"], validate=True)


def test_the_document_lists_the_settings_of_every_app() -> None:
    answer = (ROOT / "docs/compat.md").read_text()
    for app in (
        "OpenAI SDKs",
        "Open WebUI",
        "SillyTavern",
        "LibreChat",
        "n8n",
        "LobeChat",
        "KoboldAI Lite",
        "AnythingLLM",
    ):
        assert f"### {app}" in answer
    assert "### Home Assistant" in answer


def test_the_document_lists_every_field_and_every_route(url: str) -> None:
    answer = (ROOT / "docs/compat.md").read_text()
    shapes = (OpenAIGeneration, ResponsesRequest, ResponsesTool, ChatRequest, ImageToImage)
    for name in {name for shape in shapes for name in shape.model_fields} - {"type"}:
        assert f"`{name}`" in answer or f"`{name}." in answer, name
    for path in requests.get(url + "/openapi.json", timeout=GIVE_UP_S).json()["paths"]:
        if path.startswith("/sdapi/v1/"):
            assert path.removeprefix("/sdapi/v1/") in answer, path
    for flag in ("sync-max-wait-s", "clamp", "public-url", "sdapi-model-switch", "cors-origins"):
        assert f"`--{flag}" in answer
