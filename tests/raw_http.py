"""Requests and answers over raw sockets."""

import json
import socket
import struct
from typing import Any

from conftest import GIVE_UP_S
from live import SteppedServer

JSON = "Content-Type: application/json"
SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": 2}


def opened(server: SteppedServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server.port), timeout=GIVE_UP_S)


def head(first_line: str, *headers: str) -> bytes:
    return "\r\n".join([first_line, "Host: localhost", *headers, "", ""]).encode()


def read_all(connection: socket.socket) -> bytes:
    """To the end of the connection."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def ask(server: SteppedServer, request: bytes, *, half_close: bool = False) -> tuple[int, Any]:
    """Status and JSON body of an answer after which the server closes the connection."""
    with opened(server) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return parsed(read_all(connection))


def parsed(answer: bytes) -> tuple[int, Any]:
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), answer[:100]
    return int(top.split()[1]), json.loads(body)


def post(path: str, body: bytes, *headers: str) -> bytes:
    length = f"Content-Length: {len(body)}"
    return head(f"POST {path} HTTP/1.1", JSON, length, *headers) + body


def abort(connection: socket.socket) -> None:
    """Close with a reset, as a process that is killed with unread data does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def running(server: SteppedServer) -> bool:
    tasks = server.get("/queue").json()["tasks"]
    return any(task["status"] == "running" for task in tasks)
