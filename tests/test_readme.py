"""The commands of the README work as they stand in it. Only the port is another one, and the
example's task id is the one that was really given."""

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, ServerProcess, StartServer
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE_TASK_ID = "1fc9cc4f9d3b27a1"


def block(start: str) -> str:
    """The one block of code that starts like this."""
    blocks = re.findall(r"```(?:python)?\n(.*?)\n```\n", README, flags=re.DOTALL)
    named = [re.sub(r"(http://)?localhost:4030", "URL", text) for text in blocks]
    (found,) = [text for text in named if text.startswith(start)]
    return found


def run(command: str, server: ServerProcess, folder: Path, task_id: str = "") -> bytes:
    command = command.replace("URL", server.url).replace(EXAMPLE_TASK_ID, task_id)
    return subprocess.run(
        ["bash", "-ec", command], cwd=folder, check=True, capture_output=True, timeout=120
    ).stdout


def test_the_first_picture_comes_with_two_calls(server: ServerProcess, tmp_path: Path) -> None:
    run(block("task="), server, tmp_path)
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (1024, 1024))


def test_the_same_in_three_calls(server: ServerProcess, tmp_path: Path) -> None:
    submit, status, fetch = re.findall(
        r"^curl.*?(?<!\\)$", block("curl -X POST"), flags=re.DOTALL | re.MULTILINE
    )
    task_id = json.loads(run(submit, server, tmp_path))["task_id"]
    assert {"status", "pos", "wait_remaining"} <= set(
        json.loads(run(status, server, tmp_path, task_id))
    )
    server.wait_until_ended(task_id)
    run(fetch, server, tmp_path, task_id)
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert picture.size == (1024, 1024)


def test_the_python_client_saves_its_picture(server: ServerProcess, tmp_path: Path) -> None:
    code = block("from mflux_client").replace("URL", server.url)
    environment = {"PYTHONPATH": str(ROOT / "client")}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120
    )
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert picture.format == "JPEG"


def test_tasks_start_from_a_file_and_from_a_result(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "noise-flux1", "--models", "noise-kontext,noise-seedvr2")
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.jpg")
    Image.new("L", (64, 64), "white").save(tmp_path / "mask.png")
    calls = block("curl URL/generate").splitlines()
    assert len(calls) == 4
    task_id = ""
    for call in calls:
        tiny = call.replace("dev-kontext", "noise-kontext").replace("seedvr2-3b", "noise-seedvr2")
        task_id = json.loads(run(tiny, server, tmp_path, task_id))["task_id"]
        assert server.wait_until_ended(task_id)["status"] == "done"
