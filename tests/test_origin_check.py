"""Host names and pages of other sites: who may use the server, over real HTTP."""

import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, StartServer
from flask import Flask
from live import SteppedServer

from api.origin_check import AllowedHosts, is_same_origin
from api.security_headers import install_security_headers

SMALL = {"prompt": "x", "width": 64, "height": 64, "steps": 1}


@pytest.fixture
def open_server(tmp_path: Path) -> Iterator[SteppedServer]:
    server = SteppedServer(tmp_path, host="0.0.0.0")
    yield server
    server.close()


def estimate(server: ServerProcess, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(server.url + "/estimate", json=SMALL, headers=named, timeout=GIVE_UP_S)


def test_a_page_of_another_port_may_change_nothing(server: ServerProcess) -> None:
    port = urlsplit(server.url).port
    assert port
    for origin in (
        f"http://127.0.0.1:{port + 1}",
        "http://127.0.0.1",
        f"http://localhost:{port}",
        f"https://127.0.0.1:{port + 1}",
        f"ftp://127.0.0.1:{port}",
        "null",
        "",
        "http://[::1",
        f"http://127.0.0.1:{port}x",
    ):
        answer = estimate(server, Origin=origin)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_page"), origin
        assert "--cors-origins" in answer.json()["error"]["message"]
    assert estimate(server, Origin=f"http://127.0.0.1:{port}").status_code == 200
    assert estimate(server).status_code == 200


def test_a_page_behind_a_tls_proxy_may_change_something(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--allowed-hosts", "draw.example")
    page = "https://draw.example"
    for host, origin in (
        ("draw.example", page),
        ("draw.example:443", page),
        ("draw.example:8443", page + ":8443"),
        ("draw.example:80", "http://draw.example"),
    ):
        assert estimate(server, Host=host, Origin=origin).status_code == 200, host
    assert estimate(server, Host="draw.example", Origin=page + ":8443").status_code == 403
    # The proxy has put its own address of the server in place of the name.
    assert estimate(server, Origin=page).status_code == 403
    assert estimate(server, Origin=page, Sec_Fetch_Site="same-origin").status_code == 200
    for site in ("same-site", "cross-site", "none", ""):
        assert estimate(server, Origin=page, Sec_Fetch_Site=site).status_code == 403


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://a.example", "a.example", True),
        ("http://A.example:80", "a.EXAMPLE", True),
        ("https://a.example", "a.example:443", True),
        ("https://a.example", "a.example:80", False),
        ("http://a.example:4030", "a.example", False),
        ("http://[::1]:4030", "[::1]:4030", True),
        ("http://a.example", "b.example", False),
        ("http://a.example:99999", "a.example", False),
        ("http://", "", False),
        ("null", "null", False),
    ],
)
def test_an_origin_is_a_scheme_a_host_and_a_port(origin: str, host: str, same: bool) -> None:
    assert is_same_origin(origin, host) is same


def test_an_open_server_answers_under_addresses_and_names_of_its_machine(
    open_server: SteppedServer,
) -> None:
    def ask(host: str) -> requests.Response:
        headers = {"Host": host}
        return requests.get(open_server.url + "/queue", headers=headers, timeout=GIVE_UP_S)

    for host in (
        "localhost",
        "127.0.0.1:4030",
        "192.168.1.20:4030",
        "[fe80::1]:4030",
        "studio.local",
        "Studio.LOCAL.:4030",
        socket.gethostname(),
    ):
        assert ask(host).status_code == 200, host
    for host in ("evil.example", "local", "evil.example:4030", "127.0.0.1.evil.example"):
        answer = ask(host)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (421, "unknown_host"), host
        assert f"--allowed-hosts {host.split(':')[0]}" in error["message"]


def test_an_open_server_answers_under_the_names_that_it_is_given(start_server: StartServer) -> None:
    allowed = ("--allowed-hosts", "Draw.example, host.docker.internal")
    server = start_server("--model", "noise-flux1", "--host", "0.0.0.0", *allowed)
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    for host, status in (
        ("draw.example", 200),
        ("host.docker.internal:4030", 200),
        ("10.0.0.1", 200),
        ("other.example", 421),
    ):
        answer = requests.get(url + "/queue", headers={"Host": host}, timeout=GIVE_UP_S)
        assert answer.status_code == status, host


def test_a_slow_lookup_of_the_own_names_delays_nothing_and_counts_when_it_ends() -> None:
    may_end, ended = Event(), Event()

    def own_names() -> set[str]:
        may_end.wait(GIVE_UP_S)
        return {"Studio.home.example"}

    class Hosts(AllowedHosts):
        def _look_up(self, lookup: object) -> None:
            super()._look_up(own_names)
            ended.set()

    hosts = Hosts("0.0.0.0", own_names=own_names)
    assert not hosts.allows("studio.home.example")
    may_end.set()
    assert ended.wait(GIVE_UP_S)
    assert hosts.allows("studio.home.example")
    assert not hosts.allows("other.home.example")


def test_a_star_allows_every_host() -> None:
    assert AllowedHosts("0.0.0.0", "*").allows("evil.example")
    assert AllowedHosts("127.0.0.1", "*").allows("evil.example")
    assert not AllowedHosts("127.0.0.1").allows("studio.local")


def test_every_answer_has_headers_for_browsers(server: ServerProcess) -> None:
    task_id = server.submit(format="PNG")["task_id"]
    server.wait_until_ended(task_id)
    for path in (
        "/",
        "/web/app.js",
        "/swagger",
        "/openapi.json",
        "/health",
        "/nowhere",
        f"/image?task_id={task_id}&delete=false",
        f"/thumbnail?task_id={task_id}",
    ):
        answer = server.get(path)
        headers = answer.headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert headers["Referrer-Policy"] == "no-referrer", path
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        is_picture = headers["Content-Type"].startswith("image/")
        expected = "cross-origin" if is_picture else "same-origin"
        assert headers["Cross-Origin-Resource-Policy"] == expected, path


def test_headers_that_a_view_has_set_stay_however_it_writes_their_names() -> None:
    app = Flask(__name__)
    install_security_headers(app)
    own = {"content-security-policy": "default-src 'none'", "CACHE-CONTROL": "max-age=60"}
    app.add_url_rule("/", view_func=lambda: ("", own))
    headers = app.test_client().get("/").headers
    assert headers.getlist("Content-Security-Policy") == ["default-src 'none'"]
    assert headers.getlist("Cache-Control") == ["max-age=60"]
    assert headers.getlist("X-Content-Type-Options") == ["nosniff"]
