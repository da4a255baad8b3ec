"""The families that are built small, through the whole server: requests, pictures, forecasts."""

from collections.abc import Iterator
from io import BytesIO
from itertools import combinations
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, allow, params_for, slow_except
from PIL import Image, ImageDraw
from served import served

from fields import Takes
from generation.previews import FAMILIES as PREVIEWED
from generation.previews import Previews
from generator import MfluxGenerator
from images import read_metadata, to_base64, to_png
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Pipeline
from models.tiny_modules import FAMILIES
from task import Phase, Stage


def picture(colour: str) -> str:
    drawing = Image.new("RGB", (64, 64), colour)
    ImageDraw.Draw(drawing).ellipse((8, 8, 40, 40), fill="black")
    return to_base64(to_png(drawing))


WHITE, RED = picture("white"), picture("red")
VALUES: dict[Takes, list[dict[str, Any]]] = {
    Takes.GUIDANCE: [{"guidance": 2.5}],
    Takes.NEGATIVE_PROMPT: [{"negative_prompt": "red"}],
    Takes.INIT_IMAGE: [{"init_image": WHITE}, {"init_image": RED}],
    Takes.IMAGES: [{"images": [RED]}, {"images": [WHITE, RED]}],
    Takes.MASK: [{"mask": to_base64(to_png(Image.linear_gradient("L").resize((64, 64))))}],
    Takes.CFG_END: [{"cfg_end": 0.4}],
    Takes.IMAGE_STRENGTH: [{"init_image": WHITE, "image_strength": 0.7}],
}
"""What changes a picture, by a field that a model may take."""
NEEDS = {Takes.IMAGES: {"images": [WHITE]}}
"""Fields that an edit cannot do without."""
ENLARGES = "Fibo2Edit"
"""mflux scales several pictures to a megapixel each, which takes too long here."""
NAMES = sorted(FAMILIES)
USUAL = "noise-ernie"
PIPELINES = [
    (name, pipeline)
    for name in NAMES
    for pipeline in allow(name).default.pipelines
    if not pipeline.inpaints  # test_inpainting.py
]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(tmp_path_factory.mktemp("families"), "--models", ",".join(NAMES))


def usual(name: str, pipeline: Pipeline) -> dict[str, Any]:
    """A request in which guidance and negative prompt have an effect."""
    wanted: dict[str, Any] = {"model": name, "seed": 1, "steps": 3, "format": "PNG"}
    for field in pipeline.needs:
        wanted |= NEEDS[field]
    if Takes.NEGATIVE_PROMPT in pipeline.takes:
        wanted["negative_prompt"] = "blue"
    return wanted | ({"guidance": 4.0} if Takes.GUIDANCE in pipeline.takes else {})


def file_of(studio: ServerProcess, task_id: str) -> bytes:
    done = studio.wait_until_ended(task_id)
    assert done["status"] == "done", done
    return studio.get("/image", task_id=task_id).content


@pytest.mark.parametrize(
    ("name", "pipeline"),
    slow_except([one for one in PIPELINES if one[0] == USUAL], PIPELINES),
    ids=[f"{name}-{pipeline.name}" for name, pipeline in PIPELINES],
)
def test_a_picture_depends_on_each_field_that_its_model_takes_and_is_the_same_again(
    studio: ServerProcess, name: str, pipeline: Pipeline
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        *({"prompt": "a fox"}, {"seed": 2}, {"steps": 4}, {"width": 96}),
        *(change for field, some in VALUES.items() if field in pipeline.takes for change in some),
        *({"scheduler": other} for other in pipeline.rules.schedulers[1:]),
    ]
    if pipeline.name == ENLARGES:
        changes = [change for change in changes if len(change.get("images", ())) < 2]
    tasks = [
        studio.submit(**usual(name, pipeline) | change)["task_id"] for change in [*changes, {}]
    ]
    files = [file_of(studio, task_id) for task_id in tasks]
    assert files[0] == files[-1], "equal params give equal files"
    pictures = [Image.open(BytesIO(file)).convert("RGB") for file in files[:-1]]
    assert {drawn.size for drawn in pictures} == {(64, 64), (96, 64)}
    for (one, first), (other, second) in combinations(zip(changes, pictures, strict=True), 2):
        assert first.tobytes() != second.tobytes(), (one, other)


@pytest.mark.parametrize("name", slow_except([USUAL], NAMES))
def test_the_defaults_of_a_model_draw_and_are_in_the_metadata_and_the_forecast_is_learned(
    studio: ServerProcess, name: str
) -> None:
    asked = {"model": name, "prompt": "a tower", "seed": 7, "width": 96, "height": 96}
    accepted = requests.post(studio.url + "/generate", json={**asked, "format": "PNG"}, timeout=60)
    assert accepted.status_code == 200, accepted.text
    drawn = file_of(studio, accepted.json()["task_id"])
    assert np.asarray(Image.open(BytesIO(drawn)).convert("L")).std() > 5
    params, written = accepted.json()["params"], read_metadata(drawn)
    assert written
    assert {key: written[key] for key in asked} == asked
    assert written["steps"] == params["steps"]
    if "guidance" in params:  # not where it changes nothing
        assert written.get("guidance") == params["guidance"]
    answer = requests.post(studio.url + "/estimate", json=asked, timeout=60).json()
    assert answer["confidence"] != "none", answer


@pytest.mark.parametrize("name", slow_except([USUAL], NAMES))
def test_steps_are_reported_in_order_and_a_preview_is_made_of_each_known_form_of_latents(
    name: str, data_dir: Path
) -> None:
    prepare_mlx()
    previews = Previews(monotonic=lambda: 0.0)
    generator = MfluxGenerator(data_dir, previews=previews)
    model = allow(name).default
    weights = LoadSpec(model, model.pipelines[0], None)
    generator.load(weights)
    seen: list[tuple[Phase, int, int]] = []
    previews.turn_to("a")
    previews.look("a")
    generator.generate(
        Stage(weights, params_for(steps=2, model=name)),
        data_dir,
        lambda *event: seen.append(event),
    )
    generator.unload()
    assert seen == [
        *((Phase.DENOISING, done, 2) for done in range(3)),
        (Phase.DECODING, 2, 2),
    ]
    done = Event()
    previews._thread.put(done.set)
    assert done.wait(GIVE_UP_S)
    is_known = model.family in PREVIEWED
    assert (previews.made > 0) == is_known
    assert sum(learned.pictures for learned in previews._maps.values()) == is_known
