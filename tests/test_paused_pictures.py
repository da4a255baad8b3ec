"""Pictures that are paused for others: real mflux draws both as if they were alone."""

import signal
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import EAGER_SERVER, GIVE_UP_S, PlayedQueue, ServerProcess, allow, params_for
from memory_stores import memory_store
from PIL import Image
from test_previews import settle

from errors import ModelLoadError, NotFinite
from generation.previews import Previews
from generator import MfluxGenerator
from models.mlx_setup import prepare_mlx
from scheduler.limits import QueueLimits
from task import Drawn, GenerationParams, Phase, Report, Stage, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

STEP_S = 2.0
LONG = {"seed": 1, "width": 128, "height": 96, "steps": 24}
URGENT = {"seed": 2, "width": 96, "height": 160, "steps": 3}


def fail_to_load(error: ModelLoadError) -> None:
    pytest.fail(str(error))


class Machine:
    """The real queue, worker and mflux, under a clock by which each step takes STEP_S."""

    def __init__(self, data_dir: Path, model: str) -> None:
        self.at = 1000.0
        self.previews = Previews(monotonic=lambda: self.at)
        self.queue = PlayedQueue(
            allow(model), TimingModel(), memory_store(), QueueLimits(preempt=True),
            monotonic=lambda: self.at,
        )  # fmt: skip
        self.at_step: Callable[[GenerationParams, int], None] = lambda params, step: None
        machine = self

        class Slow(MfluxGenerator):
            def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
                def slowly(phase: Phase, steps_done: int, steps_total: int) -> None:
                    machine.at += STEP_S
                    if phase is Phase.DENOISING:
                        machine.at_step(stage.params, steps_done)
                    report(phase, steps_done, steps_total)

                return super().generate(stage, inputs, slowly)

        self.order: list[str] = []
        generator = Slow(data_dir, previews=self.previews)
        self.worker = Worker(self.queue.worker, generator, fail_to_load, turn_to=self._turn_to)
        self.worker.load()

    def _turn_to(self, task_id: str) -> None:
        self.order.append(task_id)
        self.previews.turn_to(task_id)

    def submit(self, priority: int = 0, **changes: Any) -> str:
        return self.queue.submit(params_for(**changes), priority=priority)[0].task_id

    def run(self) -> None:
        """All tasks, one after the other."""
        while self.worker.run_once(0):
            pass
        self.worker._encoder.drain()

    def alone(self, **changes: Any) -> bytes:
        task_id = self.submit(**changes)
        self.run()
        return self.queue.image(task_id, 0)[0]

    def status(self, task_id: str) -> TaskStatus:
        return self.queue.status(task_id).status


@pytest.fixture
def machine(data_dir: Path) -> Iterator[Machine]:
    prepare_mlx()
    machine = Machine(data_dir, "noise-flux1")
    yield machine
    machine.worker.stop(GIVE_UP_S)


@pytest.mark.parametrize("model", ["noise-flux1", "noise-flux2", "noise-z-image", "noise-qwen"])
def test_both_pictures_are_the_same_bytes_as_undisturbed_ones(data_dir: Path, model: str) -> None:
    prepare_mlx()
    machine = Machine(data_dir, model)
    alone = [machine.alone(**LONG), machine.alone(**URGENT)]
    machine.order.clear()
    urgent: list[str] = []
    phases: list[Phase | None] = []

    def at_step(params: GenerationParams, step: int) -> None:
        if params.seed == LONG["seed"] and step in (5, 11):
            urgent.append(machine.submit(priority=1, **URGENT))
        if params.seed == URGENT["seed"]:
            phases.append(machine.queue.status(long).phase)

    machine.at_step = at_step
    long = machine.submit(**LONG)
    machine.run()
    assert machine.order == [long, *urgent]
    assert phases == [Phase.PAUSED] * 4 * 2
    assert [machine.queue.image(task_id, 0)[0] for task_id in (long, *urgent)] == [
        alone[0],
        alone[1],
        alone[1],
    ]
    machine.worker.stop(GIVE_UP_S)


