"""MCP over stdio, for assistants that start a program: python3 -m client.mcp --server URL

It passes each message on to /mcp of a running mflux-server and prints the answers. It needs nothing
but Python 3.9: the file can be copied.

With --pictures FOLDER the tool edit_image also takes `path`: a picture in this folder. Without it
no file is read, whatever an assistant asks for.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

DEFAULT_URL = "http://localhost:4030"
TIMEOUT_S = 120.0
"""Of a connection without a byte. The server waits 45 s for a picture."""
LAST_ANSWERS_S = 1.0
"""Seconds that answers may take once the assistant has closed its end."""
MODERN = "io.modelcontextprotocol/protocolVersion"
"""In `_meta` of each message since revision 2026-07-28; before, `initialize` agreed on one."""
NAMED = {"tools/call": "name", "resources/read": "uri"}
PARSE_ERROR, INTERNAL_ERROR = -32700, -32603
ID = (str, int, type(None))
MOST_PICTURE_BYTES = 30_000_000
PICTURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8", re.DOTALL)
"""The beginning of a PNG, JPEG, WebP or GIF. Other files are not sent anywhere."""


AT_ONCE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
"""Of SO_LINGER: closing resets the connection."""


class Unusable(Exception):
    """A path that is not sent. The message is for the assistant."""


class Call:
    """A request that has no answer yet."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Resetting the connection of a request cancels it. A connection that is only closed could
        be one of a client that still reads."""
        self.cancelled = True
        connection = self.socket
        if connection is not None:
            with suppress(OSError):  # it is closed already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                connection.shutdown(socket.SHUT_RD)  # wakes the thread that reads; it closes it


class Bridge:
    """Any thread may call.

    Args:
        url: of the server.
        key: for it; empty: none.
        folders: whose pictures may be edited.
        out: where answers go, one on each line.
    """

    def __init__(self, url: str, key: str, folders: Iterable[Path], out: BinaryIO) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an address like {DEFAULT_URL}")
        self._tls, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/mcp") + "/mcp"
        self._url, self._key = url, key
        self._folders = [folder.expanduser().resolve() for folder in folders]
        for folder in self._folders:
            if not folder.is_dir():
                raise ValueError(f"there is no folder {folder}")
        self._out = out
        self._writing = threading.Lock()
        self._agreed: dict[str, str] = {}
        """Headers since `initialize`: its revision and its session."""
        self._calls: dict[object, Call] = {}
        """By the id of the request."""

    def run(self, lines: Iterable[bytes]) -> None:
        """Passes messages on until there are no more."""
        threads: list[threading.Thread] = []
        for line in lines:
            if not line.strip():
                continue
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict) or not isinstance(message.get("id"), ID):
                self._print(_error(None, PARSE_ERROR, "This is not a message of JSON-RPC."))
                continue
            if message.get("method") == "notifications/cancelled":
                call = self._calls.get(str(_params_of(message).get("requestId")))
                if call:
                    call.cancel()
                continue
            call = self._calls[str(message.get("id"))] = Call()
            thread = threading.Thread(target=self._pass_on, args=(message, call), daemon=True)
            thread.start()
            threads = [one for one in threads if one.is_alive()] + [thread]
        for thread in threads:
            thread.join(LAST_ANSWERS_S / len(threads))

    def _pass_on(self, message: dict[str, Any], call: Call) -> None:
        request_id, answered = message.get("id"), False
        try:
            self._with_picture(message)
            for answer in self._answers(message, call):
                answered = answered or "id" in answer
                if request_id is not None and not call.cancelled:
                    self._print(self._taught(message, answer))
            if not answered and request_id is not None:
                raise OSError("the connection broke")
        except Unusable as error:
            text = json.dumps({"error": {"message": str(error), "field": "path"}})
            result = {"content": [{"type": "text", "text": text}], "isError": True}
            if MODERN in _meta_of(message):
                result["resultType"] = "complete"
            self._print({"jsonrpc": "2.0", "id": request_id, "result": result})
        except (OSError, HTTPException, ValueError) as error:
            if request_id is not None and not call.cancelled:
                why = f"No answer from mflux-server at {self._url}: {error or type(error).__name__}"
                with suppress(OSError):  # nobody reads it any more
                    self._print(_error(request_id, INTERNAL_ERROR, why))
        finally:
            if self._calls.get(str(request_id)) is call:
                del self._calls[str(request_id)]

    def _answers(self, message: dict[str, Any], call: Call) -> Iterator[dict[str, Any]]:
        """Sends a message and yields what comes back."""
        kind = HTTPSConnection if self._tls else HTTPConnection
        connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        with closing(connection):
            connection.connect()
            call.socket = connection.sock
            if call.cancelled:
                return
            body = json.dumps(message).encode()
            connection.request("POST", self._path, body, self._headers(message))
            with closing(connection.getresponse()) as answer:
                if "text/event-stream" in answer.headers.get("Content-Type", ""):
                    yield from _events(answer)
                    return
                content = answer.read()
            if message.get("method") == "initialize":
                self._agree(answer, content)
            yield self._whole(message.get("id"), answer, content)

    def _whole(self, request_id: Any, answer: HTTPResponse, content: bytes) -> dict[str, Any]:
        """An answer that is not a stream."""
        found: Any = None
        with suppress(ValueError):
            found = json.loads(content)
        if not isinstance(found, dict) or found.get("jsonrpc") != "2.0":
            why = f"{self._url} answers HTTP {answer.status}, and not as mflux-server does."
            return _error(request_id, INTERNAL_ERROR, why)
        found["id"] = request_id
        return found

    def _headers(self, message: dict[str, Any]) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        version = _meta_of(message).get(MODERN)
        if not isinstance(version, str):
            return {**headers, **self._agreed}
        method = str(message.get("method"))
        headers["MCP-Protocol-Version"] = _header(version)
        headers["Mcp-Method"] = _header(method)
        name = _params_of(message).get(NAMED.get(method, ""))
        if isinstance(name, str):
            headers["Mcp-Name"] = _header(name)
        return headers

    def _agree(self, answer: HTTPResponse, content: bytes) -> None:
        """Notes what `initialize` has answered."""
        with suppress(ValueError, KeyError, TypeError):
            version = str(json.loads(content)["result"]["protocolVersion"])
            self._agreed = {"MCP-Protocol-Version": version}
            if session := answer.headers.get("Mcp-Session-Id"):
                self._agreed["Mcp-Session-Id"] = session

    def _print(self, message: dict[str, Any]) -> None:
        with self._writing:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()

    # -- pictures of this machine -----------------------------------------------------------------

    def _taught(self, message: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """The list of tools, with the argument that only this program knows."""
        if not self._folders or message.get("method") != "tools/list":
            return answer
        for tool in (answer.get("result") or {}).get("tools", ()):
            if tool.get("name") == "edit_image":
                tool["inputSchema"]["properties"]["path"] = {
                    "type": "string",
                    "description": "In place of image: the path of a picture on this machine, in "
                    + self._where(),
                }
        return answer

    def _with_picture(self, message: dict[str, Any]) -> None:
        """Replaces the path of a picture by its bytes. Raises: Unusable."""
        arguments = _params_of(message).get("arguments")
        if (
            self._folders
            and message.get("method") == "tools/call"
            and _params_of(message).get("name") == "edit_image"
            and isinstance(arguments, dict)
            and arguments.get("path") is not None
        ):
            data = self._picture(arguments.pop("path"))
            arguments["image"] = base64.b64encode(data).decode()

    def _picture(self, path: object) -> bytes:
        """Every refusal is the same, so that nothing is said about files outside the folders."""
        refusal = Unusable(f"path must be a PNG, JPEG, WebP or GIF file in {self._where()}.")
        if not isinstance(path, str):
            raise refusal
        try:
            file = (self._folders[0] / Path(path).expanduser()).resolve()
            if not any(folder in file.parents for folder in self._folders) or not file.is_file():
                raise refusal
            with file.open("rb") as stream:
                data = stream.read(MOST_PICTURE_BYTES + 1)
        except (OSError, ValueError, RuntimeError):
            raise refusal from None
        if len(data) > MOST_PICTURE_BYTES or not PICTURE.match(data):
            raise refusal
        return data

    def _where(self) -> str:
        return " or ".join(map(str, self._folders))


def _events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The messages of a stream of server-sent events."""
    for line in answer:
        if line.startswith(b"data:"):
            found = json.loads(line[5:])
            if isinstance(found, dict):
                yield found


