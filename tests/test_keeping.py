"""What the server keeps, for how long, and what it refuses: over real HTTP, across restarts."""

import http.client
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import requests
from conftest import ServerProcess, StartServer, until

LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}


def post(server: ServerProcess, body: dict[str, Any], **headers: str) -> requests.Response:
    return requests.post(server.url + "/generate", json=body, headers=headers, timeout=60)


def test_a_restart_keeps_the_order_the_pictures_and_what_was_learned(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1")
    kept = server.submit("kept", format="PNG", seed=5)["task_id"]
    server.wait_until_ended(kept)
    image = server.get("/image", task_id=kept, delete="false").content
    timings = server.get("/status", task_id=kept).json()["timings"]
    running = server.submit(width=1024, height=1024, steps=100)["task_id"]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    normal = [server.submit()["task_id"] for _ in range(3)]
    urgent = server.submit(priority=True)["task_id"]
    server.stop(signal.SIGTERM)

    server = start_server("--model", "noise-flux1")
    order = [task["task_id"] for task in server.get("/queue").json()["tasks"]]
    assert set(order) <= {urgent, running, *normal}
    assert server.get("/image", task_id=kept).content == image
    assert server.get("/status", task_id=kept).json()["timings"] == timings
    ended = {t: server.wait_until_ended(t) for t in (urgent, *normal)}
    started = sorted(ended, key=lambda t: ended[t]["started_at"])
    assert started == [urgent, *normal]
    assert server.wait_until_ended(running)["status"] == "done"


def test_learned_durations_survive_a_restart(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    for _ in range(3):
        server.wait_until_ended(server.submit(width=512, height=512)["task_id"])
    learned = server.submit(width=512, height=512)
    server.wait_until_ended(learned["task_id"])
    server.stop()

    server = start_server("--model", "noise-flux1")
    probe = server.submit()["task_id"]
    server.wait_until_ended(probe)  # the model is loaded
    again = server.submit(width=512, height=512)
    ratio = again["expected_time_seconds"] / learned["expected_time_seconds"]
    assert 0.3 < ratio < 3


def test_the_same_key_answers_with_the_same_task_also_after_a_restart(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1")
    body = {"prompt": "x", "width": 64, "height": 64}
    first = post(server, body, **{"Idempotency-Key": "message 7"}).json()
    again = post(server, body, **{"Idempotency-Key": "message 7"}).json()
    by_field = post(server, {**body, "client_task_id": "message 7"}).json()
    other = post(server, {**body, "client_task_id": "message 8"}).json()
    assert first["task_id"] == again["task_id"] == by_field["task_id"] != other["task_id"]
    assert first["params"]["seed"] == again["params"]["seed"]
    server.wait_until_ended(first["task_id"])
    server.stop()

    server = start_server("--model", "noise-flux1")
    restarted = post(server, body, **{"Idempotency-Key": "message 7"}).json()
    assert (restarted["task_id"], restarted["status"]) == (first["task_id"], "done")


def test_the_key_of_a_task_that_is_cancelled_deleted_or_fetched_is_free(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1", "--refetch-s", "0")
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
    running = server.submit(width=1024, height=1024, steps=100)["task_id"]

    def ask(**change: Any) -> str:
        answer = post(server, {**body, **change}, **{"Idempotency-Key": "message 7"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] in ("waiting", "running", "done")
        return str(answer.json()["task_id"])

    def delete(task_id: str) -> None:
        requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)

    cancelled = ask()
    assert ask() == cancelled
    delete(cancelled)
    after_cancel = ask()
    delete(running)
    server.wait_until_ended(after_cancel)
    delete(after_cancel)
    after_delete = ask()
    server.wait_until_ended(after_delete)
    assert ask() == after_delete
    assert server.get("/image", task_id=after_delete).status_code == 200
    server.wait_for(after_delete, lambda s: "error" in s)  # gone, once it is fetched
    after_fetch = ask(prompt="y")  # of another request, too
    assert len({cancelled, after_cancel, after_delete, after_fetch}) == 4
    server.wait_until_ended(after_fetch)


def test_a_key_that_comes_again_with_another_request_is_refused(
    start_server: StartServer,
) -> None:
    server = start_server("--models", "noise-flux1,noise-flux2")
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
    first = post(server, body, **{"Idempotency-Key": "message 7"}).json()["task_id"]
    by_field = post(server, {**body, "seed": 7, "client_task_id": "message 8"}).json()["task_id"]
    server.wait_until_ended(first)
    server.stop()

    # Another default model, other limits: what was asked for is still the same.
    server = start_server("--models", "noise-flux2,noise-flux1", "--metadata", "off")
    assert post(server, body, **{"Idempotency-Key": "message 7"}).json()["task_id"] == first
    same = {**body, "seed": "7", "client_task_id": "message 8", "n": None}
    assert post(server, same).json()["task_id"] == by_field
    for change in (
        {"prompt": "y"},
        {"steps": 2},
        {"seed": 1},
        {"model": "noise-flux1"},
        {"priority": True},
        {"count": 2},
    ):
        answer = post(server, {**body, **change}, **{"Idempotency-Key": "message 7"})
        assert answer.status_code == 422, change
        error = answer.json()["error"]
        assert (error["code"], error["field"]) == ("idempotency_key_reused", "Idempotency-Key")
    answer = post(server, {**body, "client_task_id": "message 8"})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "client_task_id"
    assert post(server, {"prompt": "y"}, **{"Idempotency-Key": "message 9"}).status_code == 200


def test_of_two_requests_at_once_with_one_key_one_is_taken(server: ServerProcess) -> None:
    def ask(number: int) -> requests.Response:
        body = {"prompt": f"picture {number % 2}", "width": 64, "height": 64, "steps": 1}
        return post(server, body, **{"Idempotency-Key": "of two"})

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(16)))
    taken = {answer.json()["task_id"] for answer in answers if answer.status_code == 200}
    assert len(taken) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 8 + [422] * 8
    server.wait_until_ended(taken.pop())


def test_a_bad_key_is_refused_by_name(server: ServerProcess) -> None:
    answer = post(server, {"prompt": "x"}, **{"Idempotency-Key": "k" * 201})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "Idempotency-Key")
    answer = post(server, {"prompt": "x", "client_task_id": ""})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "client_task_id")


