"""Requests of every shape for every route that takes POST: refused with a reason and at a bounded
cost, while another client is served.

The shapes are drawn from a seeded generator, so that each run sends the same requests.
"""

import gzip
import json
import re
import subprocess
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess

REQUESTS_PER_ROUTE = 60
REQUESTS_WITHOUT_BODY = 5
"""For each route that takes no body."""
MAX_CPU_S_PER_KB = 0.0003
"""Of the server's process. Parsing takes a quarter of it at most; validating each of a million
members takes four times as much."""
CPU_S_PER_REQUEST = 0.1
JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data; boundary=b"
SMALL: dict[str, Any] = {"prompt": "x", "width": 64, "height": 64, "steps": 1, "size": "64x64"}


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    limits = ("--max-pixels", "4096", "--max-steps", "2", "--max-count", "2", "--max-queue", "20")
    server = ServerProcess(tmp_path_factory.mktemp("server"), "--model", "noise-flux1", *limits)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


class Routes:
    """The routes that take POST: the fields of their bodies, and how many requests they get."""

    def __init__(self, server: ServerProcess) -> None:
        answer = server.get("/openapi.json").json()
        schemas = answer["components"]["schemas"]
        self.fields: dict[str, list[str]] = {}
        self.requests: dict[str, int] = {}
        for path, methods in answer["paths"].items():
            if "post" in methods:
                body = json.dumps(methods["post"].get("requestBody", {}))
                names = re.findall(r"#/components/schemas/(\w+)", body)
                known = [field for name in names for field in schemas[name].get("properties", {})]
                url = path.replace("{name}", "noise-flux1")
                self.fields[url] = known or ["prompt", "image", "mask", "sd_model_checkpoint"]
                self.requests[url] = REQUESTS_PER_ROUTE if body != "{}" else REQUESTS_WITHOUT_BODY


# -- shapes ----------------------------------------------------------------------------------------

TEXTS = (
    "",
    " ",
    "x",
    "64",
    "-1",
    "1e999",
    "9" * 5000,
    "true",
    "null",
    "\\u0000",
    "a\\u0000b",
    "\\ud800",
    "\\udc00\\ud800",
    "\\ud83d\\ude00",
    "\\ufffe\\uffff",
    "\\u202e\\u2028",
    "é\u0301\U000e0001",
    "<lora:x:1e9>",
    "data:image/png;base64,iVBORw0KGgo=",
    "data:,",
    "https://localhost/x.png",
    "iVBORw0KGgo",
    "../../etc/passwd",
    "%00%ff",
)
NUMBERS = (
    "0",
    "-1",
    "1",
    "64",
    "8192",
    "1e400",
    "-0.0",
    "1.5",
    "NaN",
    "-Infinity",
    "01",
    "1" * 400,
)


def value_text(random: Random, depth: int = 0) -> str:
    """JSON of any value, or nearly JSON."""
    kinds: list[Callable[[], str]] = [
        lambda: '"' + random.choice(TEXTS) + '"',
        lambda: '"' + random.choice("ab é=") * random.choice((10, 1000, 50_000)) + '"',
        lambda: random.choice(NUMBERS),
        lambda: random.choice(("true", "false", "null", "nil", "'x'", "")),
        lambda: "9" * random.choice((20, 400, 4300, 5000, 100_000)),
        lambda: "[" * (levels := random.choice((3, 150, 250, 50_000))) + "]" * levels,
        lambda: '{"a":' * (levels := random.choice((3, 150, 250, 20_000))) + "1" + "}" * levels,
        lambda: "[" + ",".join([random.choice(NUMBERS)] * random.choice((5, 9, 20_000))) + "]",
        lambda: object_text([f"k{k}" for k in range(random.choice((1, 5_000)))], lambda _: "1"),
        lambda: '{"task_id":' + random.choice(('"x"', "[]", '"x","index":-1')) + "}",
    ]
    if depth < 3:
        kinds.append(lambda: "[" + ",".join(value_text(random, depth + 1) for _ in range(3)) + "]")
    return random.choice(kinds)()


