"""What the rules of models change in params, calls, forecasts and lists."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, params_for, seen_by_all
from memory_stores import memory_store
from PIL import Image

from allowed import Allowed
from api.generate_request import Limits, check_request
from api.submission import Prepared, Submission
from api.waiting_places import WaitingPlaces
from declared import read_allowed
from errors import BadOption, NotSupported
from fields import PRESETS
from generation.pipelines import arguments
from images import to_png
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec
from scheduler.estimates import Estimates
from task import InputImage, Stage
from timing_model import TimingModel

JSON_PROMPT = '{"short_description": "a lighthouse"}'


def prepared(model: str, *, limits: Limits | None = None, **fields: Any) -> tuple[Prepared, Stage]:
    """What a request becomes, and the stage that draws it."""
    allowed = allow(model)
    queue = PlayedQueue(allowed, TimingModel(), memory_store())
    submission = Submission(
        seen_by_all(queue),
        allowed,
        limits or Limits(),
        lambda stage: None,
        places=WaitingPlaces(1),
    )
    request = check_request({"prompt": "a lighthouse", **fields}, limits or Limits())
    ready = submission.prepare(request)
    return ready, allowed.stages(ready.params)[-1]


def call(model: str, **fields: Any) -> dict[str, Any]:
    return arguments(prepared(model, **fields)[1], Path("/inputs"))


def picture_of(width: int, height: int) -> bytes:
    return to_png(Image.new("RGB", (width, height), "teal"))


def test_ideogram_draws_with_its_preset_unless_steps_are_sent() -> None:
    usual = call("ideogram-4-fp8")
    assert not {"num_inference_steps", "guidance", "preset"} & usual.keys()
    chosen, stage = prepared("ideogram-4-fp8", preset=PRESETS[0])
    assert chosen.params.steps == 48
    sent = arguments(stage, Path("/inputs"))
    assert sent["preset"] == PRESETS[0]
    assert "num_inference_steps" not in sent
    assert call("ideogram-4-fp8", steps=8)["num_inference_steps"] == 8
    both = call("ideogram-4-fp8", steps=8, guidance=5)
    assert (both["num_inference_steps"], both["guidance"]) == (8, 5)
    alone, stage = prepared("ideogram-4-fp8", guidance=5)
    assert alone.ignored_fields == ["guidance"]
    assert "guidance" not in arguments(stage, Path("/inputs"))


def test_steps_that_the_operator_limits_are_sent_although_the_request_names_none() -> None:
    _, stage = prepared("ideogram-4-fp8", limits=Limits(max_steps=10))
    assert arguments(stage, Path("/inputs"))["num_inference_steps"] == 10


@pytest.mark.parametrize("model", ["fibo2", "flux3-image-klein-base", "anima-base", "iris-3b-base"])
def test_a_class_with_defaults_of_its_own_gets_steps_and_guidance_only_if_they_are_sent(
    model: str,
) -> None:
    assert not {"num_inference_steps", "guidance"} & call(model).keys()
    sent = call(model, steps=7, guidance=2)
    assert (sent["num_inference_steps"], sent["guidance"]) == (7, 2)


def test_sides_that_follow_a_picture_are_what_the_model_draws() -> None:
    for width, height, expected in ((500, 300, (480, 288)), (20, 20, (32, 32))):
        ready, _ = prepared("qwen-image-2.1", images=[picture_of(width, height)])
        assert (ready.params.width, ready.params.height) == expected
    ready, _ = prepared("qwen-image-2.1", images=[picture_of(500, 300)], width=960)
    assert (ready.params.width, ready.params.height) == (960, 576)


def test_a_control_image_gives_the_size_and_a_large_one_about_a_megapixel() -> None:
    model = "dev-controlnet-canny"
    ready, _ = prepared(model, control_image=picture_of(640, 400))
    assert (ready.params.width, ready.params.height) == (640, 400)
    ready, _ = prepared(model, control_image=picture_of(640, 400), height=800)
    assert (ready.params.width, ready.params.height) == (1280, 800)
    ready, _ = prepared(model, control_image=picture_of(3000, 1500))
    assert 900_000 < ready.params.width * ready.params.height <= 1024 * 1024
    assert abs(ready.params.width / ready.params.height - 2) < 0.05


@pytest.mark.parametrize(
    ("model", "strength"),
    [("dev-controlnet-canny", 0.4), ("z-image-turbo-controlnet-union-2.1", 1.0)],
)
def test_the_control_strength_is_that_of_mfluxs_command(model: str, strength: float) -> None:
    control = picture_of(64, 64)
    assert call(model, control_image=control)["controlnet_strength"] == strength
    sent = call(model, control_image=control, control_strength=0.7)
    assert sent["controlnet_strength"] == 0.7


def test_fibo_lite_ignores_guidance_and_negative_prompt_and_says_so() -> None:
    ready, stage = prepared("fibo-lite", prompt=JSON_PROMPT, guidance=4, negative_prompt="blurry")
    assert ready.ignored_fields == ["guidance", "negative_prompt"]
    assert not {"guidance", "negative_prompt"} & arguments(stage, Path("/inputs")).keys()


def test_the_in_context_class_of_dev_needs_no_load_and_draws_twice_the_width() -> None:
    allowed = allow("dev")
    (alone,) = allowed.stages(params_for(model="dev"))
    (pair,) = allowed.stages(params_for(model="dev", images=(InputImage("a", 64, 64),)))
    assert alone.load_spec.key == pair.load_spec.key == "dev"
    assert pair.load_spec.pipeline.name == "Flux1InContextDev"
    estimates = Estimates(TimingModel())
    assert estimates.work(pair).tokens == 2 * estimates.work(alone).tokens


def test_bits_that_ruin_a_model_are_refused_at_the_start_and_at_submit() -> None:
    with pytest.raises(BadOption, match="anima-base cannot be quantized to 3 bits"):
        read_allowed(
            read_catalog(),
            default="anima-base",
            allowed=(),
            path=None,
            fallback="noise-flux1",
            quantize=3,
            quantize_choices=(),
            lora_dir=None,
            allow_lora_repos=False,
        )
    model = allow("anima-base").default
    offer = Allowed(model, (model,), quantize_choices=(3, 4))
    with pytest.raises(NotSupported, match="cannot be quantized to 3 bits") as caught:
        offer.stages(params_for(model="anima-base", quantize=3))
    assert caught.value.field == "quantize"
    (stage,) = offer.stages(params_for(model="anima-base", quantize=4))
    assert LoadSpec(model, model.pipelines[0], 4).key == stage.load_spec.key
