"""A storm of malformed requests: nothing but documented answers, and the server goes on working.

schemathesis makes requests from our own specification, well-formed and not; what it cannot make
goes through bare sockets.
"""

import json
import socket
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import schemathesis
from conftest import FOREIGN_PATHS, ServerProcess, slow_except
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

load_all_checks()
SETTINGS = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
EXAMPLES = slow_except([15], [15, 30])
"""Of each operation in `make test`; `make test-slow` tries twice as many."""
AS_DOCUMENTED: list[Any] = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)
REFUSES_BAD_DATA: list[Any] = CHECKS.get_by_names(["negative_data_rejection"])
STANDS_ON_A_TASK = (
    "/status",
    "/image",
    "/image/link",
    "/keep",
    "/zip",
    "/delete",
    "/cancel",
    "/preview",
    "/thumbnail",
)
OPERATIONS = {
    ("/generate", "POST"),
    ("/estimate", "POST"),
    ("/status", "GET"),
    ("/image", "GET"),
    ("/events", "GET"),
    ("/preview", "GET"),
    ("/thumbnail", "GET"),
    ("/queue", "GET"),
    ("/delete", "DELETE"),
    ("/delete", "POST"),
    ("/health", "GET"),
    ("/stats", "GET"),
    ("/models", "GET"),
    ("/models/{name}", "GET"),
    ("/wildcards", "GET"),
    ("/models/{name}/load", "POST"),
    ("/session", "GET"),
    ("/session", "POST"),
    ("/session", "DELETE"),
    ("/clients", "GET"),
    ("/queue", "DELETE"),
    ("/queue/pause", "POST"),
    ("/queue/resume", "POST"),
    ("/tasks/{task_id}/front", "POST"),
    ("/tasks/{task_id}/retry", "POST"),
    ("/tasks", "GET"),
    ("/clear", "DELETE"),
    ("/clear", "POST"),
    ("/cancel", "GET"),
    ("/cancel", "POST"),
    ("/cancel", "DELETE"),
    ("/image/link", "POST"),
    ("/keep", "GET"),
    ("/keep", "POST"),
    ("/keep", "DELETE"),
    ("/zip", "GET"),
    ("/machines", "GET"),
    ("/metrics", "GET"),
    ("/machines/{name}/drain", "POST"),
    ("/machines/{name}/resume", "POST"),
}
WITHOUT_INPUT = {
    ("/keep", "GET"),
    ("/machines", "GET"),
    ("/metrics", "GET"),
    ("/tasks", "GET"),
    ("/health", "GET"),
    ("/stats", "GET"),
    ("/models", "GET"),
    ("/wildcards", "GET"),
    ("/session", "GET"),
    ("/session", "DELETE"),
    ("/queue/pause", "POST"),
    ("/queue/resume", "POST"),
    ("/clear", "DELETE"),
    ("/clear", "POST"),
    ("/queue", "DELETE"),  # any text can be the name of a client
}
ALWAYS_REFUSED = {
    ("/session", "POST"): 401,  # no key is right where there are none
    ("/tasks/{task_id}/front", "POST"): 404,
    ("/tasks/{task_id}/retry", "POST"): 404,
}
"""What well-formed requests get, because nothing here is what they ask for."""


PLAIN_FIELDS = ("seed", "format", "quality", "priority", "metadata", "guidance")
"""Those that every model can honour, in any combination."""


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose pictures are small and quick; in the end it still draws."""
    limits = ("--max-pixels", "65536", "--max-steps", "2", "--max-queue", "20")
    server = ServerProcess(tmp_path_factory.mktemp("server"), "--model", "noise-flux1", *limits)
    yield server
    assert picture_of(server).size == (64, 64)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def picture_of(server: ServerProcess) -> Image.Image:
    """A new picture, once the queue has room."""
    while server.get("/health").json()["waiting"] == 20:
        pass
    task_id = server.submit()["task_id"]
    assert server.wait_until_ended(task_id)["status"] == "done"
    picture = Image.open(BytesIO(server.get("/image", task_id=task_id).content))
    picture.load()
    return picture


def check_error(status: int, content_type: str | None, content: bytes) -> None:
    """What is no success is our JSON error, and never the server's own fault."""
    assert 400 <= status < 500
    assert content_type == "application/json"
    body = json.loads(content)
    assert set(body) == {"error"}
    assert set(body["error"]) <= {"code", "message", "field"}
    assert body["error"]["code"]
    assert body["error"]["message"]


