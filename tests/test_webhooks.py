"""Callbacks at the end of a task, to a receiver of our own on 127.0.0.1."""

import base64
import json
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import requests
from conftest import GIVE_UP_S, StartServer
from live import SteppedServer
from receivers import KEY, Receiver, calling, until_all_are_called
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from api.generate_request import Limits
from api.task_answers import StatusAnswer
from settings import Settings

OTHER_KEY = "whsec_" + base64.b64encode(bytes(range(1, 33))).decode()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedServer]:
    yield from calling(tmp_path, monkeypatch)


def delete(server: SteppedServer, task_id: str) -> None:
    requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)


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
