"""The service: its files, and what the server reports to systemd."""

import os
import plistlib
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GIVE_UP_S, ROOT, ServerProcess

from service_manager import READY, notify

sys.path.insert(0, str(ROOT / "deploy"))
import service

OPTIONS = ["--model", "noise-flux1", "--expand-url", "http://127.0.0.1/50%/a $b"]


def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    commands = service.install(OPTIONS, tmp_path, "linux")
    path = service.file_of(tmp_path, "linux")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    checked = subprocess.run(
        [analyze, "verify", "--user", "--man=no", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "50%%/a $$b" in path.read_text()
    assert commands[-1] == ["systemctl", "--user", "restart", "mflux-server.service"]


def test_only_install_and_remove_change_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert service.main(["--help"]) == service.main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_launchd_agent_starts_the_server_with_its_options(tmp_path: Path) -> None:
    commands = service.install(OPTIONS, tmp_path, "darwin")
    path = service.file_of(tmp_path, "darwin")
    agent = plistlib.loads(path.read_bytes())
    assert path.name == f"{agent['Label']}.plist"
    assert agent["ProgramArguments"] == [sys.executable, str(ROOT / "server.py"), *OPTIONS]
    assert (agent["KeepAlive"], agent["LimitLoadToSessionType"]) == (True, "Aqua")
    assert commands == [["launchctl", "bootstrap", f"gui/{os.getuid()}", str(path)]]


def test_the_server_reports_that_it_is_ready_and_that_it_stops(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(GIVE_UP_S)
        environment = {"NOTIFY_SOCKET": address}
        server = ServerProcess(tmp_path / "data", "--model", "noise-flux1", environment=environment)
        try:
            assert systemd.recv(100) == b"READY=1"
            assert server.get("/health").status_code == 200
        finally:
            assert server.stop(signal.SIGTERM) == 0
        assert systemd.recv(100) == b"STOPPING=1"


def test_without_a_service_manager_nothing_is_sent_and_a_lost_one_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notify(READY, {})
    assert caplog.text == ""
    notify(READY, {"NOTIFY_SOCKET": str(tmp_path / "missing")})
    assert "could not be informed of READY=1" in caplog.text
