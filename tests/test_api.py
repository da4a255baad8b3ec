"""The native API over real HTTP, with real mflux on a tiny model."""

import base64
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from api_calls import error_of, fetch
from conftest import ServerProcess, StartServer
from PIL import Image

JSON = {"Content-Type": "application/json"}


def test_a_picture_is_asked_for_watched_and_fetched_under_api_too(server: ServerProcess) -> None:
    body = {"prompt": "a lighthouse", "width": 64, "height": 64}
    accepted = requests.post(server.url + "/api/generate", json=body, timeout=60).json()
    task_id = accepted["task_id"]
    done = server.wait_until_ended(task_id)
    assert (done["status"], done["steps_done"], done["steps_total"]) == ("done", 4, 4)
    assert "wait_remaining" not in done
    answer = server.get("/api/image", task_id=task_id)
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert Image.open(BytesIO(answer.content)).size == (64, 64)


@pytest.mark.parametrize(
    ("asked", "content_type", "name"),
    [("JPEG", "image/jpeg", "JPEG"), ("png", "image/png", "PNG"), ("WEBP", "image/webp", "WEBP")],
)
def test_each_format_comes_with_its_content_type(
    server: ServerProcess, asked: str, content_type: str, name: str
) -> None:
    task_id = server.submit(format=asked)["task_id"]
    server.wait_until_ended(task_id)
    answer = server.get("/image", task_id=task_id)
    assert answer.headers["Content-Type"] == content_type
    assert Image.open(BytesIO(answer.content)).format == name


def test_quality_changes_the_size_of_a_jpeg(server: ServerProcess) -> None:
    sizes = []
    for quality in (10, 95):
        task_id = server.submit(quality=quality, seed=1)["task_id"]
        server.wait_until_ended(task_id)
        sizes.append(len(fetch(server, task_id)))
    assert sizes[0] < sizes[1]


def test_base64_and_keeping_the_image(server: ServerProcess) -> None:
    task_id = server.submit()["task_id"]
    server.wait_until_ended(task_id)
    text = server.get("/image", task_id=task_id, base64="true", delete="false")
    assert text.headers["Content-Type"].startswith("text/plain")
    image = fetch(server, task_id, delete="false")
    assert base64.b64decode(text.text, validate=True) == image
    assert fetch(server, task_id) == image


def test_head_does_not_remove_the_image(server: ServerProcess) -> None:
    task_id = server.submit()["task_id"]
    server.wait_until_ended(task_id)
    head = requests.head(server.url + "/image", params={"task_id": task_id}, timeout=60)
    assert head.status_code == 200
    assert len(fetch(server, task_id)) == int(head.headers["Content-Length"])


def test_the_same_seed_gives_the_same_png_and_another_seed_another(server: ServerProcess) -> None:
    images = []
    for seed in (7, "7", 8):
        task_id = server.submit(seed=seed, format="PNG")["task_id"]
        server.wait_until_ended(task_id)
        images.append(fetch(server, task_id))
    assert images[0] == images[1]
    assert images[0] != images[2]


def test_a_random_seed_is_returned_and_reproduces_the_picture(server: ServerProcess) -> None:
    first = server.submit(format="PNG")
    assert server.wait_until_ended(first["task_id"])["params"]["seed"] == first["params"]["seed"]
    again = server.submit(format="PNG", seed=first["params"]["seed"])
    server.wait_until_ended(again["task_id"])
    assert fetch(server, first["task_id"]) == fetch(server, again["task_id"])
    assert server.submit()["params"]["seed"] != first["params"]["seed"]


def test_the_largest_seed_arrives_unchanged(server: ServerProcess) -> None:
    accepted = server.submit(seed=2**64 - 1)
    assert accepted["params"]["seed"] == "18446744073709551615"
    assert server.wait_until_ended(accepted["task_id"])["status"] == "done"


def test_sizes_are_rounded_down_to_multiples_of_16_and_returned(server: ServerProcess) -> None:
    accepted = server.submit(width=79, height=49)
    assert (accepted["params"]["width"], accepted["params"]["height"]) == (64, 48)
    server.wait_until_ended(accepted["task_id"])
    assert Image.open(BytesIO(fetch(server, accepted["task_id"]))).size == (64, 48)


def test_a_model_without_guidance_says_that_it_ignores_it(server: ServerProcess) -> None:
    assert server.submit(guidance=3.5)["ignored_fields"] == ["guidance"]
    accepted = server.submit()
    assert accepted["ignored_fields"] == []
    assert "guidance" not in accepted["params"]


