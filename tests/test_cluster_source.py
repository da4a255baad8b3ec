"""Offers that are taken back or repeated, and what outlives a head, in this process alone."""

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from conftest import PlayedQueue, params_for, until
from fake_generator import FakeGenerator
from PIL import Image

from allowed import Allowed
from cluster.carrier import Carrier, CarrierUnavailable
from cluster.messages import PROTOCOL, Answer, Offer, Presence, Registration, Stop
from cluster.source import RemoteSource
from models.mflux_registry import find_model
from scheduler.limits import QueueLimits
from scheduler.machines import Machine
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import GenerationParams, Phase, Progress, Report, Verdict
from timing_model import TimingModel
from workers.worker import Worker

TASK = "0123456789abcdef"
AT_A_STEP = Progress(Phase.DENOISING, 1, 2)
ABOUT = Registration(
    name="cellar", hardware="x", system="x", memory_bytes=0, speeds={}, versions={}, models=[],
    bits=[None], loras=[], lora_repos=False, models_in_memory=1,
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> RemoteSource:
    model = find_model("noise-flux1")
    assert model
    return RemoteSource(
        "f" * 32,
        create_autospec(Carrier, instance=True),
        Allowed(model, (model,)),
        registration=lambda: ABOUT,
        resident=tuple,
        folder=tmp_path,
        refused=pytest.fail,
    )


def hear(source: RemoteSource, kind: type[Offer | Stop], attempt: int = 1) -> None:
    """A message of the head arrives."""
    session = source._session
    if kind is Stop:
        source.handle(Stop(session=session, task_id=TASK, attempt=attempt).model_dump())
        return
    params = GenerationParams(
        prompt="x", seed=1, width=64, height=64, steps=2, guidance=None, format="PNG", quality=85,
        model="noise-flux1",
    )  # fmt: skip
    offer = Offer(
        session=session,
        task_id=TASK,
        attempt=attempt,
        params=params.model_dump(mode="json"),
        images_done=0,
        inputs={},
    )
    source.handle(offer.model_dump())


def claimed(source: RemoteSource) -> int | None:
    """The attempt that the worker draws now."""
    task = source.claim(0)
    return task.attempt if task else None


def test_an_offer_that_was_taken_back_can_be_made_again(source: RemoteSource) -> None:
    hear(source, Offer)
    hear(source, Stop)
    assert claimed(source) is None
    hear(source, Offer)
    assert claimed(source) == 1
    assert source.report(TASK, 1, AT_A_STEP) is Verdict.CONTINUE, "the Stop was for the earlier one"


def test_an_offer_that_arrives_twice_is_drawn_once(source: RemoteSource) -> None:
    hear(source, Offer)
    hear(source, Offer)
    assert claimed(source) == 1
    hear(source, Offer)
    assert claimed(source) is None


def test_an_attempt_that_is_not_wanted_any_more_stops_at_its_next_report(
    source: RemoteSource,
) -> None:
    hear(source, Offer)
    assert claimed(source) == 1
    hear(source, Stop)
    assert source.report(TASK, 1, AT_A_STEP) is Verdict.STOP


def test_a_new_attempt_is_drawn_after_the_old_one_was_stopped(source: RemoteSource) -> None:
    hear(source, Stop)
    hear(source, Offer, attempt=2)
    assert claimed(source) == 2


def heard_by_a_head(source: RemoteSource) -> list[dict[str, Any]]:
    """What the worker sends from now on. A head accepts each request at once."""
    carrier, sent = source._carrier, list[dict[str, Any]]()

    def publish(message: dict[str, Any]) -> None:
        sent.append(message)
        if request := message.get("request"):
            answer = Answer(session=source._session, request=request, accepted=True)
            source.handle(answer.model_dump())

    head = Presence(protocol=PROTOCOL, session="head", lease_s=20.0)
    carrier.presence.return_value = head.model_dump()  # type: ignore[attr-defined]
    carrier.publish.side_effect = publish  # type: ignore[attr-defined]
    source.outbox.start()
    return sent


def test_a_task_that_is_stopped_after_its_last_step_is_given_back(source: RemoteSource) -> None:
    """Otherwise the head waits for its picture, and the worker has left it."""
    sent = heard_by_a_head(source)

    def draw(_: GenerationParams, report: Report) -> Image.Image:
        report(Phase.DECODING, 2, 2)
        hear(source, Stop)
        return Image.new("RGB", (64, 64))

    worker = Worker(source, FakeGenerator(draw), lambda error: pytest.fail(str(error)))
    hear(source, Offer)
    assert worker.run_once(0)
    ended = [(m["task_id"], m["attempt"], m["code"]) for m in sent if m["kind"] == "ended"]
    assert ended == [(TASK, 1, None)]
    assert source._heartbeat().held == []
    assert source.load_reported(0.5), "it does not end a load that the operator wants"


def test_a_worker_keeps_what_it_was_sent_ahead_while_the_broker_is_away(
    source: RemoteSource,
) -> None:
    sent = heard_by_a_head(source)
    hear(source, Offer)
    until(lambda: sent)
    carrier, publish = source._carrier, source._carrier.publish.side_effect  # type: ignore[attr-defined]
    carrier.publish.side_effect = CarrierUnavailable("away")  # type: ignore[attr-defined]
    source.load_started(source.first_spec)
    until(lambda: not source.outbox._reachable)
    carrier.publish.side_effect = publish  # type: ignore[attr-defined]
    before = len(sent)
    until(lambda: len(sent) > before)
    assert source._heartbeat().held
    assert claimed(source) == 1
    another = Presence(protocol=PROTOCOL, session="another head", lease_s=20.0)
    hear(source, Offer, attempt=2)
    carrier.presence.return_value = another.model_dump()  # type: ignore[attr-defined]
    source.outbox.leave()  # which makes it look at once
    until(lambda: source._heartbeat().held == [])
    assert claimed(source) is None, "another head knows nothing of it"


def test_a_head_that_dies_again_and_again_does_not_fail_what_others_draw(tmp_path: Path) -> None:
    model = find_model("noise-flux1")
    assert model
    for death in range(4):
        store = TaskStore(tmp_path)
        limits = QueueLimits(local_worker=False)
        queue = PlayedQueue(Allowed(model, (model,)), TimingModel(), store, limits)
        if death == 0:
            queue.submit(params_for("long"), priority=0)
        machine = Machine("cellar")
        queue.scheduler.machines.join(machine)
        task = WorkerApi(queue.scheduler, machine).claim(0.0)
        assert task is not None, "it waits again"
        assert task.attempt == death + 1
        store.close()  # and the process dies
