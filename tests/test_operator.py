"""What operators do with the queue and clients may not, and what the server remembers of it."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from played_app import PlayedApp

from scheduler.limits import MAX_INTERRUPTIONS
from task import Encoded, Phase


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


OPERATIONS = (
    "POST /queue/pause",
    "POST /queue/resume",
    "DELETE /queue",
    "POST /tasks/{task_id}/front",
    "GET /clients",
    "GET /metrics",
    "GET /machines",
    "POST /machines/local/drain",
    "POST /machines/local/resume",
)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_an_operator_may_do_it(bench: PlayedApp, operation: str) -> None:
    task_id = bench.submit("alice")
    method, path = operation.split()
    path = path.replace("{task_id}", task_id)
    refused = bench.ask("alice", method, path)
    assert refused.status_code == 403
    assert refused.get_json()["error"]["code"] == "operator_only"
    assert bench.status("alice", task_id)["status"] == "waiting"
    assert bench.ask("", method, path).status_code == 401
    assert bench.ask("root", method, path).status_code == 200


# -- pausing ---------------------------------------------------------------------------------------


def test_a_paused_queue_starts_nothing_and_ends_what_runs_also_after_a_restart(
    bench: PlayedApp,
) -> None:
    bench.submit("alice", "runs")
    running = bench.claim()
    task_id = bench.submit("alice", "waits")
    paused = bench.json("root", "POST", "/queue/pause")
    assert paused == {"paused": True, "waiting": 1, "running": 1}
    assert bench.queue.finish(running.task_id, [b"image"])
    assert bench.queue.claim() is None
    bench.reopen()
    assert bench.queue.claim() is None
    assert bench.status("alice", task_id)["paused"]
    assert bench.json("alice", "GET", "/queue")["paused"]
    assert bench.json("", "GET", "/health")["paused"]
    assert bench.submit("bob", "accepted")
    assert not bench.json("root", "POST", "/queue/resume")["paused"]
    assert "paused" not in bench.status("alice", task_id)
    assert bench.run() == "waits"
    bench.reopen()
    assert bench.run() == "accepted"


# -- clearing --------------------------------------------------------------------------------------


def test_clearing_cancels_what_waits_of_all_or_of_one_client(bench: PlayedApp) -> None:
    bench.submit("alice", "runs")
    running = bench.claim()
    ids = [bench.submit(name, name) for name in ("alice", "bob", "alice", "bob", "root")]
    cleared = bench.json("root", "DELETE", "/queue", query_string={"client": "bob"})
    assert cleared == {"cancelled": 2}
    assert sorted(bench.waiting()) == ["alice", "alice", "root"]
    assert bench.status("bob", ids[1])["status"] == "cancelled"
    nobody = bench.json("root", "DELETE", "/queue", query_string={"client": "nobody"})
    assert nobody == {"cancelled": 0}
    assert bench.json("root", "DELETE", "/queue") == {"cancelled": 3}
    assert bench.waiting() == []
    assert bench.status("alice", running.task_id)["status"] == "running"
    bench.reopen()
    assert all(bench.status("root", task_id)["status"] == "cancelled" for task_id in ids)


# -- the front -------------------------------------------------------------------------------------


def test_a_moved_task_runs_next_before_urgent_ones_also_after_a_restart(bench: PlayedApp) -> None:
    for prompt in ("a", "b", "c", "d"):
        bench.submit("alice", prompt)
    bench.submit("root", "urgent", priority=True)
    by_prompt = {task.params.prompt: task.task_id for task in bench.queue.unfinished(10, 0)[0]}
    moved = bench.json("root", "POST", f"/tasks/{by_prompt['c']}/front")
    assert moved["pos"] == 0
    assert moved["status"] == "waiting"
    assert bench.waiting()[:2] == ["c", "urgent"]
    bench.json("root", "POST", f"/tasks/{by_prompt['d']}/front")
    order = ["d", "c", "urgent", "a", "b"]
    assert bench.waiting() == order
    bench.submit("alice", "e")
    bench.reopen()
    assert [bench.run() for _ in range(6)] == [*order, "e"]


def test_the_only_task_can_be_moved_and_survives_a_restart(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", "a")
    bench.json("root", "POST", f"/tasks/{task_id}/front")
    bench.reopen()
    assert bench.run() == "a"


def test_a_task_that_is_overtaken_by_a_moved_one_has_the_reason(bench: PlayedApp) -> None:
    large = {"width": 1024, "height": 1024, "steps": 50}
    first, second = bench.submit("alice", "a", **large), bench.submit("bob", "b", **large)
    bench.json("root", "POST", f"/tasks/{second}/front")
    assert bench.status("alice", first)["reason"] == "overtaken"
    assert "reason" not in bench.status("bob", second)


def test_only_a_task_that_waits_can_be_moved(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", "runs")
    bench.claim()
    refused = bench.ask("root", "POST", f"/tasks/{task_id}/front")
    assert refused.status_code == 409
    assert refused.get_json()["error"]["code"] == "wrong_status"
    assert bench.ask("root", "POST", f"/tasks/{'0' * 16}/front").status_code == 404
    bench.queue.finish(task_id, [b"image"])
    assert bench.ask("root", "POST", f"/tasks/{task_id}/front").status_code == 409


# -- trying again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["alice", "root"])
def test_a_failed_task_is_tried_again_with_its_id(bench: PlayedApp, who: str) -> None:
    task_id = bench.submit("alice", "a")
    assert bench.fail() == task_id
    bench.submit("alice", "earlier")
    again = bench.json(who, "POST", f"/tasks/{task_id}/retry")
    assert again["task_id"] == task_id
    assert again["status"] == "waiting"
    status = bench.status("alice", task_id)
    assert status["status"] == "waiting"
    assert "error" not in status
    bench.reopen()
    assert [bench.run(), bench.run()] == ["earlier", "a"]
    assert bench.status("alice", task_id)["status"] == "done"


def test_a_retried_task_during_which_a_worker_died_fails_when_one_dies_again(
    bench: PlayedApp,
) -> None:
    task_id, worker = bench.submit("alice"), bench.queue.worker
    for _ in range(MAX_INTERRUPTIONS):
        assert worker.release(task_id, bench.claim().attempt, interrupted=True)
    assert bench.status("alice", task_id)["error"]["code"] == "ended_too_often"
    bench.json("alice", "POST", f"/tasks/{task_id}/retry")
    bench.reopen()
    assert bench.queue.worker.release(task_id, bench.claim().attempt, interrupted=True)
    assert bench.status("alice", task_id)["error"]["code"] == "ended_too_often"


def test_a_worker_with_an_attempt_from_before_a_retry_is_refused(bench: PlayedApp) -> None:
    task_id = bench.submit("alice")
    before = bench.claim()
    bench.queue.fail(task_id, "task_failed", "It broke.")
    bench.json("alice", "POST", f"/tasks/{task_id}/retry")
    again, worker = bench.claim(), bench.queue.worker
    assert not worker.finish(task_id, before.attempt, Encoded(b"of the old attempt", 0))
    assert worker.finish(task_id, again.attempt, Encoded(b"of the new one", 0))
    assert bench.queue.all_images(task_id)[0] == [b"of the new one"]


def test_a_task_that_has_not_failed_is_not_tried_again(bench: PlayedApp) -> None:
    waiting, stranger = bench.submit("alice"), bench.submit("bob")
    assert bench.ask("alice", "POST", f"/tasks/{waiting}/retry").status_code == 409
    assert bench.ask("alice", "POST", f"/tasks/{stranger}/retry").status_code == 404
    bench.run()
    assert bench.ask("alice", "POST", f"/tasks/{waiting}/retry").status_code == 409
    assert bench.ask("alice", "POST", f"/tasks/{'0' * 16}/retry").status_code == 404


def test_the_images_of_a_failed_task_are_kept_when_it_is_tried_again(bench: PlayedApp) -> None:
    task_id = bench.submit("alice", "two", count=2)
    task = bench.claim()
    bench.queue.report(task_id, Phase.DENOISING, 0, 4)
    bench.queue.next_image(task_id, 0, 1)
    assert bench.queue.worker.store_image(task_id, task.attempt, Encoded(b"first", 0))
    bench.queue.fail(task_id, "task_failed", "It broke.")
    bench.json("alice", "POST", f"/tasks/{task_id}/retry")
    again = bench.claim()
    assert again.images_done == 1
    assert bench.queue.finish(task_id, [b"second"])
    images, _ = bench.queue.all_images(task_id)
    assert images == [b"first", b"second"]


# -- the clients -----------------------------------------------------------------------------------


def clients(bench: PlayedApp) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in bench.json("root", "GET", "/clients")["clients"]}


def test_the_gpu_seconds_of_each_client_are_counted_and_survive_a_restart(bench: PlayedApp) -> None:
    bench.submit("alice", "a")
    bench.submit("alice", "b", steps=12)
    bench.run()
    bench.run()
    bench.submit("bob", "c")
    bench.claim()
    bench.at += 8.0
    bench.submit("bob", "d")
    before = clients(bench)
    assert before["alice"]["gpu_seconds"] == before["alice"]["gpu_seconds_today"] == 32.0
    assert before["alice"]["share_today"] == 1.0
    assert (before["bob"]["waiting"], before["bob"]["running"]) == (1, 1)
    assert before["root"]["last_seen_at"] == bench.at
    assert before["root"]["has_key"]
    for task in bench.queue.unfinished(10, 0)[0]:
        bench.json("bob", "DELETE", "/delete", query_string={"task_id": task.task_id})
    bench.reopen()
    after = clients(bench)
    assert after["alice"]["gpu_seconds"] == 32.0
    assert after["bob"]["gpu_seconds"] == 8.0
    assert after["bob"]["share_today"] == 0.2
    assert "last_seen_at" not in after["alice"]
    bench.at += 24 * 3600.0
    tomorrow = clients(bench)
    assert tomorrow["alice"]["gpu_seconds_today"] == 0.0
    assert tomorrow["alice"]["gpu_seconds"] == 32.0


def test_a_failed_and_a_released_task_have_used_the_gpu_too(bench: PlayedApp) -> None:
    bench.submit("alice")
    task = bench.claim()
    bench.at += 4.0
    bench.queue.release(task.task_id)
    task = bench.claim()
    bench.at += 3.0
    bench.queue.fail(task.task_id, "task_failed", "It broke.")
    assert clients(bench)["alice"]["gpu_seconds"] == 7.0


# -- the log ---------------------------------------------------------------------------------------


def test_each_action_of_an_operator_is_one_line_of_the_log(
    bench: PlayedApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mflux-server.audit")
    task_id = bench.submit("alice")
    bench.json("root", "POST", "/queue/pause")
    bench.json("root", "POST", f"/tasks/{task_id}/front")
    bench.json("root", "POST", "/queue/resume")
    bench.fail()
    bench.json("root", "POST", f"/tasks/{task_id}/retry")
    bench.json("root", "DELETE", "/delete", query_string={"task_id": task_id})
    bench.json("root", "DELETE", "/queue", query_string={"client": "bob"})
    own = bench.submit("alice")
    bench.json("alice", "DELETE", "/delete", query_string={"task_id": own})
    bench.ask("alice", "POST", "/queue/pause")
    lines = [record.getMessage() for record in caplog.records]
    lines = [line for line in lines if line.startswith("operator ")]
    assert lines == [
        "operator root (127.0.0.1) paused the queue",
        f"operator root (127.0.0.1) moved task {task_id} to the front",
        "operator root (127.0.0.1) resumed the queue",
        f"operator root (127.0.0.1) tries task {task_id} of alice again",
        f"operator root (127.0.0.1) cancelled or removed task {task_id} of alice",
        "operator root (127.0.0.1) cancelled the waiting tasks of 'bob': 0",
    ]
