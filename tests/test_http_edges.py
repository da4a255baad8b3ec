"""Requests at the edges of HTTP: headers, methods, paths and queries that no client of ours sends.
The answer is the usual one or a JSON error, never a server error."""

import json
import socket
from urllib.parse import urlsplit

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess

GET_ROUTES = (
    "/",
    "/web/app.js",
    "/swagger",
    "/openapi.json",
    "/health",
    "/stats",
    "/queue",
    "/models",
    "/models/noise-flux1",
    "/v1/models",
    "/v1/models/noise-flux1",
    "/sdapi/v1/options",
    "/sdapi/v1/progress",
    "/sdapi/v1/sd-models",
)
TASK_ROUTES = ("/status", "/image", "/thumbnail", "/preview")
HEADERS = {
    "Range": (
        "bytes=0-",
        "bytes=5-1",
        "bytes=-0",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(2000)),
        "bytes=99999999999999999999999-",
        "lines=1-2",
        "nonsense",
    ),
    "If-None-Match": (
        "*",
        '"' + "a" * 8000 + '"',
        ",".join('W/"x"' for _ in range(1000)),
        '"',
        ",",
    ),
    "If-Modified-Since": ("yesterday", "Thu, 99 Foo 99999 99:99:99 GMT"),
    "If-Range": ('"', "Thu, 01 Jan 1970 00:00:00 GMT"),
    "Accept": (
        "*/*;q=nan",
        "application/xml",
        ",".join(f"a/b{n};q=0.{n}" for n in range(1000)),
        ";",
    ),
    "Accept-Encoding": ("gzip;q=2, *;q=-1", "identity;q=0, *;q=0"),
    "Accept-Language": ("x" * 5000, "de;q=x"),
    "Authorization": (
        "Basic",
        "Basic !!!",
        "Basic /////w==",
        "Bearer",
        "Bearer " + "x" * 9000,
        "?",
    ),
    "Cookie": ("a=b; " * 1000, "=;=;", "\xff=\xfe"),
    "X-Forwarded-For": (", ".join(["1.2.3.4"] * 1000), "unknown", "'; --"),
    "X-Forwarded-Host": ("evil.example", "a" * 5000),
    "X-Forwarded-Proto": ("gopher", "https,http"),
    "Forwarded": ('for="[::1', "host=evil.example;proto=x"),
    "X-HTTP-Method-Override": ("DELETE", "x" * 5000),
    "Content-Type": ("multipart/form-data", "a/b; charset=nonsense", "/", ";;;"),
    "Last-Event-ID": ("-1", "1.5", "x" * 5000, "9" * 400, "\xb2"),
    "Upgrade": ("h2c", "websocket"),
    "Referer": ("x" * 8000,),
    "Origin": ("null", "x" * 8000, "http://[::1"),
}
METHODS = ("TRACE", "CONNECT", "FOO", "PROPFIND", "G", "M-SEARCH", "PRI", "A" * 500)


def check(answer: requests.Response) -> None:
    """Errors are JSON and not ours."""
    assert answer.status_code < 500, (answer.request.headers, answer.text)
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert answer.headers["Content-Type"].startswith("application/json"), answer.text[:500]
        assert answer.json()


def bare(server: ServerProcess, target: bytes, method: bytes = b"GET", more: bytes = b"") -> bytes:
    """The whole answer to a request whose target is sent as it is."""
    address = urlsplit(server.url)
    head = b"%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s\r\n"
    with socket.create_connection(("127.0.0.1", address.port or 0), timeout=GIVE_UP_S) as line:
        line.sendall(head % (method, target, more))
        return b"".join(iter(lambda: line.recv(65536), b""))


@pytest.fixture(scope="module")
def picture(server: ServerProcess) -> str:
    task_id = str(server.submit()["task_id"])
    assert server.wait_until_ended(task_id)["status"] == "done"
    return task_id


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_any_value_is_used_ignored_or_refused(
    server: ServerProcess, picture: str, name: str
) -> None:
    paths = (
        "/health",
        "/web/app.js",
        f"/image?task_id={picture}&delete=false",
        f"/events?task_id={picture}",
        "/v1/models",
    )
    assert HEADERS[name]
    for value in HEADERS[name]:
        for path in paths:
            headers = {name: value.encode("latin-1")}
            check(requests.get(server.url + path, headers=headers, timeout=GIVE_UP_S))
        for path in ("/estimate", "/v1/images/edits", "/sdapi/v1/png-info"):
            answer = requests.post(
                server.url + path, data=b"{}", headers=headers, timeout=GIVE_UP_S
            )
            check(answer)


def test_a_method_in_a_header_or_a_query_does_not_override_the_real_one(
    server: ServerProcess, picture: str
) -> None:
    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        answer = requests.post(
            server.url + "/status",
            params={"task_id": picture, "_method": "GET"},
            headers={name: "GET"},
            timeout=GIVE_UP_S,
        )
        assert answer.status_code == 405
    answer = requests.get(
        server.url + "/status",
        params={"task_id": picture, "_method": "DELETE"},
        headers={"X-HTTP-Method-Override": "DELETE"},
        timeout=GIVE_UP_S,
    )
    assert answer.status_code == 200
    assert server.get("/status", task_id=picture).json()["status"] == "done"


def test_head_is_answered_like_get_without_a_body_and_removes_nothing(
    server: ServerProcess, picture: str
) -> None:
    targets = [*GET_ROUTES, *(f"{path}?task_id={picture}" for path in TASK_ROUTES)]
    for target in targets:
        answer = bare(server, target.encode(), b"HEAD")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), target
        assert body == b"", target
    assert server.get("/image", task_id=picture, delete="false").status_code == 200
    assert bare(server, b"/nowhere", b"HEAD").startswith(b"HTTP/1.1 404 ")


