"""Weights that are not on this machine: tasks wait for them while others are drawn."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import StartServer, forecast_of, params_for
from download_desk import OFFER, Desk, empty_cache, model
from stalling_hub import StallingHub

from api.models_api import download_answer
from errors import QueueFull
from models.model_catalog import LoadSpec
from scheduler.downloads import FAILURE_KEPT_S, USUAL_BYTES_PER_S, Downloads
from scheduler.pending import Pending, PendingTasks, PendingWait
from task import Task, TaskStatus
from timing_model import Confidence


def weights_of(name: str) -> LoadSpec:
    return LoadSpec(model(name), model(name).pipelines[0], None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def desk(tmp_path: Path, cache: Path) -> Iterator[Desk]:
    with closing(Desk(tmp_path, cache)) as desk:
        yield desk


def test_a_task_waits_for_its_weights_while_others_are_drawn(desk: Desk) -> None:
    lacking = desk.submit("schnell")
    assert lacking.waits_for_download
    others = [desk.submit("noise-flux1"), desk.submit("noise-flux2")]
    assert [view.task_id for view in desk.queue.unfinished(9, 0)[0]] == [
        *(view.task_id for view in others),
        lacking.task_id,
    ]
    desk.downloader.start()
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


def test_urgent_tasks_get_their_weights_first(desk: Desk) -> None:
    desk.submit("dev")
    desk.submit("schnell", priority=1)
    for name in ("dev", "schnell"):
        desk.gate(name)
    assert desk.downloader.run_once()
    assert desk.run_all() == ["schnell"]
    assert desk.downloader.run_once()
    assert desk.run_all() == ["dev"]


def test_a_task_that_lacks_the_weights_of_two_stages_waits_for_both(desk: Desk) -> None:
    desk.submit("schnell", upscale=2.0, upscaler="seedvr2-3b")
    for name in ("schnell", "seedvr2-3b"):
        assert sum(view.waits_for_download for view in desk.queue.unfinished(9, 0)[0]) == 1
        desk.gate(name)
        assert desk.downloader.run_once()
    assert desk.run_all() == ["schnell", "seedvr2-3b"]


def test_a_load_ordered_by_the_operator_downloads_first(desk: Desk) -> None:
    desk.queue.control.order_load(weights_of("schnell"))
    assert desk.run_all() == []
    desk.gate("schnell")
    assert desk.downloader.run_once()
    assert desk.worker.run_once(0)
    assert [weights.model.name for weights in desk.queue.health().loaded] == ["schnell"]
    desk.queue.control.order_load(weights_of("dev"))
    desk.gate("dev", "No such thing.")
    assert desk.downloader.run_once()
    assert not desk.worker.run_once(0)
    error = desk.queue.health().last_error
    assert error
    assert error.message == "No such thing."


def test_weights_can_be_fetched_ahead_of_any_task(desk: Desk) -> None:
    for _ in range(2):
        assert desk.queue.fetch_ahead(params_for(model="schnell")) is None
    desk.gate("schnell")
    assert desk.downloader.run_once()
    assert not desk.submit("schnell").waits_for_download
    assert desk.queue.fetch_ahead(params_for(model="dev")) is None
    desk.gate("dev", "No.")
    assert desk.downloader.run_once()
    assert desk.queue.fetch_ahead(params_for(model="dev")) == "No."
    desk.at += FAILURE_KEPT_S
    assert desk.queue.fetch_ahead(params_for(model="dev")) is None
    assert desk.downloader.run_once(), "it is tried again"


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
        assert desk.downloader.run_once()
    assert [view.task_id for view in desk.queue.unfinished(99, 0)[0]] == [
        *(urgent, *line),
        *(other, first, second),
    ]


def test_a_download_without_progress_keeps_the_pace_known_before() -> None:
    clock = [0.0]
    downloads = Downloads(lambda: clock[0])
    held = PendingTasks(downloads, lambda: clock[0])
    (stage,) = OFFER.stages(params_for(model="schnell"))
    task = Task("1", stage.params, 0, created_at=0.0, stages=(stage,))
    held.add(Pending(task, (stage.load_spec,), load_s=3.0, work_s=10.0))
    downloads.begin(stage.load_spec, 0)
    clock[0] = 100.0
    downloads.progress(0)
    assert not downloads.pace_known
    ready_s = 34e9 / USUAL_BYTES_PER_S
    assert held.waits(lambda priority: 0.0) == [PendingWait(task, 0, ready_s, ready_s + 13.0)]
    downloads.progress(40_000_000_000)  # more than was expected
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
