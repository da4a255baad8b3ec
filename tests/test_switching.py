"""Switching between models: the queue and the worker with a clock and a generator of the test, and
what the cache of Hugging Face is said to hold."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for
from huggingface_hub import constants
from mflux.models.common.resolution.model_revisions import ModelRevisions
from PIL import Image

from allowed import Allowed
from api.models_api import download_answer, model_answer
from errors import ModelLoadError, NoWorker, ServerError
from models.hub_cache import bytes_on_disk, cache_dir, is_present, weight_files
from models.model_catalog import LoadSpec, LoraFit, Model
from scheduler.health import QueueHealth, ServerState
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from supervision import SupervisedQueue
from task import Drawn, InputImage, Memory, Phase, Report, Stage, Task, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

OFFER = allow("noise-flux1", "noise-flux2", "noise-qwen", "noise-seedvr2")


class Clock:
    """Time passes when the generator works, and not else."""

    at = 1000.0

    def __call__(self) -> float:
        return self.at


class Gpu:
    """Loads and draws by the clock, and notes what it did."""

    LOAD_S, STEP_S, HELPER_S = 7.0, 1.0, 20.0

    def __init__(self, clock: Clock, models_in_memory: int) -> None:
        self.memory = Memory()
        self.resident: tuple[str, ...] = ()
        self.loads: list[str] = []
        self.drawn: list[tuple[str, str, int]] = []
        self.broken: set[str] = set()
        self.bytes_of: dict[str, int] = {}
        self.prepared: list[tuple[str, str]] = []
        self._encoded: set[tuple[str, str]] = set()
        self.on_step: Callable[[Stage, int], None] = lambda stage, step: None
        self._clock = clock
        self._models_in_memory = models_in_memory

    def load(self, weights: LoadSpec, report: object = None) -> int | None:
        kept = list(self.resident[: self._models_in_memory - 1])
        while self.memory.room_bytes and kept and self._bytes(weights.key, *kept) > 10:
            kept.pop()
        self.resident = tuple(kept)
        loaded = {key: self._bytes(key) for key in (*self.memory.loaded_bytes, weights.key)}
        self.memory = replace(self.memory, loaded_bytes=loaded)
        self._clock.at += self.LOAD_S
        self.loads.append(weights.key)
        if weights.model.name in self.broken:
            raise ModelLoadError(f"There are no weights of {weights.model.name}.")
        self.resident = (weights.key, *self.resident)
        return None

    def _bytes(self, *keys: str) -> int:
        return sum(self.bytes_of.get(key, 0) for key in keys)

    def save_copies(self, may_continue: Callable[[], bool]) -> bool:
        return False

    def apply_adapters(self, weights: LoadSpec) -> None:
        assert weights.key in self.resident

    def unload(self) -> None:
        self.resident = ()

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        key, steps = stage.load_spec.key, stage.params.steps
        assert key in self.resident
        self.resident = (key, *(other for other in self.resident if other != key))
        if stage.load_spec.model.upscaler:
            assert (inputs / f"{_init_image(stage).file}.png").is_file()
        if stage.load_spec.model.upscaler or (key, stage.params.prompt) not in self._encoded:
            self._clock.at += 0.5
        self._encoded.add((key, stage.params.prompt))
        report(Phase.DENOISING, 0, steps)
        for step in range(1, steps + 1):
            self._clock.at += self.STEP_S
            self.on_step(stage, step)
            report(Phase.DENOISING, step, steps)
        report(Phase.DECODING, steps, steps)
        self._clock.at += 0.5
        self.drawn.append((key, stage.params.prompt, stage.params.seed))
        return Drawn(Image.new("RGB", stage.params.final_size), {"seed": stage.params.seed})

    def prepare(self, stage: Stage, inputs: Path, report: Report) -> str | Image.Image:
        report(Phase.DENOISING, 0, 1)
        self._clock.at += self.HELPER_S
        report(Phase.DENOISING, 1, 1)
        report(Phase.DECODING, 1, 1)
        self.prepared.append((stage.load_spec.key, stage.params.prompt))
        if stage.load_spec.model.makes == "prompt":
            return '{"short_description": "written"}'
        return Image.new("RGB", (32, 32), "white")

    def refusal(self, stage: Stage, *, memory: bool = True) -> ServerError | None:
        return None

    def check_adapters(self, weights: LoadSpec) -> tuple[str, ...]:
        return ()

    def fit_of_adapter(self, path: Path, weights: LoadSpec) -> LoraFit:
        return LoraFit(1, 1)


def _init_image(stage: Stage) -> InputImage:
    assert stage.params.init_image
    return stage.params.init_image


class AtOnce(SupervisedQueue[Any]):
    """Encodes an image where it was drawn, while the clock stands still."""

    def put(self, item: Any) -> None:
        self._handle(item)


class Studio:
    """A queue and its worker, whose thread is the test's own."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        in_memory: int = 1,
        max_delay_s: float = 0.0,
        unload_after_s: float = 0.0,
    ) -> None:
        self.clock = Clock()
        self.submitted = 0
        self.gpu = Gpu(self.clock, in_memory)
        rules = QueueLimits(models_in_memory=in_memory, max_delay_s=max_delay_s)
        self.queue = PlayedQueue(
            OFFER, TimingModel(), TaskStore(None), rules, monotonic=self.clock, now=self.clock
        )
        monkeypatch.setattr("workers.worker.time.monotonic", self.clock)
        self.failures: list[ModelLoadError] = []
        self.worker = Worker(
            self.queue.worker, self.gpu, self.failures.append, unload_after_s=unload_after_s
        )
        encoder = self.worker._encoder
        encoder._pictures = AtOnce("encoder", encoder.encode, lambda item: None)

    def submit(self, model: str, prompt: str = "", *, priority: int = 0, **fields: Any) -> Task:
        self.submitted += 1
        params = params_for(prompt or str(self.submitted), model=model, **fields)
        return self.queue.submit(params, priority=priority)[0]

    def run_one(self) -> bool:
        """One task or load; whether there was one."""
        return self.worker.run_once(0)

    def run_all(self) -> None:
        while self.run_one():
            pass

    def status(self, task_id: str) -> Task:
        return self.queue.status(task_id)

    @property
    def order(self) -> list[str]:
        return [prompt for _, prompt, _ in self.gpu.drawn]