def test_the_storm_knows_every_operation(small_server: ServerProcess) -> None:
    paths = small_server.get("/openapi.json").json()["paths"]
    known = {(path, method.upper()) for path in paths for method in paths[path]}
    foreign = {(path, method) for path, method in known if path.startswith(FOREIGN_PATHS)}
    assert known - foreign == OPERATIONS


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), sorted(OPERATIONS))
def test_every_answer_is_as_documented(
    small_server: ServerProcess, path: str, method: str, mode: GenerationMode, examples: int
) -> None:
    if (path, method) in WITHOUT_INPUT and mode is GenerationMode.NEGATIVE:
        pytest.skip("nothing that it takes can be wrong")
    if path == "/events":
        pytest.skip("it has no end; test_events.py asks for it in wrong ways")
    specification = small_server.get("/openapi.json").json()
    if mode is GenerationMode.NEGATIVE:  # schemathesis knows no wrong value for a file of a form
        body = specification["paths"][path][method.lower()].get("requestBody", {})
        body.get("content", {}).pop("multipart/form-data", None)
    schema = schemathesis.openapi.from_dict(specification)
    schema.config.update(base_url=small_server.url)
    operation = schema[path][method]
    checks = list(AS_DOCUMENTED)
    if path in ("/generate", "/estimate"):  # elsewhere an empty value counts as absent, on purpose
        checks += REFUSES_BAD_DATA
    known: list[str | None] = [None]
    if mode is GenerationMode.POSITIVE and path in STANDS_ON_A_TASK:
        known += [small_server.submit()["task_id"] for _ in range(5)]
        small_server.wait_until_ended(known[-1] or "")
        requests.delete(small_server.url + "/delete", params={"task_id": known[-1]}, timeout=60)
        known.append(small_server.submit(width=256, height=256)["task_id"])
    if mode is GenerationMode.POSITIVE and "{name}" in path:
        known += ["noise-flux1", "DEV", "nothing", "local"]
    statuses: Counter[int] = Counter()

    @settings(SETTINGS, max_examples=examples)
    @given(
        case=operation.as_strategy(generation_mode=mode),
        task_id=st.sampled_from(known),
        plain=st.booleans() if mode is GenerationMode.POSITIVE else st.just(False),
    )
    def storm(case: schemathesis.Case[Any], task_id: str | None, plain: bool) -> None:
        if plain and isinstance(case.body, dict):
            kept = {name: value for name, value in case.body.items() if name in PLAIN_FIELDS}
            case.body = {**kept, "prompt": "x", "width": 64, "height": 64}
        if task_id and "{name}" in path:
            case.path_parameters["name"] = task_id
        elif task_id:
            case.query["task_id"] = task_id
        answer = case.call(timeout=60)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=checks)
        if answer.status_code != 200:
            check_error(answer.status_code, answer.headers["content-type"][0], answer.content)

    storm()
    if mode is GenerationMode.POSITIVE:
        assert statuses[ALWAYS_REFUSED.get((path, method), 200)]
    else:
        assert statuses[404 if "{" in path else 400]
    if path == "/machines/{name}/drain":
        requests.post(small_server.url + "/machines/local/resume", timeout=60).raise_for_status()
    if path == "/queue/pause":
        requests.post(small_server.url + "/queue/resume", timeout=60)
    assert small_server.get("/health").status_code == 200


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: (
        st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = ("prompt", "seed", "width", "height", "steps", "guidance", "format", "quality", "count")


@SETTINGS
@given(
    body=st.binary(max_size=100)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES).map(
        lambda fields: json.dumps({"prompt": "x", "width": 16, **fields}).encode()
    )
)
def test_a_body_of_any_bytes_is_accepted_or_refused(
    small_server: ServerProcess, body: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(small_server.url + "/generate", data=body, headers=headers, timeout=60)
    if answer.status_code == 200:
        assert answer.json()["task_id"]
    else:
        check_error(answer.status_code, answer.headers["Content-Type"], answer.content)


@pytest.mark.parametrize("path", sorted({path for path, _ in OPERATIONS}))
def test_every_other_method_is_a_405(small_server: ServerProcess, path: str) -> None:
    allowed = {method for known, method in OPERATIONS if known == path} | {"OPTIONS"}
    if "GET" in allowed:
        allowed.add("HEAD")
    methods = {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY", "PROPFIND"}
    assert methods - allowed
    for method in sorted(methods - allowed):
        answer = requests.request(method, small_server.url + path, timeout=60)
        assert answer.status_code == 405
        assert {word.strip() for word in answer.headers["Allow"].split(",")} == allowed
        check_error(answer.status_code, answer.headers["Content-Type"], answer.content)


def send(server: ServerProcess, request: bytes, *, close: bool = False) -> bytes:
    """Send bytes as they are; returns all that comes back until the server closes."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=60) as connection:
        try:
            connection.sendall(request)
            if close:
                return b""
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:  # it has seen enough
            return b""


POST = (
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
NOTHING = 0
"""No answer: the connection is closed, at times before all was read."""
BARE: dict[str, tuple[bytes, set[int]]] = {
    "garbage": (b"\x00\xff\x16\x03\x01 garbage \x80\r\n\r\n", {400}),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, {400}),
    "nothing but line ends": (b"\r\n" * 1000, {NOTHING}),
    "a huge header": (
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 400_000 + b"\r\n\r\n",
        {431, NOTHING},
    ),
    "many headers": (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 60_000 + b"\r\n", {431, NOTHING}),
    "a huge request line": (GET % (b"/" + b"a" * 400_000), {431, NOTHING}),
    "a long path": (GET % (b"/" + b"a" * 10_000), {404}),
    "a negative length": (POST + b"Content-Length: -5\r\n\r\nhello", {400}),
    "a huge length": (POST + b"Content-Length: 99999999999999999999\r\n\r\nhello", {413}),
    "a length of letters": (POST + b"Content-Length: five\r\n\r\nhello", {400}),
    "a length of other digits": (POST + b"Content-Length: \xef\xbc\x95\r\n\r\nhello", {400}),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", {400}),
    "less than its length": (POST + b"Content-Length: 500\r\n\r\nhello", {NOTHING}),
    "no body": (POST + b"\r\n", {400}),
    "garbage for chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n\r\n", {400}),
    "a negative chunk": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        {400},
    ),
    "a huge chunk": (
        POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello",
        {NOTHING},
    ),
    "a chunk without end": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
        {400},
    ),
    "chunks that are no JSON": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n",
        {400},
    ),
    "a NUL in the query": (GET % b"/status?task_id=\x00", {400, 404}),
    "a quoted NUL in the query": (GET % b"/status?task_id=%00", {400, 404}),
    "bytes in the query": (GET % b"/image?task_id=\xff\xfe", {400, 404}),
    "a lone surrogate in the query": (GET % b"/status?task_id=%ed%a0%80", {400, 404}),
    "bad quoting in the query": (GET % b"/status?task_id=%zz%", {400, 404}),
    "a way out in the query": (GET % b"/image?task_id=../tasks.sqlite3", {404}),
    "bytes in the path": (GET % b"/\xff\xfe", {400, 404}),
    "quoted bytes in the path": (GET % b"/%ff%fe%00", {400, 404}),
    "a way out in the path": (GET % b"/../../../etc/passwd", {404}),
    "a path without slash": (GET % b"nowhere", {400, 404}),
    "a URL for a path": (GET % b"http://[::1/health", {400}),
    "bytes for a host": (GET.replace(b"localhost", b"\xff\xfe\x00") % b"/health", {400, 421}),
    "half a host": (GET.replace(b"localhost", b"[::1") % b"/health", {400, 421}),
    "a port of letters": (GET.replace(b"localhost", b"a:b") % b"/health", {400, 421}),
    "another host": (GET.replace(b"localhost", b"evil.example") % b"/health", {421}),
    "no host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", {400, 421}),
    "bytes in a header": (
        GET.replace(b"Host:", b"X: \xff\xfe\x00\r\nHost:") % b"/nowhere",
        {400, 404},
    ),
    "a header without colon": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nnonsense\r\n\r\n",
        {400},
    ),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", {400}),
    "a bare carriage return": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
        {400},
    ),
    "no version": (b"GET /nowhere\r\n\r\n", {400, 404, 421}),
    "a version from the future": (b"GET /nowhere HTTP/9.9\r\nHost: localhost\r\n\r\n", {400, 404}),
    "a method in lower case": (
        b"get /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {400, 404},
    ),
    "a bad key": (POST + b"Idempotency-Key: \xff\x01\r\nContent-Length: 2\r\n\r\n{}", {400}),
}


@pytest.mark.parametrize(("request_bytes", "expected"), BARE.values(), ids=BARE.keys())
def test_bare_bytes_are_refused_and_the_server_lives(
    small_server: ServerProcess, request_bytes: bytes, expected: set[int]
) -> None:
    answer = send(small_server, request_bytes)
    if answer:
        head, _, content = answer.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        status = int(status_line.split()[1])
        check_error(status, headers["content-type"], content)
        assert status in expected
    else:
        assert NOTHING in expected
    assert small_server.get("/health").status_code == 200


def test_clients_that_leave_in_the_middle_of_a_request_do_no_harm(
    small_server: ServerProcess,
) -> None:
    whole = POST + b"Content-Length: 40\r\n\r\n" + b'{"prompt": "x", "width": 16, "steps": 1 }'
    for end in range(1, len(whole), 5):
        send(small_server, whole[:end], close=True)
    for _ in range(20):  # and before its answer
        send(small_server, GET % b"/openapi.json", close=True)
    assert small_server.get("/health").status_code == 200
