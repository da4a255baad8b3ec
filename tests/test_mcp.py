"""MCP at /mcp: the official client of both generations of the protocol, over real HTTP."""

import base64
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import requests
from assistants import ERAS, HANDSHAKE, MODERN, SMALL, Answer, Assistant, assistant, post, rpc
from conftest import GIVE_UP_S, ServerProcess, until
from live import SteppedServer
from mcp import MCPError
from PIL import Image
from played_app import PlayedApp
from served import served
from test_sync_calls import calls_of

from api.generate_request import PICTURES, GenerateRequest
from compat.mcp import McpRoutes
from compat.mcp_schemas import MOST_WAIT_S, TOOLS
from compat.mcp_tools import Waiting


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = ("--models", "noise-flux1,noise-flux2,noise-fill")
    yield from served(tmp_path_factory.mktemp("server"), *models)


@pytest.fixture(scope="module", params=ERAS)
def host(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Assistant]:
    with assistant(server.url, request.param) as found:
        yield found


@pytest.fixture
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SteppedServer]:
    """A server whose pictures make a step when the test wants."""
    server = SteppedServer(tmp_path_factory.mktemp("stepped"))
    yield server
    server.end()
    server.close()


def png(colour: Any = "red", side: int = 64) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shown(answer: Answer) -> list[Image.Image]:
    """The pictures in an answer."""
    assert {(one.type, one.mime_type) for one in answer.pictures} <= {("image", "image/jpeg")}
    return [Image.open(BytesIO(base64.b64decode(one.data))) for one in answer.pictures]


def test_a_client_that_may_choose_takes_the_newest_revision(server: ServerProcess) -> None:
    with assistant(server.url, "auto") as found:
        assert found.client.protocol_version == MODERN
        about = found.client.server_info
        assert about
        assert about.name == "mflux-server"


def test_a_picture_comes_inline_as_a_link_and_as_a_resource(
    server: ServerProcess, host: Assistant
) -> None:
    answer = host.draw("generate_image", **SMALL, seed="7", format="PNG", count=2)
    assert not answer.failed
    assert answer.said["status"] == "done"
    assert [picture.size for picture in shown(answer)] == [(64, 64)] * 2
    assert [one["seed"] for one in answer.said["pictures"]] == ["7", "8"]
    listed = {one.uri: one for one in host.do(host.client.list_resources).resources}
    for index, one in enumerate(answer.said["pictures"]):
        full = requests.get(one["url"], timeout=GIVE_UP_S)
        assert full.headers["Content-Type"] == "image/png"
        [content] = host.do(host.client.read_resource, one["resource"]).contents
        assert base64.b64decode(content.blob) == full.content
        assert (content.mime_type, content.uri) == ("image/png", one["resource"])
        assert listed[one["resource"]].size == len(full.content)
        assert listed[one["resource"]].name == f"{answer.task_id}_{index}.png"
    [template] = host.do(host.client.list_resource_templates).resource_templates
    assert template.uri_template == "mflux://pictures/{task_id}/{index}"


def test_the_arguments_of_the_tools_are_fields_of_generate_with_one_type(host: Assistant) -> None:
    tools = host.do(host.client.list_tools).tools
    assert [tool.name for tool in tools] == list(TOOLS)
    for tool in tools:
        schema = tool.input_schema
        jsonschema_rs.meta.validate(schema)
        assert "$ref" not in str(schema)
        for name, argument in schema["properties"].items():
            assert isinstance(argument["type"], str)
            assert argument["description"]
            named = set(re.findall(r"[a-z_]+", argument["description"])) & {*PICTURES, "form"}
            assert named <= {"images", *schema["properties"]}, (tool.name, name)
    by_name = {tool.name: tool.input_schema["properties"] for tool in tools}
    for name in TOOLS["generate_image"].fields:
        assert name in GenerateRequest.model_fields
        assert name in by_name["estimate"]
    assert by_name["generate_image"]["steps"]["maximum"] == 100
    assert by_name["generate_image"]["format"]["enum"] == ["JPEG", "PNG", "WEBP"]


