"""Masks through the whole server, in each API: what lies outside is the source."""

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ServerProcess
from masks import BOX, HEIGHT, MASK, SOURCE, TINY, WIDTH, box_of, inside
from PIL import Image
from served import served

from fields import MASK_FEATHER
from images import read_metadata, to_base64, to_png
from models import tiny_models


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    loras = tmp_path_factory.mktemp("loras")
    tiny_models.write_lora(loras / "wild.safetensors", "noise-flux1")
    yield from served(
        tmp_path_factory.mktemp("server"),
        *("--models", ",".join((*TINY, "noise-seedvr2"))),
        *("--models-in-memory", "8"),
        *("--lora-dir", str(loras)),
    )


ASKED: dict[str, Any] = {
    "prompt": "a door",
    "width": WIDTH,
    "height": HEIGHT,
    "steps": 4,
    "seed": 1,
    "format": "PNG",
    "init_image": to_base64(to_png(SOURCE)),
    "mask": to_base64(to_png(MASK)),
}


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {name: value for name, value in (ASKED | fields).items() if value is not None}
    return requests.post(server.url + "/generate", json=body, timeout=60)


def files_of(server: ServerProcess, **fields: Any) -> list[bytes]:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    task_id = answer.json()["task_id"]
    assert server.wait_until_ended(task_id)["status"] == "done"
    return [
        server.get("/image", task_id=task_id, index=index, delete="false").content
        for index in range(fields.get("count", 1))
    ]


def pixels(file: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(file)).convert("RGB"))


def keeps_source(file: bytes, feather: int = MASK_FEATHER) -> bool:
    outside = ~inside(feather)
    return bool((pixels(file)[outside] == np.asarray(SOURCE)[outside]).all())


@pytest.mark.parametrize("model", TINY)
def test_pixels_outside_the_feathered_mask_are_those_of_the_source(
    server: ServerProcess, model: str
) -> None:
    (file,) = files_of(server, model=model)
    drawn = pixels(file)
    assert keeps_source(file)
    changed = (drawn != np.asarray(SOURCE)).any(axis=2)
    assert changed[inside()].mean() > 0.9
    assert changed[inside(MASK_FEATHER) & ~inside()].any()
    assert files_of(server, model=model) == [file]
    other_seed, other_prompt, hard_edge, plain = (
        files_of(server, model=model, **change)[0]
        for change in ({"seed": 2}, {"prompt": "a fox"}, {"mask_feather": 0}, {"mask": None})
    )
    assert keeps_source(other_seed)
    assert (pixels(other_seed)[inside()] != drawn[inside()]).any()
    assert (pixels(other_prompt)[inside()] != drawn[inside()]).any()
    assert keeps_source(hard_edge, feather=0)
    assert not keeps_source(plain)
    metadata = read_metadata(file)
    assert metadata
    assert (metadata["image_strength"], metadata["mask_feather"]) == (0.4, MASK_FEATHER)
    assert metadata["masked_image_path"].endswith(".png")


def test_each_picture_of_a_task_keeps_the_source(server: ServerProcess) -> None:
    first, second = files_of(server, model="noise-flux1", count=2)
    assert keeps_source(first)
    assert keeps_source(second)
    assert (pixels(first) != pixels(second)).any()
    assert files_of(server, model="noise-flux1", seed=2)[0] == second


def test_a_lora_draws_inside_the_mask_only(server: ServerProcess) -> None:
    (plain,) = files_of(server, model="noise-flux1")
    (styled,) = files_of(server, model="noise-flux1", loras=["wild"])
    assert keeps_source(styled)
    assert (pixels(styled)[inside()] != pixels(plain)[inside()]).any()


def test_what_was_inpainted_is_upscaled(server: ServerProcess) -> None:
    (plain,) = files_of(server, model="noise-flux1")
    (enlarged,) = files_of(server, model="noise-flux1", upscale=2)
    (apart,) = files_of(
        server,
        model="noise-seedvr2",
        init_image=to_base64(plain),
        upscale=2,
        **dict.fromkeys(("prompt", "mask", "width", "height", "steps")),
    )
    assert pixels(enlarged).shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert (pixels(enlarged) == pixels(apart)).all()


