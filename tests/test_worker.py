"""The worker's step, with the real queue; the generator is a fake where failing is the subject."""

from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for
from fake_generator import FakeGenerator
from memory_stores import memory_store
from PIL import Image

import images
from errors import ModelLoadError, StorageUnavailable
from generator import MfluxGenerator
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Lora
from scheduler.health import ServerState
from task import Drawn, GenerationParams, Phase, Report, Stage, TaskStatus
from timing_model import TimingModel
from workers import encoder, endings
from workers.endings import Endings
from workers.worker import Worker


@pytest.fixture
def queue() -> PlayedQueue:
    return PlayedQueue(allow("noise-flux1"), TimingModel(), memory_store())


def submit(queue: PlayedQueue, prompt: str = "x") -> str:
    return queue.submit(params_for(prompt, format="JPEG"), priority=0)[0].task_id


def test_an_order_that_the_options_do_not_allow_does_not_end_the_worker(
    queue: PlayedQueue, data_dir: Path
) -> None:
    prepare_mlx()
    generator = MfluxGenerator(data_dir, lora_path=allow("noise-flux1").lora)
    worker = Worker(queue.worker, generator, fail_to_load)
    worker.load()
    elsewhere = replace(queue.allowed.first_spec, quantize=8, loras=(Lora("../elsewhere", 1.0),))
    queue.control.order_load(elsewhere)
    assert worker.run_once(0)
    generator.unload()
    queue.control.order_load(elsewhere)
    assert worker.run_once(0)
    assert queue.health().loading is None
    task_id = submit(queue)
    assert worker.run_once(0)
    assert worker.stop(GIVE_UP_S)
    assert queue.status(task_id).status is TaskStatus.DONE


def fail_to_load(error: ModelLoadError) -> None:
    pytest.fail(str(error))


def test_a_failure_in_real_mflux_affects_only_its_task(queue: PlayedQueue, data_dir: Path) -> None:
    class FailsAtStep2(MfluxGenerator):
        def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
            def report_and_fail(phase: Phase, steps_done: int, steps_total: int) -> None:
                report(phase, steps_done, steps_total)
                if stage.params.prompt == "bad" and steps_done == 2:
                    raise MemoryError("no room for step 3")

            return super().generate(stage, inputs, report_and_fail)

    prepare_mlx()
    worker = Worker(queue.worker, FailsAtStep2(data_dir), fail_to_load)
    bad, good = submit(queue, "bad"), submit(queue, "good")
    worker.load()
    assert worker.run_once(0)
    assert worker.run_once(0)
    assert worker.stop(GIVE_UP_S)
    view = queue.status(bad)
    assert (view.status, view.error_code) == (TaskStatus.FAILED, "out_of_memory")
    assert view.error
    assert "64 x 64 pixels with noise-flux1" in view.error
    assert queue.status(good).status is TaskStatus.DONE
    assert queue.image(good)[0].startswith(b"\xff\xd8")


def test_a_picture_that_cannot_be_encoded_fails_its_task(queue: PlayedQueue) -> None:
    worker = Worker(queue.worker, FakeGenerator(lambda *_: None), fail_to_load)  # type: ignore[arg-type]
    task_id = submit(queue)
    assert worker.run_once(0)
    worker.stop(0)
    assert queue.status(task_id).status is TaskStatus.FAILED


@pytest.mark.parametrize("options", [{}, {"mark_generated": False}], ids=["by default", "off"])
def test_files_are_marked_as_generated_unless_the_operator_switches_it_off(
    queue: PlayedQueue, options: dict[str, bool]
) -> None:
    worker = Worker(queue.worker, FakeGenerator(), fail_to_load, **options)  # type: ignore[arg-type]
    task_ids = [
        queue.submit(params_for(format=format, metadata=metadata))[0].task_id
        for format in images.EXTENSIONS
        for metadata in (True, False)
    ]
    while worker.run_once(0):
        pass
    assert worker.stop(GIVE_UP_S)
    marked = {images.is_marked_as_generated(queue.image(task_id)[0]) for task_id in task_ids}
    assert marked == {not options}


