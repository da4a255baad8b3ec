"""The proxies of docs/proxy.md: its files in a real nginx and a real Caddy, with TLS and a path."""

import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPSConnection
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ROOT, ServerProcess, needs_chromium, until
from flask import Flask, request
from pages import WAIT_MS
from PIL import Image
from playwright.sync_api import Browser, expect

from api.trusted_proxies import trusting

NAME = "pictures.localhost"
"""In place of pictures.example: browsers look for it on this machine."""
KEY = "a key of sixteen letters"
NO_KEY = {"Authorization": None}
FORGED = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Prefix": "/forged"}
PATH = f"{os.environ['PATH']}:/usr/sbin:/opt/homebrew/bin"
PROGRAMS = {name: shutil.which(name, path=PATH) or "" for name in ("nginx", "caddy")}


class Proxy:
    """A proxy with TLS before a server, and a session of a client that trusts its certificate.

    Attributes:
        url: where it serves, below a path.
        log: of the server.
    """

    def __init__(self, kind: str, folder: Path, server: ServerProcess, port: int) -> None:
        self.url, self.log, self.folder = f"https://{NAME}:{port}/mflux", server.log, folder
        self.server = server
        text = (ROOT / "docs" / "proxy.md").read_text(encoding="utf-8")
        (config,) = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
        config = config.replace("127.0.0.1:4030", server.url.removeprefix("http://"))
        command = getattr(self, f"_{kind}")(config, port)
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.session = requests.Session()
        self.session.trust_env = False  # no other proxy, and no other certificates
        self.session.verify = str(folder / "tls.crt")
        self.session.headers["Authorization"] = f"Bearer {KEY}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=GIVE_UP_S, **options)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return self.ask("GET", "/health").ok
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(GIVE_UP_S)

    def _nginx(self, config: str, port: int) -> list[str]:
        config = config.replace("pictures.example;", f"{NAME};")
        config = config.replace("listen 443", f"listen 127.0.0.1:{port}")
        config = config.replace("/etc/ssl/pictures.example", f"{self.folder}/tls")
        folders = "".join(
            f"{kind}_temp_path {self.folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        whole = f"events {{}}\nhttp {{\naccess_log off;\n{folders}{config}}}\n"
        (self.folder / "nginx.conf").write_text(f"daemon off;\npid {self.folder}/pid;\n{whole}")
        own = ("-c", f"{self.folder}/nginx.conf", "-e", f"{self.folder}/errors")
        return [PROGRAMS["nginx"], *own, "-p", str(self.folder), "-g", "user root;"]

    def _caddy(self, config: str, port: int) -> list[str]:
        tls = f"tls {self.folder}/tls.crt {self.folder}/tls.key"
        site = config.replace("pictures.example {", f"https://{NAME}:{port} {{\n{tls}", 1)
        own = f"admin off\nstorage file_system {self.folder}/storage\nauto_https off"
        (self.folder / "Caddyfile").write_text(f"{{\n{own}\n}}\n{site}")
        named = ("--adapter", "caddyfile", "--config", f"{self.folder}/Caddyfile")
        return [PROGRAMS["caddy"], "run", *named]


def make_certificate(folder: Path) -> None:
    usual = ("req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", f"/CN={NAME}")
    own = ("-addext", f"subjectAltName=DNS:{NAME}", "-keyout", "tls.key", "-out", "tls.crt")
    subprocess.run(["openssl", *usual, *own], cwd=folder, check=True, capture_output=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the options of docs/proxy.md."""
    folder = tmp_path_factory.mktemp("proxies")
    (folder / "keys.toml").write_text(f'[alice]\nkey = "{KEY}"\noperator = true\n')
    text = (ROOT / "docs" / "proxy.md").read_text(encoding="utf-8")
    found = re.search('make serve ARGS="--keys keys.toml (.*)"', text)
    assert found
    options = found[1].replace("pictures.example", NAME).split()
    keys = ("--keys", str(folder / "keys.toml"))
    server = ServerProcess(folder / "data", "--model", "noise-flux1", *keys, *options)
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["nginx", pytest.param("caddy", marks=pytest.mark.slow)])
def proxy(
    request: pytest.FixtureRequest, behind: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    if not PROGRAMS[request.param]:
        pytest.skip(f"{request.param} is not installed (Debian: apt install {request.param})")
    folder = tmp_path_factory.mktemp(request.param)
    make_certificate(folder)
    with pytest.MonkeyPatch.context() as patch:
        look_up = socket.getaddrinfo

        def here(host: Any, *more: Any, **options: Any) -> Any:
            return look_up("127.0.0.1" if host == NAME else host, *more, **options)

        patch.setattr(socket, "getaddrinfo", here)
        started = Proxy(request.param, folder, behind, free_port())
        until(started.answers)
        yield started
        started.stop()


def small(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": 2, **fields}


def test_uploads_streams_long_reads_and_pictures_pass(proxy: Proxy) -> None:
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    sent = proxy.ask("POST", "/generate", data=small(), files={"init_image": png.getvalue()})
    assert sent.status_code == 200, sent.text
    task_id = sent.json()["task_id"]
    stream = proxy.ask("GET", f"/events?task_id={task_id}", stream=True)
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    names = [line[7:] for line in stream.iter_lines(decode_unicode=True) if line[:7] == "event: "]
    assert names[-1] == "done"
    status = proxy.ask("GET", f"/status?task_id={task_id}&wait=300").json()
    assert status["status"] == "done"
    picture = proxy.ask("GET", f"/image?task_id={task_id}&wait=300")
    assert Image.open(io.BytesIO(picture.content)).size == (64, 64)


def test_an_event_arrives_before_the_stream_ends(proxy: Proxy) -> None:
    with proxy.ask("GET", "/events", stream=True) as stream:
        got = threading.Event()

        def read() -> None:
            for line in stream.iter_lines(decode_unicode=True):
                if line.startswith("event: done"):
                    got.set()
                    return

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert proxy.ask("POST", "/generate", json=small()).status_code == 200
        assert got.wait(GIVE_UP_S)
        reader.join(GIVE_UP_S)


def test_too_large_a_body_gets_the_servers_own_error(proxy: Proxy) -> None:
    if "caddy" in proxy.folder.name:
        pytest.skip("Caddy breaks such an upload off, often before the answer is passed on")
    port = int(proxy.url.split(":")[2].split("/")[0])
    trusting_it = ssl.create_default_context(cafile=str(proxy.folder / "tls.crt"))
    with closing(HTTPSConnection(NAME, port, timeout=GIVE_UP_S, context=trusting_it)) as caller:
        caller.putrequest("POST", "/mflux/generate")
        caller.putheader("Authorization", f"Bearer {KEY}")
        caller.putheader("Content-Length", "50500000")
        caller.endheaders()
        caller.send(bytes(50_500_000))
        answer = caller.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"] == "body_too_large"


def test_picture_urls_of_the_openai_api_can_be_fetched(proxy: Proxy) -> None:
    body = {"prompt": "a lighthouse", "size": "256x256", "response_format": "url"}
    answer = proxy.ask("POST", "/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    url = answer.json()["data"][0]["url"]
    assert url.startswith(f"https://{NAME}/mflux/v1/images/img-")
    own = url.replace(f"https://{NAME}/mflux", proxy.url)  # the port of the test
    fetched = proxy.session.get(own, headers=NO_KEY, timeout=GIVE_UP_S)
    assert fetched.headers["Content-Type"].startswith("image/")


def test_other_names_and_requests_without_a_key_are_refused(proxy: Proxy) -> None:
    answer = proxy.ask("GET", "/queue", headers=NO_KEY)
    assert answer.status_code == 401
    direct = requests.get(
        proxy.server.url + "/queue", headers={"Host": "evil.example"}, timeout=GIVE_UP_S
    )
    assert (direct.status_code, direct.json()["error"]["code"]) == (421, "unknown_host")


def test_the_log_has_the_address_that_the_proxy_saw_not_the_one_that_a_client_made_up(
    proxy: Proxy,
) -> None:
    before = len(proxy.log)
    assert proxy.ask("POST", "/queue/resume", headers=FORGED).status_code == 200
    until(lambda: any("operator alice" in line for line in proxy.log[before:]))
    (line,) = (line for line in proxy.log[before:] if "operator alice" in line)
    assert "operator alice (127.0.0.1)" in line


@needs_chromium
def test_the_page_and_its_documentation_work_below_the_path(proxy: Proxy, browser: Browser) -> None:
    context = browser.new_context(ignore_https_errors=True)
    context.set_extra_http_headers({"Authorization": f"Bearer {KEY}"})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(proxy.url)
    assert page.url == proxy.url + "/"
    expect(page.locator("#forecast")).not_to_be_empty()
    for address in ("/swagger", "/swagger/"):
        page.goto(proxy.url + address)
        block = page.locator("#operations-images-post_estimate")
        block.locator(".opblock-summary").first.click()
        block.locator("button.try-out__btn").click()
        block.locator("button.execute").click()
        answer = block.locator(".live-responses-table .highlight-code").first
        assert "wait_p90_s" in answer.inner_text()
        assert f"{proxy.url}/estimate" in block.locator(".request-url").inner_text()
    context.close()
    assert broken == []


@pytest.mark.parametrize(
    ("trusted", "sees"),
    [
        ("", ["10.1.2.3", "http://server.example/"]),
        ("10.9.0.0/16", ["10.1.2.3", "http://server.example/"]),
        ("10.1.0.0/16", ["192.0.2.7", "https://pictures.example/mflux/"]),
        ("2001:db8::/32,10.1.2.3", ["192.0.2.7", "https://pictures.example/mflux/"]),
    ],
)
def test_forwarded_headers_count_only_from_trusted_proxies(trusted: str, sees: list[str]) -> None:
    app = Flask(__name__)
    networks = [ip_network(name) for name in trusted.split(",") if name]
    app.wsgi_app = trusting(app.wsgi_app, networks)  # type: ignore[method-assign,assignment]
    app.add_url_rule("/", view_func=lambda: json.dumps([request.remote_addr, request.url_root]))
    headers = {
        "X-Forwarded-For": "203.0.113.9, 192.0.2.7",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "pictures.example",
        "X-Forwarded-Prefix": "/mflux",
    }
    answer = app.test_client().get(
        "/",
        base_url="http://server.example",
        headers=headers,
        environ_base={"REMOTE_ADDR": "10.1.2.3"},
    )
    assert json.loads(answer.data) == sees
