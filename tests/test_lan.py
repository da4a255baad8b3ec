"""--lan: keys, links that sign browsers in, the QR code; --bonjour."""

import asyncio
import io
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess
from played_app import PlayedApp
from zeroconf import NotRunningException
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

import commands
import errors
from announcements import base_url, bonjour, show_links
from api.pairing import LINK_S, link_to
from configuration import LAN_OPERATOR, LAN_PHONE, for_lan, identity_of, make_keys
from key_file import KeyFile
from lan import SERVICE, Announcement, lan_address, qr_code
from settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """With --lan, after its first start."""
    settings = for_lan(replace(Settings(), lan=True, data_dir=tmp_path / "data"))
    make_keys(settings)
    return settings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lan_opens_the_server_with_keys(settings: Settings) -> None:
    assert settings.host == "0.0.0.0"
    assert settings.keys
    clients = {client.name: client.operator for client in KeyFile(settings.keys).clients}
    assert clients == {LAN_OPERATOR: True, LAN_PHONE: False}
    before = settings.keys.read_text()
    assert "mflux_" not in before, "only hashes of keys are kept"
    assert settings.keys.stat().st_mode & 0o077 == 0
    make_keys(settings)
    assert settings.keys.read_text() == before


def test_lan_takes_the_address_and_the_keys_that_the_operator_names(tmp_path: Path) -> None:
    given = replace(Settings(), lan=True, host="192.168.1.5", keys=tmp_path / "own.toml")
    assert for_lan(given) == given
    assert for_lan(Settings()) == Settings()


def test_a_phone_signs_in_with_the_link_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ServerProcess(tmp_path, "--model", "noise-flux1", "--lan")
    port = urlsplit(server.url).port
    url = f"http://127.0.0.1:{port}"
    try:
        assert requests.get(f"{url}/queue", timeout=60).status_code == 401
        # A server of --port 0 names its cookies after 0.
        given = replace(Settings(), lan=True, data_dir=tmp_path, pair=LAN_PHONE, port=0)
        assert commands.run_command(for_lan(given)) == 0
        link = re.search(r"http://\S+:0(/pair\S+)", capsys.readouterr().out)
        assert link
        with requests.Session() as phone:
            page = phone.get(url + link[1], timeout=60)
            assert (page.url, page.status_code) == (f"{url}/", 200)
            session = phone.get(f"{url}/session", timeout=60).json()
            assert (session["name"], session["operator"]) == (LAN_PHONE, False)
            body = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
            assert phone.post(f"{url}/generate", json=body, timeout=60).status_code == 200
    finally:
        server.stop()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


def opened(bench: PlayedApp, link: str) -> int:
    """The status with which the server answers a link."""
    parts = urlsplit(link)
    return bench.http.get(f"{parts.path}?{parts.query}").status_code


def test_a_link_works_for_an_hour_and_for_its_client(bench: PlayedApp) -> None:
    alice = bench.identity.named("alice")
    assert alice
    now = time.time()
    link = link_to(bench.identity, "http://localhost/", alice, now)
    for wrong in (
        link_to(bench.identity, "http://localhost", alice, now - LINK_S - 1),
        link.replace("alice", "root"),
        link.replace("alice", "nobody"),
        link[:-1],
        re.sub("expires=[0-9]+", "expires=99999999999", link),
        re.sub("expires=[0-9]+", "expires=" + "9" * 30, link),
        re.sub("expires=[0-9]+", "expires=x", link),
        "http://localhost/pair",
    ):
        assert opened(bench, wrong) == 401, wrong
        assert bench.http.get("/queue").status_code == 401
    assert opened(bench, link) == 303
    assert opened(bench, link) == 303, "in as many browsers as open it"
    assert bench.http.get("/session").get_json()["name"] == "alice"


def test_a_new_key_of_its_client_ends_a_link(bench: PlayedApp) -> None:
    alice = bench.identity.named("alice")
    assert alice
    link = link_to(bench.identity, "http://localhost", alice, time.time())
    bench.key_file.write_text('[alice]\nkey = "another-0123456789"\n')
    bench.at += 10.0
    assert opened(bench, link) == 401


