"""The head, with workers that are messages: leases, offers, load orders, the broker's absence."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from played_app import PlayedApp
from played_head import LEASE_S, NO_SPEC, PlayedHead, drawing
from small_disk import fill_disk

from api.event_texts import EventTexts
from cluster.remote_machine import DEAF
from cluster.stalls import LEAST_S as STALL_S
from models.model_catalog import LoadSpec
from task import TaskStatus

MINUTE_S = 60.0


@pytest.fixture
def head(tmp_path: Path) -> Iterator[PlayedHead]:
    with closing(PlayedHead(tmp_path)) as head:
        yield head


def png(color: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, "PNG")
    return file.getvalue()


def spend(head: PlayedHead, seconds: float, *beating: str) -> None:
    """Time passes, in which these workers beat."""
    for _ in range(int(seconds / 10)):
        head.step(10.0, *beating)


# -- progress --------------------------------------------------------------------------------------


def test_a_hung_gpu_loses_its_task_and_its_late_picture_is_refused(head: PlayedHead) -> None:
    task_id = drawing(head, "hung")
    spend(head, STALL_S - 30, "hung")
    assert head.queue.status(task_id).status is TaskStatus.RUNNING
    spend(head, 60, "hung")
    assert head.queue.status(task_id).status is TaskStatus.WAITING
    head.beat("other")
    assert head.offers() == [("other", task_id)]
    head.report("other", task_id, 1, attempt=2)
    assert not head.image("hung", task_id, png())["accepted"]
    assert head.blobs == {}
    assert head.image("other", task_id, png("red"), attempt=2)["accepted"]
    assert head.queue.status(task_id).status is TaskStatus.DONE


def test_a_machine_whose_gpu_hangs_gets_no_task_before_it_waits_for_one(head: PlayedHead) -> None:
    task_id = drawing(head, "hung")
    spend(head, STALL_S + 30, "hung")
    head.beat("hung", (task_id, 1))
    sent = head.step()
    assert not [m for _, m in sent if m["kind"] == "offer"]
    status = next(m for m in head.queue.machines() if m.name == "hung")
    assert status.last_error
    assert "no progress" in status.last_error
    head.beat("hung", waiting=True)
    assert head.offers() == [("hung", task_id)]


def test_a_task_during_which_two_gpus_hung_is_failed(head: PlayedHead) -> None:
    task_id = drawing(head, "first")
    spend(head, STALL_S + 30, "first")
    head.beat("second")
    assert head.offers() == [("second", task_id)]
    head.beat("second", (task_id, 2))
    head.report("second", task_id, 1, attempt=2)
    spend(head, STALL_S + 30, "first", "second")
    assert head.queue.status(task_id).error_code == "ended_too_often"


def test_each_step_extends_the_lease(head: PlayedHead) -> None:
    task_id = drawing(head, "slow")
    for step in (2, 3):
        spend(head, STALL_S - 30, "slow")
        head.report("slow", task_id, step)
    assert head.queue.status(task_id).status is TaskStatus.RUNNING


def test_a_step_that_is_forecast_to_take_minutes_has_twenty_times_as_long(
    head: PlayedHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = drawing(head, "slow")
    remaining = head.scheduler.forecaster.remaining
    monkeypatch.setattr(remaining, "phase_s", lambda run, at: 2 * MINUTE_S)
    spend(head, 39 * MINUTE_S, "slow")
    assert head.queue.status(task_id).status is TaskStatus.RUNNING
    spend(head, 2 * MINUTE_S, "slow")
    assert head.queue.status(task_id).status is TaskStatus.WAITING


def test_a_download_that_goes_on_is_progress(head: PlayedHead) -> None:
    task_id = drawing(head, "far")
    spec = {"model": "noise-flux1", "pipeline": "Flux1", **NO_SPEC}
    head.report("far", task_id, 0, phase="loading")
    head.say("far", "loading", spec=spec, done=False)
    for second in range(0, int(3 * STALL_S), 10):
        head.at += 10.0
        head.beat("far", (task_id, 1), resident=[], downloaded_bytes=second)
        head.step()
    assert head.queue.status(task_id).status is TaskStatus.RUNNING
    spend(head, STALL_S + 3600, "far")
    assert head.queue.status(task_id).status is TaskStatus.WAITING


def test_a_task_that_was_sent_ahead_and_never_begins_goes_elsewhere(head: PlayedHead) -> None:
    head.beat("hung")
    task_id = head.submit()
    assert head.offers() == [("hung", task_id)]
    head.beat("hung", (task_id, 1))
    spend(head, STALL_S + 30, "hung")
    head.beat("other")
    assert head.offers() == [("other", task_id)]


def test_a_task_is_sent_ahead_for_as_long_as_the_one_before_it_takes(head: PlayedHead) -> None:
    running = drawing(head, "slow")
    waits = head.submit()
    assert head.offers() == [("slow", waits)]
    head.beat("slow", (running, 1), (waits, 1))
    for step in (2, 3, 4):
        spend(head, STALL_S - 30, "slow")
        head.report("slow", running, step)
    head.report("slow", running, 4, phase="image_encoding")
    assert head.offers(60.0, "slow") == []
    assert head.registry.named("slow")
    head.report("slow", waits, 0)
    assert head.queue.status(waits).status is TaskStatus.RUNNING


def test_a_machine_that_hears_nothing_gets_no_task(head: PlayedHead) -> None:
    head.beat("deaf", deaf=True)
    task_id = head.submit()
    assert head.offers() == []
    assert head.queue.machines()[0].last_error == DEAF
    head.beat("deaf")
    assert head.queue.machines()[0].last_error is None
    assert head.offers() == [("deaf", task_id)]
    head.beat("deaf", deaf=True)
    head.beat("other")
    assert head.offers() == [("other", task_id)]


def test_each_heartbeat_is_answered(head: PlayedHead) -> None:
    head.beat("cellar")
    head.beat("cellar")
    assert [(to, m["kind"]) for to, m in head.all_sent()] == 2 * [("cellar", "heard")]


# -- silence ---------------------------------------------------------------------------------------


def test_a_task_is_not_blamed_for_a_network_that_was_cut_twice(head: PlayedHead) -> None:
    task_id = drawing(head, "laptop")
    for attempt in (2, 3, 4):
        head.step(LEASE_S + 1)
        assert head.queue.status(task_id).status is TaskStatus.WAITING
        head.beat("laptop")
        assert head.offers() == [("laptop", task_id)]
        head.beat("laptop", (task_id, attempt))
        head.report("laptop", task_id, 1, attempt=attempt)
    assert head.queue.status(task_id).status is TaskStatus.RUNNING


def test_a_task_during_which_a_worker_died_twice_is_failed(head: PlayedHead) -> None:
    task_id = drawing(head, "laptop")
    head.restarted("laptop")
    head.beat("laptop")
    assert head.offers() == [("laptop", task_id)]
    head.report("laptop", task_id, 1, attempt=2)
    head.step(LEASE_S + 1)
    assert head.queue.status(task_id).error_code == "ended_too_often"


def test_workers_have_two_leases_to_find_a_broker_that_is_back(head: PlayedHead) -> None:
    task_id = drawing(head, "laptop")
    head.broker_leaves()
    head.step(LEASE_S - 1)
    head.step(LEASE_S - 1)
    head.broker_returns()
    head.step(1.0)
    head.step(2 * LEASE_S - 1)
    assert head.queue.status(task_id).status is TaskStatus.RUNNING
    head.step(2.0)
    assert head.queue.status(task_id).status is TaskStatus.WAITING


def test_health_machines_and_metrics_say_that_the_broker_is_away(tmp_path: Path) -> None:
    app = PlayedApp(tmp_path)
    with closing(PlayedHead(tmp_path, scheduler=app.queue.scheduler)) as head:
        head.broker_leaves()
        head.step()
        for path in ("/health", "/machines"):
            assert app.json("root", "GET", path)["broker_away_since"] == app.at
        assert "mflux_broker_away 1.0" in app.ask("root", "GET", "/metrics").text
        head.broker_returns()
        app.at += 2.0
        head.step()
        for path in ("/health", "/machines"):
            assert "broker_away_since" not in app.json("root", "GET", path)
        assert "mflux_broker_away 0.0" in app.ask("root", "GET", "/metrics").text


def test_a_picture_that_does_not_fit_on_the_disk_is_asked_for_again(
    mount: Callable[[str], Path],
) -> None:
    disk = mount("size=8m")
    large = Image.frombytes("RGB", (640, 640), os.urandom(3 * 640 * 640))
    file = io.BytesIO()
    large.save(file, "PNG")
    with closing(PlayedHead(disk / "data")) as head:
        task_id = drawing(head, "cellar")
        filler = fill_disk(disk)
        answer = head.image("cellar", task_id, file.getvalue())
        assert answer["retry"]
        assert not answer["accepted"]
        assert head.blobs == {}, "it comes again with the next request"
        assert head.queue.status(task_id).status is TaskStatus.RUNNING
        filler.unlink()
        assert head.image("cellar", task_id, file.getvalue())["accepted"]
        assert head.queue.status(task_id).status is TaskStatus.DONE
        assert head.queue.image(task_id)[0] == file.getvalue()


# -- load orders and downloads ---------------------------------------------------------------------


def test_the_operator_loads_a_model_on_a_machine(tmp_path: Path) -> None:
    with closing(PlayedHead(tmp_path, "noise-flux1", "noise-z-image")) as head:
        head.beat("cellar")
        model = head.scheduler.allowed.models[1]
        spec = LoadSpec(model, model.pipelines[0], None)
        assert not head.queue.control.order_load(spec, "cellar")
        sent = head.step()
        assert [(to, m["kind"], m["spec"]["model"]) for to, m in sent] == [
            ("cellar", "load", "noise-z-image")
        ]
        assert head.step() == []
        assert [m["kind"] for _, m in head.step(LEASE_S, "cellar")] == ["load"], "it may be lost"
        head.say("cellar", "loading", spec=sent[0][1]["spec"], done=False)
        assert head.step(LEASE_S, "cellar") == []
        head.beat("cellar", resident=[spec.key])
        head.beat("cellar", resident=[spec.key])
        assert head.queue.control.order_load(spec, "cellar"), "it is there"


def test_a_model_that_was_loaded_once_is_not_loaded_again_when_another_has_replaced_it(
    tmp_path: Path,
) -> None:
    with closing(PlayedHead(tmp_path, "noise-flux1", "noise-z-image")) as head:
        head.beat("cellar")
        specs = [LoadSpec(m, m.pipelines[0], None) for m in head.scheduler.allowed.models]
        other, wanted = specs
        head.queue.control.order_load(wanted, "cellar")
        assert [m["kind"] for _, m in head.step()] == ["load"]
        head.beat("cellar", resident=[wanted.key])
        assert head.step() == []
        head.beat("cellar", resident=[other.key])
        assert head.step(LEASE_S, "cellar") == []
        assert not head.queue.control.order_load(wanted, "cellar")
        assert [m["kind"] for _, m in head.step()] == ["load"], "a new order is sent at once"


def test_the_events_of_a_task_say_which_worker_draws_it(tmp_path: Path) -> None:
    app = PlayedApp(tmp_path)
    with closing(PlayedHead(tmp_path, scheduler=app.queue.scheduler)) as head:
        app.queue.control.drain("local", True)
        head.at = app.at
        task_id = drawing_on(app, head, "cellar")
        assert b'"machine":"cellar"' in EventTexts(app.queue).of_task(task_id, 1)


def test_the_operator_loads_a_model_on_a_named_machine_over_http(tmp_path: Path) -> None:
    app = PlayedApp(tmp_path)
    with closing(PlayedHead(tmp_path, scheduler=app.queue.scheduler)) as head:
        head.beat("cellar", resident=[])
        answer = app.json("root", "POST", "/models/noise-flux1/load?machine=cellar")
        assert not answer["loaded"]
        assert [(to, m["kind"]) for to, m in head.step()] == [("cellar", "load")]
        unknown = app.ask("root", "POST", "/models/noise-flux1/load?machine=attic")
        assert unknown.get_json()["error"]["code"] == "unknown_machine"
        assert (
            app.ask("alice", "POST", "/models/noise-flux1/load?machine=cellar").status_code == 403
        )


def test_a_download_on_a_worker_is_shown_like_one_of_the_server(tmp_path: Path) -> None:
    app = PlayedApp(tmp_path)
    with closing(PlayedHead(tmp_path, scheduler=app.queue.scheduler)) as head:
        app.queue.control.drain("local", True)
        head.at = app.at
        task_id = drawing_on(app, head, "cellar")
        head.report("cellar", task_id, 0, phase="loading")
        spec = {"model": "noise-flux1", "pipeline": "Flux1", **NO_SPEC}
        head.say("cellar", "loading", spec=spec, done=False)
        head.beat("cellar", (task_id, 1), resident=[], downloaded_bytes=12_345)
        download = {"model": "noise-flux1", "bytes_done": 12_345}
        machines = app.json("root", "GET", "/machines")["machines"]
        assert next(m for m in machines if m["name"] == "cellar")["download"].items() >= (
            download.items()
        )
        status = app.status("alice", task_id)
        assert status["phase"] == "loading"
        assert status["machine"] == "cellar"
        assert app.json("alice", "GET", "/health")["machines"] == 1, "the server's own is drained"
        app.queue.control.drain("local", False)
        assert app.json("alice", "GET", "/health")["machines"] == 2
        assert status["download"].items() >= download.items()
        head.beat("cellar", (task_id, 1), resident=[])
        assert "download" not in app.status("alice", task_id)


def drawing_on(app: PlayedApp, head: PlayedHead, name: str) -> str:
    """A task of alice that this worker has begun."""
    head.beat(name)
    task_id = app.submit("alice")
    assert head.offers() == [(name, task_id)]
    head.report(name, task_id, 0)
    return task_id
