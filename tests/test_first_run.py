"""The first start: which model serves an operator who has named none, and how weights come."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow

import configuration
from announcements import warn
from configuration import FIRST_CHOICES
from models.hub_cache import login_command
from models.mflux_registry import find_model
from models.model_catalog import LoadSpec, Model
from scheduler.health import Cause
from settings import Settings
from storage.task_store import TaskStore
from timing_model import TimingModel

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets which weights are on this machine, and whether somebody is logged in."""

    def have(*names: str, login: bool = False) -> None:
        def lacks(folder: Path, model: Model) -> bool:
            return not model.tiny and model.name not in names

        monkeypatch.setattr(configuration, "needs_download", lacks)
        monkeypatch.setattr(configuration, "has_login", lambda: login)

    return have


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings(), data_dir=tmp_path)


def served(settings: Settings, *, has_gpu: bool = True) -> list[str]:
    """The names of the models: the default one first."""
    allowed = configuration.allow(settings, has_gpu)
    assert allowed.models[0] == allowed.default
    return [model.name for model in allowed.models]


def test_a_mac_without_weights_and_login_starts_with_the_tiny_model_and_choices(
    machine: Machine, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    machine()
    assert served(settings) == ["tiny", *FIRST_CHOICES]
    for name in FIRST_CHOICES:
        model = find_model(name)
        assert model
        assert not model.gated
        assert model.download_bytes > 1e9, "the page shows its size"
    caplog.set_level(logging.WARNING)
    warn(settings, configuration.allow(settings, has_gpu=True))
    assert "no weights are on this machine yet: serving the built-in tiny model" in caplog.text
    assert "  --model flux2-klein-4b   15 GB" in caplog.text
    assert f"  --model schnell          34 GB, after: {login_command()}" in caplog.text


def test_what_is_on_the_machine_is_served_else_what_the_login_can_fetch(
    machine: Machine, settings: Settings
) -> None:
    machine("z-image-turbo")
    assert served(settings) == ["z-image-turbo"]
    machine("z-image-turbo", "schnell")
    assert served(settings) == ["schnell"]
    machine(login=True)
    assert served(settings) == ["schnell"]


def test_an_operator_who_has_chosen_is_not_asked(machine: Machine, settings: Settings) -> None:
    machine()
    assert served(replace(settings, model="schnell")) == ["schnell"]
    assert served(replace(settings, models=("dev", "schnell"))) == ["dev", "schnell"]
    assert served(settings, has_gpu=False) == ["tiny"]


def test_the_login_is_named_with_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert login_command() == "hf auth login"
    (tmp_path / "hf").touch()
    assert login_command() == f"{tmp_path}/hf auth login"
    inside = Path(configuration.__file__).parent / "docs" / "images"
    monkeypatch.setattr(sys, "executable", str(inside / "python"))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert login_command() == "docs/images/hf auth login"


class Start:
    """A queue whose model has no weights yet. The test is the download thread."""

    def __init__(self, folder: Path) -> None:
        self.store = TaskStore(folder)
        self.queue = PlayedQueue(
            allow("flux2-klein-4b"), TimingModel(), self.store, needs_download=lambda model: True
        )
        self.worker = Thread(target=self.queue.downloads.fetch_first, daemon=True)
        self.worker.start()

    def download(self) -> LoadSpec:
        spec = self.queue.downloads.next_download()
        assert spec
        self.queue.downloads.download_began(spec, 0)
        return spec


def test_the_worker_waits_for_the_weights_of_the_start_which_come_with_their_progress(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = Start(tmp_path)
    spec = start.download()
    caplog.set_level(logging.INFO)
    for done in (1, 2, 8):
        assert start.queue.downloads.download_progress(spec, int(done * 1e9))
    download = start.queue.health().download
    assert download
    assert (download.spec.model.name, download.bytes_done) == ("flux2-klein-4b", 8 * 10**9)
    assert start.worker.is_alive()
    start.queue.downloads.download_ended(spec)
    start.worker.join(GIVE_UP_S)
    assert not start.worker.is_alive()
    said = [line.partition(": ")[2] for line in caplog.messages if "of about" in line]
    assert [line.partition(" of ")[0] for line in said] == ["2.0", "8.0"], "each tenth"
    start.store.close()


def test_weights_that_cannot_be_had_do_not_hold_the_worker(tmp_path: Path) -> None:
    start = Start(tmp_path)
    spec = start.download()
    start.queue.downloads.download_failed(spec, "No connection.")
    start.worker.join(GIVE_UP_S)
    assert not start.worker.is_alive()
    error = start.queue.health().last_error
    assert error
    assert (error.cause, error.message) == (Cause.DOWNLOAD, "No connection.")
    start.store.close()


def test_a_stop_does_not_wait_for_the_weights(tmp_path: Path) -> None:
    start = Start(tmp_path)
    start.download()
    start.queue.scheduler.stop(0.0)
    start.worker.join(GIVE_UP_S)
    assert not start.worker.is_alive()
    start.store.close()
