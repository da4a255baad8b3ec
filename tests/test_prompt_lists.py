"""Several prompts in one task: one image of each."""

import json
from typing import Any

import pytest
import requests
from conftest import ServerProcess, forecast_of
from studio import StudioOf
from submission_desk import Desk

from api.generate_request import Limits, parse_form, parse_request
from errors import InvalidInput
from images import read_metadata
from task import TaskStatus

FOXES = ["a red fox", "a blue fox", "a green fox"]


def test_there_is_one_image_of_each_prompt() -> None:
    params = Desk("schnell").params(prompt=FOXES, seed=5)
    assert (params.count, params.prompt, params.prompts) == (3, FOXES[0], tuple(FOXES))
    assert [params.seed_of(index) for index in range(3)] == [5, 6, 7]
    assert [params.prompt_of(index) for index in range(3)] == FOXES
    assert Desk("schnell").params(prompt=FOXES, count=3).count == 3


def test_a_list_of_one_prompt_is_this_prompt() -> None:
    params = Desk("schnell").params(prompt=["a fox"], count=4)
    assert (params.count, params.prompt, params.prompts) == (4, "a fox", ())
    same = Desk("schnell").params(prompt=["a fox", "a fox"])
    assert (same.count, same.prompt, same.prompts) == (2, "a fox", ())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": FOXES, "count": 2}, "count"),
        ({"prompt": FOXES, "n": 6}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", " "]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a", None]}, "prompt"),
        ({"prompt": ["a", "b\0"]}, "prompt"),
        ({"prompt": ["a", "x" * 101]}, "prompt"),
        ({"prompt": ["a"] * 11}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
    ],
)
def test_other_lists_are_refused(fields: dict[str, Any], field: str) -> None:
    code, named, _ = Desk("schnell", limits=Limits(max_prompt_chars=100)).refusal(**fields)
    assert (code, named) == ("invalid_input", field)


def test_the_refusal_says_what_is_allowed() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request(b'{"prompt": 5}', Limits(max_prompt_chars=100, max_count=4))
    assert caught.value.message == (
        "prompt must be a string of up to 100 characters or a list of 1 to 4, each a string of 1 "
        "to 100 characters, not 5."
    )


def test_a_form_has_several_prompts_as_several_parts() -> None:
    assert parse_form({"prompt": FOXES}, {}, Limits()).prompts == FOXES
    assert parse_form({"prompt": ["a fox"]}, {}, Limits()).prompt == "a fox"


def test_other_lists_have_other_digests() -> None:
    bodies: list[Any] = [FOXES, FOXES[::-1], FOXES[0]]
    digests = {
        parse_request(json.dumps({"prompt": prompt}).encode(), Limits()).digest for prompt in bodies
    }
    assert len(digests) == 3


def test_the_images_of_a_list_are_those_of_tasks_with_one_prompt_each(
    server: ServerProcess,
) -> None:
    usual: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "format": "PNG"}

    def drawn(prompt: str | list[str], seed: int) -> tuple[dict[str, Any], list[bytes]]:
        body = {"prompt": prompt, "seed": seed, **usual}
        answer = requests.post(server.url + "/generate", json=body, timeout=60).json()
        status = server.wait_until_ended(answer["task_id"])
        assert status["status"] == "done"
        indices = range(status["images_done"])
        query = {"task_id": answer["task_id"], "delete": "false"}
        return status, [server.get("/image", index=index, **query).content for index in indices]

    status, images = drawn(FOXES, 5)
    assert status["params"]["prompts"] == FOXES
    assert status["params"]["count"] == len(images) == 3
    assert [(read_metadata(image) or {})["prompt"] for image in images] == FOXES
    for index, prompt in enumerate(FOXES):
        alone, (image,) = drawn(prompt, 5 + index)
        assert image == images[index]
        assert "prompts" not in alone["params"]


def test_an_image_without_metadata_is_described_with_its_own_prompt(server: ServerProcess) -> None:
    task_id = server.submit(FOXES, metadata=False)["task_id"]  # type: ignore[arg-type]
    server.wait_until_ended(task_id)
    described = [
        server.get("/image", task_id=task_id, index=index, metadata="true").json()
        for index in range(3)
    ]
    assert [one["prompt"] for one in described] == FOXES
    assert "prompts" not in described[0]


def test_weights_are_loaded_once_for_all_prompts(studio_of: StudioOf) -> None:
    studio = studio_of("noise-flux1", "noise-flux2")
    task = studio.submit("noise-flux2", FOXES[0], prompts=tuple(FOXES), count=3)
    studio.run_all()
    assert studio.gpu.loads == ["noise-flux1", "noise-flux2"]
    assert studio.gpu.drawn == [
        ("noise-flux2", prompt, seed) for seed, prompt in enumerate(FOXES, 1)
    ]
    assert studio.status(task.task_id).status is TaskStatus.DONE


def test_the_forecast_encodes_each_prompt(studio_of: StudioOf) -> None:
    studio = studio_of("noise-flux1")
    one, task = studio.queue.scheduler.estimates, studio.submit("noise-flux1", FOXES[0], count=3)
    listed = studio.submit("noise-flux1", FOXES[0], prompts=tuple(FOXES), count=3)
    same, each = (one.durations(*studio.queue.allowed.stages(t.params)) for t in (task, listed))
    assert each.gpu_s - same.gpu_s == pytest.approx(2 * same.text_encoding_s)
    assert forecast_of(listed).end_s > forecast_of(task).end_s


def test_a_helper_writes_each_prompt(studio_of: StudioOf) -> None:
    studio = studio_of("fibo")
    studio.submit("fibo", FOXES[0], prompts=tuple(FOXES), count=3)
    studio.run_all()
    assert studio.gpu.prepared == [("fibo-vlm", prompt) for prompt in FOXES]
    assert len(studio.gpu.drawn) == 3
