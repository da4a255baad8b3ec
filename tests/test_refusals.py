"""Requests that the model or the operator does not allow are refused with the reason."""

import json
from typing import Any

import pytest
from submission_desk import PICTURE, Desk, picture_of

from fields import PRESETS, Takes
from images import to_base64
from models.mflux_registry import read_catalog

CAPTION = json.dumps({"edit_instruction": "add a boat"})
"""A prompt that every model takes."""
VALUES: dict[Takes, Any] = {
    Takes.GUIDANCE: 3.5,
    Takes.NEGATIVE_PROMPT: "blurry",
    Takes.SCHEDULER: "linear",
    Takes.INIT_IMAGE: PICTURE,
    Takes.IMAGE_STRENGTH: 0.5,
    Takes.IMAGES: [PICTURE],
    Takes.MASK: PICTURE,
    Takes.MASK_FEATHER: 4,
    Takes.CONTROL_IMAGE: PICTURE,
    Takes.CONTROL_STRENGTH: 0.5,
    Takes.CONTROL_TYPE: "canny",
    Takes.LORAS: ["a"],
    Takes.PRESET: PRESETS[0],
    Takes.UPSCALE: 2,
    Takes.STEPS: 4,
    Takes.PROMPT: "a lighthouse",
    Takes.REFERENCE_STRENGTHS: [0.5],
    Takes.EDIT_STRENGTH: 0.5,
    Takes.AUTO_MASK: "the shirt",
    Takes.VERIFY_RETRIES: 2,
    Takes.OUTPUT_RESOLUTION: 512,
    Takes.STEP_CACHE: 0.25,
    Takes.CFG_END: 0.5,
    Takes.SKIP_LAYERS: [3],
    Takes.SOFTNESS: 0.5,
    Takes.BACKGROUND: "transparent",
    Takes.LORA_STYLE: "storyboard",
    Takes.CONTROL_IMAGES: [PICTURE],
    Takes.CONTROL_TYPES: ["canny"],
    Takes.CONTROL_STRENGTHS: [0.5],
}


def test_there_is_a_value_for_each_field_that_not_every_model_takes() -> None:
    assert set(VALUES) == set(Takes)


@pytest.mark.parametrize("name", list(Takes))
def test_a_field_that_a_model_lacks_is_refused_by_the_names_of_both(name: Takes) -> None:
    refused = 0
    for model in read_catalog().models:
        if name in model.takes | model.ignored - {Takes.GUIDANCE} or model.name == "iris-3b":
            continue
        needs = {field: VALUES[field] for field in model.pipelines[0].needs}
        prompt = {"prompt": CAPTION if Takes.PROMPT in model.takes else None}
        desk = Desk(model.name)
        fields = {**prompt, **needs, name: VALUES[name]}
        if name is Takes.GUIDANCE:
            assert desk.prepare(**fields).ignored_fields == ["guidance"]
        elif name is Takes.SOFTNESS:
            assert desk.refusal(**fields)[:2] == ("invalid_input", "upscale")
        elif name is Takes.UPSCALE:
            assert desk.refusal(**fields)[:2] == ("not_supported", "upscale")
        else:
            code, field, message = desk.refusal(**fields)
            assert (code, field) == ("not_supported", name)
            assert message == f"{model.name} has no {name}."
        refused += 1
    assert refused > 0


def test_a_model_of_a_fixed_number_of_steps_takes_no_other() -> None:
    code, field, message = Desk("iris-3b").refusal(steps=4)
    assert (code, field, message) == ("not_supported", "steps", "iris-3b has no steps.")
    assert Desk("iris-3b").params().steps == 4


@pytest.mark.parametrize(
    ("model", "fields", "field"),
    [
        ("dev-kontext", {}, "images"),
        ("dev-fill", {"init_image": PICTURE}, "mask"),
        ("dev-fill", {"mask": PICTURE}, "init_image"),
        ("dev-redux", {}, "images"),
        ("dev-depth", {}, "control_image"),
        ("dev-fill-catvton", {"images": [PICTURE], "mask": PICTURE}, "init_image"),
        ("qwen-image-edit", {}, "images"),
        ("fibo-edit", {"mask": PICTURE}, "images"),
        ("z-image-controlnet", {}, "control_image"),
        ("z-image-controlnet", {"control_strength": 0.0}, "control_image"),
        ("z-image-controlnet", {"control_type": "mlsd"}, "control_image"),
        ("seedvr2-3b", {"prompt": None, "upscale": 2}, "init_image"),
        ("seedvr2-3b", {"prompt": None, "init_image": PICTURE}, "upscale"),
        ("z-image", {"prompt": None}, "prompt"),
        ("z-image", {"image_strength": 0.5}, "image_strength"),
    ],
)
def test_a_field_that_a_model_needs_is_named(
    model: str, fields: dict[str, Any], field: str
) -> None:
    code, named, message = Desk(model).refusal(**fields)
    assert (code, named) == ("invalid_input", field)
    assert field in message


