"""The HTTP server under the application, over raw sockets: connections that open and break by the
hundred, and the edges of the protocol."""

import json
import logging
import os
import resource
import socket
import struct
import threading
from base64 import b64decode
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import live
import pytest
import requests
from conftest import GIVE_UP_S, until
from flask import Flask
from live import Connection, EventStream, SteppedServer
from PIL import Image

from api import event_stream, http_channel, http_loop, long_poll, transfer_budget
from api.event_texts import HEARTBEAT
from api.http_channel import Pieces
from api.http_loop import HttpLoop
from api.http_server import HttpServer
from api.transfer_budget import TransferBudget

JSON = "Content-Type: application/json"
NOISE = Image.effect_noise((1500, 1500), 100).convert("RGB")
SMALL = {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": 2}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    monkeypatch.setattr(http_loop, "CHECK_S", 0.05)
    stepped = SteppedServer(tmp_path)
    yield stepped
    stepped.close()


def opened(server: SteppedServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server.port), timeout=GIVE_UP_S)


def opened_for_little(server: SteppedServer) -> socket.socket:
    """A connection that takes little that its program does not read."""
    connection = socket.socket()
    connection.settimeout(GIVE_UP_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.server.port))
    return connection


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


# The loop


def test_no_thread_but_the_loop_can_open_or_close_connections(server: SteppedServer) -> None:
    sockets = server.server._http._server.loop.sockets
    number = next(iter(sockets))
    with pytest.raises(RuntimeError, match="only the HTTP loop"):
        del sockets[number]
    assert server.get("/health").status_code == 200


def test_streams_that_open_and_break_by_the_hundred_leave_the_server_well(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that another thread opened or closed would be an error in the log."""
    monkeypatch.setattr(event_stream, "LOOK_S", 0.05)
    caplog.set_level(logging.WARNING)
    server.running()
    idle = [opened(server) for _ in range(50)]
    for number in range(8):
        streams = [opened(server) for _ in range(60)]
        for index, stream in enumerate(streams):
            stream.sendall(head("GET /events HTTP/1.1"))
            if (index + number) % 3 == 0:
                assert stream.recv(10)
        for index, stream in enumerate(streams):
            abort(stream) if index % 2 else stream.close()
        assert server.get("/status", task_id="unknown").status_code == 404
    until(lambda: server.server.places.taken == 0)
    for connection in idle:
        connection.sendall(head("GET /health HTTP/1.1", "Connection: close"))
        assert parsed(read_all(connection))[0] == 200
        connection.close()
    assert not caplog.messages


def test_an_error_of_one_connection_closes_that_one_alone(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(channel: object, data: bytes) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, opened(server) as connection:
        patch.setattr(http_channel.Channel, "received", fail)
        connection.sendall(b"GET")
        assert read_all(connection) == b""
    assert server.get("/health").status_code == 200


def test_the_end_of_the_loop_closes_every_connection(tmp_path: Path) -> None:
    server = SteppedServer(tmp_path)
    idle = [opened(server) for _ in range(5)]
    until(lambda: len(server.server._http._server.active_channels) == 5)
    server.close()
    for connection in idle:
        assert read_all(connection) == b""
        connection.close()


def test_a_loop_that_never_ran_can_end() -> None:
    loop = HttpLoop()
    loop.end()
    assert loop._woken.fileno() == -1


class Asked:
    """A closed socket that notes when the loop asks it."""

    def __init__(self) -> None:
        self.was_asked = threading.Event()

    @property
    def _fileno(self) -> None:
        self.was_asked.set()


def test_changes_of_two_threads_at_the_same_moment_wake_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_loop, "CHECK_S", 3600.0)
    first, second, begun = Asked(), Asked(), threading.Event()
    loop = HttpLoop(begun.set)

    class Interrupted(deque[Any]):
        def append(self, changed: Any) -> None:
            super().append(changed)
            if changed is first:
                other = threading.Thread(target=loop.changed, args=(second,))
                other.start()
                other.join()

    loop._changed = Interrupted()
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    assert begun.wait(GIVE_UP_S)
    loop.changed(first)
    assert first.was_asked.wait(GIVE_UP_S)
    assert second.was_asked.wait(GIVE_UP_S)
    loop.end()
    thread.join()


class Late:
    """The loop's end of its wake-up pair; just before it is read, another change comes."""

    def __init__(self, loop: HttpLoop, change: Asked) -> None:
        self._woken, self._loop, self._change = loop._woken, loop, change

    def recv(self, size: int) -> bytes:
        other = threading.Thread(target=self._loop.changed, args=(self._change,))
        other.start()
        other.join()
        return self._woken.recv(size)

    def close(self) -> None:
        self._woken.close()


def test_a_change_while_the_loop_wakes_leaves_it_able_to_wake_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_loop, "CHECK_S", 3600.0)
    first, second, third, begun = Asked(), Asked(), Asked(), threading.Event()
    loop: Any = HttpLoop(begun.set)
    loop._woken = Late(loop, second)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    assert begun.wait(GIVE_UP_S)
    loop.changed(first)
    assert second.was_asked.wait(GIVE_UP_S)
    loop.changed(third)
    assert third.was_asked.wait(GIVE_UP_S)
    loop.end()
    thread.join()


