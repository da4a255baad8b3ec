"""The loop of the HTTP server: connections that open, break and wait by the hundred."""

import logging
import os
import resource
import socket
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, until
from flask import Flask
from live import Connection, SteppedServer
from raw_http import abort, head, opened, parsed, read_all

from api import event_stream, http_channel, http_loop
from api.http_channel import Pieces
from api.http_loop import HttpLoop
from api.http_server import HttpServer


def test_no_thread_but_the_loop_can_open_or_close_connections(stepped: SteppedServer) -> None:
    sockets = stepped.server._http._server.loop.sockets
    number = next(iter(sockets))
    with pytest.raises(RuntimeError, match="only the HTTP loop"):
        del sockets[number]
    assert stepped.get("/health").status_code == 200


def test_streams_that_open_and_break_by_the_hundred_leave_the_server_well(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that another thread opened or closed would be an error in the log."""
    monkeypatch.setattr(event_stream, "LOOK_S", 0.05)
    caplog.set_level(logging.WARNING)
    stepped.running()
    idle = [opened(stepped) for _ in range(50)]
    for number in range(8):
        streams = [opened(stepped) for _ in range(60)]
        for index, stream in enumerate(streams):
            stream.sendall(head("GET /events HTTP/1.1"))
            if (index + number) % 3 == 0:
                assert stream.recv(10)
        for index, stream in enumerate(streams):
            abort(stream) if index % 2 else stream.close()
        assert stepped.get("/status", task_id="unknown").status_code == 404
    until(lambda: stepped.server.places.taken == 0)
    for connection in idle:
        connection.sendall(head("GET /health HTTP/1.1", "Connection: close"))
        assert parsed(read_all(connection))[0] == 200
        connection.close()
    assert not caplog.messages


def test_an_error_of_one_connection_closes_that_one_alone(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(channel: object, data: bytes) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, opened(stepped) as connection:
        patch.setattr(http_channel.Channel, "received", fail)
        connection.sendall(b"GET")
        assert read_all(connection) == b""
    assert stepped.get("/health").status_code == 200


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


def test_a_small_answer_is_sent_in_one_piece(stepped: SteppedServer) -> None:
    sent: list[bytes] = []
    served = threading.Semaphore(0)

    class Noted(http_channel.Channel):
        def service(self) -> None:
            super().service()
            served.release()

        def send(self, data: memoryview, do_close: bool = True) -> int:
            sent.append(bytes(data))
            return int(super().send(data, do_close))

    with opened(stepped) as connection:
        channel_of(stepped, connection).__class__ = Noted
        for _ in range(3):
            connection.sendall(head("GET /health HTTP/1.1"))
            assert served.acquire(timeout=GIVE_UP_S)
    assert [parsed(answer)[0] for answer in sent] == [200, 200, 200]


def test_data_that_arrives_during_an_answer_waits_and_does_not_keep_the_loop_busy(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = stepped.server._http._server.loop
    task_id = stepped.running()
    with opened(stepped) as connection:
        connection.sendall(head(f"GET /status?task_id={task_id}&wait=300 HTTP/1.1"))
        until(lambda: stepped.server.places.taken == 1)
        connection.sendall(head("GET /health HTTP/1.1", "Connection: close"))
        handled: list[object] = []
        checked = threading.Semaphore(0)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_handle", lambda socket, events: handled.append(socket))
            patch.setattr(loop, "check", checked.release)
            assert all(checked.acquire(timeout=GIVE_UP_S) for _ in range(3))
        assert not handled
        stepped.end()
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


def test_requests_in_one_piece_are_parsed_one_after_the_other(stepped: SteppedServer) -> None:
    """Parsing all of them at once would let other connections wait."""
    task_id = stepped.running()
    waits = head(f"GET /status?task_id={task_id}&wait=60 HTTP/1.1")
    with opened(stepped) as connection:
        last = head("GET /health HTTP/1.1", "Connection: close")
        connection.sendall(waits + head("GET /health HTTP/1.1") * 1000 + last)
        until(lambda: stepped.server.places.taken == 1)
        channel = next(
            channel
            for channel in stepped.server._http._server.active_channels.values()
            if channel.requests
        )
        assert len(channel.requests) == 1
        assert len(channel._behind) > 10_000
        stepped.end()
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 1002


def test_line_ends_between_requests_are_no_requests(stepped: SteppedServer) -> None:
    with opened(stepped) as connection:
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


def test_the_connection_that_is_idle_for_longest_makes_room_for_a_new_one(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = stepped.server._http._server
    monkeypatch.setattr(front, "_connections", 3)
    task_id = stepped.running()
    waiting = Connection(stepped, f"/image?task_id={task_id}&wait=300")
    until(lambda: stepped.server.places.taken == 1 and len(front.active_channels) == 1)
    oldest = opened(stepped)
    until(lambda: len(front.active_channels) == 2)
    half = opened(stepped)
    half.sendall(b"GET /health HTTP/1.1\r\n")
    until(lambda: len(front.active_channels) == 3)
    assert stepped.get("/health").status_code == 200
    assert read_all(oldest) == b""
    stepped.end()
    assert waiting.head()[0] == 200
    waiting.close()
    oldest.close()
    half.close()


def test_where_all_connections_are_busy_a_new_one_waits(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = stepped.server._http._server
    monkeypatch.setattr(front, "_connections", 1)
    task_id = stepped.running()
    busy = Connection(stepped, f"/image?task_id={task_id}&wait=300")
    until(lambda: stepped.server.places.taken == 1)
    new = Connection(stepped, "/health")
    until(lambda: front._paused)
    assert len(front.active_channels) == 1
    stepped.end()
    assert busy.head()[0] == 200
    busy.close()
    assert new.head()[0] == 200
    new.close()


@pytest.mark.parametrize("idle", [0, 1])
def test_without_a_free_file_a_connection_waits_or_an_idle_one_makes_room(
    stepped: SteppedServer, idle: int
) -> None:
    front = stepped.server._http._server
    task_id = stepped.running()
    busy = Connection(stepped, f"/image?task_id={task_id}&wait=300")
    until(lambda: stepped.server.places.taken == 1 and len(front.active_channels) == 1)
    others = [opened(stepped) for _ in range(idle)]
    until(lambda: len(front.active_channels) == 1 + idle)
    late = socket.socket()
    late.settimeout(GIVE_UP_S)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        late.connect(("127.0.0.1", stepped.server.port))
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
    stepped.end()
    assert busy.head()[0] == 200
    busy.close()
    for connection in (late, *others):
        connection.close()
