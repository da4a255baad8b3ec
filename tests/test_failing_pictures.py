"""Pictures that fail while they are drawn: NaN, too little memory, extras that raise."""

import logging
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, PlayedQueue, StartServer, allow, params_for, until
from memory_stores import memory_store
from on_its_thread import FILES, PROMPTED
from PIL import Image
from test_generator import OnItsThread

from errors import ModelLoadError, NotFinite, OutOfMemory
from generation.finite import check_finite
from generation.previews import Previews
from generation.prompt_cache import PromptCache
from generator import MfluxGenerator
from images import to_png
from models.mlx_setup import prepare_mlx
from task import Stage, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

ASKED: dict[str, dict[str, Any]] = {
    **PROMPTED,
    "noise-seedvr2": {"init_image": FILES["first"], "upscale": 2.0, "prompt": ""},
}
NO_MEMORY = RuntimeError(
    "[metal::malloc] Attempting to allocate 21474836480 bytes which is greater than the maximum "
    "allowed buffer size of 17179869184 bytes."
)


@pytest.fixture(scope="module", autouse=True)
def pictures(data_dir: Path) -> None:
    for name in ("first", "second"):
        (data_dir / f"{name}.png").write_bytes(to_png(Image.new("RGB", (64, 64), "teal")))
    (data_dir / "mask.png").write_bytes(to_png(Image.new("L", (64, 64), 255)))


@pytest.fixture(scope="module")
def tiny(data_dir: Path) -> OnItsThread:
    return OnItsThread("noise-flux1", data_dir)


def on(generating: OnItsThread, function: Callable[[], Any]) -> Any:
    return generating._thread.submit(function).result()


def multiply(generating: OnItsThread, part: str, factor: float) -> None:
    """Change all weights of a part of the loaded model."""
    from mlx.utils import tree_map

    module = getattr(generating.loaded.pipeline, part)
    on(generating, lambda: module.update(tree_map(lambda a: a * factor, module.parameters())))