def channel_of(server: SteppedServer, connection: socket.socket) -> http_channel.Channel:
    channels: dict[int, http_channel.Channel] = server.server._http._server.active_channels
    address = connection.getsockname()
    until(lambda: any(channel.addr == address for channel in list(channels.values())))
    return next(channel for channel in list(channels.values()) if channel.addr == address)


def test_a_small_answer_is_sent_in_one_piece(server: SteppedServer) -> None:
    sent: list[bytes] = []
    served = threading.Semaphore(0)

    class Noted(http_channel.Channel):
        def service(self) -> None:
            super().service()
            served.release()

        def send(self, data: memoryview, do_close: bool = True) -> int:
            sent.append(bytes(data))
            return int(super().send(data, do_close))

    with opened(server) as connection:
        channel_of(server, connection).__class__ = Noted
        for _ in range(3):
            connection.sendall(head("GET /health HTTP/1.1"))
            assert served.acquire(timeout=GIVE_UP_S)
    assert [parsed(answer)[0] for answer in sent] == [200, 200, 200]


def test_data_that_arrives_during_an_answer_waits_and_does_not_keep_the_loop_busy(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = server.server._http._server.loop
    task_id = server.running()
    with opened(server) as connection:
        connection.sendall(head(f"GET /status?task_id={task_id}&wait=300 HTTP/1.1"))
        until(lambda: server.server.places.taken == 1)
        connection.sendall(head("GET /health HTTP/1.1", "Connection: close"))
        handled: list[object] = []
        checked = threading.Semaphore(0)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_handle", lambda socket, events: handled.append(socket))
            patch.setattr(loop, "check", checked.release)
            assert all(checked.acquire(timeout=GIVE_UP_S) for _ in range(3))
        assert not handled
        server.end()
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 2


def test_connections_that_come_at_once_are_accepted_at_once(tmp_path: Path) -> None:
    idle = HttpServer(
        Flask(__name__), "127.0.0.1", 0, threads=1, connections=100, max_body_bytes=1000
    )
    connections = [socket.create_connection(("127.0.0.1", idle.port)) for _ in range(20)]
    idle._server.handle_accept()  # one turn of the loop
    assert len(idle._server.active_channels) == 20
    for connection in connections:
        connection.close()
    idle.stop(1)


def test_requests_in_one_piece_are_parsed_one_after_the_other(server: SteppedServer) -> None:
    """Parsing all of them at once would let other connections wait."""
    task_id = server.running()
    waits = head(f"GET /status?task_id={task_id}&wait=60 HTTP/1.1")
    with opened(server) as connection:
        last = head("GET /health HTTP/1.1", "Connection: close")
        connection.sendall(waits + head("GET /health HTTP/1.1") * 1000 + last)
        until(lambda: server.server.places.taken == 1)
        channel = next(
            channel
            for channel in server.server._http._server.active_channels.values()
            if channel.requests
        )
        assert len(channel.requests) == 1
        assert len(channel._behind) > 10_000
        server.end()
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 1002


def test_line_ends_between_requests_are_no_requests(server: SteppedServer) -> None:
    with opened(server) as connection:
        connection.sendall(b"\r\n" * 10_000 + head("GET /health HTTP/1.1") + b"\r\n")
        connection.sendall(b"\r\n" + head("GET /health HTTP/1.1", "Connection: close"))
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 2


def test_sent_data_is_freed() -> None:
    pieces = Pieces()
    pieces.append(b"abcdef")
    pieces.append(b"gh")
    sent = b""
    while len(pieces):
        piece = bytes(pieces.get(4))
        sent += piece
        pieces.skip(len(piece), True)
    assert sent == b"abcdefgh"


# Connections that are idle, slow or too many


def test_the_connection_that_is_idle_for_longest_makes_room_for_a_new_one(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = server.server._http._server
    monkeypatch.setattr(front, "_connections", 3)
    task_id = server.running()
    waiting = Connection(server, f"/image?task_id={task_id}&wait=300")
    until(lambda: server.server.places.taken == 1)
    oldest = opened(server)
    until(lambda: len(front.active_channels) == 2)
    half = opened(server)
    half.sendall(b"GET /health HTTP/1.1\r\n")
    until(lambda: len(front.active_channels) == 3)
    assert server.get("/health").status_code == 200
    assert read_all(oldest) == b""
    server.end()
    assert waiting.head()[0] == 200
    waiting.close()
    oldest.close()
    half.close()


def test_where_all_connections_are_busy_a_new_one_waits(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = server.server._http._server
    monkeypatch.setattr(front, "_connections", 1)
    task_id = server.running()
    busy = Connection(server, f"/image?task_id={task_id}&wait=300")
    until(lambda: server.server.places.taken == 1)
    new = Connection(server, "/health")
    until(lambda: front._paused)
    assert len(front.active_channels) == 1
    server.end()
    assert busy.head()[0] == 200
    busy.close()
    assert new.head()[0] == 200
    new.close()


@pytest.mark.parametrize("idle", [0, 1])
def test_without_a_free_file_a_connection_waits_or_an_idle_one_makes_room(
    server: SteppedServer, idle: int
) -> None:
    front = server.server._http._server
    task_id = server.running()
    busy = Connection(server, f"/image?task_id={task_id}&wait=300")
    others = [opened(server) for _ in range(idle)]
    until(lambda: server.server.places.taken == 1 and len(front.active_channels) == 1 + idle)
    late = socket.socket()
    late.settimeout(GIVE_UP_S)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        late.connect(("127.0.0.1", server.server.port))
        late.sendall(head("GET /nothing HTTP/1.1", "Connection: close"))
        if idle:
            assert read_all(others[0]) == b""
            assert parsed(read_all(late))[0] == 404
        else:
            until(lambda: front._paused)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if not idle:
        assert parsed(read_all(late))[0] == 404
    server.end()
    assert busy.head()[0] == 200
    busy.close()
    for connection in (late, *others):
        connection.close()


def test_a_client_that_sends_too_slowly_gets_408(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_budget, "GRACE_S", 0.05)
    started = post("/generate", b" " * 100_000)[:-50_000]
    for begun in (b"GET /health HT", started):
        assert ask(server, begun)[0] == 408
    assert server.get("/health").status_code == 200


def test_what_is_refused_before_the_application_sees_it_can_be_read_by_an_allowed_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_loop, "CHECK_S", 0.05)
    page, other = "https://lite.example", "https://evil.example"
    server = SteppedServer(tmp_path, max_body_bytes=100_000, cors_origins=(page,))
    too_large = ("POST /v1/images/generations HTTP/1.1", "Content-Length: 999999999")
    cut_off = ("POST /generate HTTP/1.1", "Content-Length: 5000", JSON)
    long_head = ("GET /health HTTP/1.1", "X: " + "x" * 70_000)

    def answer(request: bytes) -> bytes:
        with opened(server) as connection:
            connection.sendall(request)
            return read_all(connection).partition(b"\r\n\r\n")[0]

    for origin in (page, other):
        for lines, status in ((too_large, b" 413 "), (long_head, b" 431 "), (cut_off, b" 408 ")):
            if status == b" 408 ":
                monkeypatch.setattr(transfer_budget, "GRACE_S", 0.05)
            first_line, *rest = lines
            top = answer(head(first_line, f"Origin: {origin}", *rest))
            assert status in top.partition(b"\r\n")[0]
            assert b"\r\nVary: Origin" in top
            allowed = f"\r\nAccess-Control-Allow-Origin: {origin}".encode()
            assert (allowed in top) == (origin == page)
            assert (b"\r\nAccess-Control-Expose-Headers: Retry-After" in top) == (origin == page)
    half_a_head = b"GET /health HTTP/1.1\r\nOrigin: " + page.encode() + b"\r\nHost: local"
    assert b"\r\nAccess-Control-Allow-Origin: https://lite.example" in answer(half_a_head)
    server.close()


# The edges of HTTP


@pytest.mark.parametrize(
    "request_line",
    ["GET /health HTTP/1.1", "POST /estimate HTTP/1.1", "DELETE /delete?task_id=x HTTP/1.1"],
)
def test_expect_without_a_body_is_answered(server: SteppedServer, request_line: str) -> None:
    answer = ask(server, head(request_line, JSON, "Expect: 100-continue", "Connection: close"))
    assert answer[0] in (200, 400, 404)


def test_expect_with_a_body_is_answered_with_continue_and_then_the_answer(
    server: SteppedServer,
) -> None:
    body = json.dumps(SMALL).encode()
    request = post("/estimate", body, "Expect: 100-continue", "Connection: close")
    with opened(server) as connection:
        connection.sendall(request[: -len(body)])
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert parsed(read_all(connection))[0] == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server: SteppedServer) -> None:
    request = head(
        "POST /generate HTTP/1.1", JSON, "Content-Length: 999999999", "Expect: 100-continue"
    )
    status, answer = ask(server, request)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_a_client_that_sends_too_large_a_body_can_still_read_why(
    tmp_path: Path,
) -> None:
    server = SteppedServer(tmp_path, max_body_bytes=100_000)
    with opened(server) as connection:
        connection.sendall(post("/generate", b" " * 20_000_000))
        status, answer = parsed(read_all(connection))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    server.close()


@pytest.mark.parametrize(
    "headers",
    [
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
    ],
)
def test_a_body_with_two_lengths_is_refused_and_the_rest_is_no_request(
    server: SteppedServer, headers: tuple[str, ...]
) -> None:
    smuggled = head("GET /health HTTP/1.1")
    status, _ = ask(
        server, head("POST /generate HTTP/1.1", JSON, *headers) + b"0\r\n\r\n" + smuggled
    )
    assert status == 400


def test_an_endless_line_between_chunks_is_refused(server: SteppedServer) -> None:
    request = head("POST /generate HTTP/1.1", JSON, "Transfer-Encoding: chunked")
    assert ask(server, request + b"0" * 100_000)[0] == 400
    assert ask(server, request + b"0\r\n" + b"a" * 100_000)[0] == 400


def test_a_body_in_too_many_tiny_chunks_is_refused(server: SteppedServer) -> None:
    request = head("POST /estimate HTTP/1.1", JSON, "Transfer-Encoding: chunked")
    status, answer = ask(server, request + b"1\r\n \r\n" * 200_000)
    assert (status, answer["error"]["message"]) == (400, "The chunks of the body are too small.")


def test_a_body_may_come_in_tiny_chunks(server: SteppedServer) -> None:
    body = json.dumps(SMALL | {"prompt": "x" * 5000}).encode()
    request = head(
        "POST /estimate HTTP/1.1", JSON, "Transfer-Encoding: chunked", "Connection: close"
    )
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert ask(server, request + chunked + b"0\r\n\r\n")[0] == 200


def test_a_client_that_speaks_tls_gets_an_error_at_once(server: SteppedServer) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500
    status, answer = ask(server, hello)
    assert (status, answer["error"]["message"]) == (400, "This server speaks http, and not https.")


def test_chunks_make_a_body(server: SteppedServer) -> None:
    body = json.dumps(SMALL).encode()
    request = head(
        "POST /estimate HTTP/1.1", JSON, "Transfer-Encoding: chunked", "Connection: close"
    )
    chunked = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
    assert ask(server, request + chunked)[0] == 200


def test_http_1_0_without_a_host_is_answered_and_1_1_is_not(server: SteppedServer) -> None:
    assert ask(server, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200
    assert ask(server, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n")[0] == 421
    assert ask(server, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")[0] == 400


@pytest.mark.parametrize("host", ["::", "*", ""])
def test_every_address_means_both_versions_of_ip(tmp_path: Path, host: str) -> None:
    server = SteppedServer(tmp_path, host=host)
    request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    addresses = ["127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])]
    for address in addresses:
        with socket.create_connection((address, server.server.port), GIVE_UP_S) as connection:
            connection.sendall(request)
            assert parsed(read_all(connection))[0] == 200
    server.close()


# Clients that close one half


@pytest.mark.parametrize("path", ["/health", "/queue", "/status?task_id=x", "/models", "/nothing"])
def test_a_client_that_closes_one_half_gets_an_answer(server: SteppedServer, path: str) -> None:
    status, answer = ask(server, head(f"GET {path} HTTP/1.1"), half_close=True)
    assert status in (200, 404)
    assert answer


def test_a_client_that_closes_one_half_may_submit(server: SteppedServer) -> None:
    status, body = ask(server, post("/generate", json.dumps(SMALL).encode()), half_close=True)
    assert (status, body["params"]["steps"]) == (200, 2)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_closes_one_half_and_waits_gets_the_answer(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_S", 0.01)
    task_id = server.running()
    with opened(server) as connection:
        connection.sendall(head(f"GET /image?task_id={task_id}&wait=300 HTTP/{version}"))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"H"  # it was seen, and the client asked by it
        assert server.server.places.taken == 1
        server.end()
        answer = b"H" + read_all(connection)
    top, _, picture = answer.partition(b"\r\n\r\n")
    assert top.startswith(f"HTTP/{version} 200 OK\r\n".encode())
    assert picture.startswith(b"\xff\xd8")


def test_a_client_that_closes_one_half_gets_the_picture_of_a_synchronous_call(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compat.sync_calls.LOOK_S", 0.01)
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "steps": 2}).encode()
    with opened(server) as connection:
        connection.sendall(post("/sdapi/v1/txt2img", body))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"H"
        server.end()
        status, answer = parsed(b"H" + read_all(connection))
    assert (status, len(answer["images"])) == (200, 1)


def test_a_client_that_closes_one_half_of_a_stream_gets_all_of_it(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.01)
    task_id = server.running()
    stream = EventStream(server, f"?task_id={task_id}")
    stream.socket.shutdown(socket.SHUT_WR)
    chunks = stream.chunks()
    while next(chunks) != HEARTBEAT:  # the client is asked by it
        pass
    server.end()
    rest = b"".join(chunks)
    assert rest.index(b"event: done") < rest.index(task_id.encode(), rest.index(b"event: done"))
    stream.close()


def test_a_client_that_closes_one_half_and_then_the_other_is_noticed(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_S", 0.01)
    task_id = server.running()
    connection = opened(server)
    connection.sendall(head(f"GET /image?task_id={task_id}&wait=300 HTTP/1.1"))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b"H"
    connection.close()
    until(lambda: server.server.places.taken == 0)
    assert server.status(task_id)["status"] == "running"


@pytest.mark.parametrize("resets", [False, True])
def test_disconnecting_from_a_synchronous_call_cancels_it(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch, resets: bool
) -> None:
    monkeypatch.setattr("compat.sync_calls.LOOK_S", 0.01)
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "steps": 2}).encode()
    connection = opened(server)
    connection.sendall(post("/sdapi/v1/txt2img", body))
    until(lambda: running(server))
    abort(connection) if resets else connection.close()
    until(lambda: server.server.places.taken == 0)
    server.step(3)
    until(lambda: not running(server))


def test_disconnecting_from_a_synchronous_stream_cancels_it(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compat.sync_calls.LOOK_S", 0.01)
    body = json.dumps({"prompt": "x", "size": "64x64", "stream": True}).encode()
    connection = opened(server)
    connection.sendall(post("/v1/images/generations", body))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr("compat.streams.SIGN_OF_LIFE_AFTER", 10**9)
    connection.close()
    until(lambda: server.server.places.taken == 0)
    server.step(9)
    until(lambda: not running(server))


# What is in memory for clients


def budget_of(server: SteppedServer) -> TransferBudget:
    budget: TransferBudget = server.server._http._server.budget
    return budget


def test_bodies_that_many_clients_half_send_take_no_more_than_the_budget(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = budget_of(server)
    monkeypatch.setattr(budget, "limit_bytes", 4_000_000)
    started = post("/generate", b" " * 1_000_000)[:-10]
    clients = []
    for _ in range(10):
        clients.append(opened(server))
        clients[-1].sendall(started)
    until(lambda: budget.held_bytes > 2_000_000)
    with opened(server) as late:  # one of the connections above the limit
        late.sendall(post("/generate", b" " * 3_000_000))
        answer = read_all(late)
    status, result = parsed(answer)
    assert (status, result["error"]["code"]) == (503, "too_many_transfers")
    assert b"Retry-After: 5\r\n" in answer
    assert budget.held_bytes <= 3_000_000
    assert server.submit()  # a small body always passes
    for client in clients:
        client.close()
    until(lambda: budget.held_bytes == 0)


def test_a_body_gives_its_room_back_as_soon_as_it_is_read(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "steps": 2}).encode()
    with opened(server) as connection:
        connection.sendall(post("/sdapi/v1/txt2img", body + b" " * 500_000))
        until(lambda: running(server))
        assert budget_of(server).held_bytes == 0
        server.end()
        assert parsed_head(connection) == 200


def parsed_head(connection: socket.socket) -> int:
    return int(connection.recv(1 << 16).split()[1])


def test_answers_that_nobody_reads_hold_no_thread_and_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SteppedServer(tmp_path, threads=34)
    monkeypatch.setattr(live, "PICTURE", NOISE)
    task_id = server.running(format="PNG")
    server.end()
    picture = server.get("/image", task_id=task_id, wait=60, delete="false").content
    assert len(picture) > 4_500_000
    budget = budget_of(server)
    monkeypatch.setattr(budget, "limit_bytes", 3 * len(picture))
    asked = head(f"GET /image?task_id={task_id}&delete=false&base64=true HTTP/1.1")
    stalled = []
    for _ in range(2):
        stalled.append(opened_for_little(server))
        stalled[-1].sendall(asked)
        assert parsed_head(stalled[-1]) == 200
    refused = server.get("/image", task_id=task_id, delete="false", base64="true")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert refused.json()["error"]["code"] == "too_many_transfers"
    assert budget.held_bytes <= budget.limit_bytes
    for _ in range(40):
        assert server.get("/status", task_id=task_id).status_code == 200
    for connection in stalled:
        abort(connection)
    until(lambda: budget.held_bytes == 0)
    again = server.get("/image", task_id=task_id, base64="true")
    assert b64decode(again.text) == picture
    server.close()


def test_a_client_that_reads_too_slowly_is_closed(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PICTURE", NOISE)
    task_id = server.running(format="PNG")
    server.end()
    server.get("/image", task_id=task_id, wait=60, delete="false")
    with opened_for_little(server) as connection:
        connection.sendall(head(f"GET /image?task_id={task_id}&delete=false&base64=true HTTP/1.1"))
        until(lambda: budget_of(server).held_bytes > 0)
        monkeypatch.setattr(transfer_budget, "GRACE_S", 0.0)
        for channel in list(server.server._http._server.active_channels.values()):
            channel._sending._since -= 1_000_000  # as if so much time had passed
        until(lambda: budget_of(server).held_bytes == 0)


def test_a_form_and_its_answer_need_no_temporary_folder(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    monkeypatch.setattr(live, "PICTURE", NOISE)
    picture = BytesIO()
    NOISE.resize((640, 640)).save(picture, "PNG")
    assert len(picture.getvalue()) > 600_000
    answer = requests.post(
        server.url + "/generate",
        data={"prompt": "x", "width": "64", "height": "64", "steps": "2", "format": "PNG"},
        files={"init_image": picture.getvalue()},
        timeout=GIVE_UP_S,
    )
    assert answer.status_code == 200, answer.text
    server.end()
    task_id = answer.json()["task_id"]
    bundle = server.get("/image", task_id=task_id, wait=60, all="true")
    assert (bundle.status_code, len(bundle.content) > 1_000_000) == (200, True)