@pytest.mark.parametrize(
    ("model", "fields", "field", "words"),
    [
        ("dev", {"init_image": PICTURE, "images": [PICTURE]}, "images", "not both"),
        ("dev-kontext", {"images": [PICTURE, PICTURE]}, "images", "one picture"),
        ("seedvr2-3b", {"prompt": "x", "init_image": PICTURE, "upscale": 2}, "prompt", "prompt"),
        (
            "seedvr2-3b",
            {"prompt": None, "init_image": PICTURE, "upscale": 2, "width": 64},
            "width",
            "upscale, not width",
        ),
        (
            "seedvr2-3b",
            {"prompt": None, "init_image": PICTURE, "upscale": 2, "steps": 4},
            "steps",
            "no steps",
        ),
        ("krea-2", {"negative_prompt": "red"}, "negative_prompt", "guidance 1: "),
        ("z-image", {"negative_prompt": "red", "guidance": 1}, "negative_prompt", "above 1"),
        ("z-image", {"negative_prompt": "red", "guidance": 0}, "negative_prompt", "above 1"),
        ("z-image", {"quantize": 4}, "quantize", "Allowed: none"),
        ("z-image", {"upscale": 2}, "upscale", "needs an upscaler"),
        ("z-image", {"loras": ["a"]}, "loras", "no LoRA 'a'"),
        ("z-image", {"loras": ["../a"]}, "loras", "no LoRA"),
        ("z-image", {"loras": ["/etc/passwd"]}, "loras", "no LoRA"),
        ("z-image", {"loras": ["org/name"]}, "loras", "no LoRA"),
        ("z-image", {"loras": ["org/name:file.safetensors"]}, "loras", "no LoRA"),
    ],
)
def test_a_request_that_the_model_or_the_operator_does_not_allow_is_refused(
    model: str, fields: dict[str, Any], field: str, words: str
) -> None:
    code, named, message = Desk(model).refusal(**fields)
    assert (code, named) == ("not_supported", field)
    assert words in message


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"scheduler": "os.path"}, "scheduler", "one of linear, flow_match_euler_discrete"),
        ({"scheduler": "ddim"}, "scheduler", "one of"),
        ({"control_type": "cat"}, "control_type", "one of canny"),
        ({"count": 2, "n": 3}, "n", "mean the same"),
        ({"count": 11}, "count", "from 1 to 10"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"count": 101}, "count", "from 1 to 10"),
        ({"count": 0}, "count", "from 1 to 10"),
        ({"steps": 101}, "steps", "from 1 to 100"),
        ({"image_strength": 0}, "image_strength", "above 0 and below 1"),
        ({"image_strength": 1}, "image_strength", "above 0 and below 1"),
        ({"init_image": PICTURE, "steps": 1}, "steps", "leaves no step"),
        ({"init_image": PICTURE, "steps": 1, "image_strength": 0.9}, "steps", "leaves no step"),
        ({"upscale": 1}, "upscale", "above 1 and up to 4"),
        ({"upscale": 4.1}, "upscale", "above 1 and up to 4"),
        ({"negative_prompt": "x" * 10_001}, "negative_prompt", "up to 10000 characters"),
        ({"prompt": " \n"}, "prompt", "only with a picture"),
        ({"images": []}, "images", "a list of 1 to 10"),
        ({"images": [PICTURE] * 11}, "images", "a list of 1 to 10"),
        ({"images": PICTURE}, "images", "a list of 1 to 10"),
        ({"images": [{"index": 0}]}, "images", "{task_id, index}"),
        ({"init_image": {"task_id": "x", "path": "/"}}, "init_image", "{task_id, index}"),
        ({"init_image": {"task_id": "x", "index": -1}}, "init_image", "{task_id, index}"),
        ({"init_image": 7}, "init_image", "base64"),
        ({"init_image": "http://example.org/a.png"}, "init_image", "URLs are not fetched"),
        ({"mask": "file:///etc/passwd"}, "mask", "URLs are not fetched"),
        ({"images": ["https://example.org/a.png"]}, "images", "URLs are not fetched"),
        ({"init_image": "data:text/html,AAAA"}, "init_image", "data URL"),
        ({"init_image": to_base64(b"hello, I am a text")}, "init_image", "not a picture"),
        ({"init_image": to_base64(picture_of()[:60])}, "init_image", "broken or incomplete"),
        ({"init_image": to_base64(picture_of(8, 64))}, "init_image", "at least 16"),
        ({"loras": [{"scale": 1}]}, "loras", "{name, scale}"),
        ({"loras": [{"name": "a", "scale": 11}]}, "loras", "{name, scale}"),
        ({"loras": [{"name": "a", "path": "/"}]}, "loras", "{name, scale}"),
        ({"loras": ["a"] * 9}, "loras", "a list of 1 to 8"),
        ({"quantize": 2}, "quantize", "from 3 to 8"),
        ({"control_strength": 3}, "control_strength", "from 0 to 2"),
        ({"metadata": "yes"}, "metadata", "true or false"),
    ],
)
def test_a_value_that_no_model_takes_is_refused_by_the_name_of_its_field(
    fields: dict[str, Any], field: str, words: str
) -> None:
    code, named, message = Desk("z-image", "seedvr2-3b").refusal(**fields)
    assert (code, named) == ("invalid_input", field)
    assert words in message
    assert len(message) < 1000