@pytest.fixture
def studio_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Studio]]:
    started: list[Studio] = []

    def start(**options: Any) -> Studio:
        started.append(Studio(monkeypatch, **options))
        started[-1].worker.load()
        return started[-1]

    yield start
    for studio in started:
        studio.worker.stop(0)


StudioOf = Callable[..., Studio]


def test_without_affinity_tasks_run_first_come_first_served(studio_of: StudioOf) -> None:
    studio = studio_of(max_delay_s=0)
    for number in range(6):
        studio.submit(("noise-flux1", "noise-flux2")[number % 2], str(number))
    studio.run_all()
    assert studio.order == list("012345")
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2"] * 3


def test_with_affinity_tasks_of_a_model_run_together_level_by_level(studio_of: StudioOf) -> None:
    studio = studio_of(max_delay_s=3600)
    for number in range(6):
        studio.submit(("noise-flux1", "noise-flux2")[number % 2], str(number))
    for number in range(4):
        studio.submit(("noise-qwen", "noise-flux2")[number % 2], f"u{number}", priority=1)
    studio.run_all()
    assert studio.order == ["u0", "u2", "u1", "u3", "0", "2", "4", "1", "3", "5"]
    assert len(studio.gpu.loads) == 5


def test_two_models_in_memory_are_not_loaded_again_and_the_oldest_makes_room(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=2)
    for model in ("noise-flux1", "noise-flux2") * 3:
        studio.submit(model)
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2"]
    for model in ("noise-flux1", "noise-qwen", "noise-flux1", "noise-flux2"):
        studio.submit(model)
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2", "noise-qwen", "noise-flux2"]
    assert [w.key for w in studio.queue.health().loaded] == ["noise-flux2", "noise-flux1"]


