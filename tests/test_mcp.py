"""MCP at /mcp: the official client of both generations of the protocol, over real HTTP."""

import base64
import json
import re
import socket
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import requests
from assistants import ERAS, HANDSHAKE, MODERN, Answer, Assistant, assistant
from conftest import GIVE_UP_S, ServerProcess, ask, until
from live import SteppedServer
from mcp import MCPError
from PIL import Image
from played_app import PlayedApp
from test_sync_calls import calls_of

from api.generate_request import PICTURES, GenerateRequest
from compat.mcp import McpRoutes
from compat.mcp_messages import PREFIX
from compat.mcp_results import MOST_INLINE_BYTES
from compat.mcp_schemas import MOST_WAIT_S, TOOLS
from compat.mcp_tools import Waiting
from decoding.decoder import PictureReader

SMALL = {"prompt": "a fox", "width": 64, "height": 64, "steps": 2}
META = {
    PREFIX + "protocolVersion": MODERN,
    PREFIX + "clientCapabilities": {},
    PREFIX + "clientInfo": {"name": "test", "version": "1"},
}
TOOLS_LIST = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/list"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = ("--models", "noise-flux1,noise-flux2,noise-fill")
    process = ServerProcess(tmp_path_factory.mktemp("server"), *models)
    yield process
    assert process.stop() == 0
    assert "Traceback" not in "".join(process.log)


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


def post(url: str, body: Any, **headers: str) -> requests.Response:
    usual = {"Accept": "application/json, text/event-stream"}
    return ask("POST", url + "/mcp", json=body, headers={**usual, **headers})


def rpc(method: str, request_id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}


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


def test_only_the_call_that_orders_a_picture_cancels_it_when_its_caller_disconnects(
    stepped: SteppedServer,
) -> None:
    task_id = stepped.submit(steps=50)
    checks = rpc("tools/call", name="check_image", arguments={"task_id": task_id})
    orders = rpc("tools/call", name="generate_image", arguments={**SMALL, "steps": 50})
    for body in (checks, orders):
        connection = raw_post(stepped.url, body)
        until(lambda: stepped.server.places.taken == 1)
        assert stepped.get("/queue").json()["length"] == (2 if body is orders else 1)
        hang_up(connection)
        until(lambda: stepped.server.places.taken == 0)
        until(lambda: stepped.get("/queue").json()["length"] == 1)
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


# -- the protocol ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("2025-11-25", "2025-11-25"),
        ("2025-03-26", "2025-03-26"),
        ("2024-11-05", "2024-11-05"),
        ("1999-01-01", "2025-11-25"),
        (None, "2025-11-25"),
    ],
)
def test_the_handshake_agrees_on_a_revision_of_its_generation(
    server: ServerProcess, asked: str | None, answered: str
) -> None:
    answer = post(server.url, rpc("initialize", protocolVersion=asked))
    assert answer.status_code == 200
    assert answer.json()["result"]["protocolVersion"] == answered
    assert len(answer.headers["Mcp-Session-Id"]) == 32
    done = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert (post(server.url, done).status_code, post(server.url, done).content) == (202, b"")
    assert post(server.url, rpc("ping"), **{"MCP-Protocol-Version": answered}).json() == {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {},
    }


@pytest.mark.parametrize(
    ("headers", "params", "code"),
    [
        ({}, {"_meta": META}, -32020),
        ({"MCP-Protocol-Version": MODERN}, {"_meta": META}, -32020),
        ({**TOOLS_LIST, "Mcp-Method": "tools/call"}, {"_meta": META}, -32020),
        ({**TOOLS_LIST, "MCP-Protocol-Version": "2025-11-25"}, {"_meta": META}, -32020),
        (TOOLS_LIST, {}, -32602),
        (TOOLS_LIST, {"_meta": {PREFIX + "protocolVersion": MODERN}}, -32602),
        (
            {**TOOLS_LIST, "MCP-Protocol-Version": "2099-01-01"},
            {"_meta": {**META, PREFIX + "protocolVersion": "2099-01-01"}},
            -32022,
        ),
        ({"MCP-Protocol-Version": "2099-01-01"}, {}, -32022),
    ],
)
def test_a_request_whose_headers_and_body_disagree_is_refused(
    server: ServerProcess, headers: dict[str, str], params: dict[str, Any], code: int
) -> None:
    answer = post(server.url, rpc("tools/list", 5, **params), **headers)
    assert answer.status_code == 400
    assert answer.json()["id"] == 5
    assert answer.json()["error"]["code"] == code
    if code == -32022:
        assert MODERN in answer.json()["error"]["data"]["supported"]