def test_the_smallest_picture_and_a_strange_prompt_work(server: ServerProcess) -> None:
    task_id = server.submit("\u2028🦊\u202e " + "ünïcödé " * 1000, width=16, height=16, steps=1)[
        "task_id"
    ]
    assert server.wait_until_ended(task_id)["status"] == "done"


@pytest.mark.parametrize(
    ("body", "field", "allowed"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "only with a picture"),
        ({"prompt": " \n"}, "prompt", "only with a picture"),
        ({"prompt": "x" * 10_001}, "prompt", "up to 10000 characters"),
        ({"prompt": 5}, "prompt", "a string"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": ["x", 5]}, "prompt", "a string"),
        ({"seed": -1}, "seed", "from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed", "from 0 to 18446744073709551615"),
        ({"seed": "abc"}, "seed", "a string of digits"),
        ({"seed": "²"}, "seed", "a string of digits"),
        ({"seed": True}, "seed", "a whole number"),
        ({"seed": 1.5}, "seed", "a whole number"),
        ({"width": 15}, "width", "from 16 to 8192"),
        ({"width": 0}, "width", "from 16 to 8192"),
        ({"width": "64"}, "width", "a whole number"),
        ({"height": 8193}, "height", "from 16 to 8192"),
        ({"height": None}, "height", "a whole number"),
        ({"width": 8192, "height": 8192}, "width", "at most 4194304 pixels"),
        ({"steps": 0}, "steps", "from 1 to 100"),
        ({"steps": 101}, "steps", "from 1 to 100"),
        ({"steps": 2000}, "steps", "from 1 to 100"),
        ({"steps": True}, "steps", "a whole number"),
        ({"guidance": -0.1}, "guidance", "from 0 to 100"),
        ({"guidance": float("nan")}, "guidance", "a number"),
        ({"guidance": float("inf")}, "guidance", "a number"),
        ({"guidance": "3"}, "guidance", "a number"),
        ({"format": "GIF"}, "format", "one of JPEG, PNG, WEBP"),
        ({"format": 1}, "format", "one of JPEG, PNG, WEBP"),
        ({"quality": 0}, "quality", "from 1 to 100"),
        ({"quality": 101}, "quality", "from 1 to 100"),
        ({"priority": 2}, "priority", "true or false"),
        ({"priority": "yes"}, "priority", "true or false"),
        ({"stepz": 4}, "stepz", "steps"),
        ({"model": 1}, "model", "a string"),
        ({"negative_prompt": 5}, "negative_prompt", "a string"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field_and_what_it_allows(
    server: ServerProcess, body: dict[str, Any], field: str, allowed: str
) -> None:
    if field != "prompt":
        body = {"prompt": "a lighthouse", **body}
    answer = requests.post(
        server.url + "/generate", data=json.dumps(body), headers=JSON, timeout=60
    )
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["field"]) == (400, "invalid_input", field)
    assert allowed in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_a_400(server: ServerProcess, body: bytes) -> None:
    answer = requests.post(server.url + "/generate", data=body, headers=JSON, timeout=60)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_input")


def test_a_body_that_is_not_declared_as_json_is_a_415(server: ServerProcess) -> None:
    answer = requests.post(server.url + "/generate", data='{"prompt": "x"}', timeout=60)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")


def test_a_body_over_the_limit_is_a_413(server: ServerProcess) -> None:
    body = json.dumps({"prompt": "x" * 51_000_000})
    answer = requests.post(server.url + "/generate", data=body, headers=JSON, timeout=60)
    assert answer.status_code == 413
    assert error_of(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/api/nowhere", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("PUT", "/delete?task_id=1", 405, "method_not_allowed"),
        ("GET", "/status", 400, "invalid_input"),
        ("GET", "/status?task_id=", 400, "invalid_input"),
        ("GET", "/status?task_id=nope", 404, "unknown_task"),
        ("GET", "/image", 400, "invalid_input"),
        ("GET", "/image?task_id=nope", 404, "unknown_task"),
        ("GET", "/image?task_id=" + "x" * 65, 400, "invalid_input"),
        ("GET", "/image?task_id=nope&base64=maybe", 400, "invalid_input"),
        ("GET", "/image?task_id=nope&delete=2", 400, "invalid_input"),
        ("DELETE", "/delete", 400, "invalid_input"),
        ("DELETE", "/delete?task_id=nope", 404, "unknown_task"),
        ("POST", "/delete?task_id=nope", 404, "unknown_task"),
    ],
)
def test_every_other_mistake_is_answered_in_json(
    server: ServerProcess, method: str, path: str, status: int, code: str
) -> None:
    answer = requests.request(method, server.url + path, timeout=60)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code)
    if status == 400:
        assert error["field"] in path or error["field"] == "task_id"


