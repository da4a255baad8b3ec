"""From a request to params: defaults, sizes, pictures, what the model draws."""

import pytest
from conftest import PlayedQueue, allow, seen_by_all
from memory_stores import memory_store
from submission_desk import DEV, SCHNELL

from api.generate_request import GenerateRequest, Limits, parse_request, request_schema
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from errors import InvalidInput
from models.mflux_registry import find_model, read_catalog
from models.model_catalog import Model
from task import GenerationParams, InputImage
from timing_model import TimingModel


def resolve(request: GenerateRequest, model: Model, limits: Limits) -> GenerationParams:
    allowed = allow(model.name)
    queue = PlayedQueue(allowed, TimingModel(), memory_store())
    submission = Submission(
        seen_by_all(queue), allowed, limits, lambda params: None, places=WaitingPlaces(1)
    )
    return submission.prepare(request).params


def test_absent_fields_are_filled_in_from_the_model() -> None:
    request = parse_request(b'{"prompt": "x"}', Limits())
    params = resolve(request, DEV, Limits())
    assert (params.width, params.height, params.steps, params.guidance) == (1024, 1024, 25, 3.5)
    assert (params.format, params.quality, params.tokens) == ("JPEG", 85, 4096)
    assert resolve(request, SCHNELL, Limits()).guidance is None
    assert resolve(request, DEV, Limits()).seed != params.seed


def test_a_guidance_that_was_asked_for_is_taken_where_the_model_has_one() -> None:
    request = parse_request(b'{"prompt": "x", "guidance": 0}', Limits())
    assert resolve(request, DEV, Limits()).guidance == 0
    assert resolve(request, SCHNELL, Limits()).guidance is None


def test_the_operators_limits_are_in_the_schema_and_in_the_refusals() -> None:
    limits = Limits(max_pixels=512 * 512, max_steps=7)
    properties = request_schema(limits)["properties"]
    assert "at most 262144 pixels" in properties["width"]["description"]
    for steps in (8, 5000):
        body = b'{"prompt": "x", "width": 64, "steps": %d}' % steps
        with pytest.raises(InvalidInput, match="a whole number from 1 to 7, not") as caught:
            resolve(parse_request(body, limits), DEV, limits)
        assert caught.value.field == "steps"
    body = b'{"prompt": "x", "width": 1024, "height": 512}'
    with pytest.raises(InvalidInput, match="at most 262144 pixels") as caught:
        resolve(parse_request(body, limits), DEV, limits)
    assert caught.value.field == "width"


def test_the_default_size_stays_within_the_operators_limit() -> None:
    limits = Limits(max_pixels=500_000)
    params = resolve(parse_request(b'{"prompt": "x"}', limits), DEV, limits)
    assert (params.width, params.height) == (704, 704)
    assert request_schema(limits)["properties"]["width"]["default"] == 704


def test_the_default_steps_stay_within_the_operators_limit() -> None:
    limits = Limits(max_steps=7)
    assert resolve(parse_request(b'{"prompt": "x"}', limits), DEV, limits).steps == 7


def test_params_that_an_earlier_version_has_stored_are_read() -> None:
    first = '{"prompt":"x","seed":1,"width":64,"height":64,"steps":4,"guidance":null,'
    first += '"format":"JPEG","quality":85}'
    params = GenerationParams.model_validate_json(first)
    assert (params.model, params.count, params.scheduler, params.asked) == ("", 1, None, "")
    later = (
        first[:-1] + ',"model":"dev","quantize":8,"count":2,"negative_prompt":null,'
        '"scheduler":"linear","init_image":["0123456789abcdef",64,64],"image_strength":0.4,'
        '"images":[],"mask":null,"control_image":null,"control_strength":null,'
        '"control_type":null,"loras":[["a",0.5]],"upscale":2.0,"upscaler":"seedvr2-3b",'
        '"metadata":true,"warnings":[],"asked":"b4199e33255db273"}'
    )
    params = GenerationParams.model_validate_json(later)
    assert (params.quantize, params.scheduler, params.upscale) == (8, "linear", 2.0)
    assert params.init_image == InputImage("0123456789abcdef", 64, 64)


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        (b'{"model": ""}', "a string of 1 to 200 characters"),
        (b'{"negative_prompt": 3}', "a string of up to 10000 characters"),
        (b'{"loras": []}', "a list of 1 to 8, each a string or {name, scale}"),
    ],
)
def test_refusals_name_the_range_of_texts_and_lists(body: bytes, allowed: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request(body, Limits())
    assert f" must be {allowed}, not " in caught.value.message


def test_a_long_value_is_cut_in_the_refusal() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request(b'{"prompt": "x", "format": "' + b"y" * 10_000 + b'"}', Limits())
    assert len(caught.value.message) < 200


def test_no_name_or_alias_stands_for_two_models() -> None:
    names = [name for model in read_catalog().models for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert find_model("SCHNELL") is find_model("schnell")
    assert find_model("devil") is None
