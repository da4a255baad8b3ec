"""LoadSpec that are not on this machine: tasks wait for them while others are drawn. The downloads
are real processes that fill a real cache folder, and wait there until the test lets them end."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    GIVE_UP_S,
    FakeGenerator,
    PlayedQueue,
    StallingHub,
    StartServer,
    allow,
    forecast_of,
    params_for,
)
from huggingface_hub import constants
from mflux.models.common.resolution.model_revisions import ModelRevisions
from PIL import Image

from api.models_api import download_answer
from errors import NoWorker, QueueFull
from models.hub_cache import bytes_on_disk, marked_as_incomplete, needs_download, partial_files
from models.model_catalog import LoadSpec, Model
from scheduler.downloads import FAILURE_KEPT_S, USUAL_BYTES_PER_S, Downloads, Pending, PendingWait
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import GenerationParams, Phase, Report, Task, TaskStatus
from timing_model import Confidence, TimingModel
from workers import downloads
from workers.downloads import Downloads as DownloadThread
from workers.worker import Worker

NOTHING = {True: 0.0, False: 0.0}
"""Seconds until the line is free, for each level."""
OFFER = allow("noise-flux1", "schnell", "dev", "noise-flux2", "seedvr2-3b")

DOWNLOAD = """
import os, sys, time
from pathlib import Path

repository, revision, gate = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
blob = repository / "blobs" / f"abc.{os.getpid()}.incomplete"
blob.parent.mkdir(parents=True, exist_ok=True)
blob.write_bytes(bytes(1000))
while not gate.exists():
    time.sleep(0.01)
if error := gate.read_text():
    print("Some warning.\\nserver.py: " + error, file=sys.stderr)
    sys.exit(1)