# -- NaN -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_no_pipeline_makes_a_picture_of_nan(name: str, part: str, data_dir: Path) -> None:
    generating = OnItsThread(name, data_dir)
    multiply(generating, part, float("nan"))
    with pytest.raises(NotFinite, match="not numbers"):
        generating.generate(params_for(**{"steps": 2, **ASKED[name]}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_no_number_is_enough(value: float) -> None:
    prepare_mlx()
    import mlx.core as mx

    array = mx.zeros((1, 3, 64, 64), mx.bfloat16)
    check_finite(array, "a picture")
    array[0, 1, 2, 3] = value
    with pytest.raises(NotFinite, match="a picture"):
        check_finite(array, "a picture")


def test_embeddings_of_nan_are_not_kept_for_the_next_picture(data_dir: Path) -> None:
    generating = OnItsThread("noise-flux1", data_dir)
    before = generating.generate(params_for("a fox")).tobytes()
    encoder = generating.loaded.pipeline.clip_text_encoder
    kept = encoder.parameters()
    multiply(generating, "clip_text_encoder", float("nan"))
    with pytest.raises(NotFinite):
        generating.generate(params_for("a cat"))
    cache: PromptCache = generating.loaded.hook.prompt_cache
    assert (len(cache), cache.currsize) == (0, 0)
    on(generating, lambda: encoder.update(kept))
    assert generating.generate(params_for("a fox")).tobytes() == before
    assert generating.generate(params_for("a cat")).tobytes() != before


def test_latents_of_nan_make_no_preview_and_teach_nothing() -> None:
    import numpy as np

    previews = Previews()
    previews.turn_to("a")
    with previews.picture("flux", "flux"):
        assert previews.look("a") is None
        latents = np.full((1, 16, 64), np.nan, np.float32)
        previews.draw(latents, 64, 64)
        previews.keep(latents, 64, 64)
        previews.learn(Image.new("RGB", (64, 64)))
        assert previews._thread.stop(GIVE_UP_S)
        assert previews._map_of(previews._now).pictures == 0
    assert previews.made == 0
    assert previews.look("a") is None


# -- the whole way, with the real queue and worker -------------------------------------------------


class Failing(MfluxGenerator):
    """Real mflux; pictures of a prompt in `errors` fail with that error in their second step."""

    errors: dict[str, BaseException]

    def generate(self, stage: Stage, inputs: Path, report: Any) -> Any:
        def report_and_fail(phase: Any, steps_done: int, steps_total: int) -> None:
            report(phase, steps_done, steps_total)
            if steps_done == 2 and stage.params.prompt in self.errors:
                raise self.errors[stage.params.prompt]

        return super().generate(stage, inputs, report_and_fail)


class Shop:
    """A queue and its worker with real mflux, whose thread is the test's own."""

    def __init__(self, data_dir: Path, *models: str, **options: Any) -> None:
        prepare_mlx()
        self.queue = PlayedQueue(allow(*models), TimingModel(), memory_store())
        self.generator = Failing(data_dir, **options)
        self.generator.errors = {}
        self.failures: list[ModelLoadError] = []
        self.worker = Worker(self.queue.worker, self.generator, self.failures.append)
        assert self.worker.load()

    def submit(self, prompt: str, **fields: Any) -> str:
        return self.queue.submit(params_for(prompt, **fields), priority=0)[0].task_id

    def run(self, *task_ids: str) -> list[tuple[TaskStatus, str | None, str | None]]:
        """Run as many tasks as there are ids; how each ended."""
        for _ in task_ids:
            assert self.worker.run_once(0)
        until(lambda: not self.queue.health().running)  # the encoder has work
        views = [self.queue.status(task_id) for task_id in task_ids]
        return [(view.status, view.error_code, view.error) for view in views]


def test_a_picture_with_nan_fails_its_task_and_gives_no_sample(data_dir: Path) -> None:
    from mlx.utils import tree_map

    shop = Shop(data_dir, "noise-flux1")
    good, bad = shop.submit("good"), shop.submit("bad")
    (done,) = shop.run(good)
    samples = shop.queue.scheduler.store.timings.samples()
    pipeline = next(iter(shop.generator._loaded.values())).pipeline
    whole = pipeline.vae.decoder.parameters()
    pipeline.vae.decoder.update(tree_map(lambda a: a * float("nan"), whole))
    (failed,) = shop.run(bad)
    assert (done[0], failed[0], failed[1]) == (TaskStatus.DONE, TaskStatus.FAILED, "not_finite")
    assert failed[2]
    assert "not numbers" in failed[2]
    assert shop.queue.scheduler.store.timings.samples() == samples
    pipeline.vae.decoder.update(whole)
    again = shop.submit("good")
    assert shop.run(again)[0][0] is TaskStatus.DONE
    assert shop.queue.image(again)[0] == shop.queue.image(good)[0]


def test_too_little_memory_fails_the_task_and_frees_the_other_models(data_dir: Path) -> None:
    shop = Shop(data_dir, "noise-flux1", "noise-flux2", models_in_memory=2)
    first = shop.submit("good", model="noise-flux2")
    assert shop.run(first)[0][0] is TaskStatus.DONE
    assert shop.generator.resident == ("noise-flux2", "noise-flux1")
    shop.generator.errors = {"bad": NO_MEMORY, "worse": MemoryError()}
    failed = shop.run(shop.submit("bad", model="noise-flux2"), shop.submit("worse"))
    assert [one[:2] for one in failed] == [(TaskStatus.FAILED, "out_of_memory")] * 2
    assert failed[0][2] == (
        "This machine's memory does not suffice for 64 x 64 pixels with noise-flux2: ask for a "
        "smaller picture, or start the server with --quantize 8."
    )
    assert set(shop.generator.resident) == {"noise-flux1"}
    assert shop.run(shop.submit("good"))[0][0] is TaskStatus.DONE


def test_a_model_for_which_memory_does_not_suffice_fails_its_task_alone(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(data_dir, "noise-flux1", "noise-flux2")

    def no_memory(*_: Any) -> Any:
        raise NO_MEMORY

    monkeypatch.setattr("generation.pipelines._class_of", no_memory)
    (failed,) = shop.run(shop.submit("x", model="noise-flux2"))
    assert failed[:2] == (TaskStatus.FAILED, "model_load_failed")
    assert failed[2]
    assert "memory" in failed[2]
    monkeypatch.undo()
    assert shop.run(shop.submit("x", model="noise-flux1"))[0][0] is TaskStatus.DONE


def test_memory_of_a_failed_picture_is_freed(tiny: OnItsThread) -> None:
    import mlx.core as mx

    def fail(*_: Any) -> None:
        raise NO_MEMORY

    tiny.generate(params_for())
    before = mx.get_active_memory()
    for _ in range(3):
        with pytest.raises(OutOfMemory):
            tiny.generate(params_for(width=512, height=512), fail)
    assert mx.get_active_memory() <= before + 200_000
    assert mx.get_cache_memory() < 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's memory")
def test_a_task_for_which_mlx_ends_the_process_is_failed_and_no_other_one_is_lost(
    start_server: StartServer,
) -> None:
    """On a CPU, MLX ends with a signal where the system gives it no memory. What starts the server
    again here is a supervisor in operation."""
    import resource

    options = ("--model", "noise-flux1", "--no-memory-check", "--max-pixels", str(3072 * 3072))
    server = start_server(*options)
    server.wait_until_ended(server.submit()["task_id"])
    deaths, deadly, behind = 0, "", ""
    while deaths < 4:
        taken = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0])
        limit = taken * resource.getpagesize() + 500_000_000
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, limit))
        if not deadly:
            deadly = server.submit(width=3072, height=3072, steps=1)["task_id"]
            behind = server.submit()["task_id"]
        assert server.process.wait(GIVE_UP_S) < 0
        server.stop()
        deaths += 1
        server = start_server(*options)
        status = server.get("/status", task_id=deadly).json()
        if status["status"] == "failed":
            break
    assert status["error"]["code"] == "ended_too_often"
    assert "too little memory" in status["error"]["message"]
    assert server.wait_until_ended(behind)["status"] == "done"


