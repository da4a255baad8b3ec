"""Limits of each client, tasks whose time is up, and links that expire."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, until
from played_app import KEYS, PlayedApp
from werkzeug.test import TestResponse

import checks
from api.links import LINK_S
from checks import Checks
from key_file import Client
from scheduler.events import EventKind


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


def opened(folder: Path, **usual: Any) -> PlayedApp:
    return PlayedApp(folder, usual=Client(**usual))


def ask(bench: PlayedApp, name: str, **fields: Any) -> TestResponse:
    body = {"prompt": "x", "width": 512, "height": 512, "steps": 4, **fields}
    return bench.ask(name, "POST", "/generate", json=body)


def refusal(answer: TestResponse, code: str) -> int:
    """Seconds after which trying again pays."""
    assert answer.status_code == 429, answer.text
    assert answer.get_json()["error"]["code"] == code
    assert f"in {answer.headers['Retry-After']} s." in answer.get_json()["error"]["message"]
    return int(answer.headers["Retry-After"])


# -- limits ----------------------------------------------------------------------------------------


def test_a_client_may_have_so_many_tasks_waiting_and_others_are_not_concerned(
    tmp_path: Path,
) -> None:
    bench = opened(tmp_path, max_waiting=2)
    for _ in range(2):
        assert ask(bench, "alice").status_code == 200
    retry_after_s = refusal(ask(bench, "alice"), "client_limit")
    first = bench.queue.unfinished(1, 0)[0][0]
    assert first.forecast
    assert retry_after_s == max(1, -int(-first.forecast.start_s // 1))
    assert ask(bench, "bob").status_code == 200
    assert all(ask(bench, "root").status_code == 200 for _ in range(3))
    bench.claim()
    assert ask(bench, "alice").status_code == 200
    bench.reopen()
    assert ask(bench, "alice").status_code == 429


def test_retry_after_is_the_forecast_of_when_the_first_of_its_tasks_starts(
    tmp_path: Path,
) -> None:
    bench = opened(tmp_path, max_waiting=1)
    for _ in range(5):
        bench.submit("root", width=512, height=512)
        bench.run()
    bench.submit("root", width=512, height=512)
    bench.claim()
    assert ask(bench, "alice").status_code == 200
    retry_after_s = refusal(ask(bench, "alice"), "client_limit")
    alices = bench.queue.unfinished(1, 1)[0][0]
    assert alices.forecast
    assert 6.0 < alices.forecast.start_s <= retry_after_s < alices.forecast.start_s + 1.0


def test_a_client_may_have_so_many_forecast_seconds_waiting(tmp_path: Path) -> None:
    bench = opened(tmp_path, max_wait_seconds=20.0)
    for _ in range(5):
        bench.submit("root", width=512, height=512)
        bench.run()  # a task takes 8 s
    assert ask(bench, "alice").status_code == 200
    assert ask(bench, "alice").status_code == 200
    refusal(ask(bench, "alice"), "client_limit")
    assert ask(bench, "alice", steps=1).status_code == 200
    assert ask(bench, "bob", steps=40).status_code == 200  # a single task may take more
    refusal(ask(bench, "bob", steps=1), "client_limit")


def test_the_file_of_keys_has_other_limits_for_one_client(tmp_path: Path) -> None:
    own = '[carol]\nkey = "carol-0123456789"\nmax_waiting = 3\n'
    KEYS["carol"] = "carol-0123456789"
    try:
        bench = opened(tmp_path, max_waiting=1)
        bench.key_file.write_text(own + bench.key_file.read_text().partition("[carol]")[0])
        bench.reopen()
        answers = [ask(bench, "carol").status_code for _ in range(4)]
    finally:
        del KEYS["carol"]
    assert answers == [200, 200, 200, 429]
    assert [ask(bench, "alice").status_code for _ in range(2)] == [200, 429]


def test_a_client_may_send_so_many_requests_per_second(tmp_path: Path) -> None:
    bench = opened(tmp_path, max_requests_per_s=2)

    def statuses(name: str, number: int) -> list[int]:
        return [bench.ask(name, "GET", "/queue").status_code for _ in range(number)]

    assert statuses("alice", 21) == [200] * 20 + [429]
    assert statuses("bob", 1) == [200]
    assert statuses("root", 30) == [200] * 30
    refused = bench.ask("alice", "GET", "/queue")
    assert refusal(refused, "too_many_requests") == 1
    bench.at += 0.5
    assert statuses("alice", 2) == [200, 429]
    bench.at += 3600.0
    assert statuses("alice", 21) == [200] * 20 + [429]
    assert bench.ask("", "GET", "/health").status_code == 200


def test_the_options_limit_clients_without_a_key_on_the_network(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--host", "0.0.0.0", "--client-max-waiting", "1")
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        body = {"prompt": "x", "width": 2048, "height": 2048, "steps": 100}

        def submit(client_id: str) -> requests.Response:
            headers = {"X-Client-Id": client_id}
            return requests.post(f"{url}/generate", json=body, headers=headers, timeout=60)

        running = submit("r" * 16).json()["task_id"]

        def status() -> str:
            asked, headers = {"task_id": running}, {"X-Client-Id": "r" * 16}
            answer = requests.get(f"{url}/status", params=asked, headers=headers, timeout=60)
            return str(answer.json()["status"])

        until(lambda: status() == "running")
        assert submit("a" * 16).status_code == 200
        refused = submit("a" * 16)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "client_limit"
        assert int(refused.headers["Retry-After"]) >= 1
        assert submit("b" * 16).status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("path", "form"), [("/v1/models", "rate_limit"), ("/sdapi/v1/options", "too_many")]
)
def test_each_dialect_refuses_in_its_own_form(tmp_path: Path, path: str, form: str) -> None:
    bench = opened(tmp_path, max_requests_per_s=0.1)
    assert bench.ask("alice", "GET", path).status_code == 200
    refused = bench.ask("alice", "GET", path)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "10"
    assert form in refused.text


# -- time that is up -------------------------------------------------------------------------------


def error_of(bench: PlayedApp, name: str, task_id: str) -> str:
    status = bench.status(name, task_id)
    assert status["status"] == "cancelled"
    return str(status["error"]["code"])


def test_a_task_that_has_not_started_in_time_is_cancelled_with_the_reason(
    bench: PlayedApp,
) -> None:
    bench.submit("bob")
    bench.claim()
    late = bench.submit("alice", max_age_s=60)
    patient = bench.submit("alice", max_age_s=1000)
    bench.at += 59.0
    bench.queue.control.cancel_overdue()
    assert bench.status("alice", late)["status"] == "waiting"
    bench.reopen()
    bench.at += 1.0
    bench.queue.control.cancel_overdue()
    assert error_of(bench, "alice", late) == "expired"
    image = bench.ask("alice", "GET", "/image", query_string={"task_id": late})
    assert image.status_code == 410
    assert "60 s (max_age_s)" in image.get_json()["error"]["message"]
    assert bench.status("alice", patient)["status"] == "waiting"
    assert bench.status("alice", patient)["params"]["max_age_s"] == 1000
    bench.reopen()
    assert error_of(bench, "alice", late) == "expired"


def test_a_worker_does_not_start_a_task_whose_time_is_up(bench: PlayedApp) -> None:
    late = bench.submit("alice", max_age_s=60)
    bench.submit("alice", "next")
    bench.at += 61.0
    assert bench.queue.claim() is None
    assert error_of(bench, "alice", late) == "expired"
    assert bench.run() == "next"


def test_a_task_that_has_started_in_time_is_finished(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", max_age_s=60, keep_alive_s=10)
    task = bench.claim()
    bench.at += 100.0
    bench.queue.control.cancel_overdue()
    assert bench.status("alice", task_id)["status"] == "running"
    bench.queue.release(task.task_id)
    bench.queue.control.cancel_overdue()
    assert bench.status("alice", task_id)["status"] == "waiting"
    assert bench.claim().task_id == task_id


def test_a_task_that_nobody_asks_for_is_cancelled(bench: PlayedApp) -> None:
    asked, forgotten = (bench.submit("alice", keep_alive_s=30) for _ in range(2))
    for _ in range(3):
        bench.at += 20.0
        bench.queue.control.cancel_overdue()
        assert bench.status("alice", asked)["status"] == "waiting"
        bench.status("root", forgotten)  # an operator is not its client
    assert error_of(bench, "alice", forgotten) == "abandoned"
    bench.at += 29.0
    bench.reopen()  # which gives its client time to come back
    bench.at += 29.0
    bench.queue.control.cancel_overdue()
    assert bench.status("alice", asked)["status"] == "waiting"
    bench.at += 31.0
    bench.queue.control.cancel_overdue()
    assert error_of(bench, "alice", asked) == "abandoned"


def test_asking_for_a_task_writes_nothing_to_the_disk(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", keep_alive_s=30)
    before = bench.store._database.connection.total_changes
    for _ in range(10):
        bench.status("alice", task_id)
    assert bench.store._database.connection.total_changes == before


@pytest.mark.parametrize("named", [True, False])
def test_a_stream_of_events_keeps_the_tasks_of_its_client(bench: PlayedApp, named: bool) -> None:
    ids = {name: bench.submit(name, keep_alive_s=30) for name in ("alice", "bob")}
    bench.at += 29.0
    query = {"task_id": ids["alice"]} if named else {}
    with bench.ask("alice", "GET", "/events", query_string=query, buffered=False) as stream:
        texts = iter(stream.response)
        while b"event: " not in next(texts):
            pass
        bench.queue.events.publish(EventKind.WAITING, ids["alice"])
        next(texts)
        bench.at += 2.0
        bench.queue.control.cancel_overdue()
    assert bench.status("alice", ids["alice"])["status"] == "waiting"
    assert error_of(bench, "bob", ids["bob"]) == "abandoned"


def test_a_thread_looks_for_tasks_whose_time_is_up(
    bench: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "EVERY_S", 0.01)
    task_id = bench.submit("alice", max_age_s=60)
    thread = Checks(bench.queue.control.cancel_overdue)
    thread.start()
    try:
        bench.at += 61.0
        until(lambda: bench.status("alice", task_id)["status"] == "cancelled")
    finally:
        thread.stop(GIVE_UP_S)
    assert error_of(bench, "alice", task_id) == "expired"


def test_a_task_that_is_tried_again_has_no_deadline_any_more(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", max_age_s=60)
    bench.fail()
    bench.at += 61.0
    bench.json("alice", "POST", f"/tasks/{task_id}/retry")
    bench.queue.control.cancel_overdue()
    assert bench.claim().task_id == task_id


@pytest.mark.parametrize(
    "fields", [{"max_age_s": 0}, {"max_age_s": -1}, {"keep_alive_s": 9}, {"keep_alive_s": "x"}]
)
def test_a_time_that_cannot_be_is_refused(bench: PlayedApp, fields: dict[str, Any]) -> None:
    refused = ask(bench, "alice", **fields)
    assert refused.status_code == 400
    assert refused.get_json()["error"]["field"] in fields


# -- links -----------------------------------------------------------------------------------------


def test_a_link_works_for_its_time_also_after_a_restart(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", steps=1)
    bench.run()
    query = {"task_id": task_id}
    link = bench.json("alice", "POST", "/image/link", query_string=query)
    path = link["url"].partition("localhost")[2]
    assert link["expires_at"] == bench.at + LINK_S
    bench.at += LINK_S - 1.0
    bench.reopen()
    assert bench.ask("", "GET", path).data == b"image"
    bench.at += 1.0
    expired = bench.ask("", "GET", path)
    assert expired.status_code == 401
    assert "not any more" in expired.text
    assert bench.ask("alice", "GET", path).data == b"image"
    assert bench.ask("bob", "GET", path).status_code == 404


def test_a_link_to_an_image_that_is_not_there_is_not_given(bench: PlayedApp) -> None:
    task_id = bench.submit("alice")
    query = {"task_id": task_id}
    assert bench.ask("alice", "POST", "/image/link", query_string=query).status_code == 409
    assert bench.ask("bob", "POST", "/image/link", query_string=query).status_code == 404
    bench.run()
    query["index"] = "1"
    assert bench.ask("alice", "POST", "/image/link", query_string=query).status_code == 400


def test_health_names_tasks_only_to_clients_with_a_key(bench: PlayedApp) -> None:
    bench.submit("alice")
    failed = bench.fail()
    assert bench.json("bob", "GET", "/health")["last_error"] == f"task {failed}: task_failed"
    assert "last_error" not in bench.json("", "GET", "/health")


def test_users_take_turns_with_their_urgent_tasks_as_the_queue_says(bench: PlayedApp) -> None:
    for number, (user, urgent) in enumerate([("u", False), ("v", False), ("u", True), ("v", True)]):
        bench.submit("root", f"{number}", user=user, priority=urgent)
        bench.submit("root", f"{number}b", user=user, steps=1 + number)
    listed = bench.json("root", "GET", "/queue")["tasks"]
    assert [bench.run() for _ in listed] == [task["params"]["prompt"] for task in listed]