@pytest.mark.parametrize(
    ("tool", "arguments", "field"),
    [
        ("generate_image", {"prompt": "x", "steps": 0}, "steps"),
        ("generate_image", {"prompt": "x", "width": "wide"}, "width"),
        ("generate_image", {"prompt": "x", "seed": -1}, "seed"),
        ("generate_image", {"prompt": "x", "model": "dall-e-3"}, "model"),
        ("generate_image", {"prompt": "x", "negative_prompt": "y"}, "negative_prompt"),
        ("generate_image", {"prompt": "x", "colour": "red"}, "colour"),
        ("generate_image", {"prompt": "x", "priority": True}, "priority"),
        ("generate_image", {"prompt": "x", "wait_s": MOST_WAIT_S + 1}, "wait_s"),
        ("generate_image", {"prompt": "x", "wait_s": True}, "wait_s"),
        ("generate_image", {"prompt": None}, "prompt"),
        ("generate_image", {}, "prompt"),
        ("estimate", {"prompt": "x", "count": 1000}, "count"),
        ("edit_image", {"prompt": "x"}, "image"),
        ("edit_image", {"prompt": "x", "image": "QUJD", "task_id": "a"}, "image"),
        ("edit_image", {"prompt": "x", "image": "http://127.0.0.1/a.png"}, "image"),
        ("edit_image", {"prompt": "x", "image": "/etc/passwd"}, "image"),
        ("edit_image", {"prompt": "x", "image": "file:///etc/passwd"}, "image"),
        ("edit_image", {"prompt": "x", "image": {"task_id": "a"}}, "image"),
        ("edit_image", {"prompt": "x", "image": "QUJD", "mask": 1}, "mask"),
        ("edit_image", {"prompt": "x", "image": "QUJD", "model": ["schnell"]}, "model"),
        ("edit_image", {"prompt": "x", "path": "/etc/passwd"}, "path"),
        ("edit_image", {"prompt": "x", "task_id": "0" * 16}, "task_id"),
        ("edit_image", {"prompt": "x", "task_id": "0" * 16, "index": 1.5}, "index"),
        ("check_image", {}, "task_id"),
        ("check_image", {"task_id": ""}, "task_id"),
        ("check_image", {"task_id": "0" * 16}, "task_id"),
        ("cancel", {"task_id": ["a"]}, "task_id"),
        ("list_models", {"all": True}, "all"),
    ],
)
def test_bad_input_is_a_result_that_names_the_argument(
    host: Assistant, tool: str, arguments: dict[str, Any], field: str
) -> None:
    answer = host.call(tool, **arguments)
    assert answer.failed
    assert answer.pictures == []
    assert answer.said["error"]["field"] == field
    assert answer.said["error"]["code"]
    assert answer.said["error"]["message"]


def test_an_earlier_picture_and_one_that_is_sent_can_be_edited(host: Assistant) -> None:
    first = host.draw("generate_image", **SMALL)
    whole = base64.b64encode(png()).decode()
    for picture in (
        {"task_id": first.task_id},
        {"task_id": first.task_id, "index": 0},
        {"image": whole},
        {"image": f"data:image/png;base64,{whole}"},
    ):
        edited = host.draw("edit_image", prompt="at night", steps=2, **picture)
        assert not edited.failed, edited.said
        assert edited.said["model"] == "noise-flux2"
        assert shown(edited)[0].size == (64, 64)


def test_a_mask_or_a_strength_starts_from_the_picture(host: Assistant) -> None:
    picture, mask = (base64.b64encode(png(colour)).decode() for colour in ("red", "white"))
    masked = host.draw("edit_image", prompt="a door", image=picture, mask=mask, steps=2)
    assert masked.said["model"] == "noise-fill"
    kept = host.draw("edit_image", prompt="a door", image=picture, image_strength=0.5, steps=4)
    assert kept.said["model"] == "noise-flux1"


