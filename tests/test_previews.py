"""Previews: they resemble the picture, come only to those who look, and cost next to nothing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import requests
from conftest import GIVE_UP_S, StartServer, params_for
from live import EventStream, SteppedServer
from PIL import Image

from client.mflux_client import Client, MfluxError
from generation.previews import LEARN_FROM, SHARE, WATCHED_S, Previews
from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from task import Phase, Stage


def settle(previews: Previews) -> None:
    """Until the previews' own thread has done all."""
    done = Event()
    previews._thread.put(done.set)
    assert done.wait(GIVE_UP_S)


class Drawing:
    """A generator with previews, on the thread that MLX wants."""

    def __init__(self, name: str, data_dir: Path, previews: Previews) -> None:
        prepare_mlx()
        self.previews = previews
        model = find_model(name)
        assert model
        self._weights = LoadSpec(model, model.pipelines[0], None)
        self._data_dir = data_dir
        self._thread = ThreadPoolExecutor(1)
        self._generator = MfluxGenerator(data_dir, previews=previews)
        self._thread.submit(self._generator.load, self._weights).result()

    def draw(
        self, seed: int, after_step: Callable[[int], None] = lambda step: None, steps: int = 4
    ) -> Image.Image:
        params = params_for(seed=seed, width=128, height=96, steps=steps)

        def report(phase: Phase, steps_done: int, steps_total: int) -> None:
            self.settle()
            if phase is Phase.DENOISING:
                after_step(steps_done)

        def draw() -> Image.Image:
            self.previews.turn_to(f"task-{seed}")
            stage = Stage(self._weights, params)
            return self._generator.generate(stage, self._data_dir, report).picture

        picture = self._thread.submit(draw).result()
        self.settle()
        return picture

    def look(self, step: int) -> None:
        self.previews.look("task-1")

    def settle(self) -> None:
        settle(self.previews)


class Clock:
    """Costs of the worker's time are what the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def likeness(jpeg: bytes, picture: Image.Image) -> float:
    """Correlation of a preview with the picture averaged to its size, apart from its tint."""
    preview = Image.open(BytesIO(jpeg))
    assert preview.format == "JPEG"
    assert preview.size == (picture.width // 8, picture.height // 8)
    seen, small = (
        np.asarray(each, dtype=float) - np.asarray(each, dtype=float).mean(axis=(0, 1))
        for each in (preview, picture.convert("RGB").reduce(8))
    )
    return float(np.corrcoef(seen.ravel(), small.ravel())[0, 1])


@pytest.mark.parametrize("name", ["noise-flux1", "noise-flux2"])
def test_previews_come_to_resemble_the_picture_that_is_drawn(name: str, data_dir: Path) -> None:
    drawing = Drawing(name, data_dir, Previews())
    others = [drawing.draw(seed) for seed in range(LEARN_FROM)]
    seen: list[bytes] = []

    def look(step: int) -> None:
        if jpeg := drawing.previews.look("task-99"):
            seen.append(jpeg)

    drawing.previews._rest_until = float("-inf")
    clock = Clock()
    drawing.previews._monotonic = clock
    picture = drawing.draw(99, look)
    assert len(seen) == 4
    last = likeness(seen[-1], picture)
    assert last > 0.7  # decoders of random weights are less linear than real ones
    assert last > likeness(seen[0], picture)
    assert last > 0.3 + max(likeness(seen[-1], other) for other in others)


def test_before_anything_was_learned_a_preview_shows_shapes(data_dir: Path) -> None:
    clock = Clock()
    drawing = Drawing("noise-flux1", data_dir, Previews(monotonic=clock))
    drawing.draw(1, drawing.look)
    jpeg = drawing.previews.look("task-1")
    assert jpeg
    assert np.asarray(Image.open(BytesIO(jpeg)).convert("L")).std() > 20


def test_no_preview_is_made_without_a_request_and_pictures_do_not_change(data_dir: Path) -> None:
    drawing = Drawing("noise-flux1", data_dir, Previews())
    reference = drawing.draw(1).tobytes()
    drawing.previews.look("another task")
    assert drawing.draw(1).tobytes() == reference
    assert drawing.previews.made == 0
    assert drawing.draw(1, drawing.look).tobytes() == reference
    assert 1 <= drawing.previews.made <= 4


def test_off_means_that_nothing_is_made_or_learned(data_dir: Path) -> None:
    drawing = Drawing("noise-flux1", data_dir, Previews(on=False))
    drawing.draw(1, drawing.look)
    assert drawing.previews.made == 0
    assert drawing.previews._maps == {}


class Pretend:
    """Previews of latents that are made up, under a clock of the test's own."""

    def __init__(self, family: str = "flux") -> None:
        self.clock = Clock()
        self.previews = Previews(monotonic=self.clock)
        self.previews.turn_to("a")
        self._drawing = self.previews.picture(family, family)
        self._drawing.__enter__()

    def step(self, step_s: float, cost_s: float = 0.0) -> bool:
        """Whether a preview was made after a step that took so long."""
        self.clock.now += step_s
        if not self.previews.must_generate():
            return False
        self.clock.now += cost_s
        self.previews.draw(np.zeros((1, 16, 64), np.float32), 64, 64)
        settle(self.previews)
        return True


