"""Messages of MCP, the Model Context Protocol: JSON-RPC, and its two generations.

Since revision 2026-07-28 each request says in `_meta` which revision it uses, and headers repeat
its method and name ("modern" below). Before, a client began with the method `initialize`
("handshake"). One endpoint answers both.

https://modelcontextprotocol.io/specification/2026-07-28/basic/transports/streamable-http
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from werkzeug.datastructures import Headers

from version import VERSION

MODERN = ("2026-07-28",)
HANDSHAKE = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""Revisions, the newest first."""
PREFIX = "io.modelcontextprotocol/"
"""Of what the protocol itself adds to `_meta`."""
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
INTERNAL_ERROR, HEADER_MISMATCH, UNSUPPORTED_VERSION = -32603, -32020, -32022
RESOURCE_NOT_FOUND = -32002
"""Of the older revisions; INVALID_PARAMS since."""
NAMED = {"tools/call": "name", "resources/read": "uri"}
"""Methods with the header Mcp-Name, and the member of their params that it repeats."""
MOST_ID_CHARS = 1000
ENCODED = re.compile(r"=\?base64\?(.*)\?=")
SERVER_INFO = {"name": "mflux-server", "title": "mflux-server", "version": VERSION}


class RpcError(Exception):
    """A request that is answered with a JSON-RPC error.

    Args:
        status: HTTP status in the modern revisions; the older ones answer 200.
    """

    def __init__(
        self, code: int, message: str, *, status: int = 400, data: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.data = data


@dataclass
class Message:
    """A request, or a notification (`request_id` is None)."""

    method: str
    request_id: str | int | None
    modern: bool
    params: dict[str, Any] = field(default_factory=dict)
    progress_token: str | int | None = None
    """What the client wants its notifications of progress marked with; None: it wants none."""

    def cached(self, ttl_ms: int) -> dict[str, Any]:
        """What an answer to this says about caching it."""
        return {"ttlMs": ttl_ms, "cacheScope": "private"} if self.modern else {}


def read_message(body: Mapping[str, Any], headers: Headers) -> Message:
    """
    Raises:
        RpcError: it is no message, or none of a revision that this server speaks.
    """
    method, request_id, params = body.get("method"), body.get("id"), body.get("params", {})
    if body.get("jsonrpc") != "2.0" or not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "The body must be a request of JSON-RPC 2.0.")
    if "id" in body and not _is_id(request_id):
        raise RpcError(
            INVALID_REQUEST,
            f"id must be a whole number or a text, of at most {MOST_ID_CHARS} characters.",
        )
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, "params must be an object.")
    version = headers.get("MCP-Protocol-Version")
    modern = PREFIX + "protocolVersion" in _meta_of(params) or version in MODERN
    if modern and request_id is not None:
        _check_modern(method, params, headers)
    elif version is not None and version not in (*HANDSHAKE, *MODERN):
        raise _unsupported(version)
    token = _meta_of(params).get("progressToken")
    return Message(method, request_id, modern, params, token if _is_id(token) else None)


def _check_modern(method: str, params: dict[str, Any], headers: Headers) -> None:
    """The headers repeat what the body says. Raises: RpcError."""
    meta = _meta_of(params)
    version = meta.get(PREFIX + "protocolVersion")
    for name in ("protocolVersion", "clientCapabilities"):
        if PREFIX + name not in meta:
            raise RpcError(INVALID_PARAMS, f"params._meta must have {PREFIX}{name}.")
    _check_header(headers, "MCP-Protocol-Version", version)
    _check_header(headers, "Mcp-Method", method)
    if method in NAMED and isinstance(params.get(NAMED[method]), str):
        _check_header(headers, "Mcp-Name", params[NAMED[method]])
    if version not in MODERN:
        raise _unsupported(version)


def _check_header(headers: Headers, name: str, wanted: Any) -> None:
    sent = headers.get(name)
    if sent is not None and name == "Mcp-Name":
        sent = _decoded(sent)
    if sent is None or sent != wanted:
        raise RpcError(HEADER_MISMATCH, f"The header {name} must say what the body says.")


def _decoded(text: str) -> str | None:
    """A header whose text may be wrapped as base64; None: it is wrapped badly."""
    found = ENCODED.fullmatch(text)
    if found is None:
        return text
    try:
        return base64.b64decode(found[1], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def _unsupported(version: Any) -> RpcError:
    data = {"supported": [*MODERN, *HANDSHAKE], "requested": str(version)[:100]}
    return RpcError(UNSUPPORTED_VERSION, "Unsupported protocol version", data=data)


def _meta_of(params: Mapping[str, Any]) -> dict[str, Any]:
    meta = params.get("_meta")
    return meta if isinstance(meta, dict) else {}


def id_in(body: Mapping[str, Any]) -> str | int | None:
    """The id of a request that may be wrong otherwise."""
    return body["id"] if _is_id(body.get("id")) else None


def _is_id(value: object) -> bool:
    """Whether it can be the id of a request, or a token of progress: both are repeated."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return False
    return len(str(value)) <= MOST_ID_CHARS


def negotiated(params: Mapping[str, Any]) -> str:
    """The revision that `initialize` answers: the client's, or the newest of that generation."""
    asked = params.get("protocolVersion")
    return asked if asked in HANDSHAKE else HANDSHAKE[0]


def result_of(message: Message, result: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    if message.modern:
        result = {**result, "resultType": "complete", "_meta": {PREFIX + "serverInfo": SERVER_INFO}}
    return {"jsonrpc": "2.0", "id": message.request_id, "result": result}


def error_of(request_id: str | int | None, error: RpcError) -> dict[str, Any]:
    """Args: request_id: None: it could not be read, and is left out."""
    about: dict[str, Any] = {"code": error.code, "message": str(error)}
    if error.data is not None:
        about["data"] = error.data
    known = {} if request_id is None else {"id": request_id}
    return {"jsonrpc": "2.0", **known, "error": about}


def progress_of(token: str | int, progress: float, total: float, text: str) -> dict[str, Any]:
    """A notification. `progress` must grow from one to the next."""
    params = {"progressToken": token, "progress": progress, "total": total, "message": text}
    return {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}
