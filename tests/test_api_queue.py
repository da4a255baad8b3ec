"""The queue over real HTTP: its order, tags, cancelling and removing."""

import signal
from itertools import pairwise
from typing import Any

import pytest
import requests
from api_calls import delete, error_of, fetch
from conftest import ServerProcess, StartServer

from scheduler.baselines import STEADY_S, STEADY_SHARE

LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}
"""Keeps the worker busy until the test cancels it."""


def test_urgent_tasks_run_before_normal_ones_and_each_level_in_order(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1", "--preempt", "off")
    blocker = server.submit(**LONG)["task_id"]
    server.wait_for(blocker, lambda s: s["status"] == "running")
    names = ["normal 1", "urgent 1", "normal 2", "urgent 2"]
    accepted = {n: server.submit(n, priority=n.startswith("urgent")) for n in names}
    expected = ["urgent 1", "urgent 2", "normal 1", "normal 2"]

    queue = server.get("/queue").json()
    assert queue["length"] == 5
    assert [task["task_id"] for task in queue["tasks"]] == [
        blocker,
        *(accepted[n]["task_id"] for n in expected),
    ]
    assert [task["pos"] for task in queue["tasks"]] == [0, 0, 1, 2, 3]
    waits = [task["wait_remaining"] for task in queue["tasks"]]
    for earlier, later in pairwise(waits):  # each task keeps its own forecast while it is steady
        assert later >= earlier - STEADY_S - STEADY_SHARE * earlier
    assert [accepted[n]["task_length"] for n in names] == [1, 2, 3, 4]
    for position, name in enumerate(expected):
        status = server.get("/status", task_id=accepted[name]["task_id"]).json()
        assert (status["status"], status["pos"]) == ("waiting", position)

    delete(server, blocker)
    ended = {n: server.wait_until_ended(accepted[n]["task_id"]) for n in names}
    assert all(status["status"] == "done" for status in ended.values())
    assert sorted(names, key=lambda n: ended[n]["started_at"]) == expected


def test_tags_are_kept_with_the_task_and_found_in_the_queue(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    blocker = server.submit(**LONG, tags=["all", "running"])["task_id"]
    server.wait_for(blocker, lambda s: s["status"] == "running")
    both = server.submit(tags=["all", "été"])
    assert both["params"]["tags"] == ["all", "été"]
    form = [("prompt", (None, "a lighthouse")), ("tags", (None, "all")), ("tags", (None, "one"))]
    sent = requests.post(server.url + "/generate", files=form, timeout=60)
    assert sent.json()["params"]["tags"] == ["all", "one"]
    plain = server.submit()
    assert "tags" not in plain["params"]

    def found(tag: str, **paging: int) -> tuple[list[str], int]:
        answer = server.get("/queue", tag=tag, **paging).json()
        return [task["task_id"] for task in answer["tasks"]], answer["length"]

    tagged = [blocker, both["task_id"], sent.json()["task_id"]]
    server.stop(signal.SIGKILL)
    server = start_server("--model", "noise-flux1")
    assert found("all") == (tagged, 3)
    assert found("all", limit=1, offset=1) == (tagged[1:2], 3)
    assert found("été") == ([both["task_id"]], 1)
    assert found("al") == ([], 0)
    assert found("")[0] == [*tagged, plain["task_id"]]
    status = server.get("/status", task_id=both["task_id"]).json()
    assert status["params"]["tags"] == ["all", "été"]


@pytest.mark.parametrize("tags", ["all", [""], ["x" * 41], ["a"] * 11, [3], ["\0"]])
def test_tags_that_are_too_many_or_too_long_are_refused(server: ServerProcess, tags: Any) -> None:
    answer = requests.post(server.url + "/generate", json={"prompt": "x", "tags": tags}, timeout=60)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["field"] == "tags"
    if tags != ["\0"]:
        allowed = "a list of up to 10, each a string of 1 to 40 characters"
        assert error["message"].startswith(f"tags must be {allowed}, not ")


def test_a_waiting_task_is_cancelled_and_those_behind_it_move_up(server: ServerProcess) -> None:
    blocker = server.submit(**LONG)["task_id"]
    server.wait_for(blocker, lambda s: s["status"] == "running")
    first, second = server.submit()["task_id"], server.submit()["task_id"]
    assert server.get("/status", task_id=second).json()["pos"] == 1
    assert server.get("/image", task_id=first).status_code == 409

    assert delete(server, first)["was"] == "waiting"
    assert server.get("/status", task_id=first).json()["status"] == "cancelled"
    assert server.get("/image", task_id=first).status_code == 410
    assert server.get("/status", task_id=second).json()["pos"] == 0
    delete(server, blocker)
    server.wait_until_ended(second)


def test_a_running_task_is_cancelled_and_the_next_picture_is_unaffected(
    server: ServerProcess,
) -> None:
    reference = server.submit(seed=3, format="PNG")["task_id"]
    server.wait_until_ended(reference)
    blocker = server.submit(seed=4, **LONG)["task_id"]
    server.wait_for(blocker, lambda s: s["steps_done"] >= 1)
    assert delete(server, blocker)["was"] == "running"
    following = server.submit(seed=3, format="PNG")["task_id"]
    assert server.wait_until_ended(following)["status"] == "done"
    assert fetch(server, following) == fetch(server, reference)
    status = server.get("/status", task_id=blocker).json()
    assert (status["status"], status["steps_done"] < 100) == ("cancelled", True)


def test_a_finished_task_is_removed(server: ServerProcess) -> None:
    task_id = server.submit()["task_id"]
    server.wait_until_ended(task_id)
    answer = requests.post(server.url + "/delete", params={"task_id": task_id}, timeout=60)
    assert answer.json()["was"] == "done"
    assert server.get("/status", task_id=task_id).status_code == 410


def test_long_prompts_are_cut_in_the_list_and_whole_in_the_status(server: ServerProcess) -> None:
    blocker = server.submit(**LONG)["task_id"]
    task_id = server.submit("long " * 1000)["task_id"]
    listed = server.get("/queue").json()["tasks"][-1]["params"]["prompt"]
    assert (len(listed), listed[-3:]) == (200, "...")
    assert len(server.get("/status", task_id=task_id).json()["params"]["prompt"]) == 5000
    for waiting in (blocker, task_id):
        delete(server, waiting)


def test_the_wait_of_a_running_task_shrinks_and_counts_its_steps(server: ServerProcess) -> None:
    task_id = server.submit(width=1024, height=1024, steps=100)["task_id"]
    seen: list[tuple[int, int]] = []

    def ended(status: dict[str, Any]) -> bool:
        if status.get("phase") == "denoising" and status["steps_done"] >= 2:
            seen.append((status["steps_done"], status["wait_remaining"]))
        return bool(status["status"] == "done")

    assert server.wait_for(task_id, ended)["steps_done"] == 100
    steps = [s for s, _ in seen]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert min(wait for _, wait in seen) >= 1