def test_a_large_model_that_made_others_room_does_not_make_memory_smaller_for_good(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=3)
    studio.gpu.memory = Memory(room_bytes=10)
    studio.gpu.bytes_of = {"noise-flux1": 3, "noise-flux2": 3, "noise-qwen": 9}
    studio.submit("noise-qwen")
    studio.run_all()
    assert [w.key for w in studio.queue.health().loaded] == ["noise-qwen"]
    for model in ("noise-flux1", "noise-flux2"):
        studio.submit(model)
    studio.run_all()
    assert [w.key for w in studio.queue.health().loaded] == ["noise-flux2", "noise-flux1"]
    for model in ("noise-flux1", "noise-flux2") * 2:
        assert forecast_of(studio.submit(model)).switches == 0
    behind_the_large_one = [studio.submit(model) for model in ("noise-qwen", "noise-flux1")]
    assert [forecast_of(task).switches for task in behind_the_large_one] == [1, 2]
    before = len(studio.gpu.loads)
    studio.run_all()
    assert studio.gpu.loads[before:] == ["noise-qwen", "noise-flux1"]


@pytest.mark.parametrize("room_bytes", [0, 10])
@pytest.mark.parametrize("in_memory", [1, 2, 3])
@pytest.mark.parametrize("max_delay_s", [0.0, 3600.0])
def test_what_is_forecast_at_submit_comes_true_where_the_work_is_as_learned(
    studio_of: StudioOf, in_memory: int, max_delay_s: float, room_bytes: int
) -> None:
    studio = studio_of(in_memory=in_memory, max_delay_s=max_delay_s)
    studio.gpu.memory = Memory(room_bytes=room_bytes)
    studio.gpu.bytes_of = {"noise-flux1": 3, "noise-flux2": 4, "noise-qwen": 6, "noise-seedvr2": 2}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("noise-flux1", {}),
        ("noise-flux2", {"count": 3}),
        ("noise-qwen", {"upscale": 2.0, "upscaler": "noise-seedvr2"}),
        ("noise-flux1", {"count": 2, "upscale": 2.0, "upscaler": "noise-seedvr2"}),
        ("noise-qwen", {}),
        ("noise-flux2", {}),
    ]
    for _ in range(8):  # until it is learned
        for model, fields in asked:
            studio.submit(model, **fields)
            studio.run_all()
    for _ in range(3):
        views = [studio.submit(model, **fields) for model, fields in asked]
        forecast = {
            view.task_id: studio.clock.at + (forecast_of(studio.status(view.task_id)).end_s)
            for view in views
        }
        listed, length = studio.queue.unfinished(100, 0)
        assert length == len(asked)
        for view in listed:
            now = studio.status(view.task_id)
            assert forecast_of(view).end_s == pytest.approx(forecast_of(now).end_s)
        for _ in asked:
            assert studio.run_one()
        for task_id, end_at in forecast.items():
            view = studio.status(task_id)
            assert view.status is TaskStatus.DONE
            assert view.ended_at == pytest.approx(end_at, abs=0.1)


