"""Callbacks at the end of a task, to a receiver of our own on 127.0.0.1."""

import base64
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, StartServer
from live import SteppedServer
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from api import webhooks
from api.generate_request import Limits
from api.task_answers import StatusAnswer
from settings import Settings

KEY = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER_KEY = "whsec_" + base64.b64encode(bytes(range(1, 33))).decode()


class Receiver:
    """Answers with what is planned, then with 200; keeps what it got."""

    def __init__(self) -> None:
        self.calls: Queue[tuple[str, dict[str, str], bytes]] = Queue()
        self.planned: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.calls.put((self.path, dict(self.headers), body))
                receiver.go_on.wait(GIVE_UP_S)
                self.send_response(receiver.planned.pop(0) if receiver.planned else 200)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def handle(self) -> None:
                with suppress(ConnectionError, ssl.SSLError):  # who called has gone
                    super().handle()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/hook?chat=42"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def with_tls(self, context: ssl.SSLContext) -> str:
        """From now on; returns the address."""
        self._http.socket = context.wrap_socket(
            self._http.socket, server_side=True, do_handshake_on_connect=False
        )
        return self.url.replace("http://127.0.0.1", "https://localhost")

    def next(self) -> dict[str, Any]:
        """The body of the next call."""
        body: dict[str, Any] = json.loads(self.calls.get(timeout=GIVE_UP_S)[2])
        return body

    def close(self) -> None:
        self.go_on.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    monkeypatch.setattr(webhooks, "RETRY_AFTER_S", (0.0, 0.0, 0.0, 0.0))
    server = SteppedServer(tmp_path, callback_hosts=("127.0.0.1",), callback_key=KEY)
    yield server
    server.close()


def delete(server: SteppedServer, task_id: str) -> None:
    requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)


def until_all_are_called(server: SteppedServer) -> None:
    pause = threading.Event()
    for _ in range(GIVE_UP_S * 100):
        if server.server._store.callbacks.next() is None:
            return
        pause.wait(0.01)
    raise AssertionError("a callback is still there")


def test_the_status_is_sent_when_a_task_is_done_and_signed(
    server: SteppedServer, receiver: Receiver
) -> None:
    task_id = server.submit(callback_url=receiver.url)
    server.end()
    path, headers, body = receiver.calls.get(timeout=GIVE_UP_S)
    assert path == "/hook?chat=42"
    assert headers["Content-Type"] == "application/json"
    answer = Webhook(KEY).verify(body, headers)
    assert answer["task_id"] == task_id
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(KEY).verify(body.replace(b"done", b"lost"), headers)
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(OTHER_KEY).verify(body, headers)
    status = StatusAnswer.model_validate_json(body)
    assert (status.task_id, status.status) == (task_id, "done")
    until_all_are_called(server)
    assert receiver.calls.empty()


def test_a_repeated_call_keeps_its_id_and_is_signed_with_the_time_of_its_try(
    server: SteppedServer, receiver: Receiver
) -> None:
    at = iter(range(1_800_000_000, 1_900_000_000, 1000))
    server.server._webhooks._now = lambda: float(next(at))
    receiver.planned = [500, 500]
    first = server.submit(callback_url=receiver.url)
    server.end()
    tries = [receiver.calls.get(timeout=GIVE_UP_S)[1:] for _ in range(3)]
    assert {headers["webhook-id"] for headers, _ in tries} == {f"msg_{first}"}
    assert len({headers["webhook-timestamp"] for headers, _ in tries}) == 3
    for headers, body in tries:
        timestamp = int(headers["webhook-timestamp"])
        moment = datetime.fromtimestamp(timestamp, UTC)
        signature = Webhook(KEY).sign(f"msg_{first}", moment, body.decode())
        assert headers["webhook-signature"] == signature
    with pytest.raises(WebhookVerificationError, match="too new"):
        Webhook(KEY).verify(tries[0][1], tries[0][0])
    receiver.calls.queue.clear()
    second = server.submit(callback_url=receiver.url)
    assert receiver.calls.get(timeout=GIVE_UP_S)[1]["webhook-id"] == f"msg_{second}"