def _error(request_id: Any, code: int, message: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}


def _params_of(message: dict[str, Any]) -> dict[str, Any]:
    params = message.get("params")
    return params if isinstance(params, dict) else {}


def _meta_of(message: dict[str, Any]) -> dict[str, Any]:
    meta = _params_of(message).get("_meta")
    return meta if isinstance(meta, dict) else {}


def _header(text: str) -> str:
    """A text as a header: as it is, or wrapped as base64."""
    plain = text.isascii() and text.isprintable() and text == text.strip()
    if plain and not (text.startswith("=?base64?") and text.endswith("?=")):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m client.mcp",
        description="Lets assistants that speak MCP on stdin and stdout use an mflux-server.",
    )
    parser.add_argument(
        "--server",
        "--url",
        default=os.environ.get("MFLUX_SERVER_URL") or DEFAULT_URL,
        metavar="URL",
        help="of the server; MFLUX_SERVER_URL, %(default)s",
    )
    parser.add_argument(
        "--key",
        default=os.environ.get("MFLUX_SERVER_KEY", ""),
        help="for a server with keys; better in MFLUX_SERVER_KEY, because others can see options",
    )
    parser.add_argument(
        "--pictures",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="lets assistants edit the pictures in this folder; repeatable. Without it no file of "
        "this machine is read",
    )
    options = parser.parse_args()
    try:
        bridge = Bridge(options.server, options.key, options.pictures, sys.stdout.buffer)
    except ValueError as error:
        parser.error(str(error))
    with suppress(KeyboardInterrupt, BrokenPipeError):
        bridge.run(sys.stdin.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