def test_a_fetched_picture_can_be_fetched_again_for_some_time(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    task_id = server.submit(width=512, height=512, format="PNG")["task_id"]
    server.wait_until_ended(task_id)
    broken = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    broken.request("GET", f"/image?task_id={task_id}")
    assert len(broken.getresponse().read(100)) == 100
    broken.close()
    whole = server.get("/image", task_id=task_id)
    assert int(whole.headers["Content-Length"]) == len(whole.content)


def test_a_fetched_picture_goes_at_once_where_the_operator_says_so(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1", "--refetch-s", "0")
    task_id = server.submit()["task_id"]
    server.wait_until_ended(task_id)
    assert server.get("/image", task_id=task_id).status_code == 200
    server.wait_for(task_id, lambda s: "error" in s)
    gone = server.get("/image", task_id=task_id)
    assert gone.status_code == 410
    assert "fetched" in gone.json()["error"]["message"]
    until(lambda: server.get("/health").json()["images_bytes"] == 0)


def test_a_deleted_picture_is_gone_at_once_with_the_reason(server: ServerProcess) -> None:
    task_id = server.submit()["task_id"]
    server.wait_until_ended(task_id)
    requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)
    for path in ("/status", "/image"):
        gone = server.get(path, task_id=task_id)
        assert gone.status_code == 410
        assert "deleted" in gone.json()["error"]["message"]


def test_a_full_queue_and_a_long_wait_are_429_with_retry_after(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--max-queue", "2", "--max-wait-s", "100000")
    blocker = server.submit(**LONG)["task_id"]
    server.wait_for(blocker, lambda s: s["status"] == "running")
    server.submit()
    server.submit()
    full = post(server, {"prompt": "x"})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["Retry-After"]) >= 1
    server.stop(signal.SIGKILL)

    server = start_server("--model", "noise-flux1", "--max-wait-s", "1")
    refused = post(server, {"prompt": "x", **LONG})
    while refused.status_code == 200:  # until the long task of the first server runs again
        refused = post(server, {"prompt": "x", **LONG})
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "accepts up to 1 s" in refused.json()["error"]["message"]


def test_a_task_is_cancelled_while_the_model_loads(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    task_id = server.submit()["task_id"]
    answer = requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)
    assert answer.json()["was"] in ("waiting", "running")
    assert server.get("/status", task_id=task_id).json()["status"] == "cancelled"
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"


def test_the_queue_is_paged(server: ServerProcess) -> None:
    blocker = server.submit(**LONG)["task_id"]
    server.wait_for(blocker, lambda s: s["status"] == "running")
    waiting = [server.submit()["task_id"] for _ in range(5)]
    page = server.get("/queue", limit=2, offset=2).json()
    assert page["length"] == 6
    assert [task["task_id"] for task in page["tasks"]] == waiting[1:3]
    assert [task["pos"] for task in page["tasks"]] == [1, 2]
    for bad in ({"limit": 0}, {"limit": "x"}, {"offset": -1}, {"limit": 1001}):
        answer = server.get("/queue", **bad)
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, next(iter(bad)))
    for task_id in (blocker, *waiting):
        requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)


def test_health_reports_memory_and_disk(server: ServerProcess) -> None:
    server.wait_until_ended(server.submit()["task_id"])
    health = server.get("/health").json()
    assert health["memory"]["active_bytes"] > 0
    assert health["memory"]["peak_bytes"] > 0
    assert health["disk_free_bytes"] > 0
    assert health["worker_restarts"] == 0


def test_a_picture_that_does_not_fit_into_memory_is_refused_unless_the_check_is_off(
    start_server: StartServer,
) -> None:
    huge = {"prompt": "x", "width": 8192, "height": 8192}
    for check, status in (("on", 422), ("off", 200)):
        server = start_server(
            *("--model", "noise-flux1", "--max-pixels", str(8192 * 8192), "--memory-check", check)
        )
        server.wait_until_ended(server.submit()["task_id"])  # the model is loaded
        answer = requests.post(server.url + "/estimate", json=huge, timeout=60)
        assert answer.status_code == status
        if status == 422:
            error = answer.json()["error"]
            assert error["code"] == "does_not_fit"
            assert "8192 x 8192, decoded in tiles of 256, needs about" in error["message"]
        server.stop()