def test_a_terminal_shows_links_for_this_machine_and_for_phones(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    terminal, identity = Terminal(), identity_of(settings)
    show_links(settings, identity, 4031, terminal)
    shown = terminal.getvalue()
    assert re.search(rf"as {LAN_OPERATOR}: http://localhost:4031/pair\?name={LAN_OPERATOR}&", shown)
    phone = re.search(rf"as {LAN_PHONE}: (http://{re.escape(lan_address())}:4031/pair\S+)", shown)
    assert phone
    assert qr_code(phone[1]) in shown
    assert shown.count("signs every browser that opens it in as ") == 2
    caplog.set_level(logging.INFO)
    log = io.StringIO()
    show_links(settings, identity, 4031, log)
    assert log.getvalue() == ""
    assert caplog.messages
    assert "/pair" not in "".join(caplog.messages), "others may read the log"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("192.168.1.5", "http://192.168.1.5:4031"),
        ("127.0.0.1", "http://127.0.0.1:4031"),
        ("fd00::5", "http://[fd00::5]:4031"),
        ("::", f"http://{lan_address()}:4031"),
    ],
)
def test_links_lead_to_where_the_server_listens(settings: Settings, host: str, url: str) -> None:
    settings = replace(settings, host=host)
    assert base_url(settings, 4031) == url
    assert base_url(replace(settings, public_url="https://a.example/m"), 1) == "https://a.example/m"
    terminal = Terminal()
    show_links(settings, identity_of(settings), 4031, terminal)
    local = "http://localhost:4031" if host == "::" else url
    assert f"as {LAN_OPERATOR}: {local}/pair?" in terminal.getvalue()


def test_without_lan_nothing_is_shown() -> None:
    terminal = Terminal()
    show_links(Settings(), identity_of(Settings()), 4031, terminal)
    assert terminal.getvalue() == ""


def test_a_link_is_given_to_known_clients_only(settings: Settings) -> None:
    with pytest.raises(errors.BadOption, match="--pair bob"):
        commands.pair(replace(settings, pair="bob"))


def test_the_address_is_one_of_this_machine() -> None:
    with socket.create_server((lan_address(), 0)) as listening:
        assert listening.getsockname()[0] == lan_address()


async def found_on_loopback(name: str) -> tuple[list[str], int | None, dict[bytes, bytes | None]]:
    """Addresses, port and properties of what is announced under this name."""
    info = AsyncServiceInfo(SERVICE, f"{name}.{SERVICE}")
    async with AsyncZeroconf(interfaces=["127.0.0.1"]) as network:
        assert await info.async_request(network.zeroconf, GIVE_UP_S * 1000)
    return info.parsed_addresses(), info.port, info.properties


def test_the_server_is_announced_until_it_stops() -> None:
    announcement = Announcement("test-of-mflux", ["127.0.0.1"], 4031)
    announcement.start()
    try:
        for _ in range(10):
            looking = found_on_loopback("mflux on test-of-mflux")
            # The browser tests have an event loop in this thread. A busy zeroconf is tried again.
            with ThreadPoolExecutor(1) as thread, suppress(NotRunningException):
                found = thread.submit(asyncio.run, looking).result()
                break
        assert found == (["127.0.0.1"], 4031, {b"path": b"/"})
    finally:
        announcement.stop(GIVE_UP_S)
    assert not announcement._thread.is_alive()


class Messages(logging.Handler):
    """Notices the first message of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.came, self.first = Event(), ""

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()
        self.came.set()


def test_an_announcement_that_fails_is_tried_again_until_the_server_stops() -> None:
    messages, log = Messages(), logging.getLogger("mflux-server")
    log.addHandler(messages)
    announcement = Announcement("x", ["no address"], 4031)
    announcement.start()
    try:
        assert messages.came.wait(GIVE_UP_S)
        assert "cannot be announced" in messages.first
        assert announcement._thread.is_alive()
    finally:
        announcement.stop(GIVE_UP_S)
        log.removeHandler(messages)
    assert not announcement._thread.is_alive()


def test_an_announcement_that_was_not_started_can_be_stopped() -> None:
    announcement = Announcement("x", ["127.0.0.1"], 4031)
    announcement.stop()
    assert not announcement._thread.is_alive()


def test_only_a_server_that_others_reach_is_announced() -> None:
    assert bonjour(Settings(), 4030) is None
    with pytest.raises(errors.BadOption, match="add --lan"):
        bonjour(replace(Settings(), bonjour=True), 4030)