def test_a_task_starts_the_moment_it_is_submitted(queue: PlayedQueue) -> None:
    started = Event()

    def draw(_: GenerationParams, __: Report) -> Image.Image:
        started.set()
        return Image.new("RGB", (16, 16))

    worker = Worker(queue.worker, FakeGenerator(draw), fail_to_load)
    worker.start()
    submit(queue)
    assert started.wait(GIVE_UP_S)
    assert worker.stop(GIVE_UP_S)


def test_stop_leaves_the_running_task_at_its_next_report_and_it_waits_again(
    queue: PlayedQueue,
) -> None:
    reached, go_on = Event(), Event()

    def draw(_: GenerationParams, report: Report) -> Image.Image:
        reached.set()
        go_on.wait(GIVE_UP_S)
        report(Phase.DENOISING, 1, 4)
        pytest.fail("the report must not return")

    worker = Worker(queue.worker, FakeGenerator(draw), fail_to_load)
    worker.start()
    task_id = submit(queue)
    assert reached.wait(GIVE_UP_S)
    assert not worker.stop(0), "it cannot have ended inside a step"
    go_on.set()
    assert worker.stop(GIVE_UP_S)
    assert queue.status(task_id).status is TaskStatus.WAITING


def test_stop_stores_what_is_drawn_before_the_task_waits_again(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, second, stopped, drained = Event(), Event(), Event(), Event()
    encode, drain = images.encode_image, encoder.Encoder.drain

    def encode_late(*arguments: Any, **options: Any) -> bytes:
        encoding.set()
        assert drained.wait(GIVE_UP_S)
        return encode(*arguments, **options)

    def see_drain(own: encoder.Encoder) -> None:
        drained.set()
        drain(own)

    def draw(params: GenerationParams, report: Report) -> Image.Image:
        if params.seed == 2:
            assert encoding.wait(GIVE_UP_S)
            second.set()
            assert stopped.wait(GIVE_UP_S)
            report(Phase.DENOISING, 1, 4)
            pytest.fail("the report must not return")
        return Image.new("RGB", (16, 16))

    monkeypatch.setattr(encoder, "encode_image", encode_late)
    monkeypatch.setattr(encoder.Encoder, "drain", see_drain)
    worker = Worker(queue.worker, FakeGenerator(draw), fail_to_load)
    worker.start()
    task_id = queue.submit(params_for(seed=1, count=3))[0].task_id
    assert second.wait(GIVE_UP_S)
    queue.worker.stop()
    stopped.set()
    assert worker.stop(GIVE_UP_S)
    task = queue.status(task_id)
    assert (task.status, task.images_done) == (TaskStatus.WAITING, 1)


def test_a_model_that_cannot_be_loaded_is_reported_once_and_ends_the_thread(
    queue: PlayedQueue,
) -> None:
    class Unloadable(FakeGenerator):
        def load(self, weights: LoadSpec, report: object = None) -> int | None:
            raise ModelLoadError("no weights")

    received: list[ModelLoadError] = []
    worker = Worker(queue.worker, Unloadable(), received.append)
    worker.start()
    assert worker.stop(GIVE_UP_S)
    assert [str(error) for error in received] == ["no weights"]
    assert queue.state() is ServerState.FAILED


@pytest.mark.parametrize(("drain_s", "tries"), [(GIVE_UP_S, 3), (0.0, 1)])
def test_what_the_disk_refuses_is_tried_again_while_the_server_drains(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch, drain_s: float, tries: int
) -> None:
    monkeypatch.setattr(endings, "RETRY_S", 0.001)
    answers = [StorageUnavailable("full"), StorageUnavailable("full"), None]
    tried: list[StorageUnavailable | None] = []

    def change() -> None:
        tried.append(answers[len(tried)])
        if error := tried[-1]:
            raise error

    ends = Endings(queue.worker)
    ends.stop(drain_s)
    ends.insist(change)
    assert len(tried) == tries
