"""Every tiny model through the whole server: what it draws, and what it says of itself."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess, slow_except
from generate_calls import drawn, fetched, health_of, post, submit
from PIL import Image, ImageDraw
from served import served

from api.model_answers import ModelAnswer, ModelsAnswer
from images import read_metadata, to_base64, to_png
from models import tiny_models

MODELS = (
    "noise-flux1",
    "noise-flux2",
    "noise-z-image",
    "noise-qwen",
    "noise-kontext",
    "noise-fill",
    "noise-redux",
    "noise-controlnet",
    "noise-seedvr2",
)


def circle(size: int = 64) -> Image.Image:
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, size - 24, size - 24), fill="black")
    return picture


def triangle() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(picture).polygon((8, 60, 40, 4, 60, 60), fill="red")
    return picture


def mask(box: tuple[int, int, int, int]) -> Image.Image:
    picture = Image.new("L", (64, 64), 0)
    picture.paste(255, box)
    return picture


def as_text(picture: Image.Image) -> str:
    return to_base64(to_png(picture))


CIRCLE, TRIANGLE = as_text(circle()), as_text(triangle())

UPPER, LEFT = as_text(mask((0, 0, 64, 32))), as_text(mask((0, 0, 32, 64)))


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    (folder / "style").mkdir()
    tiny_models.write_lora(folder / "wild.safetensors", "noise-flux1")
    tiny_models.write_lora(folder / "style" / "klein.safetensors", "noise-flux2")
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, lora_dir: Path) -> Iterator[ServerProcess]:
    """A server that offers every tiny model."""
    yield from served(
        tmp_path_factory.mktemp("studio"),
        *("--models", ",".join(MODELS)),
        *("--models-in-memory", "3"),
        *("--lora-dir", str(lora_dir)),
    )


def picture_in(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file)).convert("RGB")


GUIDED = {"guidance": 4.0}

CHANGES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "noise-flux1": ({}, [{"scheduler": "flow_match_euler_discrete"}]),
    "noise-flux2": ({}, []),
    "noise-z-image": (GUIDED, [{"negative_prompt": "red"}, {"guidance": 2.5}]),
    "noise-qwen": (GUIDED, [{"negative_prompt": "red"}, {"guidance": 2.5}]),
    "noise-kontext": ({"images": [CIRCLE]}, [{"images": [TRIANGLE]}, {"guidance": 2.0}]),
    "noise-fill": (
        {"init_image": CIRCLE, "mask": UPPER},
        [{"init_image": TRIANGLE}, {"mask": LEFT}, {"guidance": 2.0}],
    ),
    "noise-redux": (
        {"images": [CIRCLE]},
        [{"images": [TRIANGLE]}, {"images": [CIRCLE, TRIANGLE]}, {"reference_strengths": [0.3]}],
    ),
    "noise-controlnet": (
        {"control_image": CIRCLE},
        [{"control_image": TRIANGLE}, {"control_strength": 0.5}],
    ),
}
"""What each model needs, and what changes its picture beside prompt, seed, steps and size."""

IMG2IMG = ("noise-flux1", "noise-flux2", "noise-z-image", "noise-qwen")


@pytest.mark.parametrize("name", slow_except(["noise-flux1", "noise-fill"], CHANGES))
def test_a_picture_depends_on_all_that_is_asked_for_and_is_the_same_again(
    studio: ServerProcess, name: str
) -> None:
    needs, own = CHANGES[name]
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "a fox"},
        {"seed": 2},
        {"steps": 4},
        {"width": 80},
        *own,
    ]
    if name in IMG2IMG:
        changes += [
            {"init_image": CIRCLE},
            {"init_image": TRIANGLE},
            {"init_image": CIRCLE, "image_strength": 0.7},
        ]
    tasks = [
        submit(studio, **{"model": name, "prompt": "a lighthouse", **needs, **change})
        for change in [*changes, {}]
    ]
    files = [fetched(studio, task_id) for task_id in tasks]
    assert files[0] == files[-1], "equal params give equal files"
    pictures = [picture_in(file).tobytes() for file in files[:-1]]
    for number, change in enumerate(changes):
        for other in range(number):
            assert pictures[number] != pictures[other], (change, changes[other])
    assert picture_in(files[4]).size == (80, 64)


def test_the_strength_of_an_init_image_is_04_where_none_is_asked_for(studio: ServerProcess) -> None:
    one = post(studio, model="noise-flux1", prompt="x", init_image=CIRCLE).json()
    assert one["params"]["image_strength"] == 0.4
    assert one["params"]["init_image"].keys() == {"id", "width", "height"}
    same = submit(studio, model="noise-flux1", prompt="x", init_image=CIRCLE, image_strength=0.4)
    assert fetched(studio, one["task_id"]) == fetched(studio, same)


def test_klein_edits_one_picture_and_several(studio: ServerProcess) -> None:
    asked = {"model": "noise-flux2", "prompt": "make it red"}
    files = [
        drawn(studio, **asked),
        drawn(studio, **asked, images=[CIRCLE]),
        drawn(studio, **asked, images=[TRIANGLE]),
        drawn(studio, **asked, images=[CIRCLE, TRIANGLE]),
        drawn(studio, **asked, images=[TRIANGLE, CIRCLE]),
    ]
    assert len({picture_in(file).tobytes() for file in files}) == len(files)
    assert drawn(studio, **asked, images=[CIRCLE]) == files[1]
    sized = post(studio, **asked, images=[as_text(circle(100))], width=None, height=None).json()
    assert (sized["params"]["width"], sized["params"]["height"]) == (96, 96)
    assert picture_in(fetched(studio, sized["task_id"])).size == (96, 96)


NOTHING: dict[str, Any] = {"width": None, "height": None, "steps": None}


def test_an_input_image_is_upscaled(studio: ServerProcess) -> None:
    asked = {"model": "noise-seedvr2", **NOTHING, "upscale": 2}
    files = [drawn(studio, **asked, init_image=source) for source in (CIRCLE, TRIANGLE, CIRCLE)]
    assert picture_in(files[0]).size == (128, 128)
    assert files[0] == files[2] != files[1]
    odd = as_text(Image.new("RGB", (50, 37), "teal"))
    answer = post(studio, **{**asked, "upscale": 1.5}, init_image=odd).json()
    width, height = picture_in(fetched(studio, answer["task_id"])).size
    assert (width, height) == (74, 56)
    assert abs(width - 75) < 2 > abs(height - 55.5)


def test_the_picture_of_a_finished_task_is_upscaled(studio: ServerProcess) -> None:
    source = submit(studio, model="noise-qwen", prompt="x", count=2)
    first, second = (fetched(studio, source, index=index) for index in (0, 1))
    asked = {"model": "noise-seedvr2", **NOTHING, "upscale": 3}
    for index, file in enumerate((first, second)):
        by_name = drawn(studio, **asked, init_image={"task_id": source, "index": index})
        sent = drawn(studio, **asked, init_image=to_base64(file))
        assert picture_in(by_name).size == (192, 192)
        assert by_name == sent
    refused = post(studio, **asked, init_image={"task_id": source, "index": 2})
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "init_image")


def test_a_task_is_generated_and_upscaled(studio: ServerProcess) -> None:
    asked = {"model": "noise-z-image", "prompt": "x", "guidance": 3, "negative_prompt": "red"}
    plain = submit(studio, **asked, count=2)
    task_id = submit(studio, **asked, upscale=1.5, count=2)
    status = studio.get("/status", task_id=task_id).json()["params"]
    assert (status["upscale"], status["width"]) == (1.5, 64)
    for index in (0, 1):
        enlarged = fetched(studio, task_id, index=index)
        assert picture_in(enlarged).size == (96, 96)
        apart = drawn(
            studio,
            model="noise-seedvr2",
            **{**NOTHING, "seed": 1 + index},
            upscale=1.5,
            init_image={"task_id": plain, "index": index},
        )
        assert picture_in(apart).tobytes() == picture_in(enlarged).tobytes()
        metadata = read_metadata(enlarged)
        assert metadata
        assert (metadata["model"], metadata["seed"]) == ("noise-z-image", 1 + index)
        assert metadata["prompt"] == "x"


# -- adapters --------------------------------------------------------------------------------------


def test_an_adapter_changes_the_picture_as_strongly_as_it_is_asked_to(
    studio: ServerProcess, lora_dir: Path
) -> None:
    for model, lora in (("noise-flux1", "wild"), ("noise-flux2", "style/klein")):
        asked = {"model": model, "prompt": "x"}
        plain = picture_in(drawn(studio, **asked)).tobytes()
        full = drawn(studio, **asked, loras=[lora])
        none = drawn(studio, **asked, loras=[{"name": lora, "scale": 0}])
        half = drawn(studio, **asked, loras=[{"name": lora, "scale": 0.5}])
        assert picture_in(none).tobytes() == plain
        assert len({plain, *(picture_in(file).tobytes() for file in (full, half))}) == 3
        assert drawn(studio, **asked, loras=[{"name": lora, "scale": 1}]) == full
        assert picture_in(drawn(studio, **asked)).tobytes() == plain
        metadata = read_metadata(half)
        assert metadata
        assert (metadata["lora_paths"], metadata["lora_scales"]) == ([lora], [0.5])
        assert str(lora_dir).encode() not in half


def test_adapters_are_listed_and_a_broken_one_is_refused(
    studio: ServerProcess, lora_dir: Path
) -> None:
    listed = studio.get("/models").json()["loras"]
    assert [lora["name"] for lora in listed] == ["style/klein", "wild"]
    broken = lora_dir / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{not json, truly")
    try:
        error = post(studio, model="noise-flux1", prompt="x", loras=["broken"]).json()["error"]
        assert (error["code"], error["field"]) == ("unusable_adapter", "loras")
        assert error["message"].startswith(
            "The LoRA 'broken' cannot be used: its header is not JSON."
        )
    finally:
        broken.unlink()
    refused = post(studio, model="noise-flux1", prompt="x", loras=["broken"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_supported")


# -- descriptions of models ------------------------------------------------------------------------


def test_all_models_are_listed_those_first_that_are_allowed(studio: ServerProcess) -> None:
    studio.wait_until_ended(
        submit(studio, model="noise-fill", prompt="x", **CHANGES["noise-fill"][0])
    )
    answer = ModelsAnswer.model_validate(studio.get("/models").json())
    assert answer.default == "noise-flux1"
    names = [model.name for model in answer.models]
    assert tuple(names[: len(MODELS)]) == MODELS
    assert {"dev", "schnell", "z-image", "seedvr2-7b"} <= set(names)
    assert len(names) == len(set(names))
    by_name = {model.name: model for model in answer.models}
    assert {name for name in names if by_name[name].allowed} == set(MODELS)
    assert by_name["noise-fill"].loaded
    assert sum(model.loaded for model in answer.models) <= 3
    assert by_name["noise-flux1"].present
    assert not by_name["dev"].present
    assert by_name["dev"].bytes_on_disk == 0
    assert "upscale" in by_name["noise-flux1"].takes
    assert by_name["noise-fill"].needs == ["init_image", "mask"]
    assert by_name["noise-flux2"].needs == []
    assert "images" in by_name["noise-flux2"].takes
    assert by_name["noise-fill"].pictures_together == [["init_image", "mask"]]
    assert ["images", "init_image"] not in by_name["noise-flux2"].pictures_together


def test_one_model_is_described_by_its_name_or_alias(studio: ServerProcess) -> None:
    for name in ("flux2-klein-4b", "KLEIN-4B"):
        model = ModelAnswer.model_validate(studio.get(f"/models/{name}").json())
        assert (model.name, model.allowed) == ("flux2-klein-4b", False)
        assert model.repositories == ["black-forest-labs/FLUX.2-klein-4B"]
    unknown = studio.get("/models/devil")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")


def test_the_models_used_last_stay_in_memory(studio: ServerProcess) -> None:
    for name in ("noise-flux1", "noise-qwen", "noise-z-image", "noise-flux1", "noise-flux2"):
        drawn(studio, model=name, prompt="x", guidance=None)
    assert health_of(studio).loaded_models == ["noise-flux2", "noise-flux1", "noise-z-image"]


def test_a_client_on_this_machine_may_load_a_model_in_advance(studio: ServerProcess) -> None:
    drawn(studio, model="noise-flux1", prompt="x")
    url = studio.url + "/models/noise-redux/load"
    assert requests.post(url, timeout=60).json() == {"model": "noise-redux", "loaded": False}
    studio.wait_for(
        submit(studio, model="noise-flux1", prompt="x", count=1),
        lambda status: status["status"] == "done",
    )
    assert "noise-redux" in health_of(studio).loaded_models
    assert requests.post(url, timeout=60).json() == {"model": "noise-redux", "loaded": True}
    for name, status, code in (
        ("dev", 422, "model_not_allowed"),
        ("devil", 404, "unknown_model"),
    ):
        answer = requests.post(f"{studio.url}/models/{name}/load", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
