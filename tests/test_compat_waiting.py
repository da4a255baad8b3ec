"""While a caller waits for its picture, the server does not hold the pictures that it has sent."""

import gc
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from types import FrameType
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, until
from live import SteppedServer
from PIL import Image

from images import to_base64, to_png

CALLS: dict[str, tuple[str, Any]] = {
    "responses": (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": "x"},
                {"role": "user", "content": [{"type": "input_image", "image_url": "PICTURE"}]},
            ],
            "tools": [
                {"type": "image_generation", "input_image_mask": {"image_url": "PICTURE"}},
            ],
        },
    ),
    "chat": (
        "/v1/chat/completions",
        {
            "modalities": ["image"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "x"},
                        {"type": "image_url", "image_url": {"url": "PICTURE"}},
                    ],
                }
            ],
        },
    ),
    "edits": ("/v1/images/edits", {"prompt": "x", "images": ["PICTURE"], "mask": "PICTURE"}),
    "variations": ("/v1/images/variations", {"image": "PICTURE"}),
    "Ollama": (
        "/api/generate",
        {"model": "noise-flux1", "prompt": "x", "stream": False, "images": ["PICTURE"]},
    ),
    "Ollama's stream": (
        "/api/generate",
        {"model": "noise-flux1", "stream": True, "images": ["PICTURE"]},
    ),
    "img2img": (
        "/sdapi/v1/img2img",
        {
            "prompt": "x",
            "init_images": ["PICTURE"],
            "mask": "PICTURE",
            "alwayson_scripts": {"other": {"args": ["PICTURE"]}, "PICTURE": 1},
        },
    ),
    "MCP": (
        "/mcp",
        {
            "jsonrpc": "2.0",
            "id": 1,
            "beside": "PICTURE",
            "method": "tools/call",
            "params": {
                "beside": "PICTURE",
                "name": "edit_image",
                "arguments": {"prompt": "x", "image": "PICTURE", "mask": "PICTURE"},
            },
        },
    ),
}
PART = slice(30_000, 30_060)
"""Of the text of a picture: what it is recognized by."""


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SteppedServer]:
    server = SteppedServer(tmp_path_factory.mktemp("server"), sync_max_wait_s=0)
    yield server
    server.close()


def sent(server: SteppedServer, path: str, body: Any) -> tuple[socket.socket, str]:
    """The connection of a call with a picture, and a part of the text of the picture. Nothing in
    this process holds the body afterwards."""
    text = to_base64(to_png(Image.effect_noise((256, 256), 200)))
    content = json.dumps(body).replace("PICTURE", text).encode()
    connection = socket.create_connection(("127.0.0.1", server.server.port), GIVE_UP_S)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection, text[PART]


def texts_held() -> Iterator[str | bytes]:
    """The long texts that objects of this process, or functions that run, refer to."""
    holders: list[Any] = gc.get_objects()
    for latest in sys._current_frames().values():
        frame: FrameType | None = latest
        while frame is not None:
            holders.append(list(frame.f_locals.values()))
            frame = frame.f_back
    while holders:
        for one in gc.get_referents(holders.pop()):
            if isinstance(one, str | bytes | bytearray) and len(one) > PART.stop:
                yield one if isinstance(one, str) else bytes(one)
            elif isinstance(one, dict | tuple) and not gc.is_tracked(one):
                holders.append(one)


@pytest.mark.parametrize("call", CALLS)
def test_a_picture_is_not_in_memory_while_its_caller_waits(
    stepped: SteppedServer, call: str
) -> None:
    connection, part = sent(stepped, *CALLS[call])
    with closing(connection):
        until(lambda: stepped.get("/queue").json()["tasks"])
        until(lambda: not any(part in str(text) for text in texts_held()))
        task_id = stepped.get("/queue").json()["tasks"][0]["task_id"]
        answer = requests.delete(stepped.url + f"/delete?task_id={task_id}", timeout=GIVE_UP_S)
        assert answer.status_code == 200
