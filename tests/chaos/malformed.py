"""Malformed requests: a seeded generator of bytes for a socket, and sending them."""

import base64
import json
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

TIMEOUT_S = 90.0
POSTS = (
    "/generate",
    "/estimate",
    "/v1/images/generations",
    "/v1/images/edits",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/png-info",
    "/sdapi/v1/options",
)
GETS = (
    *("/status", "/image", "/preview", "/thumbnail", "/queue", "/health", "/stats", "/models"),
    *(
        "/models/noise-flux1",
        "/openapi.json",
        "/v1/models",
        "/sdapi/v1/progress",
        "/sdapi/v1/samplers",
    ),
)
FIELDS = (
    *("prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance", "format"),
    *("quality", "count", "n", "model", "quantize", "loras", "init_image", "mask", "images"),
    *("image_strength", "control_image", "upscale", "priority", "client_task_id", "scheduler"),
    *("callback_url", "size", "response_format", "output_format", "stream", "user"),
    *("init_images", "denoising_strength", "override_settings", "sampler_name", "image"),
    *("batch_size", "n_iter", "enable_hr", "hr_scale", "cfg_scale", "alwayson_scripts"),
)


@dataclass(frozen=True)
class Request:
    kind: str
    data: bytes
    whole: bool = True
    """Whether the request is complete, so that it must be answered."""


@dataclass(frozen=True)
class Answer:
    status: str
    """Three digits; empty: the server closed without an answer; "timeout": none came."""
    body: bytes = b""


def send(port: int, request: Request) -> Answer:
    """One request on a connection of its own."""
    timeout_s = TIMEOUT_S if request.whole else 1.0
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as line:
            received = _exchange(line, request.data)
    except TimeoutError:
        return Answer("timeout")
    except OSError:
        return Answer("")
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) > 1 and words[1] == b"100":
        head, _, body = body.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
    status = words[1][:3].decode("latin-1") if len(words) > 1 else ""
    return Answer(status if status.isdigit() else "", body)


def _exchange(line: socket.socket, data: bytes) -> bytes:
    received = b""
    with suppress(BrokenPipeError, ConnectionResetError):
        line.sendall(data)  # may be refused before its end; the answer may be here
    while len(received) < 1_000_000:
        try:
            chunk = line.recv(65536)
        except ConnectionResetError:
            break
        if not chunk:
            break
        received += chunk
    return received