@pytest.mark.parametrize("key", ["secret", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "*" * 40])
def test_a_key_that_is_no_standard_webhooks_secret_is_refused_and_not_shown(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        Settings.read(["--callback-key", key], {})
    message = capsys.readouterr().err
    assert "openssl rand" in message
    assert key == "whsec_" or key not in message


def test_failed_and_cancelled_tasks_cause_callbacks_too(
    server: SteppedServer, receiver: Receiver
) -> None:
    running = server.running(callback_url=receiver.url)
    waiting = server.submit(callback_url=receiver.url)
    delete(server, waiting)
    answer = receiver.next()
    assert (answer["task_id"], answer["status"]) == (waiting, "cancelled")
    server.worker_api.fail(running, 1, "task_failed", "It was the test.")
    answer = receiver.next()
    assert (answer["task_id"], answer["error"]["message"]) == (running, "It was the test.")


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
    stop = threading.Event()

    def drip() -> None:
        line, _ = listening.accept()
        with line, suppress(OSError):
            line.sendall(head)
            while not stop.wait(0.05):
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
        assert time.monotonic() - began < 5


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


def test_no_answer_contains_the_callback_url(server: SteppedServer, receiver: Receiver) -> None:
    server.running()
    task_id = server.submit(callback_url=receiver.url)
    for answer in (
        server.get("/status", task_id=task_id),
        server.get("/queue"),
        server.get("/stats"),
    ):
        assert "hook" not in answer.text
        assert "callback" not in answer.text
    server.end()
    assert "hook" not in json.dumps(receiver.next())


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "http://127.0.0.1.example.org/",
        "http://127.0.0.1@example.org/",
        "http://user:word@127.0.0.1/",
        "http://example.org\\@127.0.0.1/",
        "http://127.0.0.1\\@example.org/",
        "http://127.0.0.1\n.example.org/",
        "http://[::1]/",
        "http:///hook",
        "file://127.0.0.1/etc/passwd",
        "ftp://127.0.0.1/",
        "//127.0.0.1/",
        "127.0.0.1",
        "http://127.0.0.1:port/",
        "http://127.0.0.1:99999999/",
    ],
)
def test_other_addresses_are_refused(server: SteppedServer, url: str) -> None:
    body = {"prompt": "x", "callback_url": url}
    for path in ("/generate", "/estimate"):
        answer = requests.post(server.url + path, json=body, timeout=GIVE_UP_S)
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["code"], error["field"]) == ("not_supported", "callback_url")


def test_names_are_compared_without_case_and_without_hosts_nobody_is_called(
    tmp_path: Path,
) -> None:
    limits = Limits(callback_hosts=frozenset({"chat.example.org"}))
    assert limits.may_call("https://Chat.Example.org:8443/a?b=%20#c")
    assert limits.may_call("http://chat.example.org")
    assert not Limits().may_call("http://chat.example.org")
    server = SteppedServer(tmp_path)
    body = {"prompt": "x", "callback_url": "http://127.0.0.1/"}
    answer = requests.post(server.url + "/generate", json=body, timeout=GIVE_UP_S)
    assert answer.status_code == 422
    server.close()


def test_a_removed_task_makes_no_callback(server: SteppedServer, receiver: Receiver) -> None:
    receiver.go_on.clear()
    server.end()
    server.submit(callback_url=receiver.url)
    receiver.next()  # the thread is busy
    gone = server.submit(callback_url=receiver.url)
    server.get("/image", task_id=gone, wait=60, delete="false")
    delete(server, gone)
    last = server.submit(callback_url=receiver.url)
    server.get("/image", task_id=last, wait=60, delete="false")
    receiver.go_on.set()
    assert receiver.next()["task_id"] == last


def test_a_callback_that_is_not_allowed_any_more_is_dropped(
    tmp_path: Path, receiver: Receiver
) -> None:
    first = SteppedServer(tmp_path, callback_hosts=("127.0.0.1",))
    first.submit(callback_url=receiver.url)
    first.server.stop()
    second = SteppedServer(tmp_path, callback_hosts=("example.org",))
    second.end()
    until_all_are_called(second)
    assert receiver.calls.empty()
    second.close()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_callback_that_was_not_made_is_made_after_a_restart(
    start_server: StartServer, receiver: Receiver, end: signal.Signals
) -> None:
    options = ("--model", "noise-flux1", "--callback-hosts", "127.0.0.1")
    receiver.go_on.clear()
    first = start_server(*options)
    ended = first.submit(callback_url=receiver.url)["task_id"]
    assert receiver.next()["task_id"] == ended  # and is not answered
    unfinished = first.submit(width=2048, height=2048, steps=1, callback_url=receiver.url)
    first.stop(end)
    receiver.go_on.set()
    start_server(*options)
    answer = {receiver.next()["task_id"] for _ in range(2)}
    assert answer == {ended, unfinished["task_id"]}


def test_each_client_is_called_for_its_own_tasks_only(
    tmp_path: Path, receiver: Receiver, start_server: StartServer
) -> None:
    keys = {"alice": "alice-0123456789", "bob": "bob-0123456789ab"}
    file = tmp_path / "keys.toml"
    file.write_text("".join(f'[{name}]\nkey = "{key}"\n' for name, key in keys.items()))
    server = start_server("--keys", str(file), "--callback-hosts", "127.0.0.1")
    url, _, _ = receiver.url.partition("/hook")
    submitted = {}
    for name, key in keys.items():
        body = {"prompt": name, "width": 64, "height": 64, "steps": 1}
        answer = requests.post(
            server.url + "/generate",
            json={**body, "callback_url": f"{url}/{name}", "client_task_id": "the same"},
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )
        submitted[f"/{name}"] = answer.json()["task_id"]
    called = {}
    for _ in keys:
        path, _, sent = receiver.calls.get(timeout=GIVE_UP_S)
        called[path] = json.loads(sent)["task_id"]
    assert called == submitted
    assert len(set(called.values())) == 2
