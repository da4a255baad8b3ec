"""The HTTP server under the application, over raw sockets: the edges of the protocol."""

import json
import socket
from pathlib import Path

import pytest
from conftest import GIVE_UP_S
from live import SteppedServer
from raw_http import JSON, SMALL, ask, head, opened, parsed, post, read_all

from api import http_loop, transfer_budget


def test_a_client_that_sends_too_slowly_gets_408(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_budget, "GRACE_S", 0.05)
    started = post("/generate", b" " * 100_000)[:-50_000]
    for begun in (b"GET /health HT", started):
        assert ask(stepped, begun)[0] == 408
    assert stepped.get("/health").status_code == 200


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


@pytest.mark.parametrize(
    "request_line",
    ["GET /health HTTP/1.1", "POST /estimate HTTP/1.1", "DELETE /delete?task_id=x HTTP/1.1"],
)
def test_expect_without_a_body_is_answered(stepped: SteppedServer, request_line: str) -> None:
    answer = ask(stepped, head(request_line, JSON, "Expect: 100-continue", "Connection: close"))
    assert answer[0] in (200, 400, 404)


def test_expect_with_a_body_is_answered_with_continue_and_then_the_answer(
    stepped: SteppedServer,
) -> None:
    body = json.dumps(SMALL).encode()
    request = post("/estimate", body, "Expect: 100-continue", "Connection: close")
    with opened(stepped) as connection:
        connection.sendall(request[: -len(body)])
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert parsed(read_all(connection))[0] == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(stepped: SteppedServer) -> None:
    request = head(
        "POST /generate HTTP/1.1", JSON, "Content-Length: 999999999", "Expect: 100-continue"
    )
    status, answer = ask(stepped, request)
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
    stepped: SteppedServer, headers: tuple[str, ...]
) -> None:
    smuggled = head("GET /health HTTP/1.1")
    status, _ = ask(
        stepped, head("POST /generate HTTP/1.1", JSON, *headers) + b"0\r\n\r\n" + smuggled
    )
    assert status == 400


def test_an_endless_line_between_chunks_is_refused(stepped: SteppedServer) -> None:
    request = head("POST /generate HTTP/1.1", JSON, "Transfer-Encoding: chunked")
    assert ask(stepped, request + b"0" * 100_000)[0] == 400
    assert ask(stepped, request + b"0\r\n" + b"a" * 100_000)[0] == 400


def test_a_body_in_too_many_tiny_chunks_is_refused(stepped: SteppedServer) -> None:
    request = head("POST /estimate HTTP/1.1", JSON, "Transfer-Encoding: chunked")
    status, answer = ask(stepped, request + b"1\r\n \r\n" * 200_000)
    assert (status, answer["error"]["message"]) == (400, "The chunks of the body are too small.")


def test_a_body_may_come_in_tiny_chunks(stepped: SteppedServer) -> None:
    body = json.dumps(SMALL | {"prompt": "x" * 5000}).encode()
    request = head(
        "POST /estimate HTTP/1.1", JSON, "Transfer-Encoding: chunked", "Connection: close"
    )
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert ask(stepped, request + chunked + b"0\r\n\r\n")[0] == 200


def test_a_client_that_speaks_tls_gets_an_error_at_once(stepped: SteppedServer) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500
    status, answer = ask(stepped, hello)
    assert (status, answer["error"]["message"]) == (400, "This server speaks http, and not https.")


def test_chunks_make_a_body(stepped: SteppedServer) -> None:
    body = json.dumps(SMALL).encode()
    request = head(
        "POST /estimate HTTP/1.1", JSON, "Transfer-Encoding: chunked", "Connection: close"
    )
    chunked = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
    assert ask(stepped, request + chunked)[0] == 200


def test_http_1_0_without_a_host_is_answered_and_1_1_is_not(stepped: SteppedServer) -> None:
    assert ask(stepped, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200
    assert ask(stepped, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n")[0] == 421
    assert ask(stepped, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")[0] == 400


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
