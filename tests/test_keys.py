"""Keys, sessions and links over HTTP: what is answered without one."""

import re
import time

import pytest
import requests
from conftest import ServerProcess
from owned import ALICE, BOB, PROMPT, ROOT_KEY, Owned, operations_of


def test_without_a_key_nothing_is_answered_but_the_public_pages(owned: Owned) -> None:
    for operation in operations_of(owned.server):
        method, path = operation.split()
        answer = requests.request(
            method, owned.server.url + path.replace("{name}", "noise-flux1"), timeout=60
        )
        if operation in ("GET /health", "GET /session", "DELETE /session"):
            assert answer.status_code == 200, operation
        elif operation == "POST /session":
            assert answer.status_code == 415
        else:
            assert answer.status_code == 401, operation
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert PROMPT not in answer.text
    for path in ("/", "/swagger", "/openapi.json"):
        assert requests.get(owned.server.url + path, timeout=60).status_code == 200


def test_each_dialect_refuses_a_wrong_key_in_its_own_form(owned: Owned) -> None:
    native = owned.ask("wrong", "GET", "/queue")
    openai = owned.ask("wrong", "GET", "/v1/models")
    a1111 = owned.ask("wrong", "GET", "/sdapi/v1/options")
    assert {native.status_code, openai.status_code, a1111.status_code} == {401}
    assert native.json()["error"]["code"] == "unauthorized"
    assert openai.json()["error"]["code"] == "invalid_api_key"
    assert a1111.json()["error"] == "unauthorized"


def test_a_link_shows_one_image_without_a_key_and_nothing_else(owned: Owned) -> None:
    asked = {"task_id": owned.done, "index": "0"}
    link = owned.ask(ALICE, "POST", "/image/link", params=asked).json()
    assert link["expires_at"] > time.time() + 3000
    url = link["url"]
    shown = requests.get(url, timeout=60)
    assert shown.status_code == 200
    image = owned.ask(ALICE, "GET", "/image", params={**asked, "delete": "false"})
    assert shown.content == image.content
    changed = [
        url.replace(f"img-{owned.done}", f"img-{owned.waiting}"),
        url.replace("_0.jpg", "_1.jpg"),
        url.replace("_0.jpg", "_0.png"),
        url.replace("expires=", "expires=9"),
        re.sub("expires=[0-9]+", "expires=1", url),
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.partition("&signature")[0],
        url.partition("?")[0],
        url + "%00",
        re.sub("signature=.*", "signature=%ff%fe", url),
    ]
    for other in changed:
        assert requests.get(other, timeout=60).status_code in (400, 401), other
    by_bob = requests.get(changed[-3], headers={"Authorization": f"Bearer {BOB}"}, timeout=60)
    assert by_bob.status_code == 404
    answer = requests.get(url.replace("/v1/", "/v1/../"), timeout=60)
    assert answer.status_code in (401, 404)


def test_the_urls_of_the_openai_api_work_without_a_key(owned: Owned) -> None:
    openai = ServerProcess(owned.keys.parent / "openai", "--keys", str(owned.keys))
    try:
        body = {"prompt": "x", "size": "64x64", "n": 2, "response_format": "url"}
        headers = {"Authorization": f"Bearer {ALICE}"}
        answer = requests.post(
            f"{openai.url}/v1/images/generations", json=body, headers=headers, timeout=60
        )
        first, second = (image["url"] for image in answer.json()["data"])
        pictures = [requests.get(url, timeout=60) for url in (first, second)]
        assert all(picture.status_code == 200 for picture in pictures)
        assert pictures[0].content != pictures[1].content
        swapped = first.replace("_0.", "_1.")
        refused = requests.get(swapped, timeout=60)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    finally:
        openai.stop()


def test_urgent_tasks_need_the_right(owned: Owned) -> None:
    body = {"prompt": "x", "width": 64, "height": 64, "priority": True}
    refused = owned.ask(BOB, "POST", "/generate", json=body)
    assert refused.status_code == 403
    assert refused.json()["error"] == {
        **refused.json()["error"],
        "code": "not_permitted",
        "field": "priority",
    }
    accepted = owned.ask(ROOT_KEY, "POST", "/generate", json=body)
    assert accepted.status_code == 200
    owned.ask(ROOT_KEY, "DELETE", "/delete", params={"task_id": accepted.json()["task_id"]})


def test_a_browser_signs_in_with_a_cookie(owned: Owned) -> None:
    browser = requests.Session()
    url = owned.server.url
    assert browser.get(f"{url}/session", timeout=60).json()["needs_key"]
    wrong = browser.post(f"{url}/session", json={"key": "wrong"}, timeout=60)
    assert wrong.status_code == 401
    signed_in = browser.post(f"{url}/session", json={"key": ALICE}, timeout=60)
    assert signed_in.json()["name"] == "alice"
    image = browser.get(f"{url}/thumbnail", params={"task_id": owned.done}, timeout=60)
    assert image.status_code == 200
    browser.delete(f"{url}/session", timeout=60)
    image = browser.get(f"{url}/thumbnail", params={"task_id": owned.done}, timeout=60)
    assert image.status_code == 401


def test_the_stream_of_a_client_whose_key_is_removed_ends(owned: Owned) -> None:
    carol = "carol-0123456789"
    before = owned.keys.read_text()
    owned.keys.write_text(f'{before}[carol]\nkey = "{carol}"\noperator = true\n')
    while owned.ask(carol, "GET", "/queue").status_code == 401:
        pass  # the file is looked at once a second
    with owned.ask(carol, "GET", "/events", stream=True) as stream:
        assert stream.status_code == 200
        owned.keys.write_text(before)
        lines = list(stream.iter_lines())
    assert b"retry: 2000" in lines
    assert owned.ask(carol, "GET", "/queue").status_code == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"key": "' + b"a" * 5_000 + b'"}', 413),
        (b'{"' + b"a" * 4_000 + b'": 1}', 400),
        (b'{"key": 1}', 400),
        (b"[]", 400),
    ],
)
def test_signing_in_takes_a_small_body_and_answers_a_short_error(
    owned: Owned, body: bytes, status: int
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{owned.server.url}/session", body, headers=headers, timeout=60)
    assert answer.status_code == status
    assert len(answer.content) < 500
    assert "Set-Cookie" not in answer.headers


def test_no_answer_is_kept_by_a_cache_for_somebody_else(owned: Owned) -> None:
    for path in ("/queue", "/stats", "/session", "/v1/models", "/nothing"):
        answer = owned.ask(ALICE, "GET", path)
        assert answer.headers["Cache-Control"] == "no-store", path


def test_keys_are_in_no_log(owned: Owned) -> None:
    owned.ask("a wrong key nobody has", "GET", "/queue")
    log = "".join(owned.server.log)
    assert all(key not in log for key in (ALICE, BOB, ROOT_KEY, "a wrong key nobody has"))
