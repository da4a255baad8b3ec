"""The program that speaks MCP on stdin and stdout, started by the official client, with a real
server behind it."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from assistants import ERAS, Answer, assistant
from conftest import GIVE_UP_S, ROOT, ServerProcess, until
from live import SteppedServer
from mcp.client.stdio import StdioServerParameters
from PIL import Image
from served import served

KEY = "alice-0123456789"
SMALL = {"prompt": "a fox", "width": 64, "height": 64, "steps": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys.toml").write_text(f'[alice]\nkey = "{KEY}"\n')
    keys = ("--keys", str(folder / "keys.toml"))
    yield from served(folder / "data", "--models", "noise-flux1,noise-flux2", *keys)


def program(url: str, *options: str, key: str = KEY) -> StdioServerParameters:
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "client.mcp", "--server", url, *options],
        cwd=ROOT,
        env={"MFLUX_SERVER_KEY": key},
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a picture, and files beside and in it that must not be sent."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "deep" / "photo.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "private.png")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    (folder / "secret.png").write_text("a password")
    (tmp_path / "pictures-too").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures-too" / "photo.png")
    return folder


@pytest.mark.parametrize("era", ERAS)
def test_everything_is_passed_on_to_the_server_and_back(server: ServerProcess, era: str) -> None:
    with assistant(program(server.url), era) as host:
        assert "edit_image" in [tool.name for tool in host.do(host.client.list_tools).tools]
        call = host.begin_call("generate_image", watched=True, **SMALL)
        drawn = host.ended(Answer(call.result(GIVE_UP_S)))
        assert drawn.said["status"] == "done"
        assert Image.open(BytesIO(base64.b64decode(drawn.pictures[0].data))).size == (64, 64)
        assert all(text for _, _, text in host.progress)
        [content] = host.do(
            host.client.read_resource, drawn.said["pictures"][0]["resource"]
        ).contents
        assert content.mime_type == "image/jpeg"
        assert host.call("generate_image", prompt="x", steps=0).said["error"]["field"] == "steps"


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("era", ERAS)
def test_cancelling_a_call_cancels_its_task(tmp_path: Path, era: str, watched: bool) -> None:
    stepped = SteppedServer(tmp_path)
    with closing(stepped), assistant(program(stepped.url), era) as host:
        call = host.begin_call("generate_image", watched=watched, **{**SMALL, "steps": 50})
        until(lambda: stepped.get("/queue").json()["length"] == 1)
        [task] = stepped.get("/queue").json()["tasks"]
        call.cancel()
        stepped.step(20)
        ended = {"task_id": task["task_id"], "wait": 60}
        until(lambda: stepped.get("/status", **ended).json()["status"] == "cancelled")
        assert host.call("estimate", **SMALL).said["unfinished_tasks"] == 0


@pytest.mark.parametrize("era", ERAS)
def test_pictures_of_the_named_folder_can_be_edited_and_no_other_file(
    server: ServerProcess, pictures: Path, era: str
) -> None:
    edit: dict[str, Any] = {"prompt": "at night", "steps": 2}
    with assistant(program(server.url, "--pictures", str(pictures)), era) as host:
        schema = tool_schema(host, "edit_image")
        assert str(pictures) in schema["properties"]["path"]["description"]
        assert "path" not in tool_schema(host, "generate_image")["properties"]
        for path in ("deep/photo.png", str(pictures / "deep" / "photo.png")):
            edited = host.draw("edit_image", **edit, path=path)
            assert not edited.failed, edited.said
            assert edited.said["width"] == 64
        refusals = {
            host.call("edit_image", **edit, path=path).said["error"]["message"]
            for path in (
                "../private.png",
                str(pictures.parent / "private.png"),
                "../pictures-too/photo.png",
                "link.png",
                "secret.png",
                "missing.png",
                "deep",
                "",
                "a\0b",
                "/etc/passwd",
                "~nobody-here/x.png",
                "/dev/zero",
                7,
                ["deep/photo.png"],
            )
        }
        assert len(refusals) == 1, "nothing is said about files outside"
        assert "path" in refusals.pop()


@pytest.mark.parametrize("era", ERAS)
def test_without_a_named_folder_no_file_is_read(
    server: ServerProcess, pictures: Path, era: str
) -> None:
    with assistant(program(server.url), era) as host:
        assert "path" not in tool_schema(host, "edit_image")["properties"]
        answer = host.call("edit_image", prompt="x", path=str(pictures / "deep" / "photo.png"))
        assert answer.failed
        assert answer.said["error"]["field"] == "path"


def tool_schema(host: Any, name: str) -> dict[str, Any]:
    tools = host.do(host.client.list_tools).tools
    return next(dict(tool.input_schema) for tool in tools if tool.name == name)


def spoken(url: str, *lines: bytes, key: str = KEY) -> list[dict[str, Any]]:
    """What the program answers to these lines; it ends with them."""
    environment = {**os.environ, "MFLUX_SERVER_KEY": key}
    done = subprocess.run(
        [sys.executable, ROOT / "client" / "mcp.py", "--server", url],
        input=b"".join(line + b"\n" for line in lines),
        capture_output=True,
        timeout=GIVE_UP_S,
        env=environment,
        check=True,
    )
    assert done.stderr == b""
    return [json.loads(line) for line in done.stdout.splitlines()]


PING = b'{"jsonrpc": "2.0", "id": "a", "method": "ping"}'


def test_a_server_that_is_away_or_no_mflux_server_is_an_answer(server: ServerProcess) -> None:
    [away] = spoken("http://127.0.0.1:9", PING)
    assert away["id"] == "a"
    assert "No answer from mflux-server at http://127.0.0.1:9" in away["error"]["message"]
    [elsewhere] = spoken(server.url + "/nothing", PING)
    assert "HTTP 404" in elsewhere["error"]["message"]
    assert elsewhere["id"] == "a"


@pytest.mark.parametrize("options", [["--server", "localhost"], ["--pictures", "/nowhere/at/all"]])
def test_options_that_cannot_be_used_end_it_with_the_reason(options: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "client" / "mcp.py", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
    )
    assert ended.returncode == 2
    assert options[1] in ended.stderr
    assert ended.stdout == ""


def test_a_wrong_key_is_an_answer_that_says_so(server: ServerProcess) -> None:
    [refused] = spoken(server.url, PING, key="wrong-0123456789")
    assert refused["id"] == "a"
    assert refused["error"]["data"]["code"] == "unauthorized"


def test_what_is_no_message_is_an_error_and_the_next_one_is_answered(
    server: ServerProcess,
) -> None:
    lines = (b"x", b"[]", b"\xff", b'{"id": [1]}', b"[" * 100_000, b"", PING)
    *errors, pong = spoken(server.url, *lines)
    assert [error["error"]["code"] for error in errors] == [-32700] * 5
    assert pong == {"jsonrpc": "2.0", "id": "a", "result": {}}


def test_it_runs_on_the_python_of_a_mac_and_needs_no_package() -> None:
    """The oldest Python that it names parses it; it imports the standard library alone."""
    import ast

    tree = ast.parse((ROOT / "client" / "mcp.py").read_text(encoding="utf-8"), feature_version=9)
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [one.name for one in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert names <= sys.stdlib_module_names | {"__future__"}
