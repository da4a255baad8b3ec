"""Downloads that fail, stall, are given up, are incomplete or end with the server."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from download_desk import Desk, empty_cache, model
from memory_stores import memory_store
from mflux.models.common.resolution.model_revisions import ModelRevisions

from errors import NoWorker
from models.hub_cache import bytes_on_disk, marked_as_incomplete, needs_download
from models.model_catalog import LoadSpec
from models.repositories import FOLDERS
from task import TaskStatus
from workers import downloader


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def desk(tmp_path: Path, cache: Path) -> Iterator[Desk]:
    with closing(Desk(tmp_path, cache)) as desk:
        yield desk


def test_a_failed_download_affects_only_the_tasks_that_need_it(desk: Desk) -> None:
    lost = [desk.submit("schnell"), desk.submit("schnell")]
    other = desk.submit("dev")
    desk.downloader.start()
    desk.gate("schnell", "The weights cannot be had from /home/me/secret/hub: log in.")
    desk.wait_until_held(1)
    for view in lost:
        ended = desk.queue.status(view.task_id)
        assert (ended.status, ended.error_code) == (TaskStatus.FAILED, "model_load_failed")
        assert ended.error == "The weights cannot be had from hub: log in."
    desk.gate("dev")
    desk.wait_until_held(0)
    assert desk.run_all() == ["dev"]
    assert desk.queue.status(other.task_id).status is TaskStatus.DONE


def test_a_download_that_cannot_be_started_is_an_error_like_any_other(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.downloader, "_command", lambda weights: ["/nonexistent/python"])
    lost = desk.submit("schnell")
    assert desk.downloader.run_once()
    ended = desk.queue.status(lost.task_id)
    assert ended.status is TaskStatus.FAILED
    assert "cannot be started" in str(ended.error)
    monkeypatch.setattr(desk.downloader, "_command", lambda weights: ["false"])
    lost = desk.submit("schnell")
    assert desk.downloader.run_once()
    assert "ended with exit code 1" in str(desk.queue.status(lost.task_id).error)


def test_a_download_that_nobody_wants_any_more_ends(desk: Desk) -> None:
    view = desk.submit("schnell")
    desk.downloader.start()
    desk.wait_for_bytes("schnell", 1000)
    assert desk.queue.delete(view.task_id) is TaskStatus.WAITING
    assert desk.queue.status(view.task_id).status is TaskStatus.CANCELLED
    later = desk.submit("dev")
    desk.wait_for_bytes("dev", 1000)
    assert desk.partial_files("schnell") == []
    desk.gate("dev")
    desk.wait_until_held(0)
    assert desk.run_all() == ["dev"]
    assert desk.queue.status(later.task_id).status is TaskStatus.DONE


def test_a_download_that_something_else_ends_is_tried_again_and_given_up_in_the_end(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloader, "RETRY_S", 0.01)
    view = desk.submit("schnell")
    shot = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(desk.downloader, "_command", lambda weights: shot)
    for _ in range(2):
        assert desk.downloader.run_once()
        assert desk.queue.status(view.task_id).waits_for_download
    assert desk.downloader.run_once()
    assert "ended with SIGKILL" in str(desk.queue.status(view.task_id).error)


def test_a_download_that_stalls_is_given_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloader, "STALLED_S", 0.2)
    view = desk.submit("schnell")
    assert desk.downloader.run_once()
    assert "stalled" in str(desk.queue.status(view.task_id).error)
    assert desk.partial_files("schnell") == []


def test_an_error_in_a_download_does_not_stop_the_next_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weights: LoadSpec) -> list[str]:
        raise ZeroDivisionError

    lost = desk.submit("schnell")
    with monkeypatch.context() as patch:
        patch.setattr(desk.downloader, "_command", broken)
        assert desk.downloader.run_once()
    assert "ZeroDivisionError" in str(desk.queue.status(lost.task_id).error)
    desk.submit("dev")
    desk.gate("dev")
    assert desk.downloader.run_once()
    assert desk.run_all() == ["dev"]


def test_an_incomplete_download_counts_as_missing(cache: Path, tmp_path: Path) -> None:
    """Where a file is not one of several that know of each other, only the mark shows it."""
    schnell = model("schnell")
    repository = schnell.repositories[0]
    snapshots = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    folder = snapshots / str(ModelRevisions.get(repository))
    assert needs_download(tmp_path, schnell)
    for part in FOLDERS[schnell.family]:
        assert needs_download(tmp_path, schnell)
        (folder / part).mkdir(parents=True)
        (folder / part / "model.safetensors").write_bytes(b"x")
    assert not needs_download(tmp_path, schnell)
    with suppress(OSError), marked_as_incomplete(tmp_path, schnell):
        assert needs_download(tmp_path, schnell)
        raise OSError("the connection broke")
    assert needs_download(tmp_path, schnell)
    with marked_as_incomplete(tmp_path, schnell):
        pass
    assert not needs_download(tmp_path, schnell)
    partial_file = folder.parent.parent / "blobs" / "abc.1.incomplete"
    partial_file.parent.mkdir()
    partial_file.write_bytes(bytes(100))
    assert bytes_on_disk(schnell) == 100
    os.utime(partial_file, (0, 0))
    assert bytes_on_disk(schnell) == 0, "no download goes on with it"


def test_a_stop_ends_the_download_and_the_next_start_goes_on(
    desk: Desk, tmp_path: Path, cache: Path
) -> None:
    view = desk.submit("schnell")
    desk.downloader.start()
    desk.wait_for_bytes("schnell", 1000)
    desk.close()
    with pytest.raises(NoWorker):
        desk.submit("schnell")
    again = Desk(tmp_path, cache)
    try:
        assert again.queue.status(view.task_id).waits_for_download
        again.gate("schnell")
        assert again.downloader.run_once()
        assert again.run_all() == ["schnell"]
        assert again.queue.status(view.task_id).status is TaskStatus.DONE
    finally:
        again.close()
        desk.store = memory_store()  # the fixture closes it once more