def object_text(names: list[str], value: Callable[[str], str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value(name)}" for name in names) + "}"


def json_bytes(random: Random, fields: list[str]) -> bytes:
    base = {name: json.dumps(SMALL[name]) for name in fields if name in SMALL}
    names = [*base, random.choice(fields)]
    if random.random() < 0.2:
        names += [f"unknown{number}" for number in range(random.choice((1, 20_000)))]
    strange = random.choice(names) if random.random() < 0.9 else ""
    values = {
        name: value_text(random) if name == strange else base.get(name, "1") for name in names
    }
    text = object_text(list(values), values.__getitem__)
    whole = text.encode()
    return random.choice(
        [
            *[whole] * 6,
            b"\xef\xbb\xbf" + whole,
            text.encode("utf-16"),
            whole[: len(whole) // 2],
            whole + b"}",
            whole.replace(b'"', b'"\xff', 1),
            b"[" + whole + b"]",
            whole[:-1] + b"," + whole[1:],
            random.randbytes(200),
            b"",
        ]
    )


def form_bytes(random: Random, fields: list[str]) -> bytes:
    """A form with the boundary b, or nearly one."""
    parts = [(f'; name="{name}"', str(value).encode()) for name, value in SMALL.items()]
    file = '; name="image"; filename="a.png"'
    strange = [
        ("", b"x"),
        ('; name=""', b"x"),
        ('; filename="a.png"', b"x"),
        (file, b""),
        (file, random.randbytes(2000)),
        ('; name="prompt"; filename="p.txt"', b"\xff\xfe"),
        (f'; name="{random.choice(fields)}"', value_text(random).encode()),
        (f'; name="{random.choice(fields)}"', b"M\xf6we \0"),
        ("; name*=utf-8''%ff%00", b"x"),
        ('; name="' + "n" * 50_000 + '"', b"x"),
    ]
    parts += random.choice(
        [random.sample(strange, 1), random.sample(strange, 2), strange[:1] * 300]
    )
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data" + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    end = b"--b--\r\n"
    return random.choice(
        [
            *[body + end] * 4,
            body,
            body[: len(body) // 2],
            body.replace(b"\r\n", b"\n") + end,
            body.replace(b"Content-Disposition", b"X") + end,
            b"--b\r\n" + b"X: y\r\n" * 30_000,
            b"--b" * 30_000 + end,
        ]
    )


def any_request(random: Random, fields: list[str]) -> tuple[bytes, dict[str, str]]:
    """A body and its headers."""
    is_form = random.random() < 0.35
    body = form_bytes(random, fields) if is_form else json_bytes(random, fields)
    usual = FORM_TYPE if is_form else JSON_TYPE
    other = (
        "multipart/form-data",
        "multipart/form-data; boundary=" + "b" * 300,
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "text/plain",
        FORM_TYPE,
        JSON_TYPE,
        ";",
    )
    headers = {"Content-Type": random.choice([usual] * 12 + list(other))}
    encoding = random.choice([""] * 8 + ["gzip", "deflate", "br", "gzip, gzip", "bad"])
    if encoding:
        headers["Content-Encoding"] = encoding.replace("bad", "gzip")
    if encoding == "gzip":
        body = gzip.compress(body)
    elif encoding == "deflate":
        body = zlib.compress(body)
    return body, headers


# -- tests -----------------------------------------------------------------------------------------


def check_answer(path: str, answer: requests.Response) -> None:
    """The answer is not a server error, and an error has a code and a message."""
    assert answer.status_code < 500, (path, answer.text[:500])
    if answer.status_code >= 400:
        body = answer.json()
        if path.startswith("/sdapi/"):
            assert body["error"]
            assert body["detail"]
        elif path == "/api/show":
            assert body["error"]
        else:
            assert body["error"]["code"]
            assert body["error"]["message"]
        assert len(answer.content) < 4000


class Poller:
    """Another client, which asks /status as long as the block lasts."""

    def __init__(self, server: ServerProcess, task_id: str) -> None:
        self.statuses: Counter[int] = Counter()
        self._server, self._task_id = server, task_id
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def _poll(self) -> None:
        while not self._ended.wait(0.02):
            answer = self._server.get("/status", task_id=self._task_id)
            self.statuses[answer.status_code] += 1

    def __enter__(self) -> "Poller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(GIVE_UP_S)


@pytest.mark.slow
def test_no_body_makes_the_server_fail_while_another_client_is_served(
    small_server: ServerProcess,
) -> None:
    random = Random(11)
    routes = Routes(small_server)
    assert {"/generate", "/v1/images/edits", "/sdapi/v1/img2img"} <= set(routes.fields)
    task_id = small_server.submit()["task_id"]
    statuses: Counter[int] = Counter()
    with Poller(small_server, task_id) as poller:
        for path, fields in routes.fields.items():
            for _ in range(routes.requests[path]):
                body, headers = any_request(random, fields)
                answer = requests.post(
                    small_server.url + path, data=body, headers=headers, timeout=60
                )
                statuses[answer.status_code] += 1
                check_answer(path, answer)
    assert statuses[400] > statuses[200] > 0
    assert set(poller.statuses) == {200}


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100
    answer = subprocess.run(
        ["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True
    ).stdout
    total = 0.0
    for part in answer.strip().split(":"):
        total = total * 60 + float(part)
    return total


M = 1_000_000
LARGE: dict[str, Callable[[], bytes]] = {
    "a million unknown keys": lambda: b"{" + b",".join(b'"k%d":1' % key for key in range(M)) + b"}",
    "a million objects": lambda: b'{"prompt":"x","images":[' + b'{"a":0},' * M + b"{}]}",
    "unknown keys": lambda: b"{" + b",".join(b'"k%d":1' % key for key in range(80_000)) + b"}",
    "objects": lambda: b'{"prompt":"x","images":[' + b'{"a":0},' * 100_000 + b"{}]}",
    "keys of an object": lambda: (
        b'{"prompt":"x","init_image":{'
        + b",".join(b'"k%d":1' % key for key in range(80_000))
        + b"}}"
    ),
    "empty lists": lambda: b'{"prompt":"x","loras":[' + b"[]," * 300_000 + b"[]]}",
    "numbers": lambda: b'{"prompt":"x","width":[' + b"1," * 400_000 + b"1]}",
    "a long number": lambda: b'{"prompt":"x","seed":' + b"1" * M + b"}",
    "long numbers": lambda: b'{"prompt":"x","seed":[' + (b"1" * 4000 + b",") * 200 + b"1]}",
    "levels": lambda: b'{"prompt":"x","mask":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "escapes": lambda: b'{"format":"' + b"\\u00e9" * 160_000 + b'"}',
    "backslashes": lambda: b'{"format":"' + b"\\\\" * 2 * M + b'"}',
    "base64 in pieces": lambda: b'{"prompt":"x","mask":"' + b"A\\n" * M + b'"}',
    "quotes": lambda: b'"' * M,
    "white space": lambda: b" " * 4 * M,
}


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/sdapi/v1/img2img"])
@pytest.mark.parametrize("made", LARGE.values(), ids=LARGE.keys())
def test_a_large_body_costs_little_processor_time_per_kilobyte(
    small_server: ServerProcess, path: str, made: Callable[[], bytes]
) -> None:
    body = made()
    if path == "/v1/images/generations":
        body = body.replace(b'"format"', b'"output_format"')
    if path == "/sdapi/v1/img2img":
        body = body.replace(b'"format"', b'"init_images"').replace(b'"images"', b'"init_images"')
    before = cpu_s(small_server.process.pid)
    answer = requests.post(
        small_server.url + path, data=body, headers={"Content-Type": JSON_TYPE}, timeout=60
    )
    cost = cpu_s(small_server.process.pid) - before
    check_answer(path, answer)
    if path == "/generate":
        assert answer.status_code in (400, 422)
    assert cost < CPU_S_PER_REQUEST + MAX_CPU_S_PER_KB * len(body) / 1000