def test_405_says_what_is_allowed(server: ServerProcess) -> None:
    assert "POST" in requests.get(server.url + "/generate", timeout=60).headers["Allow"]


def test_a_malformed_http_request_is_answered_in_json(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Length", "minus one")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["error"]["code"] == "bad_request"


@pytest.mark.slow
def test_two_hundred_concurrent_submissions_lose_and_double_nothing(server: ServerProcess) -> None:
    barrier = threading.Barrier(20)

    def submit_ten(_: int) -> list[str]:
        barrier.wait()
        return [server.submit(width=16, height=16, steps=1, seed=n)["task_id"] for n in range(10)]

    with ThreadPoolExecutor(20) as clients:
        task_ids = [task_id for ids in clients.map(submit_ten, range(20)) for task_id in ids]
    assert len(set(task_ids)) == 200
    for task_id in task_ids:
        assert server.wait_until_ended(task_id)["status"] == "done"
    assert server.get("/queue").json() == {"length": 0, "paused": False, "tasks": []}


def test_callers_that_stall_do_not_block_status(start_server: StartServer) -> None:
    """Half-sent bodies, and answers of 13 MB that are asked for and not read: more than threads."""
    server = start_server("--model", "noise-flux1", "--threads", "4")
    task_id = server.submit(width=2048, height=2048, steps=1, format="PNG")["task_id"]
    server.wait_until_ended(task_id)
    stalled = []
    for number in range(12):
        connection = socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0))
        if number % 2:
            connection.sendall(
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            )
        else:
            path = f"/image?task_id={task_id}&delete=false&base64=true"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        stalled.append(connection)
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"
    for connection in stalled:
        connection.close()


def test_an_unknown_host_name_is_refused(server: ServerProcess) -> None:
    for name in ("evil.example", "evil.example:4030", "localhost.evil.example"):
        answer = requests.get(server.url + "/queue", headers={"Host": name}, timeout=60)
        assert (answer.status_code, error_of(answer)["code"]) == (421, "unknown_host")
    for name in ("localhost", "LOCALHOST:4030", "127.0.0.1:1", "[::1]:4030"):
        answer = requests.get(server.url + "/queue", headers={"Host": name}, timeout=60)
        assert answer.status_code == 200


def test_a_done_task_has_its_timings(server: ServerProcess) -> None:
    task_id = server.submit(steps=3, width=128, height=128)["task_id"]
    timings = server.wait_until_ended(task_id)["timings"]
    assert len(timings["step_s"]) == 3
    parts = [timings["text_encoding_s"], *timings["step_s"], timings["decoding_s"]]
    assert all(seconds > 0 for seconds in [*parts, timings["image_encoding_s"]])
    assert timings["total_s"] == pytest.approx(sum(parts) + timings["image_encoding_s"], abs=1e-5)


def test_health_reports_the_model_and_the_queue(server: ServerProcess) -> None:
    health = server.get("/health")
    assert health.status_code == 200
    body = health.json()
    assert (body["model"], body["status"] in ("ready", "busy")) == ("noise-flux1", True)
    assert "random weights" in body["model_title"]


def test_a_thumbnail_is_a_small_jpeg_of_any_image_and_removes_nothing(
    server: ServerProcess,
) -> None:
    task_id = server.submit(width=256, height=128, format="PNG", n=2)["task_id"]
    assert server.get("/thumbnail", task_id=task_id).status_code in (200, 409)
    server.wait_until_ended(task_id)
    sizes = []
    for query in ({}, {"size": 64}, {"size": 1024, "index": 1}):
        answer = server.get("/thumbnail", task_id=task_id, **query)
        assert answer.headers["Content-Type"] == "image/jpeg"
        sizes.append(Image.open(BytesIO(answer.content)).size)
    assert sizes == [(256, 128), (64, 32), (256, 128)]
    for query, field in (({"size": 63}, "size"), ({"size": 1025}, "size"), ({"index": 2}, "index")):
        answer = server.get("/thumbnail", task_id=task_id, **query)
        assert (answer.status_code, error_of(answer)["field"]) == (400, field)
    fetch(server, task_id)
    assert server.get("/thumbnail", task_id="nothing").status_code == 404