def test_steps_are_left_out_where_previews_would_take_more_than_their_share() -> None:
    pretend = Pretend()
    cost_s, step_s, made = 0.1, 1.0, 0
    for _ in range(300):
        pretend.previews.look("a")
        made += pretend.step(step_s, cost_s)
    assert made * cost_s <= SHARE * (300 * step_s + made * cost_s) + cost_s
    assert made >= 60


def test_previews_end_a_while_after_the_last_look_but_outlast_slow_steps() -> None:
    pretend = Pretend()
    pretend.previews.look("a")
    made = [pretend.step(1.0) for _ in range(20)]
    assert made == [step + 1 <= WATCHED_S for step in range(20)]
    slow = Pretend()
    slow.previews.look("a")
    assert [slow.step(60.0) for _ in range(4)] == [True, True, False, False]
    slow.previews.look("a")
    assert slow.step(60.0)


def test_latents_in_an_unknown_arrangement_make_no_preview() -> None:
    for family in ("flux", "z_image", "ideogram4"):
        pretend = Pretend(family)
        pretend.previews.look("a")
        pretend.clock.now += 1
        if pretend.previews.must_generate():
            pretend.previews.draw(np.zeros((1, 3, 7), np.float32), 64, 64)
        settle(pretend.previews)
        assert pretend.previews.made == 0


def test_packed_and_plain_latents_are_arranged_as_the_picture_is() -> None:
    rows, columns = 6, 8  # of 8 x 8 pixels
    picture = np.random.default_rng(1).integers(0, 255, (rows, columns, 3))
    plain = np.zeros((rows, columns, 16), np.float32)
    plain[:, :, 3:6] = picture / 255
    packed = plain.reshape(rows // 2, 2, columns // 2, 2, 16).transpose(0, 2, 4, 1, 3)
    size = (columns * 8, rows * 8)
    large = Image.fromarray(picture.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    for family, latents in (
        ("qwen", packed.reshape(1, rows * columns // 4, 64)),
        ("z_image", plain.transpose(2, 0, 1)[:, None]),
    ):
        pretend = Pretend(family)
        pretend.previews.keep(latents, *size)
        pretend.previews.learn(large)
        pretend.previews.look("a")
        assert pretend.previews.must_generate()
        pretend.previews.draw(latents, *size)
        settle(pretend.previews)
        assert likeness(pretend.previews.look("a") or b"", large) > 0.8


# -- over HTTP ----------------------------------------------------------------------------------


def preview(server: Any, task_id: str) -> requests.Response:
    return requests.get(server.url + "/preview", params={"task_id": task_id}, timeout=GIVE_UP_S)


def test_a_running_task_is_watched_to_its_end_and_then_has_a_thumbnail(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1", "--max-steps", "1000")
    task_id = server.submit(width=512, height=512, steps=300)["task_id"]
    answer = preview(server, task_id)
    while answer.status_code != 200:
        assert (answer.status_code, answer.content) == (204, b"") or (
            answer.status_code == 409 and answer.json()["error"]["code"] == "not_ready"
        )
        server.wait_for(task_id, lambda status: True)
        answer = preview(server, task_id)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert Image.open(BytesIO(answer.content)).size == (64, 64)
    stream = requests.get(
        server.url + "/events", params={"task_id": task_id}, stream=True, timeout=GIVE_UP_S
    )
    for line in stream.iter_lines():
        if line == b"event: preview":
            break
        preview(server, task_id)
    stream.close()
    requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)
    assert preview(server, task_id).status_code == 410
    done = server.submit(width=512, height=512, steps=1)["task_id"]
    server.wait_until_ended(done)
    assert Image.open(BytesIO(preview(server, done).content)).size == (256, 256)
    assert preview(server, "nothing").status_code == 404


def test_there_is_nothing_to_see_yet_of_a_running_task_and_it_is_too_early_for_a_waiting_one(
    tmp_path: Path,
) -> None:
    server = SteppedServer(tmp_path)
    running, waiting = server.running(), server.submit()
    answer = preview(server, running)
    assert (answer.status_code, answer.content) == (204, b"")
    answer = preview(server, waiting)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ready")
    with Client(server.url) as client:
        assert client.preview(running) is None
        with pytest.raises(MfluxError, match="once it runs"):
            client.preview(waiting)
        server.end()
        client.wait(waiting)
        assert Image.open(BytesIO(client.preview(waiting) or b"")).format == "JPEG"
    server.close()


@pytest.mark.parametrize("previews", [True, False])
def test_where_none_are_made_a_waiting_task_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, previews: bool
) -> None:
    monkeypatch.setattr("api.live_api.FAMILIES", frozenset())
    server = SteppedServer(tmp_path, previews=previews)
    assert preview(server, server.running()).status_code == 204
    answer = preview(server, server.submit())
    assert answer.status_code == 409
    reason = "family flux" if previews else "--previews off"
    assert reason in answer.json()["error"]["message"]
    server.close()


def test_a_preview_is_no_news_of_a_task_that_has_ended(tmp_path: Path) -> None:
    server = SteppedServer(tmp_path)
    task_id = server.running()
    stream = EventStream(server, f"?task_id={task_id}")
    server.worker_api.preview_made(task_id)
    assert stream.until("preview")[-1][2]["status"] == "running"
    server.end()
    kinds = [kind for kind, _, _ in stream]
    version = server.status(task_id)["version"]
    server.worker_api.preview_made(task_id)
    assert kinds[-1] == "done"
    assert server.status(task_id)["version"] == version
    server.close()
