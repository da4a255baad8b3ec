"""The README that started this is a contract: its calls run here as they stand in it.

Only the port is another one, and the example's task id is the one that was really given.
"""

import json
import re
import subprocess
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess
from PIL import Image

BLOCKS: list[str] = re.findall(
    r"```\n(.*?)\n````?\n",
    (Path(__file__).parent / "data" / "original-readme.md").read_text(),
    flags=re.DOTALL,
)
EXAMPLE_TASK_ID = "1fc9cc4f"


def block(start: str) -> str:
    (found,) = [text for text in BLOCKS if text.lstrip().startswith(start)]
    return found


def curl(command: str, server: ServerProcess) -> bytes:
    command = command.replace("http://localhost:4030", server.url)
    return subprocess.run(["bash", "-c", command], check=True, capture_output=True).stdout


def test_the_curl_calls_make_a_jpeg(server: ServerProcess) -> None:
    generate, status, image = [text for text in BLOCKS if text.startswith("curl")]

    accepted = json.loads(curl(generate, server))
    assert set(json.loads(block('{\n  "task_id"'))) <= set(accepted)
    assert accepted["task_length"] == 0
    assert accepted["expected_time_seconds"] > 0

    task_id = accepted["task_id"]
    waiting = json.loads(curl(status.replace(EXAMPLE_TASK_ID, task_id), server))
    assert set(json.loads(block('{\n  "pos"'))) <= set(waiting)
    assert waiting["pos"] == 0
    assert waiting["wait_remaining"] >= 1

    server.wait_until_ended(task_id)
    picture = Image.open(BytesIO(curl(image.replace(EXAMPLE_TASK_ID, task_id), server)))
    assert (picture.format, picture.size) == ("JPEG", (1024, 1024))


def test_the_python_client_gets_its_picture(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    client: dict[str, Any] = {
        "requests": requests,
        "time": time,
        "Image": Image,
        "BytesIO": BytesIO,
    }
    for start in ("def mflux_generate_client", "def generate_image"):
        exec(block(start).replace("http://localhost:4030", server.url), client)

    picture = client["generate_image"](server.url, "A beautiful landscape", width=320, height=192)

    assert (picture.format, picture.size) == ("JPEG", (320, 192))
    assert "Waiting time:  0  seconds" in capsys.readouterr().out