(repository / "snapshots" / revision).mkdir(parents=True)
blob.rename(repository / "snapshots" / revision / "model.safetensors")
"""


def model(name: str) -> Model:
    return OFFER.model(name)


def weights_of(name: str) -> LoadSpec:
    return LoadSpec(model(name), model(name).pipelines[0], None)


class Desk:
    """A queue with its worker, driven by the test, and its thread of downloads."""

    def __init__(self, folder: Path, cache: Path, **rules: Any) -> None:
        self.folder, self.cache = folder, cache
        self.at = 1000.0
        self.order: list[str] = []
        self.store = TaskStore(folder / "data")
        self.queue = PlayedQueue(
            OFFER,
            TimingModel(),
            self.store,
            QueueLimits(**rules),
            needs_download=partial(needs_download, folder / "data"),
            monotonic=lambda: self.at,
            now=lambda: self.at,
        )
        self.worker = Worker(self.queue.worker, FakeGenerator(self._draw), lambda error: None)
        self.downloads = DownloadThread(self.queue.downloads, self._command)
        self.worker.load()

    def submit(self, name: str, *, priority: int = 0, **changes: Any) -> Task:
        return self.queue.submit(params_for(model=name, **changes), priority=priority)[0]

    def run_all(self) -> list[str]:
        """The models of the tasks that ran, in this order."""
        self.order = []
        while self.worker.run_once(0):
            pass
        self._wait_until(lambda: self.queue.health().running == 0)  # the encoder is through
        return self.order

    def gate(self, name: str, error: str = "") -> None:
        """Let the download of a model end."""
        self._gate_of(name).write_text(error)

    def wait_until_held(self, number: int) -> None:
        """So many tasks wait for a download."""
        self._wait_until(
            lambda: (
                sum(view.waits_for_download for view in self.queue.unfinished(100, 0)[0]) == number
            )
        )

    def wait_for_bytes(self, name: str, number: int) -> None:
        """The download of a model has come so far."""

        def there() -> bool:
            answer = self.queue.health().download
            return bool(answer and (answer.spec.model.name, answer.bytes_done) == (name, number))

        self._wait_until(there)

    def close(self) -> None:
        self.queue.scheduler.stop()
        assert self.downloads.stop(GIVE_UP_S)
        self.worker.stop(1)
        self.store.close()

    def _wait_until(self, there: Callable[[], bool]) -> None:
        pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
        while not there():
            assert time.monotonic() < deadline, self.queue.health()
            pause.wait(0.01)

    def partial_files(self, name: str) -> list[str]:
        return [path.name for path in partial_files(model(name))]

    def _draw(self, params: GenerationParams, report: Report) -> Image.Image:
        self.order.append(params.model)
        report(Phase.DENOISING, 0, params.steps)
        return Image.new("RGB", params.final_size)

    def _command(self, weights: LoadSpec) -> list[str]:
        name = weights.model.name
        repository = weights.model.repositories[0]
        folder = self.cache / f"models--{repository.replace('/', '--')}"
        revision, gate = str(ModelRevisions.get(repository)), str(self._gate_of(name))
        return [sys.executable, "-c", DOWNLOAD, str(folder), revision, gate]

    def _gate_of(self, name: str) -> Path:
        return self.folder / f"{name}.gate"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "PROGRESS_EVERY_S", 0.01)
    return tmp_path / "hub"


@pytest.fixture
def desk(tmp_path: Path, cache: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, cache)
    yield desk
    desk.close()


def test_a_task_waits_for_its_weights_while_others_are_drawn(desk: Desk) -> None:
    lacking = desk.submit("schnell")
    assert lacking.waits_for_download
    others = [desk.submit("noise-flux1"), desk.submit("noise-flux2")]
    assert [view.task_id for view in desk.queue.unfinished(9, 0)[0]] == [
        *(view.task_id for view in others),
        lacking.task_id,
    ]
    desk.downloads.start()
    assert desk.run_all() == ["noise-flux1", "noise-flux2"]
    desk.wait_for_bytes("schnell", 1000)
    answer = download_answer(desk.queue.health())
    assert answer
    assert (answer.model, answer.bytes_done, answer.bytes_total) == (
        "schnell",
        1000,
        34_000_000_000,
    )
    version = desk.queue.events.version(lacking.task_id)
    desk.gate("schnell")
    desk.wait_until_held(0)
    assert desk.queue.health().download is None
    assert desk.queue.events.version(lacking.task_id) > version, "there is an event"
    assert desk.run_all() == ["schnell"]
    assert desk.queue.status(lacking.task_id).status is TaskStatus.DONE
    assert not desk.submit("schnell").waits_for_download


def test_a_failed_download_affects_only_the_tasks_that_need_it(desk: Desk) -> None:
    lost = [desk.submit("schnell"), desk.submit("schnell")]
    other = desk.submit("dev")
    desk.downloads.start()
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
    monkeypatch.setattr(desk.downloads, "_command", lambda weights: ["/nonexistent/python"])
    lost = desk.submit("schnell")
    assert desk.downloads.run_once()
    ended = desk.queue.status(lost.task_id)
    assert ended.status is TaskStatus.FAILED
    assert "cannot be started" in str(ended.error)
    monkeypatch.setattr(desk.downloads, "_command", lambda weights: ["false"])
    lost = desk.submit("schnell")
    assert desk.downloads.run_once()
    assert "ended with exit code 1" in str(desk.queue.status(lost.task_id).error)


def test_a_download_that_nobody_wants_any_more_ends(desk: Desk) -> None:
    view = desk.submit("schnell")
    desk.downloads.start()
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
    monkeypatch.setattr(downloads, "RETRY_S", 0.01)
    view = desk.submit("schnell")
    shot = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(desk.downloads, "_command", lambda weights: shot)
    for _ in range(2):
        assert desk.downloads.run_once()
        assert desk.queue.status(view.task_id).waits_for_download
    assert desk.downloads.run_once()
    assert "ended with SIGKILL" in str(desk.queue.status(view.task_id).error)


def test_a_download_that_stalls_is_given_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "STALLED_S", 0.2)
    view = desk.submit("schnell")
    assert desk.downloads.run_once()
    assert "stalled" in str(desk.queue.status(view.task_id).error)
    assert desk.partial_files("schnell") == []


def test_an_error_in_a_download_does_not_stop_the_next_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weights: LoadSpec) -> list[str]:
        raise ZeroDivisionError

    lost = desk.submit("schnell")
    with monkeypatch.context() as patch:
        patch.setattr(desk.downloads, "_command", broken)
        assert desk.downloads.run_once()
    assert "ZeroDivisionError" in str(desk.queue.status(lost.task_id).error)
    desk.submit("dev")
    desk.gate("dev")
    assert desk.downloads.run_once()
    assert desk.run_all() == ["dev"]


def test_an_incomplete_download_counts_as_missing(cache: Path, tmp_path: Path) -> None:
    """If one of several files is complete, the cache does not show that others are missing."""
    schnell = model("schnell")
    repository = schnell.repositories[0]
    snapshots = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    folder = snapshots / str(ModelRevisions.get(repository))
    assert needs_download(tmp_path, schnell)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
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


def test_urgent_tasks_get_their_weights_first(desk: Desk) -> None:
    desk.submit("dev")
    desk.submit("schnell", priority=1)
    for name in ("dev", "schnell"):
        desk.gate(name)
    assert desk.downloads.run_once()
    assert desk.run_all() == ["schnell"]
    assert desk.downloads.run_once()
    assert desk.run_all() == ["dev"]


def test_a_task_that_lacks_the_weights_of_two_stages_waits_for_both(desk: Desk) -> None:
    desk.submit("schnell", upscale=2.0, upscaler="seedvr2-3b")
    for name in ("schnell", "seedvr2-3b"):
        assert sum(view.waits_for_download for view in desk.queue.unfinished(9, 0)[0]) == 1
        desk.gate(name)
        assert desk.downloads.run_once()
    assert desk.run_all() == ["schnell", "seedvr2-3b"]


def test_a_load_ordered_by_the_operator_downloads_first(desk: Desk) -> None:
    desk.queue.control.order_load(weights_of("schnell"))
    assert desk.run_all() == []
    desk.gate("schnell")
    assert desk.downloads.run_once()
    assert desk.worker.run_once(0)
    assert [weights.model.name for weights in desk.queue.health().loaded] == ["schnell"]
    desk.queue.control.order_load(weights_of("dev"))
    desk.gate("dev", "No such thing.")
    assert desk.downloads.run_once()
    assert not desk.worker.run_once(0)
    error = desk.queue.health().last_error
    assert error
    assert error.message == "No such thing."


def test_weights_can_be_fetched_ahead_of_any_task(desk: Desk) -> None:
    for _ in range(2):
        assert desk.queue.fetch_ahead(params_for(model="schnell")) is None
    desk.gate("schnell")
    assert desk.downloads.run_once()
    assert not desk.submit("schnell").waits_for_download
    assert desk.queue.fetch_ahead(params_for(model="dev")) is None
    desk.gate("dev", "No.")
    assert desk.downloads.run_once()
    assert desk.queue.fetch_ahead(params_for(model="dev")) == "No."
    desk.at += FAILURE_KEPT_S
    assert desk.queue.fetch_ahead(params_for(model="dev")) is None
    assert desk.downloads.run_once(), "it is tried again"


def test_a_stop_ends_the_download_and_the_next_start_goes_on(
    desk: Desk, tmp_path: Path, cache: Path
) -> None:
    view = desk.submit("schnell")
    desk.downloads.start()
    desk.wait_for_bytes("schnell", 1000)
    desk.close()
    with pytest.raises(NoWorker):
        desk.submit("schnell")
    again = Desk(tmp_path, cache)
    try:
        assert again.queue.status(view.task_id).waits_for_download
        again.gate("schnell")
        assert again.downloads.run_once()
        assert again.run_all() == ["schnell"]
        assert again.queue.status(view.task_id).status is TaskStatus.DONE
    finally:
        again.close()
        desk.store = TaskStore(None)  # the fixture closes it once more


def test_a_wait_that_a_download_makes_too_long_is_refused(tmp_path: Path, cache: Path) -> None:
    desk = Desk(tmp_path, cache, max_wait_s=600.0)
    desk.submit("noise-flux1")
    with pytest.raises(QueueFull, match=r"would wait 17\d\d s"):  # 34 GB at 20 MB/s
        desk.submit("schnell")
    desk.close()


def test_the_forecast_follows_the_pace_of_the_download(desk: Desk) -> None:
    size = 34e9
    wait, _ = desk.queue.estimate(params_for(model="schnell"), priority=0)
    assert wait.start_s == pytest.approx(size / USUAL_BYTES_PER_S)
    assert wait.confidence is Confidence.NONE
    assert wait.p90_s > 2 * wait.end_s
    desk.submit("schnell")
    desk.queue.downloads.download_began(weights_of("schnell"), 4_000_000_000)
    desk.at += 10
    desk.queue.downloads.download_progress(
        weights_of("schnell"), 5_000_000_000
    )  # 100 MB/s; 29 GB to go
    (view,) = desk.queue.unfinished(9, 0)[0]
    assert forecast_of(view).start_s == pytest.approx(290)
    assert forecast_of(view).confidence is Confidence.LOW
    assert forecast_of(view).end_s < forecast_of(view).p90_s < 2 * forecast_of(view).end_s
    second, _ = desk.queue.estimate(params_for(model="schnell"), priority=0)
    assert second.start_s == pytest.approx(forecast_of(view).end_s, rel=0.01), (
        "the first one runs before"
    )
    assert second.pos == 1
    other, _ = desk.queue.estimate(params_for(model="dev"), priority=0)
    size_of_dev = (model("dev").weights_gb or 0) * 1e9
    assert other.start_s == pytest.approx(290 + size_of_dev / 100e6), (
        "the others are through by then"
    )
    here, _ = desk.queue.estimate(params_for(model="noise-flux1"), priority=0)
    assert here.start_s < 60, "the line does not wait for downloads"


def test_held_tasks_are_listed_as_their_weights_come_from_any_offset(desk: Desk) -> None:
    line = [desk.submit("noise-flux1").task_id for _ in range(3)]
    first, other, second = (desk.submit(n).task_id for n in ("schnell", "dev", "schnell"))
    urgent = desk.submit("dev", priority=1).task_id
    whole = [view.task_id for view in desk.queue.unfinished(99, 0)[0]]
    assert whole == [*line, urgent, other, first, second]
    for offset in range(8):
        assert [view.task_id for view in desk.queue.unfinished(99, offset)[0]] == whole[offset:]
    some = {line[1], urgent, first, second}
    of_some = [task_id for task_id in whole if task_id in some]
    for offset in range(5):
        views, length = desk.queue.unfinished(2, offset, lambda task: task.task_id in some)
        assert [view.task_id for view in views] == of_some[offset : offset + 2]
        assert length == 4
    views = desk.queue.unfinished(99, 0)[0]
    ends = [forecast_of(view).end_s for view in views]
    assert ends == sorted(ends)
    for view in views:
        now = forecast_of(desk.queue.status(view.task_id))
        assert now.end_s == pytest.approx(forecast_of(view).end_s, rel=0.02)
    for name in ("dev", "schnell"):
        desk.gate(name)
        assert desk.downloads.run_once()
    assert [view.task_id for view in desk.queue.unfinished(99, 0)[0]] == [
        *(urgent, *line),
        *(other, first, second),
    ]


def test_a_download_without_progress_keeps_the_pace_known_before() -> None:
    clock = [0.0]
    held = Downloads(lambda: clock[0])
    (stage,) = OFFER.stages(params_for(model="schnell"))
    task = Task("1", stage.params, 0, created_at=0.0, stages=(stage,))
    held.add(Pending(task, (stage.load_spec,), load_s=3.0, work_s=10.0))
    held.begin(stage.load_spec, 0)
    clock[0] = 100.0
    held.progress(0)
    assert not held.pace_known
    ready_s = 34e9 / USUAL_BYTES_PER_S
    assert held.waits(lambda priority: 0.0) == [PendingWait(task, 0, ready_s, ready_s + 13.0)]
    held.progress(40_000_000_000)  # more than was expected
    assert held.waits(lambda priority: 0.0) == [PendingWait(task, 0, 0.0, 13.0)]
    assert held.waits(lambda priority: 5.0) == [PendingWait(task, 0, 5.0, 18.0)]


# -- whole servers ---------------------------------------------------------------------------------


def test_a_server_draws_while_it_downloads(
    start_server: StartServer, stalling_hub: StallingHub
) -> None:
    server = start_server(
        *("--model", "noise-flux1", "--models", "noise-flux1,schnell"),
        environment=stalling_hub.environment,
    )
    lacking = server.submit(model="schnell")
    assert lacking["expected_time_seconds"] > 600
    kept = server.submit(model="noise-flux1")
    assert server.wait_until_ended(kept["task_id"])["status"] == "done"
    status = server.get("/status", task_id=lacking["task_id"]).json()
    assert (status["status"], status["server"]) == ("waiting", "ready")
    answer = server.wait_for(lacking["task_id"], lambda s: "download" in s)["download"]
    assert (answer["model"], answer["bytes_done"]) == ("schnell", 0)
    assert server.get("/health").json()["download"]["model"] == "schnell"
    stalling_hub.go_on.set()
    failed = server.wait_until_ended(lacking["task_id"])
    assert failed["error"]["code"] == "model_load_failed"
    assert "There is no repository black-forest-labs/FLUX.1-schnell" in failed["error"]["message"]
    assert server.get("/health").status_code == 200
    stalling_hub.go_on.clear()
    lacking = server.submit(model="schnell")
    server.wait_for(lacking["task_id"], lambda s: "download" in s)
    assert server.stop() == 0
    stalling_hub.go_on.set()
