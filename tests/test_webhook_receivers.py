"""Receivers of callbacks that fail, hang, drip, redirect or have a certificate of their own."""

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import GIVE_UP_S
from live import SteppedServer
from receivers import Receiver, calling, until_all_are_called

from api import webhooks


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    yield from calling(tmp_path, monkeypatch)


def test_a_receiver_that_fails_is_called_again_five_times_in_all(
    server: SteppedServer, receiver: Receiver
) -> None:
    receiver.planned = [500, 503]
    first = server.submit(callback_url=receiver.url)
    server.end()
    assert [receiver.next()["task_id"] for _ in range(3)] == [first] * 3
    until_all_are_called(server)
    receiver.planned = [500] * 10
    second = server.submit(callback_url=receiver.url)
    assert [receiver.next()["task_id"] for _ in range(5)] == [second] * 5
    until_all_are_called(server)
    assert receiver.calls.empty()


def test_an_unreachable_receiver_affects_no_task(server: SteppedServer, receiver: Receiver) -> None:
    receiver.close()
    task_id = server.submit(callback_url=receiver.url)
    server.end()
    assert server.get("/image", task_id=task_id, wait=60).status_code == 200
    until_all_are_called(server)


def test_a_redirect_is_not_followed(server: SteppedServer, receiver: Receiver) -> None:
    receiver.planned = [307, 302]
    server.submit(callback_url=receiver.url)
    server.end()
    paths = [receiver.calls.get(timeout=GIVE_UP_S)[0] for _ in range(3)]
    assert paths == ["/hook?chat=42"] * 3
    until_all_are_called(server)
    assert receiver.calls.empty()


def test_a_receiver_that_hangs_delays_no_task(server: SteppedServer, receiver: Receiver) -> None:
    receiver.go_on.clear()
    server.end()
    server.submit(callback_url=receiver.url)
    receiver.next()
    for _ in range(3):
        task_id = server.submit(callback_url=receiver.url)
        assert server.get("/image", task_id=task_id, wait=60).status_code == 200


@contextmanager
def dripping(head: bytes = b"") -> Iterator[str]:
    """A receiver that answers this, and then a byte now and then; its address."""
    stop, began = threading.Event(), time.monotonic()

    def drip() -> None:
        line, _ = listening.accept()
        with line, suppress(OSError):
            line.sendall(head)
            while not stop.wait(0.05) and time.monotonic() < began + 2 * GIVE_UP_S:
                line.sendall(b"1")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 100 Continue\r\n\r\n"]
)
def test_a_receiver_that_drips_is_left_after_the_time_of_one_try(
    monkeypatch: pytest.MonkeyPatch, head: bytes, scheme: str
) -> None:
    monkeypatch.setattr(webhooks, "TRY_S", 0.5)
    with dripping(head) as address:
        began = time.monotonic()
        with pytest.raises((OSError, http.client.HTTPException)):
            webhooks._post(f"{scheme}://{address}", b"{}", {})
        assert time.monotonic() - began < GIVE_UP_S


def test_a_receiver_that_drips_delays_the_others_by_the_time_of_one_try(
    server: SteppedServer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TRY_S", 0.5)
    monkeypatch.setattr(webhooks, "RETRY_AFTER_S", ())
    with dripping() as address:
        server.end()
        server.submit(callback_url=f"http://{address}")
        task_id = server.submit(callback_url=receiver.url)
        assert receiver.next()["task_id"] == task_id


def test_the_body_of_a_receivers_answer_is_not_read(receiver: Receiver) -> None:
    """As fast as the head of its answer is there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def promise() -> None:
            line, _ = listening.accept()
            with line:
                line.recv(65536)
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                line.recv(1)

        promising = threading.Thread(target=promise)
        promising.start()
        port = listening.getsockname()[1]
        assert webhooks._post(f"http://127.0.0.1:{port}", b"{}", {}) == 200
        promising.join(GIVE_UP_S)
    assert not promising.is_alive()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_https_requires_a_trusted_certificate(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext"
    made = ["subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *made], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    url = receiver.with_tls(context)
    with pytest.raises(ssl.SSLCertVerificationError):
        webhooks._post(url, b"{}", {})
    monkeypatch.setattr("certifi.where", lambda: str(certificate))
    assert webhooks._post(url, b"{}", {}) == 200
    assert receiver.next() == {}
