"""Clients that close one half of their connection, or disconnect, over raw sockets."""

import json
import socket

import pytest
from conftest import until
from live import EventStream, SteppedServer
from raw_http import SMALL, abort, ask, head, opened, parsed, post, read_all, running

from api import event_stream, long_poll
from api.event_texts import HEARTBEAT


@pytest.mark.parametrize("path", ["/health", "/queue", "/status?task_id=x", "/models", "/nothing"])
def test_a_client_that_closes_one_half_gets_an_answer(stepped: SteppedServer, path: str) -> None:
    status, answer = ask(stepped, head(f"GET {path} HTTP/1.1"), half_close=True)
    assert status in (200, 404)
    assert answer


def test_a_client_that_closes_one_half_may_submit(stepped: SteppedServer) -> None:
    status, body = ask(stepped, post("/generate", json.dumps(SMALL).encode()), half_close=True)
    assert (status, body["params"]["steps"]) == (200, 2)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_closes_one_half_and_waits_gets_the_answer(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_S", 0.01)
    task_id = stepped.running()
    with opened(stepped) as connection:
        connection.sendall(head(f"GET /image?task_id={task_id}&wait=300 HTTP/{version}"))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"H"  # it was seen, and the client asked by it
        assert stepped.server.places.taken == 1
        stepped.end()
        answer = b"H" + read_all(connection)
    top, _, picture = answer.partition(b"\r\n\r\n")
    assert top.startswith(f"HTTP/{version} 200 OK\r\n".encode())
    assert picture.startswith(b"\xff\xd8")


def test_a_client_that_closes_one_half_gets_the_picture_of_a_synchronous_call(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compat.sync_calls.LOOK_S", 0.01)
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "steps": 2}).encode()
    with opened(stepped) as connection:
        connection.sendall(post("/sdapi/v1/txt2img", body))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"H"
        stepped.end()
        status, answer = parsed(b"H" + read_all(connection))
    assert (status, len(answer["images"])) == (200, 1)


def test_a_client_that_closes_one_half_of_a_stream_gets_all_of_it(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.01)
    task_id = stepped.running()
    stream = EventStream(stepped, f"?task_id={task_id}")
    stream.socket.shutdown(socket.SHUT_WR)
    chunks = stream.chunks()
    while next(chunks) != HEARTBEAT:  # the client is asked by it
        pass
    stepped.end()
    rest = b"".join(chunks)
    assert rest.index(b"event: done") < rest.index(task_id.encode(), rest.index(b"event: done"))
    stream.close()


def test_a_client_that_closes_one_half_and_then_the_other_is_noticed(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_S", 0.01)
    task_id = stepped.running()
    connection = opened(stepped)
    connection.sendall(head(f"GET /image?task_id={task_id}&wait=300 HTTP/1.1"))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b"H"
    connection.close()
    until(lambda: stepped.server.places.taken == 0)
    assert stepped.status(task_id)["status"] == "running"


@pytest.mark.parametrize("resets", [False, True])
def test_disconnecting_from_a_synchronous_call_cancels_it(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch, resets: bool
) -> None:
    monkeypatch.setattr("compat.sync_calls.LOOK_S", 0.01)
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "steps": 2}).encode()
    connection = opened(stepped)
    connection.sendall(post("/sdapi/v1/txt2img", body))
    until(lambda: running(stepped))
    abort(connection) if resets else connection.close()
    until(lambda: stepped.server.places.taken == 0)
    stepped.step(3)
    until(lambda: not running(stepped))


def test_disconnecting_from_a_synchronous_stream_cancels_it(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compat.sync_calls.LOOK_S", 0.01)
    body = json.dumps({"prompt": "x", "size": "64x64", "stream": True}).encode()
    connection = opened(stepped)
    connection.sendall(post("/v1/images/generations", body))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr("compat.streams.SIGN_OF_LIFE_AFTER", 10**9)
    connection.close()
    until(lambda: stepped.server.places.taken == 0)
    stepped.step(9)
    until(lambda: not running(stepped))
