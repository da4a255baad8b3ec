import pytest
from conftest import offer_of

from errors import InvalidInput
from generate_request import GenerateRequest, Limits, parse_request, request_schema
from mflux_registry import find_model, read_catalog
from model_catalog import Model
from queue_manager import QueueManager
from submission import Submission
from task import GenerationParams
from task_store import TaskStore
from timing_model import TimingModel

SCHNELL, DEV = offer_of("schnell", "dev").models


def resolve(request: GenerateRequest, model: Model, limits: Limits) -> GenerationParams:
    offer = offer_of(model.name)
    queue = QueueManager(offer, TimingModel(), TaskStore(None))
    return Submission(queue, offer, limits, lambda params: None).prepare(request).params


def test_what_is_absent_is_filled_in_from_the_model() -> None:
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


def test_a_long_value_is_cut_in_the_refusal() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request(b'{"prompt": "x", "format": "' + b"y" * 10_000 + b'"}', Limits())
    assert len(caught.value.message) < 200


def test_no_name_or_alias_stands_for_two_models() -> None:
    names = [name for model in read_catalog().models for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert find_model("SCHNELL") is find_model("schnell")
    assert find_model("devil") is None
