"""What an answer of a tool of MCP holds: pictures that are small enough, states and errors."""

import base64
import json
from io import BytesIO
from typing import Any

import pytest
from assistants import SMALL, rpc
from PIL import Image
from played_app import PlayedApp

from compat.mcp_results import MOST_INLINE_BYTES
from decoding.decoder import PictureReader


@pytest.fixture
def app(tmp_path_factory: pytest.TempPathFactory) -> PlayedApp:
    return PlayedApp(tmp_path_factory.mktemp("app"))


def noise(side: int, kind: str) -> bytes:
    buffer = BytesIO()
    Image.effect_noise((side, side), 200).convert("RGB").save(buffer, kind, quality=95)
    return buffer.getvalue()


def played(app: PlayedApp, images: list[bytes], **fields: Any) -> dict[str, Any]:
    """What check_image answers of a task with these pictures."""
    task_id = app.submit("alice", count=len(images), **fields)
    app.claim()
    assert app.queue.finish(task_id, images)
    body = rpc("tools/call", name="check_image", arguments={"task_id": task_id})
    return dict(app.json("alice", "POST", "/mcp", json=body)["result"])


@pytest.mark.parametrize(
    ("side", "number", "kind"), [(1200, 1, "PNG"), (1200, 1, "JPEG"), (640, 4, "JPEG")]
)
def test_pictures_inline_are_small_jpegs_together_below_the_limit(
    app: PlayedApp, side: int, number: int, kind: str
) -> None:
    result = played(app, [noise(side, kind)] * number, format=kind)
    pictures = [base64.b64decode(one["data"]) for one in result["content"][1:]]
    assert len(pictures) == number
    assert sum(map(len, pictures)) <= MOST_INLINE_BYTES
    for picture in pictures:
        assert Image.open(BytesIO(picture)).format == "JPEG"
        assert Image.open(BytesIO(picture)).width >= 128


def test_no_picture_of_a_task_is_tried_at_a_size_that_was_too_large_for_another(
    app: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, thumbnail = [], PictureReader.thumbnail

    def noted(reader: PictureReader, image: bytes, side: int) -> bytes:
        tried.append(side)
        return thumbnail(reader, image, side)

    monkeypatch.setattr(PictureReader, "thumbnail", noted)
    result = played(app, [noise(1200, "PNG")] * 4, format="PNG")
    assert len(result["content"]) == 5
    assert tried == sorted(tried, reverse=True)
    assert len(tried) == len(set(tried)) + 3


def test_a_small_jpeg_is_shown_as_it_is_stored_and_a_damaged_picture_is_left_out(
    app: PlayedApp,
) -> None:
    small = noise(64, "JPEG")
    result = played(app, [small, b"\x89PNG", small], format="JPEG")
    shown_as = [base64.b64decode(one["data"]) for one in result["content"][1:]]
    assert shown_as == [small, b"\x89PNG", small]  # what is stored as JPEG is not looked into
    result = played(app, [noise(64, "PNG"), b"\x89PNG"], format="PNG")
    assert len(result["content"]) == 2
    assert len(json.loads(result["content"][0]["text"])["pictures"]) == 2


def test_a_task_that_waits_in_a_paused_queue_says_so(app: PlayedApp) -> None:
    app.json("root", "POST", "/queue/pause")
    arguments = {**SMALL, "wait_s": 0}
    body = rpc("tools/call", name="generate_image", arguments=arguments)
    result = app.json("alice", "POST", "/mcp", json=body)["result"]
    said = json.loads(result["content"][0]["text"])
    assert said["status"] == "waiting"
    assert "paused" in said["message"]


def test_a_failed_task_is_a_failed_result_with_its_reason(app: PlayedApp) -> None:
    task_id = app.submit("alice")
    app.fail()
    body = rpc("tools/call", name="check_image", arguments={"task_id": task_id})
    result = app.json("alice", "POST", "/mcp", json=body)["result"]
    assert result["isError"]
    assert json.loads(result["content"][0]["text"])["error"]["message"] == "It broke."