def test_the_models_that_may_be_named_are_listed(host: Assistant) -> None:
    found = host.call("list_models").said
    assert found["default"] == "noise-flux1"
    assert [model["name"] for model in found["models"]] == [
        "noise-flux1",
        "noise-flux2",
        "noise-fill",
    ]
    assert "prompt" in found["models"][0]["takes"]


def test_an_estimate_draws_nothing(server: ServerProcess, host: Assistant) -> None:
    before = len(host.do(host.client.list_resources, cache_mode="bypass").resources)
    found = host.call("estimate", **SMALL).said
    assert found["seconds_p90"] >= found["seconds"] >= 1
    assert server.get("/queue").json()["length"] == 0
    assert len(host.do(host.client.list_resources, cache_mode="bypass").resources) == before


def test_an_unknown_tool_method_or_resource_is_an_error_of_the_protocol(host: Assistant) -> None:
    with pytest.raises(MCPError, match="no tool draw") as caught:
        host.call("draw")
    assert caught.value.code == -32602
    wanted = -32602 if host.client.protocol_version == MODERN else -32002
    for uri in ("mflux://pictures/0000/0", "file:///etc/passwd", "mflux://pictures/../../x/0"):
        with pytest.raises(MCPError) as caught:
            host.do(host.client.read_resource, uri)
        assert caught.value.code == wanted


# -- waiting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
def test_a_call_reports_progress_in_seconds_of_the_forecast(
    stepped: SteppedServer, era: str
) -> None:
    with assistant(stepped.url, era) as host:
        call = host.begin_call("generate_image", watched=True, **{**SMALL, "steps": 3})
        until(lambda: len(host.progress) >= 2)
        stepped.step(4)
        answer = host.ended(Answer(call.result(GIVE_UP_S)))
        assert answer.said["status"] == "done"
        assert len(answer.pictures) == 1
        seen = [progress for progress, _, _ in host.progress]
        assert seen == sorted(set(seen))
        for progress, total, text in host.progress:
            assert total is not None
            assert total >= progress
            assert text
            assert "left" in text


@pytest.mark.parametrize("era", ERAS)
def test_a_picture_that_takes_longer_is_checked_later(stepped: SteppedServer, era: str) -> None:
    with assistant(stepped.url, era) as host:
        ordered = host.call("generate_image", **SMALL, wait_s=0)
        assert not ordered.failed
        assert ordered.pictures == []
        assert ordered.said["status"] in ("waiting", "running")
        assert ordered.said["seconds_left"] >= 1
        again = host.call("check_image", task_id=ordered.task_id, wait_s=0)
        assert again.said["seconds_left"] >= 1
        assert "check_image" in again.said["message"]
        check = host.begin_call("check_image", watched=False, task_id=ordered.task_id)
        stepped.step(3)
        answer = host.ended(Answer(check.result(GIVE_UP_S)))
        assert answer.said["status"] == "done"
        assert len(answer.pictures) == 1


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("era", ERAS)
def test_a_call_that_its_host_cancels_cancels_its_task(
    stepped: SteppedServer, era: str, watched: bool
) -> None:
    with assistant(stepped.url, era) as host:
        call = host.begin_call("generate_image", watched=watched, **{**SMALL, "steps": 50})
        until(lambda: stepped.get("/queue").json()["length"] == 1)
        [task] = stepped.get("/queue").json()["tasks"]
        call.cancel()
        stepped.step(20)
        until(
            lambda: stepped.get("/status", task_id=task["task_id"]).json()["status"] == "cancelled"
        )
        assert host.call("check_image", task_id=task["task_id"]).failed


