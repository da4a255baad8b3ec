"""The protocol of MCP at /mcp: both generations, headers and bodies, and who may call."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from assistants import MODERN, post, rpc
from conftest import ServerProcess, ask
from played_app import PlayedApp
from served import served

from compat.mcp_messages import PREFIX

META = {
    PREFIX + "protocolVersion": MODERN,
    PREFIX + "clientCapabilities": {},
    PREFIX + "clientInfo": {"name": "test", "version": "1"},
}

TOOLS_LIST = {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/list"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = ("--models", "noise-flux1,noise-flux2,noise-fill")
    yield from served(tmp_path_factory.mktemp("server"), *models)


@pytest.fixture
def app(tmp_path_factory: pytest.TempPathFactory) -> PlayedApp:
    return PlayedApp(tmp_path_factory.mktemp("app"))


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