def test_options_returns_the_methods_and_does_nothing(server: ServerProcess, picture: str) -> None:
    for target in (*GET_ROUTES, *TASK_ROUTES, "/generate", "/delete", "/v1/images/generations"):
        answer = requests.options(
            server.url + target, params={"task_id": picture}, timeout=GIVE_UP_S
        )
        assert answer.status_code == 200, target
        assert "OPTIONS" in answer.headers["Allow"], target
    check(requests.options(server.url + "/nowhere", timeout=GIVE_UP_S))
    assert bare(server, b"*", b"OPTIONS").split()[1] in (b"200", b"400", b"404")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_method_is_refused_as_json(server: ServerProcess, method: str) -> None:
    for path in ("/generate", "/status", "/health", "/v1/models", "/sdapi/v1/txt2img", "/swagger"):
        answer = bare(server, path.encode(), method.encode())
        status = int(answer.split()[1])
        assert 400 <= status < 500, answer[:300]
        assert json.loads(answer.partition(b"\r\n\r\n")[2]), answer[:300]


@pytest.mark.parametrize(
    "host",
    [
        "localhost, evil.example",
        "evil.example, localhost",
        "localhost@evil.example",
        "localhost/evil.example",
        "evil.example/localhost",
        "localhost:99999",
        "localhost:-1",
        "localhost#evil.example",
        "localhost evil.example",
        "\xb2localhost",
        "xn--",
        ".",
        "..",
        ":4030",
        "[]",
        "x" * 5000,
    ],
)
def test_an_unknown_host_is_refused(server: ServerProcess, host: str) -> None:
    headers = {"Host": host.encode("latin-1")}
    answer = requests.get(server.url + "/queue", headers=headers, timeout=GIVE_UP_S)
    assert answer.status_code in (400, 421), answer.text
    assert answer.json()["error"]["message"]


def test_a_second_host_header_does_not_pass_for_the_first(server: ServerProcess) -> None:
    for more in (b"Host: evil.example\r\n", b"HOST: evil.example\r\n"):
        answer = bare(server, b"/queue", more=more)
        assert int(answer.split()[1]) == 400, answer[:300]


def test_an_answer_does_not_echo_what_trace_sent(server: ServerProcess) -> None:
    answer = bare(server, b"/health", b"TRACE", b"Authorization: Bearer secret-of-the-user\r\n")
    assert b"secret-of-the-user" not in answer


TARGETS = {
    "a long path": b"/" + b"a" * 30_000,
    "a deep path": b"/a" * 5_000,
    "many slashes": b"/" * 5_000 + b"health",
    "bad quoting": b"/models/%zz%",
    "half a quoted byte": b"/models/%a",
    "a quoted NUL": b"/models/%00",
    "a NUL in a page's name": b"/web/%00app.js",
    "a NUL in an image's name": b"/v1/images/%00",
    "quoted bytes that are no UTF-8": b"/models/%ff%fe%ed%a0%80",
    "a quoted slash": b"/models/%2fetc%2fpasswd",
    "a way out": b"/web/..%2f..%2fserver.py",
    "a way out, quoted twice": b"/web/%252e%252e%252fserver.py",
    "a backslash": b"/web/..%5cserver.py",
    "line ends": b"/models/%0d%0aSet-Cookie:%20a=b",
    "a semicolon": b"/health;jsessionid=1/x",
    "a fragment": b"/nowhere#x",
    "a full URL": b"http://evil.example/nowhere",
    "another direction of writing": b"/models/%e2%80%ae",
    "the API twice": b"/api/api/health",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_strange_path_is_not_found(server: ServerProcess, target: bytes) -> None:
    answer = bare(server, target)
    status, body = int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]
    expected = {200} if target.endswith(b"//health") else {400, 404, 414, 431}
    assert status in expected, answer[:300]
    assert json.loads(body)
    assert b"\r\nset-cookie" not in answer.lower()


QUERIES = {
    "ten thousand fields": "&".join(f"{n:x}=1" for n in range(10_000)),
    "more than a request line may have": "&".join(f"field{n}=1" for n in range(10_000)),
    "a field thousands of times": "&".join(["task_id=x"] * 6000),
    "only separators": "&" * 20_000,
    "a long value": "task_id=" + "x" * 30_000,
    "a long name": "x" * 30_000 + "=1",
    "bad quoting": "task_id=%&index=%zz&wait=%0",
    "a quoted NUL": "task_id=%00&index=%00&size=%00&wait=%00&since=%00",
    "no UTF-8": "task_id=%ff&index=%ff&limit=%ed%a0%80&offset=%fe",
    "huge numbers": "task_id=x&"
    + "&".join(f"{n}={'9' * 5000}" for n in ("index", "wait", "limit")),
    "other digits": "task_id=x&index=%C2%B2&wait=%D9%A3&limit=%EF%BC%95&offset=%C2%B2&since=%C2%B2",
    "signs": "task_id=x&index=-1&wait=+1&limit=1e3&offset=-0&since=0x1&size=1_0",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_a_strange_query_is_ignored_or_refused(server: ServerProcess, query: str) -> None:
    for path in (*TASK_ROUTES, "/queue", "/health", "/models", "/delete", "/sdapi/v1/progress"):
        answer = bare(server, f"{path}?{query}".encode())
        status, body = int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]
        assert status < 500, (path, answer[:300])
        assert json.loads(body), path
