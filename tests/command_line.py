"""What the tests of the command have in common."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from far_ends import FakeTask, FarEnd
from PIL import Image as pillow

from client.mflux_client import Status

SMALL = ("--width", "64", "--height", "64", "--steps", "2")


def png(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    pillow.effect_noise((side, side), 50).save(buffer, format="PNG")
    return buffer.getvalue()


def at(url: str) -> dict[str, str]:
    return {"MFLUX_SERVER_URL": url}


def status(**fields: Any) -> Status:
    answer = {k: v for k, v in {**FakeTask().fields, **fields}.items() if k != "download"}
    return Status(**answer, raw=fields)


@pytest.fixture
def fake() -> Iterator[tuple[FakeTask, str]]:
    """A task that is the third in line until the test moves it on, and where it is."""
    task = FakeTask(pos=2, wait_remaining=40)
    task.picture = png(1024)
    with FarEnd(task.answer) as far_end:
        yield task, far_end.url