def test_a_call_that_is_cancelled_before_its_task_is_in_the_queue_cancels_it(
    stepped: SteppedServer,
) -> None:
    session = {"Mcp-Session-Id": "0" * 32}
    orders = rpc("tools/call", name="generate_image", arguments={**SMALL, "steps": 50})
    stop = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
    with ThreadPoolExecutor(1) as caller:
        with stepped.server.scheduler.changes:  # nothing is submitted meanwhile
            call = caller.submit(post, stepped.url, orders, **session)
            until(lambda: stepped.server.places.taken == 1)
            assert post(stepped.url, stop, **session).status_code == 202
        answer = call.result(GIVE_UP_S).json()
    assert json.loads(answer["result"]["content"][0]["text"])["status"] == "cancelled"
    assert stepped.get("/queue").json()["length"] == 0


def queue_has(server: SteppedServer, tasks: int) -> bool:
    return bool(server.get("/queue").json()["length"] == tasks)


def test_only_the_call_that_orders_a_picture_cancels_it_when_its_caller_disconnects(
    stepped: SteppedServer,
) -> None:
    task_id = stepped.submit(steps=50)
    checks = rpc("tools/call", name="check_image", arguments={"task_id": task_id})
    orders = rpc("tools/call", name="generate_image", arguments={**SMALL, "steps": 50})
    for body in (checks, orders):
        connection = raw_post(stepped.url, body)
        until(lambda: stepped.server.places.taken == 1)
        until(partial(queue_has, stepped, 2 if body is orders else 1))
        hang_up(connection)
        until(lambda: stepped.server.places.taken == 0)
        until(partial(queue_has, stepped, 1))
        assert stepped.get("/status", task_id=task_id).json()["status"] in ("waiting", "running")


def raw_post(url: str, body: Any) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), GIVE_UP_S)
    content = json.dumps(body)
    head = f"POST /mcp HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall((head + content).encode())
    return connection


def hang_up(connection: socket.socket) -> None:
    at_once = b"\x01\0\0\0\0\0\0\0"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    connection.close()


@pytest.mark.parametrize("era", ERAS)
def test_the_tool_cancel_cancels_but_removes_no_finished_picture(
    stepped: SteppedServer, era: str
) -> None:
    with assistant(stepped.url, era) as host:
        first = host.call("generate_image", **{**SMALL, "steps": 50}, wait_s=0).task_id
        assert host.call("cancel", task_id=first).said["was"] in ("waiting", "running")
        assert stepped.get("/status", task_id=first).json()["status"] == "cancelled"
        stepped.end()
        done = host.draw("generate_image", **SMALL)
        kept = host.call("cancel", task_id=done.task_id)
        assert kept.said["was"] == "done"
        assert len(host.call("check_image", task_id=done.task_id).pictures) == 1


def test_a_call_does_not_wait_where_no_place_for_waiting_is_left(app: PlayedApp) -> None:
    calls = calls_of(app.queue, places=0)
    queue = calls.own_queue()
    task_id = app.submit("alice")
    routes = McpRoutes(calls, None)  # type: ignore[arg-type]
    assert list(routes._views(queue, Waiting(task_id, MOST_WAIT_S), lambda: False)) == []


# -- what an answer holds --------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path_factory: pytest.TempPathFactory) -> PlayedApp:
    return PlayedApp(tmp_path_factory.mktemp("app"))


def test_a_notification_cancels_only_calls_of_its_own_session(stepped: SteppedServer) -> None:
    with assistant(stepped.url, HANDSHAKE) as host:
        call = host.begin_call("generate_image", watched=False, **{**SMALL, "steps": 50})
        until(lambda: stepped.get("/queue").json()["length"] == 1)
        [task] = stepped.get("/queue").json()["tasks"]
        for number in range(5):
            params = {"requestId": number}
            stop = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
            for headers in ({}, {"Mcp-Session-Id": "0" * 32}):
                assert post(stepped.url, stop, **headers).status_code == 202
        status = stepped.get("/status", task_id=task["task_id"]).json()["status"]
        assert status in ("waiting", "running")
        stepped.end()
        assert host.ended(Answer(call.result(GIVE_UP_S))).said["status"] == "done"