def test_previews_of_a_paused_picture_go_on(machine: Machine) -> None:
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    urgent = ""

    def at_step(params: GenerationParams, step: int) -> None:
        nonlocal urgent
        if params.seed == LONG["seed"] and step == 5:
            urgent = machine.submit(priority=1, **URGENT)
        task_id = long if params.seed == LONG["seed"] else urgent
        settle(machine.previews)
        if jpeg := machine.previews.look(task_id):
            seen[params.seed, step] = Image.open(BytesIO(jpeg)).size

    machine.at_step = at_step
    long = machine.submit(**LONG)
    machine.run()
    small = {of["seed"]: (of["width"] // 8, of["height"] // 8) for of in (LONG, URGENT)}
    assert {1, 2} == {seed for seed, _ in seen}
    assert all(size == small[seed] for (seed, _), size in seen.items())
    made = machine.previews.made
    assert made >= LONG["steps"] - 2 + URGENT["steps"] - 2, "one for each step after the first"


@pytest.mark.parametrize("error", [NotFinite("no numbers"), MemoryError("no room")])
def test_a_preempting_task_that_fails_does_not_change_the_paused_one(
    machine: Machine, error: Exception
) -> None:
    alone, urgent = machine.alone(**LONG), ""

    def at_step(params: GenerationParams, step: int) -> None:
        nonlocal urgent
        if params.seed == LONG["seed"] and step == 5:
            urgent = machine.submit(priority=1, **URGENT)
        if params.seed == URGENT["seed"] and step == 2:
            raise error

    machine.at_step = at_step
    long = machine.submit(**LONG)
    machine.run()
    assert machine.status(urgent) is TaskStatus.FAILED
    assert machine.queue.image(long, 0)[0] == alone


@pytest.mark.parametrize("cancelled", ["long", "urgent"])
def test_either_one_can_be_cancelled_while_one_is_paused(machine: Machine, cancelled: str) -> None:
    alone = {"long": machine.alone(**LONG), "urgent": machine.alone(**URGENT)}
    ids: dict[str, str] = {}
    steps: list[int] = []

    def at_step(params: GenerationParams, step: int) -> None:
        steps.append(params.seed)
        if params.seed == LONG["seed"] and step == 5:
            ids["urgent"] = machine.submit(priority=1, **URGENT)
        if params.seed == URGENT["seed"] and step == 1:
            machine.queue.delete(ids[cancelled])

    machine.at_step = at_step
    ids["long"] = machine.submit(**LONG)
    machine.run()
    other = "urgent" if cancelled == "long" else "long"
    assert machine.status(ids[cancelled]) is TaskStatus.CANCELLED
    assert machine.queue.image(ids[other], 0)[0] == alone[other]
    assert steps.count(URGENT["seed"]) == (4 if other == "urgent" else 2), "it stops at its step"
    assert steps.count(LONG["seed"]) == (25 if other == "long" else 6)


def test_a_worker_that_dies_loses_neither_task_and_suspects_the_one_it_was_drawing(
    machine: Machine,
) -> None:
    class Fault(BaseException):
        """Nothing in the worker catches it."""

    alone, urgent = machine.alone(**LONG), ""

    def at_step(params: GenerationParams, step: int) -> None:
        nonlocal urgent
        if params.seed == LONG["seed"] and step == 5 and not urgent:
            urgent = machine.submit(priority=1, **URGENT)
        if params.seed == URGENT["seed"] and machine.queue.status(urgent).attempt == 1:
            raise Fault

    machine.at_step = at_step
    long = machine.submit(**LONG)
    with pytest.raises(Fault):
        machine.run()
    machine.worker._recover()
    waiting, _ = machine.queue.unfinished(10, 0)
    assert [(task.task_id, task.interruptions) for task in waiting] == [(urgent, 1), (long, 0)]
    machine.run()
    assert machine.queue.image(long, 0)[0] == alone
    assert machine.status(urgent) is TaskStatus.DONE


# -- a real server ---------------------------------------------------------------------------------


@pytest.fixture
def eager(tmp_path: Path) -> Iterator[Callable[[], ServerProcess]]:
    """Starts a server that also pauses pictures that end soon, again and again on its data dir."""
    servers: list[ServerProcess] = []

    def start() -> ServerProcess:
        server = ServerProcess(tmp_path, "--model", "noise-flux1", program=EAGER_SERVER)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def image_of(server: ServerProcess, task_id: str) -> bytes:
    assert server.wait_until_ended(task_id)["status"] == "done"
    return server.get("/image", task_id=task_id, delete="false").content


def test_a_server_draws_an_urgent_picture_inside_a_long_one(
    eager: Callable[[], ServerProcess],
) -> None:
    server = eager()
    big: dict[str, Any] = {"seed": 1, "width": 768, "height": 768, "steps": 50, "format": "PNG"}
    small: dict[str, Any] = {"seed": 2, "steps": 4, "format": "PNG"}
    alone = [image_of(server, server.submit(**of)["task_id"]) for of in (big, small)]
    long = server.submit(**big)["task_id"]
    server.wait_for(long, lambda s: s["steps_done"] >= 2)
    urgent = server.submit(**small, priority=True)
    server.wait_until_ended(urgent["task_id"])
    status = server.get("/status", task_id=long).json()
    assert status["status"] == "running"
    assert [image_of(server, task_id) for task_id in (long, urgent["task_id"])] == alone
    assert f"task {long} is paused" in "".join(server.log)


def test_kill_9_while_a_task_is_paused_loses_neither_and_draws_both_again(
    eager: Callable[[], ServerProcess],
) -> None:
    server = eager()
    big: dict[str, Any] = {"seed": 1, "width": 1024, "height": 1024, "steps": 30, "format": "PNG"}
    long = server.submit(**big)["task_id"]
    server.wait_for(long, lambda s: s["steps_done"] >= 2)
    urgent = server.submit(seed=2, width=512, height=512, steps=10, priority=True)["task_id"]
    paused = server.wait_for(long, lambda s: s["phase"] == "paused")
    assert paused["status"] == "running"
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(GIVE_UP_S)

    server = eager()
    assert server.wait_until_ended(urgent)["status"] == "done"
    assert server.get("/status", task_id=long).json()["status"] in ("waiting", "running")
    log = "".join(server.log)
    assert server.wait_until_ended(long)["status"] == "done"
    assert "is paused" not in log
    assert requests.get(server.url + "/queue", timeout=60).json()["length"] == 0