def test_the_weights_are_freed_when_nothing_comes_and_their_loading_is_forecast(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(unload_after_s=60)
    studio.submit("noise-flux1")
    studio.run_all()
    before = studio.queue.health()
    assert [w.key for w in before.loaded] == ["noise-flux1"]
    studio.clock.at += 59
    studio.worker.unload_if_idle()
    assert studio.queue.health().loaded == before.loaded
    params = params_for(model="noise-flux1")
    loaded_s = studio.queue.estimate(params, priority=0)[0].end_s
    studio.clock.at += 1
    studio.worker.unload_if_idle()
    assert studio.gpu.resident == ()
    health = studio.queue.health()
    assert (health.loaded, health.loading, health.state) == ((), None, ServerState.READY)
    cold = studio.queue.estimate(params, priority=0)[0]
    assert cold.end_s == pytest.approx(loaded_s + Gpu.LOAD_S)
    assert cold.switches == 1
    studio.submit("noise-flux1")
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux1"]


def test_weights_that_cannot_be_loaded_fail_their_task_and_leave_the_others(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=2)
    studio.gpu.broken.add("noise-qwen")
    tasks = [studio.submit(model).task_id for model in ("noise-flux2", "noise-qwen", "noise-flux1")]
    studio.run_all()
    views = [studio.status(task_id) for task_id in tasks]
    assert [view.status for view in views] == [
        TaskStatus.DONE,
        TaskStatus.FAILED,
        TaskStatus.DONE,
    ]
    assert (views[1].error_code, views[1].error) == (
        "model_load_failed",
        "There are no weights of noise-qwen.",
    )
    health = studio.queue.health()
    assert (health.state, health.loading) == (ServerState.READY, None)
    assert health.last_error is None  # a later task is done
    assert studio.failures == []


def test_a_load_ordered_by_the_operator_runs_once_between_two_tasks(
    studio_of: StudioOf,
) -> None:
    studio = studio_of(in_memory=2)
    qwen = OFFER.model("noise-qwen")
    weights = LoadSpec(qwen, qwen.pipelines[0], None)
    studio.submit("noise-flux1", "first")
    studio.submit("noise-flux1", "second")
    assert studio.run_one()
    for _ in range(3):
        studio.queue.control.order_load(weights)
    assert studio.queue.claim(0) is None, "loading comes first"
    assert studio.run_one()
    assert (studio.gpu.loads, studio.order) == (["noise-flux1", "noise-qwen"], ["first"])
    studio.run_all()
    assert studio.order == ["first", "second"]
    studio.gpu.broken.add("noise-flux2")
    flux2 = OFFER.model("noise-flux2")
    studio.queue.control.order_load(LoadSpec(flux2, flux2.pipelines[0], None))
    assert studio.run_one()
    error = studio.queue.health().last_error
    assert error
    assert error.message == "There are no weights of noise-flux2."
    assert studio.queue.state() is ServerState.READY
    studio.queue.scheduler.stop()
    with pytest.raises(NoWorker):
        studio.queue.control.order_load(weights)


def test_a_task_of_two_stages_generates_all_images_and_then_upscales_them(
    studio_of: StudioOf,
) -> None:
    studio = studio_of()
    done: list[tuple[int, int]] = []
    task_id = studio.submit(
        "noise-flux1", count=3, steps=2, upscale=2.0, upscaler="noise-seedvr2"
    ).task_id
    studio.gpu.on_step = lambda stage, step: done.append(
        (studio.status(task_id).images_done, studio.status(task_id).steps_total)
    )
    studio.run_all()
    keys = [key for key, _, _ in studio.gpu.drawn]
    assert keys == ["noise-flux1"] * 3 + ["noise-seedvr2"] * 3
    assert [seed for _, _, seed in studio.gpu.drawn] == [1, 2, 3] * 2
    assert studio.gpu.loads == ["noise-flux1", "noise-seedvr2"]
    assert done == [(0, 2)] * 6 + [(0, 1), (1, 1), (2, 1)]
    view = studio.status(task_id)
    assert (view.status, view.images_done, len(view.measured)) == (TaskStatus.DONE, 3, 6)
    for index in range(3):
        assert studio.queue.image(task_id, index)[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("moment", [("noise-flux1", 1), ("noise-seedvr2", 1)])
def test_a_cancel_in_any_stage_ends_it_and_the_next_task_runs(
    studio_of: StudioOf, moment: tuple[str, int]
) -> None:
    studio = studio_of()
    task_id = studio.submit("noise-flux1", count=2, upscale=2.0, upscaler="noise-seedvr2").task_id
    behind = studio.submit("noise-flux1", "behind").task_id

    def cancel(stage: Stage, step: int) -> None:
        if (stage.load_spec.key, step) == moment and stage.params.prompt != "behind":
            studio.queue.delete(task_id)
            assert 0 <= forecast_of(studio.status(behind)).end_s < 60

    studio.gpu.on_step = cancel
    studio.run_all()
    assert studio.status(task_id).status is TaskStatus.CANCELLED
    assert studio.status(behind).status is TaskStatus.DONE
    assert studio.queue.state() is ServerState.READY


def test_an_upscaler_that_cannot_be_loaded_fails_the_task_that_was_drawn(
    studio_of: StudioOf,
) -> None:
    studio = studio_of()
    studio.gpu.broken.add("noise-seedvr2")
    task_id = studio.submit("noise-flux1", upscale=2.0, upscaler="noise-seedvr2").task_id
    studio.run_all()
    view = studio.status(task_id)
    assert (view.status, view.error_code) == (TaskStatus.FAILED, "model_load_failed")
    assert studio.queue.health().loaded == ()
    assert forecast_of(studio.submit("noise-flux1")).end_s


def test_a_wait_never_jumps_while_a_task_of_two_stages_runs(studio_of: StudioOf) -> None:
    """The forecast of the end stays where it is, through both stages and the loading between."""
    studio = studio_of()
    asked: dict[str, Any] = {"count": 2, "upscale": 2.0, "upscaler": "noise-seedvr2"}
    for _ in range(8):
        studio.submit("noise-flux1", **asked)
        studio.run_all()
    running = studio.submit("noise-flux1", **asked).task_id
    behind = studio.submit("noise-flux1").task_id
    ends: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        ends.append(
            (
                studio.clock.at + forecast_of(studio.status(running)).end_s
                if studio.queue.length > 1
                else 0,
                studio.clock.at + forecast_of(studio.status(behind)).end_s,
            )
        )

    load = studio.gpu.load

    def noting_load(weights: LoadSpec, report: object = None) -> int | None:
        note()
        bits = load(weights)
        note()
        return bits

    studio.gpu.on_step = note
    studio.gpu.load = noting_load  # type: ignore[method-assign]
    note()
    assert studio.run_one()
    for of_running, of_behind in ends:
        assert of_running == pytest.approx(ends[0][0], abs=0.1)
        assert of_behind == pytest.approx(ends[0][1], abs=0.1)


def test_tasks_from_before_a_start_that_allows_less_are_failed_with_the_reason(
    tmp_path: Path,
) -> None:
    store = TaskStore(tmp_path)
    queue = PlayedQueue(OFFER, TimingModel(), store)
    asked: dict[str, dict[str, Any]] = {
        "kept": {},
        "model": {"model": "noise-qwen"},
        "upscaler": {"upscale": 2.0, "upscaler": "noise-seedvr2"},
        "lora": {"loras": (("gone", 1.0),)},
        "oldest": {"model": ""},
    }
    ids = {}
    for name, changes in asked.items():
        params = params_for(**{"model": "noise-flux1", **changes})
        ids[name] = f"task-{name}"
        store.insert(Task(ids[name], params, 0, created_at=1.0))
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store)
    views = {name: queue.status(task_id) for name, task_id in ids.items()}
    assert {name for name, view in views.items() if view.status is TaskStatus.WAITING} == {
        "kept",
        "oldest",
    }
    for name, code in (
        ("model", "model_not_allowed"),
        ("upscaler", "model_not_allowed"),
        ("lora", "not_supported"),
    ):
        assert (views[name].status, views[name].error_code) == (TaskStatus.FAILED, code)
        assert views[name].error
    store.close()


# -- the cache of Hugging Face ---------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(
    cache: Path, repository: str, size: int, *, whole: bool = True, revision: str | None = None
) -> None:
    """As huggingface_hub lays a repository out: blobs, and links to them in a snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    blob = folder / "blobs" / ("abc" if whole else "def.incomplete")
    blob.write_bytes(bytes(size))
    if whole:
        pinned = revision or ModelRevisions.get(repository) or "123"
        snapshot = folder / "snapshots" / pinned
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(blob)


def model(known: str, **changes: Any) -> Model:
    return replace(allow(known).default, **changes)


def test_a_model_is_present_when_each_of_its_repositories_is_whole(cache: Path) -> None:
    schnell, controlled = model("schnell"), model("schnell-controlnet-canny")
    assert cache_dir() == cache
    assert (is_present(schnell), bytes_on_disk(schnell)) == (False, 0)
    first, second = controlled.repositories
    put(cache, first, 1000, whole=False)
    assert (is_present(schnell), bytes_on_disk(schnell)) == (False, 1000)
    put(cache, first, 500)
    assert not is_present(schnell), "the rest is still on its way"
    assert bytes_on_disk(schnell) == 1500
    (cache / f"models--{first.replace('/', '--')}" / "blobs" / "def.incomplete").unlink()
    assert (is_present(schnell), bytes_on_disk(schnell)) == (True, 500)
    assert not is_present(controlled)
    put(cache, second, 20)
    assert (is_present(controlled), bytes_on_disk(controlled)) == (True, 520)


def test_weights_of_a_folder_or_of_another_repository_are_looked_for_there(
    cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    local = model("schnell", name="mine", base="schnell", path=str(folder))
    assert (is_present(local), bytes_on_disk(local)) == (False, 0)
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "0.safetensors").write_bytes(bytes(77))
    assert (is_present(local), bytes_on_disk(local)) == (True, 77)
    other = model("schnell", path="somebody/else")
    assert not is_present(other)
    put(cache, "somebody/else", 5)
    assert (is_present(other), bytes_on_disk(other)) == (True, 5)


def test_weights_of_another_revision_than_mflux_loads_are_not_present(cache: Path) -> None:
    """A new release of mflux may pin another one; then it downloads again."""
    schnell = model("schnell")
    put(cache, schnell.repositories[0], 500, revision="an-older-one")
    assert not is_present(schnell)
    assert weight_files(schnell) == []
    put(cache, schnell.repositories[0], 500)
    assert is_present(schnell)
    assert len(weight_files(schnell)) == 1


def test_of_a_repository_without_a_pin_the_newest_revision_is_checked(cache: Path) -> None:
    other = model("schnell", path="somebody/else")
    for age_s, revision in enumerate(("newest", "older", "oldest")):
        put(cache, "somebody/else", 5, revision=revision)
        folder = cache / "models--somebody--else" / "snapshots" / revision
        os.utime(folder, (1_000 - age_s, 1_000 - age_s))
    assert is_present(other)
    assert [path.parent.name for path in weight_files(other)] == ["newest"]


def health_while_loading(weights: LoadSpec | None) -> QueueHealth:
    return QueueHealth(ServerState.LOADING, 0, 0, (), weights, None, None, None)


def test_a_download_is_reported_with_its_bytes_and_total(cache: Path) -> None:
    schnell = model("schnell")
    weights = LoadSpec(schnell, schnell.pipelines[0], None)
    put(cache, schnell.repositories[0], 1000, whole=False)
    answer = download_answer(health_while_loading(weights))
    assert answer
    assert (answer.model, answer.bytes_done, answer.bytes_total) == (
        "schnell",
        1000,
        34_000_000_000,
    )
    unknown = replace(schnell, weights_gb=None)
    answer = download_answer(health_while_loading(LoadSpec(unknown, unknown.pipelines[0], None)))
    assert answer
    assert answer.bytes_total is None
    assert download_answer(health_while_loading(None)) is None
    put(cache, schnell.repositories[0], 500)
    (cache / "models--black-forest-labs--FLUX.1-schnell/blobs/def.incomplete").unlink()
    assert download_answer(health_while_loading(weights)) is None
    tiny = OFFER.default
    assert download_answer(health_while_loading(LoadSpec(tiny, tiny.pipelines[0], None))) is None


def test_a_model_shows_what_is_on_disk_and_in_memory(cache: Path) -> None:
    allowed = Allowed(model("schnell"), (model("schnell"), model("noise-seedvr2")))
    put(cache, "black-forest-labs/FLUX.1-schnell", 500)
    weights = LoadSpec(allowed.default, allowed.default.pipelines[0], 8)
    health = QueueHealth(ServerState.READY, 0, 0, (weights,), None, None, 8, None)
    answer = model_answer(allowed.default, allowed, health)
    assert (answer.allowed, answer.loaded, answer.present) == (True, True, True)
    assert (answer.bytes_on_disk, answer.default_steps, answer.gated) == (500, 4, True)
    assert "upscale" in answer.takes
    other = model_answer(model("dev"), allowed, health)
    assert (other.allowed, other.loaded, other.present) == (False, False, False)
