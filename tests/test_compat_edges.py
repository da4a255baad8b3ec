"""The edges of the foreign APIs: fields that are empty, null, of another type, out of range."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import requests
from a1111_calls import PICTURE, TINY, ask, drawn, encoded, img2img
from conftest import ServerProcess
from served import served

ANYTHING: tuple[Any, ...] = (5, -1, 0.5, True, "x", [], ["x"], {}, {"x": {"y": None}})
"""Values that no client means for a field, and that some send."""

IGNORED_BY_A1111 = (
    "alwayson_scripts",
    "clip_skip",
    "do_not_save_grid",
    "do_not_save_samples",
    "eta",
    "hr_upscaler",
    "infotext",
    "restore_faces",
    "s_churn",
    "sampler_index",
    "sampler_name",
    "save_images",
    "scheduler",
    "script_args",
    "script_name",
    "styles",
    "subseed",
    "subseed_strength",
    "tiling",
)

OF_OTHER_MODELS = ("cfg_scale", "distilled_cfg_scale", "negative_prompt", "denoising_strength")

OF_AN_UPSCALER = ("enable_hr", "hr_scale", "hr_resize_x", "hr_resize_y")

OF_IMG2IMG = (
    "image_cfg_scale",
    "include_init_images",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_fill",
    "inpainting_mask_invert",
    "mask_blur",
    "mask_blur_x",
    "mask_blur_y",
    "resize_mode",
)

IGNORED_BY_OPENAI = ("background", "input_fidelity", "moderation", "quality", "style", "user")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(tmp_path_factory.mktemp("server"), "--models", "noise-flux1,noise-flux2")


@pytest.fixture(scope="module")
def upscaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = "noise-flux1,noise-z-image,noise-seedvr2"
    yield from served(tmp_path_factory.mktemp("server"), "--models", models)


# -- ignored fields -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ANYTHING, ids=repr)
def test_fields_that_are_ignored_may_hold_anything(server: ServerProcess, value: Any) -> None:
    ignored = dict.fromkeys((*IGNORED_BY_A1111, *OF_OTHER_MODELS, *OF_AN_UPSCALER), value)
    assert drawn(server, "txt2img", prompt="x", **ignored)["width"] == 64
    ignored = dict.fromkeys((*IGNORED_BY_A1111, *OF_IMG2IMG, *OF_AN_UPSCALER), value)
    assert img2img(server, prompt="x", **ignored)["width"] == 64
    ignored = dict.fromkeys((*IGNORED_BY_OPENAI, "partial_images", "output_compression"), value)
    answer = ask(server, "/v1/images/generations", prompt="x", size="64x64", **ignored)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("value", ANYTHING, ids=repr)
def test_override_settings_that_name_no_model_are_ignored(
    server: ServerProcess, value: Any
) -> None:
    for settings in (value, {"sd_vae": value}, {"sd_model_checkpoint": value}):
        info = drawn(server, "txt2img", prompt="x", override_settings=settings)
        assert info["sd_model_name"] == "noise-flux1"


def test_a_null_counts_as_absent_in_every_field(server: ServerProcess) -> None:
    for path in ("/sdapi/v1/txt2img", "/v1/images/generations"):
        reference = requests.get(server.url + "/openapi.json", timeout=60).json()
        schema = "TextToImage" if "sdapi" in path else "OpenAIGeneration"
        names = set(reference["components"]["schemas"][schema]["properties"]) - {"prompt", *TINY}
        answer = ask(server, path, prompt="x", **dict.fromkeys(names - {"size"}), size="64x64")
        assert answer.status_code == 200, answer.text


def test_a_field_that_the_model_uses_is_refused_by_its_name(upscaling: ServerProcess) -> None:
    z_image = {"sd_model_checkpoint": "noise-z-image"}
    fields: dict[str, Any]
    for field, value in (
        ("cfg_scale", "much"),
        ("cfg_scale", -1),
        ("negative_prompt", 5),
        ("enable_hr", "perhaps"),
        ("hr_scale", "much"),
        ("hr_resize_x", -1),
    ):
        fields = {"enable_hr": True, "cfg_scale": 3, "override_settings": z_image, field: value}
        answer = ask(upscaling, "/sdapi/v1/txt2img", prompt="x", **fields)
        assert answer.status_code == 400, (field, answer.text)
        assert answer.json()["detail"].startswith(f"{field}: ")
    for fields in (
        {"stream": True, "partial_images": 4},
        {"output_format": "jpeg", "output_compression": 101},
        {"response_format": "b64"},
    ):
        answer = ask(upscaling, "/v1/images/generations", prompt="x", size="64x64", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, list(fields)[-1])


# -- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " \n", None])
def test_automatic1111_draws_with_an_empty_prompt(server: ServerProcess, prompt: Any) -> None:
    assert drawn(server, "txt2img", prompt=prompt)["prompt"].strip() == ""
    assert img2img(server, prompt=prompt)["prompt"].strip() == ""
    edit = {"override_settings": {"sd_model_checkpoint": "noise-flux2"}}
    assert img2img(server, prompt=prompt, **edit)["prompt"].strip() == ""


def test_an_edit_and_a_native_task_with_a_picture_need_no_prompt(server: ServerProcess) -> None:
    buffer = BytesIO()
    PICTURE.save(buffer, "PNG")
    for fields in ({}, {"prompt": ""}, {"prompt": " "}):
        edited = requests.post(
            server.url + "/v1/images/edits",
            data={**fields, "size": "64x64", "steps": "1"},
            files={"image": ("a.png", buffer.getvalue())},
            timeout=60,
        )
        assert edited.status_code == 200, edited.text
        submitted = requests.post(
            server.url + "/generate",
            json={**fields, "steps": 2, "init_image": encoded(PICTURE), "width": 96},
            timeout=60,
        ).json()
        assert submitted["params"]["prompt"] == ""
        assert (submitted["params"]["width"], submitted["params"]["height"]) == (96, 64)
        assert server.wait_until_ended(submitted["task_id"])["status"] == "done"
        metadata = server.get("/image", task_id=submitted["task_id"], metadata="true").json()
        assert metadata["prompt"] == ""
    refused = ask(server, "/v1/images/generations", prompt="", size="64x64")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("<lora:foo:1>", ""),
        ("cat <hypernet:x:1>", "cat "),
        ("<lyco:a:1><LoHa:b>cat", "cat"),
        ("<lora:foo:0.5:0.7><lora:foo:te=1:unet=x><lora::><lora:foo:nan>", ""),
        ("a < b, b > c, a:b, (cat:1.2), <lora>, <3", "a < b, b > c, a:b, (cat:1.2), <lora>, <3"),
    ],
)
def test_tags_are_taken_out_of_a_prompt(server: ServerProcess, prompt: str, rest: str) -> None:
    assert drawn(server, "txt2img", prompt=prompt)["prompt"] == rest


@pytest.mark.parametrize(
    "prompt",
    [
        "\U0001f98a",
        "\u200b",
        "\x01\x7f",
        "Möwe über 雨",
        "\U0001f468\u200d\U0001f469",
        "x" * 9_999,
    ],
    ids=ascii,
)
def test_any_text_is_a_prompt(server: ServerProcess, prompt: str) -> None:
    prompt = prompt if len(prompt) < 80 else prompt + "\n"
    assert drawn(server, "txt2img", prompt=prompt)["prompt"] == prompt
    assert ask(server, "/v1/images/generations", prompt=prompt, size="64x64").status_code == 200
    task_id = server.submit(prompt)["task_id"]
    status = server.wait_until_ended(task_id)
    assert (status["status"], status["params"]["prompt"]) == ("done", prompt)


# -- numbers, pictures, names -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(7.0, 7), (7.9, 7), ("7", 7), (2**53, 2**53), (2**64 - 1, 2**64 - 1), (0, 0)],
)
def test_seeds_of_any_form_are_kept(server: ServerProcess, seed: Any, expected: int) -> None:
    assert drawn(server, "txt2img", prompt="x", seed=seed)["seed"] == expected


@pytest.mark.parametrize("seed", [-1, "-1", -1.0])
def test_a_seed_of_minus_1_is_random(server: ServerProcess, seed: Any) -> None:
    fields = {"prompt": "x", "size": "64x64", "seed": seed, "n": 1}
    answers = [ask(server, "/v1/images/generations", **fields).json() for _ in range(2)]
    assert len({answer["data"][0]["seed"] for answer in answers}) == 2
    assert drawn(server, "txt2img", prompt="x", seed=seed)["seed"] >= 0


@pytest.mark.parametrize("model", [5, True, [], ["noise-flux2"], {}, "gpt-image-1"])
def test_a_model_of_openai_that_is_no_name_of_ours_means_the_servers_own(
    server: ServerProcess, model: Any
) -> None:
    answer = ask(server, "/v1/images/generations", prompt="x", size="64x64", model=model)
    assert answer.status_code == 200, answer.text


def test_the_texts_null_and_undefined_in_a_form_count_as_absent(server: ServerProcess) -> None:
    buffer = BytesIO()
    PICTURE.save(buffer, "PNG")
    names = ("n", "seed", "steps", "stream", "response_format", "output_format", "mask")
    for text in ("null", "undefined", ""):
        answer = requests.post(
            server.url + "/v1/images/edits",
            data={"prompt": "null", "size": "64x64", **dict.fromkeys(names, text)},
            files={"image": ("a.png", buffer.getvalue())},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text


def test_pictures_of_an_edit_may_be_numbered_and_be_texts(server: ServerProcess) -> None:
    buffer = BytesIO()
    PICTURE.save(buffer, "PNG")
    url = "data:image/png;base64," + encoded(PICTURE)
    usual: dict[str, Any] = {"prompt": "x", "size": "64x64", "steps": 1, "seed": 1}
    images = []
    for files, texts in (
        ([("image[]", buffer.getvalue())] * 2, {}),
        ([("image[0]", buffer.getvalue()), ("image[1]", buffer.getvalue())], {"mask": "null"}),
        ([("image", buffer.getvalue())], {"image[]": url}),
    ):
        answer = requests.post(
            server.url + "/v1/images/edits",
            data={**usual, **texts},
            files=[(name, ("a.png", data)) for name, data in files],
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        images.append(answer.json()["data"][0]["b64_json"])
    assert images[0] == images[1] == images[2]


def test_numbers_may_come_as_texts_and_be_larger_than_is_useful(server: ServerProcess) -> None:
    info = drawn(server, "txt2img", prompt="x", steps=5000, n_iter="2", batch_size=1.0)
    assert (info["steps"], len(info["all_seeds"])) == (8, 2)
    fields = {"n": "2", "steps": "5000", "seed": "7", "priority": "true", "size": "64x64"}
    answer = ask(server, "/v1/images/generations", prompt="x", **fields)
    assert [image["seed"] for image in answer.json()["data"]] == ["7", "8"]


@pytest.mark.parametrize("strength", [0, 0.001, 1, 1.5, -3])
def test_denoising_is_brought_into_its_range(server: ServerProcess, strength: float) -> None:
    info = img2img(server, prompt="x", denoising_strength=strength, steps=8)
    assert 0.01 <= info["denoising_strength"] <= 0.99


def test_pictures_may_come_alone_and_beside_empty_ones(server: ServerProcess) -> None:
    one = encoded(PICTURE)
    images = [img2img(server, prompt="x", init_images=given) for given in (one, [None, one, ""])]
    assert [info["width"] for info in images] == [64, 64]
    for nothing in ([], [None], [""], None, ""):
        answer = ask(server, "/sdapi/v1/img2img", prompt="x", init_images=nothing)
        assert answer.status_code == 400
        assert "init_images" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("noise-flux2 [abcd1234]", "noise-flux2"),
        ("noise-flux2.safetensors [abcd1234]", "noise-flux2"),
        ("flux/noise-flux2.ckpt", "noise-flux2"),
        ("flux\\noise-flux2.gguf", "noise-flux2"),
        ("sd/v1-5-pruned.ckpt [e1441589a6]", "noise-flux1"),
        ("/", "noise-flux1"),
        ("[]", "noise-flux1"),
    ],
)
def test_a_model_may_be_named_with_folder_ending_and_hash(
    server: ServerProcess, title: str, model: str
) -> None:
    override = {"sd_model_checkpoint": title}
    assert (
        drawn(server, "txt2img", prompt="x", override_settings=override)["sd_model_name"] == model
    )


@pytest.mark.parametrize(
    "path", ["/sdapi/v1/options", "/sdapi/v1/samplers/", "//sdapi/v1/progress", "/v1/models/"]
)
def test_head_and_options_change_nothing_and_slashes_do_not_matter(
    server: ServerProcess, path: str
) -> None:
    answer = requests.get(server.url + path, timeout=60)
    assert answer.status_code == 200
    head = requests.head(server.url + path, timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    options = requests.options(server.url + path, timeout=60)
    assert options.status_code == 200
    assert "GET" in options.headers["Allow"]


def test_a_picture_that_is_asked_for_with_head_stays(server: ServerProcess) -> None:
    answer = ask(server, "/v1/images/generations", prompt="x", size="64x64", response_format="url")
    url = answer.json()["data"][0]["url"]
    task_id = server.submit()["task_id"]
    server.wait_until_ended(task_id)
    for address in (url, f"{server.url}/image?task_id={task_id}"):
        head = requests.head(address, timeout=60)
        assert (head.status_code, head.content) == (200, b"")
    assert server.get("/image", task_id=task_id).status_code == 200
