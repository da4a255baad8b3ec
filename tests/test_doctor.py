"""server.py --check: a line for each part, and an exit code."""

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RunServer

from doctor import Finding, State, findings, report
from settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings(), model="noise-flux1", data_dir=tmp_path / "data", port=0)


def found(settings: Settings, part: str) -> Finding:
    matching = [finding for finding in findings(settings) if finding.part == part]
    assert len(matching) == 1, part
    return matching[0]


def test_a_server_that_can_start_has_no_error_and_nothing_is_changed(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:].partition(":")[0] for line in lines] == [
        "Python",
        "MLX",
        "memory",
        "model noise-flux1",
        "Hugging Face login",
        "disk",
        "port",
    ]
    assert not settings.data_dir.exists()


def test_the_command_prints_the_lines_and_ends_with_their_code(run_server: RunServer) -> None:
    ended = run_server("--check", "--port", "0", "--model", "noise-flux1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"ok       Python: {sys.version.split()[0]}")


def test_a_port_in_use_is_an_error(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert report(replace(settings, port=port)) == 1
    assert f"error    port: 127.0.0.1:{port}: Address already in use" in capsys.readouterr().out


def test_a_model_that_does_not_exist_is_an_error(settings: Settings) -> None:
    finding = found(replace(settings, model="no-such-model"), "models")
    assert finding.state is State.ERROR
    assert "no-such-model" in finding.words


def test_missing_weights_have_the_size_of_their_download_and_gated_ones_need_a_login(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    gated = replace(settings, model="dev")
    weights = found(gated, "model dev")
    assert weights.state is State.WARNING
    assert "a download of " in weights.words
    login = found(gated, "Hugging Face login")
    assert login.state is State.ERROR
    assert "hf auth login" in login.words
    beside = found(replace(settings, models=("dev",)), "Hugging Face login")
    assert beside.state is State.WARNING
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert found(gated, "Hugging Face login").state is State.OK


def test_a_data_dir_that_cannot_be_made_is_an_error(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = found(replace(settings, data_dir=tmp_path / "file" / "data"), "disk")
    assert finding.state is State.ERROR


def test_a_broker_is_reached_or_an_error_without_its_password(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        address = f"127.0.0.1:{broker.getsockname()[1]}"
        there = found(replace(settings, broker=f"redis://:secret@{address}"), "broker")
    assert there == (State.OK, "broker", f"{address} answers")
    gone = found(replace(settings, broker=f"redis://:secret@{address}"), "broker")
    assert gone.state is State.ERROR
    assert "secret" not in gone.words
