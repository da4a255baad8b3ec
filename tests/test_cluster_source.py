"""Offers that are taken back or repeated, and what outlives a head, in this process alone."""

from pathlib import Path
from unittest.mock import create_autospec

import pytest
from conftest import PlayedQueue, params_for

from allowed import Allowed
from cluster.carrier import Carrier
from cluster.messages import Offer, Stop
from cluster.source import RemoteSource
from models.mflux_registry import find_model
from scheduler.limits import QueueLimits
from scheduler.machines import Machine
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import GenerationParams, Phase, Progress, Verdict
from timing_model import TimingModel

TASK = "0123456789abcdef"
AT_A_STEP = Progress(Phase.DENOISING, 1, 2)


@pytest.fixture
def source(tmp_path: Path) -> RemoteSource:
    model = find_model("noise-flux1")
    assert model
    return RemoteSource(
        "f" * 32,
        create_autospec(Carrier, instance=True),
        Allowed(model, (model,)),
        registration=lambda: pytest.fail("nothing is sent here"),
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