def test_a_name_in_a_header_may_be_encoded_and_must_match(server: ServerProcess) -> None:
    body = rpc("tools/call", name="list_models", _meta=META)
    encoded = f"=?base64?{base64.b64encode(b'list_models').decode()}?="
    for name, status in (
        ("list_models", 200),
        (encoded, 200),
        ("estimate", 400),
        ("=?base64?!?=", 400),
        ("", 400),
    ):
        headers = {**TOOLS_LIST, "Mcp-Method": "tools/call", "Mcp-Name": name}
        assert post(server.url, body, **headers).status_code == status


def test_each_generation_has_its_own_methods(server: ServerProcess) -> None:
    for method in ("initialize", "ping", "nothing"):
        headers = {**TOOLS_LIST, "Mcp-Method": method}
        answer = post(server.url, rpc(method, _meta=META), **headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, -32601)
    for method in ("server/discover", "nothing"):
        answer = post(server.url, rpc(method))
        assert (answer.status_code, answer.json()["error"]["code"]) == (200, -32601)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"[]", -32700),
        (b"[" * 100_000, -32700),
        (b"{}", -32600),
        (b'{"jsonrpc": "2.0", "id": 1}', -32600),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": [1], "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', -32600),
        (b'{"jsonrpc": "2.0", "id": %s, "method": "ping"}' % (b"9" * 2000), -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "result": {}}', -32600),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": [1]}', -32602),
    ],
)
def test_what_is_no_message_is_an_error(server: ServerProcess, content: bytes, code: int) -> None:
    answer = ask("POST", server.url + "/mcp", data=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert answer.json().get("id", 1) == 1


def test_wrong_kinds_of_params_are_refused_and_not_failures(server: ServerProcess) -> None:
    for params in (
        {"name": "generate_image", "arguments": {"prompt": "x", "wait_s": float("nan")}},
        {"name": ["generate_image"]},
        {"name": "call"},
        {"name": "list_models", "arguments": "x"},
        {"name": "list_models", "arguments": [1]},
        {"name": "list_models", "_meta": 7},
        {"name": "list_models", "_meta": {"progressToken": {"a": 1}}},
        {},
    ):
        content = json.dumps(rpc("tools/call", **params))  # NaN and all
        answer = ask("POST", server.url + "/mcp", data=content)
        assert answer.status_code == 200
        assert "result" in answer.json() or answer.json()["error"]["code"] == -32602
    for uri in (None, 1, ["mflux://pictures/a/0"], "x" * 100_000):
        answer = post(server.url, rpc("resources/read", uri=uri))
        assert answer.json()["error"]["code"] == -32002


@pytest.mark.parametrize("path", ["/mcp", "/generate", "/v1/images/generations", "/api/show"])
def test_a_body_that_is_too_large_is_an_error_of_its_api(server: ServerProcess, path: str) -> None:
    """It is refused before the application sees it."""
    answer = ask("POST", server.url + path, data=b"", headers={"Content-Length": str(10**9)})
    assert answer.status_code == 413
    assert ("jsonrpc" in answer.json()) == (path == "/mcp")
    assert answer.json()["error"]


def test_there_is_no_stream_to_get_and_no_session_to_delete(server: ServerProcess) -> None:
    for method in ("GET", "DELETE", "PUT"):
        answer = ask(method, server.url + "/mcp", headers={"Accept": "text/event-stream"})
        assert answer.status_code == 405
        assert "POST" in answer.headers["Allow"]
        assert answer.json()["error"]["data"]["code"] == "method_not_allowed"


def test_pages_of_other_sites_and_unknown_hosts_are_refused(server: ServerProcess) -> None:
    foreign = post(server.url, rpc("tools/list"), Origin="https://evil.example")
    assert (foreign.status_code, foreign.json()["error"]["data"]["code"]) == (403, "foreign_page")
    assert "id" not in foreign.json()
    rebound = post(server.url, rpc("tools/list"), Host="evil.example")
    assert rebound.status_code == 421


def test_a_server_with_keys_asks_for_one_and_keeps_clients_apart(app: PlayedApp) -> None:
    assert app.ask("", "POST", "/mcp", json=rpc("tools/list")).status_code == 401
    task_id = app.submit("alice")
    app.run()
    for name, number in (("alice", 1), ("bob", 0), ("root", 0)):
        listed = app.json(name, "POST", "/mcp", json=rpc("resources/list"))["result"]["resources"]
        assert [one["uri"] for one in listed] == [f"mflux://pictures/{task_id}/0"] * number


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