# -- extras ----------------------------------------------------------------------------------------


def test_previews_and_metadata_that_raise_cost_no_picture(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(Previews):
        def must_generate(self) -> bool:
            raise ValueError("of a step")

        def keep(self, latents: Any, width: int, height: int) -> None:
            raise ValueError("of the last latents")

        def learn(self, picture: Image.Image) -> None:
            raise ValueError("of the picture")

    def no_metadata(*_: Any) -> Any:
        raise ValueError("of the metadata")

    monkeypatch.setattr("generator.metadata", no_metadata)
    shop = Shop(data_dir, "noise-flux1", previews=Raising())
    task_id = shop.submit("x")
    with caplog.at_level(logging.ERROR):
        assert shop.run(task_id)[0][0] is TaskStatus.DONE
    picture = Image.open(BytesIO(shop.queue.image(task_id)[0]))
    assert picture.getbbox()
    assert {"of a step", "of the last latents", "of the picture", "of the metadata"} <= {
        str(record.exc_info[1]) for record in caplog.records if record.exc_info
    }


def test_metadata_that_cannot_be_written_is_left_out_of_the_file(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generator.metadata", lambda *_: {"prompt": object()})
    shop = Shop(data_dir, "noise-flux1")
    task_id = shop.submit("x", format="JPEG")
    assert shop.run(task_id)[0][0] is TaskStatus.DONE
    assert shop.queue.image(task_id)[0].startswith(b"\xff\xd8")