class Generator:
    """Makes requests; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._kinds: tuple[Callable[[], Request], ...] = (
            self.raw,
            self.json_broken,
            self.json_wrong,
            self.json_wrong,
            self.form,
            self.picture,
            self.query,
        )

    def next(self) -> Request:
        return self.random.choice(self._kinds)()

    # -- HTTP -----------------------------------------------------------------------------------

    def raw(self) -> Request:
        """Broken HTTP."""
        pick = self.random.choice
        method = pick(["GET", "POST", "", "G\0T", "OPTIONS", "TRACE", "PUT", "get", "M" * 5000])
        target = pick(
            ["/status", "/generate", "*", "http://x/", "/" + "a" * 70_000, "/%00", "/\xff"]
        )
        version = pick(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "", "HTTP/1.1 x", "\0"])
        headers = [
            pick(
                [
                    *("Host: localhost", "Host: ", "Host: [", "Host: a b", "Host: evil.example"),
                    *("Host: localhost\r\nHost: other", "Host: localhost:99999"),
                ]
            ),
            pick(
                [
                    *("Content-Length: -1", "Content-Length: x", "Content-Length: 9" * 30),
                    *("Content-Length: 3\r\nContent-Length: 4", "Content-Length: +3"),
                    *("Transfer-Encoding: chunked\r\nContent-Length: 3", "Content-Length: 1e3"),
                    *("Transfer-Encoding: gzip", "Transfer-Encoding: chunked, chunked"),
                    *("Transfer-Encoding: chunked", "A: b\r\n c: folded", ": no name", "no colon"),
                    *("X: " + "y" * 300_000, "X\0Y: z", "Expect: 100-continue", "Expect: x"),
                    "\r\n".join(f"H{n}: v" for n in range(2000)),
                ]
            ),
            "Connection: close",
        ]
        body = pick(
            [b"", b"abc", b"zz\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"ffffffffff\r\n", b"-1\r\n"]
        )
        text = f"{method} {target} {version}\r\n" + "\r\n".join(headers) + "\r\n\r\n"
        data = text.encode("latin-1", "replace") + body
        if self.random.random() < 0.2:
            data = self.random.randbytes(self.random.randrange(1, 2000)) + b"\r\n\r\n"
        return Request("http", data, whole=False)

    def query(self) -> Request:
        """Odd queries and headers."""
        pick = self.random.choice
        values = ("", "x", "-1", "0", "9" * 40, "1e9", "%00", "%ff", "true", "..%2f..", "a" * 3000)
        names = ("task_id", "wait", "since", "index", "all", "base64", "delete", "size", "limit")
        given = "&".join(f"{pick(names)}={pick(values)}" for _ in range(self.random.randrange(5)))
        given = given.replace("wait=1e9", "wait=0")
        wild = (
            *("Range: bytes=0-", "Range: bytes=9-1,x", "Accept: \xff", "Accept-Encoding: br;q=x"),
            *("If-None-Match: W/", "Last-Event-ID: x", "Last-Event-ID: " + "9" * 50),
            *("Cookie: " + "a=b;" * 3000, "Origin: null", "Origin: http://[", "Authorization: B"),
            *("Idempotency-Key: " + "k" * 300, "Idempotency-Key: \xe9", "Content-Type: ;;"),
            *("X-Forwarded-For: \0", "Forwarded: for=_x", "Upgrade: websocket", "Expect: nothing"),
        )
        headers = "".join(f"{pick(wild)}\r\n" for _ in range(self.random.randrange(4)))
        method = pick(["GET", "GET", "HEAD", "DELETE", "OPTIONS", "PATCH", "POST"])
        target = pick([*GETS, "/delete", "/nothing", "/web/../server.py", "/api//status"])
        text = f"{method} {target}?{given} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        return Request("query", (text + "Connection: close\r\n\r\n").encode("latin-1"))

    def post(self, kind: str, path: str, content_type: str, body: bytes) -> Request:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return Request(kind, head.encode("latin-1") + body)

    # -- JSON -----------------------------------------------------------------------------------

    def value(self, depth: int = 0) -> Any:
        pick = self.random.choice
        if depth < 3 and self.random.random() < 0.25:
            if self.random.random() < 0.5:
                return [self.value(depth + 1) for _ in range(self.random.randrange(5))]
            return {pick(FIELDS): self.value(depth + 1) for _ in range(self.random.randrange(5))}
        return pick(
            [
                *(None, True, False, 0, -1, 1, 64, 2**63, 10**300, 1.5, -0.0, 1e308, float("nan")),
                *(float("inf"), "", "x", "64", "\0", "\ud800", "a" * 20_000, "data:,", "\ufeff"),
                *(
                    "data:image/png;base64,AAAA",
                    "../../etc/passwd",
                    "<lora:x:1>",
                    "noise-flux1",
                    "PNG",
                ),
                *("http://127.0.0.1:1/", "file:///etc/passwd", "1024x1024", "0x0", "-5x5", "64x64"),
            ]
        )

    def fields(self) -> dict[str, Any]:
        usual: dict[str, Any] = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
        for _ in range(self.random.randrange(1, 4)):
            usual[self.random.choice(FIELDS)] = self.value()
        usual["size"] = usual.get("size", "64x64")
        usual.pop("stream", None)
        return usual

    def json_wrong(self) -> Request:
        """Well-formed, with wrong values."""
        body = json.dumps(self.fields()).encode()
        return self.post("json", self.random.choice(POSTS), "application/json", body)

    def json_broken(self) -> Request:
        good = json.dumps(self.fields()).encode()
        at = self.random.randrange(len(good))
        body = self.random.choice(
            [
                *(
                    good[:at],
                    good + good,
                    b"",
                    b"\xef\xbb\xbf" + good,
                    b"null",
                    b"[]",
                    b'"x"',
                    b"1",
                ),
                *(b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "\xff\xfe"}', b"\x1f\x8b" + good),
                *(good[:at] + b"\xff" + good[at:], good.decode().encode("utf-16")),
                b'{"seed": ' + b"9" * 100_000 + b"}",
                b"{" + b",".join(b'"k%d": 1' % n for n in range(20_000)) + b"}",
                self.random.randbytes(500),
            ]
        )
        content_type = self.random.choice(
            ["application/json", "application/json; charset=utf-16", "text/plain", "", "a/b;=;"]
        )
        return self.post("broken json", self.random.choice(POSTS), content_type, body)

    # -- forms and pictures ---------------------------------------------------------------------

    def form(self) -> Request:
        pick = self.random.choice
        parts = []
        for _ in range(self.random.randrange(1, 5)):
            name = pick([*FIELDS, "", "None", "\xff", 'a"b', "x" * 5000])
            disposition = pick(
                [
                    *(f'form-data; name="{name}"', "form-data", f"form-data; name={name}", "x"),
                    *(f'form-data; name="{name}"; filename="../x"', "form-data; name*=utf-8''%ff"),
                    f'form-data; name="{name}"; filename=""',
                ]
            )
            extra = pick(
                ["", "Content-Type: image/png\r\n", "Content-Transfer-Encoding: base64\r\n"]
            )
            content = pick([b"x", b"64", b"\xff\xfe", b"", self.image_bytes(), b"9" * 1000])
            head = f"--edge\r\nContent-Disposition: {disposition}\r\n{extra}\r\n"
            parts.append(head.encode("latin-1") + content + b"\r\n")
        body = b"".join(parts) + pick([b"--edge--\r\n", b"", b"--edge", b"--other--\r\n"])
        content_type = pick(
            [
                *("multipart/form-data; boundary=edge",) * 4,
                *("multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed"),
                "application/x-www-form-urlencoded",
            ]
        )
        return self.post("form", pick(POSTS), content_type, body)

    def image_bytes(self) -> bytes:
        """A picture with a defect."""
        file = BytesIO()
        side = self.random.choice([1, 8, 64, 300])
        picture = Image.new(self.random.choice(["RGB", "L"]), (side, side), 7)
        picture.save(file, self.random.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
        data = bytearray(file.getvalue())
        for _ in range(self.random.randrange(20)):
            data[self.random.randrange(len(data))] = self.random.randrange(256)
        if data.startswith(b"\x89PNG") and self.random.random() < 0.3:
            data[16:24] = self.random.choice([b"\xff" * 8, b"\0" * 8, b"\0\0\x40\0" * 2])
        return bytes(data[: self.random.randrange(1, len(data) + 1)])

    def picture(self) -> Request:
        text = base64.b64encode(self.image_bytes()).decode()
        if self.random.random() < 0.3:
            text = f"data:image/{self.random.choice(['png', 'x', ''])};base64,{text}"
        fields = self.fields()
        name = self.random.choice(["init_image", "mask", "control_image", "image"])
        fields[name] = text
        fields["images"] = fields["init_images"] = [text] * self.random.randrange(3)
        body = json.dumps(fields).encode()
        return self.post("picture", self.random.choice(POSTS), "application/json", body)
