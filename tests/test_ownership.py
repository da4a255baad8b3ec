"""Whose task it is: a stranger with a key of its own sees and touches nothing of another client.

Every operation of the specification is either tried here with a stranger's key, or listed with
the reason why it has nothing to hide. A new route that is neither fails a test.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess
from owned import ALICE, BOB, PROMPT, ROOT_KEY, Owned, operations_of

from compat.a1111_lists import EMPTY_LISTS, NOTHING_TO_DO

NOTHING_TO_HIDE = {
    "POST /estimate": "forecasts the caller's own request",
    "GET /health": "the state of the server",
    "GET /stats": "durations by size; what is about tasks is for the operator: test_stats.py",
    "GET /models": "what the operator allows",
    "GET /wildcards": "names that the operator allows",
    "GET /models/{name}": "what the operator allows",
    "POST /models/{name}/load": "for the operator: test_model_servers.py",
    "POST /queue/pause": "for the operator: test_operator.py",
    "POST /queue/resume": "for the operator: test_operator.py",
    "DELETE /queue": "for the operator: test_operator.py",
    "POST /tasks/{task_id}/front": "for the operator: test_operator.py",
    "GET /clients": "for the operator: test_operator.py",
    "GET /machines": "for the operator: test_operator.py",
    "GET /metrics": "for the operator: test_operator.py",
    "POST /machines/{name}/drain": "for the operator: test_operator.py",
    "POST /machines/{name}/resume": "for the operator: test_operator.py",
    "GET /session": "the caller itself",
    "POST /session": "the caller itself",
    "DELETE /session": "the caller itself",
    "POST /v1/images/generations": "answers the caller's own picture",
    "POST /v1/images/edits": "answers the caller's own picture",
    "POST /v1/images/variations": "answers the caller's own picture",
    "GET /v1/models": "what the operator allows",
    "GET /v1/models/{name}": "what the operator allows",
    "GET /api/version": "the version, which every client with a key sees",
    "GET /api/tags": "what the operator allows",
    "GET /api/ps": "models in memory, as GET /health",
    "POST /api/show": "what the operator allows",
    "POST /sdapi/v1/txt2img": "answers the caller's own picture",
    "POST /sdapi/v1/img2img": "answers the caller's own picture",
    "POST /sdapi/v1/extra-single-image": "answers the caller's own picture",
    "GET /queue/status": "how many tasks the caller has",
    "GET /controlnet/version": "names of what there is",
    "GET /controlnet/model_list": "names of what there is",
    "GET /controlnet/module_list": "names of what there is",
    "GET /controlnet/control_types": "names of what there is",
    "GET /controlnet/settings": "names of what there is",
    "POST /sdapi/v1/png-info": "about the picture that is sent",
    "GET /sdapi/v1/options": "settings",
    "POST /sdapi/v1/options": "settings",
    "GET /sdapi/v1/memory": "memory of the server",
}
A1111_LISTS = (
    *EMPTY_LISTS,
    "sd-models",
    "samplers",
    "schedulers",
    "upscalers",
    "loras",
    "embeddings",
    "scripts",
    "cmd-flags",
)
NOTHING_TO_HIDE |= {f"GET /sdapi/v1/{name}": "names of what there is" for name in A1111_LISTS}
NOTHING_TO_HIDE |= {f"POST /sdapi/v1/{name}": why for name, why in NOTHING_TO_DO.items()}
ATTEMPTS: dict[str, dict[str, dict[str, str]]] = {
    "GET /status": {"params": {}},
    "GET /image": {"params": {"delete": "false"}},
    "GET /preview": {"params": {}},
    "GET /thumbnail": {"params": {}},
    "GET /events": {"params": {}},
    "DELETE /delete": {"params": {}},
    "POST /delete": {"params": {}},
    "GET /cancel": {"params": {}},
    "POST /cancel": {"params": {}},
    "DELETE /cancel": {"params": {}},
    "POST /image/link": {"params": {}},
    "POST /keep": {"params": {}},
    "DELETE /keep": {"params": {}},
    "GET /zip": {"params": {}},
}
"""Operations that name a task in the query."""

OTHERS = {
    "POST /generate": "test_a_stranger_cannot_start_from_a_picture_of_another_client",
    "POST /tasks/{task_id}/retry": "test_a_stranger_cannot_try_a_task_again",
    "GET /tasks": "test_a_stranger_lists_and_clears_only_its_own_tasks",
    "POST /clear": "test_a_stranger_lists_and_clears_only_its_own_tasks",
    "DELETE /clear": "test_a_stranger_lists_and_clears_only_its_own_tasks",
    "GET /keep": "test_a_client_lists_only_its_own_kept_tasks",
    "GET /queue": "test_a_stranger_sees_of_others_what_the_wait_depends_on",
    "POST /v1/responses": "test_a_stranger_cannot_edit_the_picture_of_a_response",
    "POST /v1/chat/completions": "test_a_stranger_cannot_edit_the_picture_of_a_response",
    "GET /v1/images/img-{name}": "test_a_stranger_cannot_fetch_by_the_openai_url",
    "GET /sdapi/v1/progress": "test_a_stranger_sees_no_progress_and_interrupts_nothing",
    "POST /sdapi/v1/interrupt": "test_a_stranger_sees_no_progress_and_interrupts_nothing",
    "POST /mcp": "test_a_stranger_cannot_use_a_task_of_another_client_through_mcp",
    "POST /sdapi/v1/skip": "test_a_stranger_sees_no_progress_and_interrupts_nothing",
}


def test_every_operation_is_tried_by_a_stranger_or_has_nothing_to_hide(owned: Owned) -> None:
    assert operations_of(owned.server) == {*NOTHING_TO_HIDE, *ATTEMPTS, *OTHERS}
    for name in OTHERS.values():
        assert name in globals(), name


@pytest.mark.parametrize("operation", ATTEMPTS)
@pytest.mark.parametrize("prefix", ["", "/api"])
def test_an_id_of_another_client_is_unknown(owned: Owned, operation: str, prefix: str) -> None:
    method, path = operation.split()
    never = "0" * 16
    expected = owned.ask(BOB, method, prefix + path, params={"task_id": never})
    assert expected.status_code == 404
    for task_id in owned.ids:
        params = {**ATTEMPTS[operation]["params"], "task_id": task_id}
        answer = owned.ask(BOB, method, prefix + path, params=params)
        assert answer.status_code == 404
        assert answer.content == expected.content
    for task_id in owned.ids:
        status = owned.ask(ALICE, "GET", "/status", params={"task_id": task_id})
        assert status.status_code == 200
        assert status.json()["status"] != "cancelled"


@pytest.mark.parametrize("query", [{"all": "true"}, {"metadata": "true"}, {"base64": "true"}])
def test_no_form_of_an_image_is_for_strangers(owned: Owned, query: dict[str, str]) -> None:
    params = {"task_id": owned.done, **query}
    assert owned.ask(BOB, "GET", "/image", params=params).status_code == 404
    params["delete"] = "false"
    assert owned.ask(ROOT_KEY, "GET", "/image", params=params).status_code == 200


def test_a_stranger_sees_of_others_what_the_wait_depends_on(owned: Owned) -> None:
    mine = owned.submit(BOB)
    try:
        seen = owned.ask(BOB, "GET", "/queue").json()
        assert seen["length"] == 3
        others = [task for task in seen["tasks"] if not task["mine"]]
        assert [task.get("task_id") for task in seen["tasks"] if task["mine"]] == [mine]
        assert len(others) == 2
        assert all(
            set(task["params"]) == {"model", "width", "height", "steps", "count"} for task in others
        )
        assert all("task_id" not in task for task in others)
        assert all(task["wait_remaining"] >= 1 for task in others)
        assert all(task_id not in json.dumps(seen) for task_id in owned.ids)
        by_operator = owned.ask(ROOT_KEY, "GET", "/queue").json()
        assert all(task["mine"] and task["task_id"] for task in by_operator["tasks"])
    finally:
        owned.ask(BOB, "DELETE", "/delete", params={"task_id": mine})


def test_tags_find_only_ones_own_tasks(owned: Owned) -> None:
    tagged = owned.submit(ALICE, tags=["holiday"])
    try:
        params = {"tag": "holiday"}
        assert owned.ask(BOB, "GET", "/queue", params=params).json()["tasks"] == []
        assert len(owned.ask(ALICE, "GET", "/queue", params=params).json()["tasks"]) == 1
    finally:
        owned.ask(ALICE, "DELETE", "/delete", params={"task_id": tagged})


def test_a_stream_without_names_is_of_ones_own_tasks(owned: Owned) -> None:
    with owned.ask(BOB, "GET", "/events", stream=True) as stream:
        others = owned.submit(ALICE)
        owned.ask(ALICE, "DELETE", "/delete", params={"task_id": others})
        mine = owned.submit(BOB)
        owned.ask(BOB, "DELETE", "/delete", params={"task_id": mine})
        seen = []
        for line in stream.iter_lines():
            seen.append(line.decode())
            if line == b"event: cancelled":
                break
        assert mine in "".join(seen)
        assert all(task_id not in "".join(seen) for task_id in (*owned.ids, others))


def test_a_stranger_cannot_start_from_a_picture_of_another_client(owned: Owned) -> None:
    body = {"prompt": "x", "steps": 2, "init_image": {"task_id": owned.done, "index": 0}}
    stranger = owned.ask(BOB, "POST", "/generate", json=body)
    assert stranger.status_code == 404
    assert stranger.json()["error"]["field"] == "init_image"
    assert owned.ask(BOB, "POST", "/estimate", json=body).status_code == 404
    assert owned.ask(ALICE, "POST", "/estimate", json=body).status_code == 200


def test_a_client_lists_only_its_own_kept_tasks(owned: Owned) -> None:
    done = {"task_id": owned.done}
    assert owned.ask(ALICE, "POST", "/keep", params=done).status_code == 200
    assert owned.ask(ALICE, "GET", "/keep").json()["task_ids"] == [owned.done]
    assert owned.ask(BOB, "GET", "/keep").json()["task_ids"] == []
    assert owned.ask(ROOT_KEY, "GET", "/keep").json()["task_ids"] == []
    assert owned.ask(ALICE, "DELETE", "/keep", params=done).status_code == 200


def test_a_stranger_lists_and_clears_only_its_own_tasks(owned: Owned) -> None:
    assert owned.ask(BOB, "GET", "/tasks").json() == []
    listed = owned.ask(ALICE, "GET", "/api/tasks").json()
    assert [task["task_id"] for task in listed] == [owned.running, owned.waiting]
    assert listed[0]["prompt"] == PROMPT
    for method in ("POST", "DELETE"):
        mine = owned.submit(BOB)
        cleared = owned.ask(BOB, method, "/clear")
        assert cleared.json() == {"cancelled": 1}
        status = owned.ask(BOB, "GET", "/status", params={"task_id": mine}).json()
        assert status["status"] == "cancelled"
    waiting = owned.ask(ALICE, "GET", "/status", params={"task_id": owned.waiting}).json()
    assert waiting["status"] == "waiting"


def test_a_stranger_cannot_try_a_task_again(owned: Owned) -> None:
    never = owned.ask(BOB, "POST", f"/tasks/{'0' * 16}/retry")
    assert never.status_code == 404
    for prefix in ("", "/api"):
        for task_id in owned.ids:
            answer = owned.ask(BOB, "POST", f"{prefix}/tasks/{task_id}/retry")
            assert (answer.status_code, answer.content) == (404, never.content)
            assert owned.ask(ALICE, "POST", f"{prefix}/tasks/{task_id}/retry").status_code == 409


def test_a_stranger_cannot_fetch_by_the_openai_url(owned: Owned) -> None:
    path = f"/v1/images/img-{owned.done}_0.jpg"
    assert owned.ask(ALICE, "GET", path).status_code == 200
    assert owned.ask(BOB, "GET", path).status_code == 404


def test_a_stranger_cannot_edit_the_picture_of_a_response(owned: Owned) -> None:
    items = [
        {"type": "image_generation_call", "id": f"ig_{owned.done}"},
        {"role": "user", "content": "at night"},
    ]
    tools = [{"type": "image_generation"}]
    for path, body in (
        ("/v1/responses", {"input": items, "tools": tools}),
        (
            "/v1/responses",
            {"input": "x", "tools": tools, "previous_response_id": f"resp_{owned.done}"},
        ),
        ("/v1/chat/completions", {"messages": items, "modalities": ["image"]}),
    ):
        assert owned.ask(BOB, "POST", path, json=body).status_code == 404


def test_a_stranger_sees_no_progress_and_interrupts_nothing(owned: Owned) -> None:
    progress = owned.ask(BOB, "GET", "/sdapi/v1/progress").json()
    assert progress["progress"] == 0
    assert PROMPT not in json.dumps(progress)
    for path in ("/sdapi/v1/interrupt", "/sdapi/v1/skip"):
        assert owned.ask(BOB, "POST", path).status_code == 200
    status = owned.ask(ALICE, "GET", "/status", params={"task_id": owned.running}).json()
    assert status["status"] == "running"


def test_a_stranger_cannot_use_a_task_of_another_client_through_mcp(owned: Owned) -> None:
    def ask(key: str, method: str, **params: Any) -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return dict(owned.ask(key, "POST", "/mcp", json=body).json())

    for tool in ("check_image", "cancel", "edit_image"):
        prompt = {"prompt": "x"} if tool == "edit_image" else {}
        never: dict[str, Any] = {"name": tool, "arguments": {"task_id": "0" * 16, **prompt}}
        for task_id in owned.ids:
            tried: dict[str, Any] = {"name": tool, "arguments": {"task_id": task_id, **prompt}}
            answer = ask(BOB, "tools/call", **tried)
            assert answer == ask(BOB, "tools/call", **never)
            assert answer["result"]["isError"]
    uri = f"mflux://pictures/{owned.done}/0"
    assert "error" in ask(BOB, "resources/read", uri=uri)
    assert ask(ALICE, "resources/read", uri=uri)["result"]["contents"][0]["uri"] == uri
    assert PROMPT not in json.dumps(ask(BOB, "resources/list"))
    assert PROMPT in json.dumps(ask(ALICE, "resources/list"))


def test_the_same_idempotency_key_of_two_clients_makes_two_tasks(owned: Owned) -> None:
    made: dict[str, str] = {}
    for key in (ALICE, BOB, ALICE):
        answer = owned.ask(
            key,
            "POST",
            "/generate",
            json={"prompt": "x", "width": 64, "height": 64, "seed": 5},
            headers={"Idempotency-Key": "same"},
        )
        assert answer.status_code == 200
        assert made.setdefault(key, answer.json()["task_id"]) == answer.json()["task_id"]
    assert made[ALICE] != made[BOB]
    for key, task_id in made.items():
        owned.ask(key, "DELETE", "/delete", params={"task_id": task_id})


def test_a_removed_task_of_another_client_is_unknown_too(owned: Owned) -> None:
    task_id = owned.submit(ALICE)
    owned.ask(ALICE, "DELETE", "/delete", params={"task_id": task_id})
    owned.ask(ALICE, "DELETE", "/delete", params={"task_id": task_id})
    params = {"task_id": task_id}
    assert owned.ask(ALICE, "GET", "/status", params=params).status_code == 410
    assert owned.ask(ROOT_KEY, "GET", "/status", params=params).status_code == 410
    assert owned.ask(BOB, "GET", "/status", params=params).status_code == 404


def test_on_the_network_each_client_sees_its_own_tasks_without_keys(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--host", "0.0.0.0")
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        body = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 2}
        mine = {"X-Client-Id": "0123456789abcdef"}
        task_id = requests.post(f"{url}/generate", json=body, headers=mine, timeout=60).json()[
            "task_id"
        ]
        params = {"task_id": task_id}
        assert requests.get(f"{url}/status", params=params, headers=mine, timeout=60).ok
        assert requests.get(f"{url}/status", params=params, timeout=60).status_code == 404
        other = {"X-Client-Id": "fedcba9876543210"}
        answer = requests.get(f"{url}/status", params=params, headers=other, timeout=60)
        assert answer.status_code == 404
        assert any("sees only their own" in line for line in server.log)
    finally:
        server.stop()