def test_mask_and_source_are_scaled_to_the_result(server: ServerProcess) -> None:
    (file,) = files_of(server, model="noise-flux1")
    twice = box_of((64, 32, 128, 96), (2 * WIDTH, 2 * HEIGHT))
    (scaled,) = files_of(server, model="noise-flux1", mask=to_base64(to_png(twice)))
    assert (pixels(scaled) == pixels(file)).all()
    large = SOURCE.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST)
    (small,) = files_of(server, model="noise-flux1", init_image=to_base64(to_png(large)))
    difference = pixels(small).astype(int) - np.asarray(SOURCE)
    assert np.abs(difference[~inside(MASK_FEATHER)]).mean() < 3


def test_a_black_mask_returns_the_source_and_a_white_one_redraws_all(
    server: ServerProcess,
) -> None:
    black, white = (Image.new("L", (WIDTH, HEIGHT), grey) for grey in (0, 255))
    (kept,) = files_of(server, model="noise-flux1", mask=to_base64(to_png(black)))
    assert (pixels(kept) == np.asarray(SOURCE)).all()
    (drawn,) = files_of(server, model="noise-flux1", mask=to_base64(to_png(white)))
    (plain,) = files_of(server, model="noise-flux1", mask=None)
    assert (pixels(drawn) == pixels(plain)).all()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"init_image": None}, "init_image"),
        ({"mask": None, "mask_feather": 4}, "mask"),
        ({"mask_feather": -1}, "mask_feather"),
        ({"mask_feather": 257}, "mask_feather"),
        ({"steps": 1}, "steps"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(
    server: ServerProcess, fields: dict[str, Any], field: str
) -> None:
    answer = post(server, model="noise-flux1", **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


def test_models_lists_the_mask_and_the_answer_its_defaults(server: ServerProcess) -> None:
    models = {model["name"]: model for model in server.get("/models").json()["models"]}
    for name in TINY:
        assert {"mask", "mask_feather", "image_strength"} <= set(models[name]["takes"])
        assert models[name]["needs"] == []
    assert models["noise-flux1"]["classes"] == ["Flux1"]
    assert "mask" not in models["noise-seedvr2"]["takes"]
    assert "mask_feather" not in models["dev-fill"]["takes"]
    params = post(server, model="noise-flux1", upscale=2).json()["params"]
    assert (params["image_strength"], params["mask_feather"]) == (0.4, MASK_FEATHER)


def test_the_mask_of_automatic1111_works_with_every_img2img_model(server: ServerProcess) -> None:
    body = {
        **{name: ASKED[name] for name in ("prompt", "seed", "steps", "width", "height", "mask")},
        "init_images": [ASKED["init_image"]],
        "denoising_strength": 0.6,
        "mask_blur": 4,
    }
    answer = requests.post(server.url + "/sdapi/v1/img2img", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["images"]
    assert json.loads(answer.json()["info"])["denoising_strength"] == 0.6
    (same,) = files_of(server, model="noise-flux1", image_strength=0.4, mask_feather=4)
    assert (pixels(base64.b64decode(image)) == pixels(same)).all()
    refused = requests.post(
        server.url + "/sdapi/v1/img2img", json={**body, "mask_blur": "much"}, timeout=60
    )
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith("mask_blur")


def test_an_openai_edit_with_a_mask_works_with_every_img2img_model(server: ServerProcess) -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), BOX)
    fields = {"prompt": "a door", "seed": 1, "size": f"{WIDTH}x{HEIGHT}", "output_format": "png"}
    answer = requests.post(
        server.url + "/v1/images/edits",
        data=fields,
        files={"image": ("a.png", to_png(SOURCE)), "mask": ("b.png", to_png(clear))},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    image = base64.b64decode(answer.json()["data"][0]["b64_json"])
    (same,) = files_of(server, model="noise-flux1")
    assert (pixels(image) == pixels(same)).all()
