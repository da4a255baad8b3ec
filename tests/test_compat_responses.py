"""OpenAI's Responses API, spoken by the real openai package to the application."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from drawing_app import DrawingApp, data_url, drawing_app, png, shown
from openai.types.responses import Response
from openai.types.responses.response_output_item import ImageGenerationCall

TOOL: Any = {"type": "image_generation", "size": "64x64"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrawingApp]:
    with drawing_app(
        tmp_path_factory.mktemp("app"), "noise-flux1", "noise-flux2", "noise-fill"
    ) as app:
        yield app


@pytest.fixture
def client(app: DrawingApp) -> Any:
    return client_of(app)


def client_of(app: DrawingApp, key: str = "none") -> Any:
    url = "http://localhost/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, http_client=app.transport())


def call_of(response: Response) -> ImageGenerationCall:
    [call] = response.output
    assert isinstance(call, ImageGenerationCall)
    assert call.status == "completed"
    return call


def params_of(app: DrawingApp, response: Response) -> dict[str, Any]:
    return app.params(response.id.removeprefix("resp_"))


def test_the_tool_draws_the_text_of_the_input(app: DrawingApp, client: Any) -> None:
    tool = {**TOOL, "output_format": "webp", "seed": 7}
    response = client.responses.create(model="gpt-5", input="a fox", tools=[tool])
    call = call_of(response)
    assert (shown(call.result).size, shown(call.result).format) == ((64, 64), "WEBP")
    assert (call.size, call.output_format, call.action) == ("64x64", "webp", "generate")
    assert call.revised_prompt == "a fox"
    assert (response.status, response.model) == ("completed", "noise-flux1")
    assert response.output_text == ""
    assert response.usage
    assert response.usage.total_tokens == 0
    again = client.responses.create(model="gpt-5", input="a fox", tools=[tool])
    assert call_of(again).result == call.result
    assert params_of(app, response)["seed"] == "7"


def test_a_picture_of_the_input_is_edited(app: DrawingApp, client: Any) -> None:
    content: Any = [
        {"type": "input_text", "text": "bluer"},
        {"type": "input_image", "image_url": data_url(png()), "detail": "auto"},
    ]
    messages: Any = [
        {"role": "developer", "content": "You are helpful."},
        {"type": "message", "role": "user", "content": content},
    ]
    response = client.responses.create(model="gpt-5", input=messages, tools=[TOOL])
    assert call_of(response).action == "edit"
    params = params_of(app, response)
    assert (params["model"], params["prompt"]) == ("noise-flux2", "bluer")
    assert len(params["images"]) == 1
    generate = {**TOOL, "action": "generate"}
    response = client.responses.create(model="gpt-5", input=messages, tools=[generate])
    assert call_of(response).action == "generate"


def test_the_model_of_the_tool_draws_else_that_of_the_request(client: Any) -> None:
    tool = {**TOOL, "model": "noise-flux2"}
    response = client.responses.create(model="noise-flux1", input="x", tools=[tool])
    assert response.model == "noise-flux2"
    response = client.responses.create(model="noise-flux2", input="x", tools=[TOOL])
    assert response.model == "noise-flux2"


def test_a_mask_is_transparent_where_to_repaint(app: DrawingApp, client: Any) -> None:
    mask = {"image_url": data_url(png("RGBA", (0, 0, 0, 0)))}
    content: Any = [
        {"type": "input_text", "text": "x"},
        {"type": "input_image", "image_url": data_url(png())},
    ]
    response = client.responses.create(
        input=[{"role": "user", "content": content}], tools=[{**TOOL, "input_image_mask": mask}]
    )
    params = params_of(app, response)
    assert params["model"] == "noise-fill"
    assert params["mask"]["width"] == 64


def test_the_picture_of_an_earlier_response_is_edited(app: DrawingApp, client: Any) -> None:
    first = client.responses.create(model="gpt-5", input="a fox", tools=[TOOL])
    by_id = client.responses.create(
        model="gpt-5", input="at night", tools=[TOOL], previous_response_id=first.id
    )
    assert by_id.previous_response_id == first.id
    call = call_of(first)
    asked: Any = {"role": "user", "content": "at night"}
    without_result: Any = {"type": "image_generation_call", "id": call.id, "status": "completed"}
    whole: Any = call.to_dict()
    reference: Any = {"type": "item_reference", "id": call.id}
    for item in (without_result, whole, reference):
        response = client.responses.create(
            model="gpt-5", input=[{"role": "user", "content": "a fox"}, item, asked], tools=[TOOL]
        )
        assert params_of(app, response)["images"] == params_of(app, by_id)["images"]
    assert params_of(app, by_id)["model"] == "noise-flux2"


def test_a_stream_has_the_events_of_the_real_api(client: Any) -> None:
    tool = {**TOOL, "partial_images": 2}
    events = list(client.responses.create(input="x", tools=[tool], stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    partial = "image_generation_call.partial_image"
    assert kinds.count(partial) <= 2  # there are some once previews have been learned
    assert [kind for kind in kinds if kind != partial] == [
        "created",
        "in_progress",
        "output_item.added",
        "image_generation_call.in_progress",
        "image_generation_call.generating",
        "image_generation_call.completed",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done: Any = events[-2]
    last: Any = events[-1]
    assert shown(call_of(last.response).result).size == (64, 64)
    assert done.item.result == call_of(last.response).result


def test_the_stream_helper_of_the_package_reads_the_stream(client: Any) -> None:
    with client.responses.stream(model="gpt-5", input="x", tools=[TOOL]) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        final: Any = stream.get_final_response()
    assert call_of(final).size == "64x64"


def message(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


TEXT = {"type": "input_text", "text": "x"}
PICTURE = message({"type": "input_image", "image_url": data_url(png())})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [TOOL]}, "input"),
        ({"input": "", "tools": [TOOL]}, "input"),
        ({"input": [], "tools": [TOOL]}, "input"),
        ({"input": 7, "tools": [TOOL]}, "input"),
        ({"input": [None, 7, [], "x"], "tools": [TOOL]}, "input"),
        ({"input": [{"role": "assistant", "content": "x"}], "tools": [TOOL]}, "input"),
        ({"input": [{"role": "user", "content": 7}], "tools": [TOOL]}, "input[0].content"),
        ({"input": message(), "tools": [TOOL]}, "input[0].content"),
        ({"input": message(TEXT, {"type": "input_file"}), "tools": [TOOL]}, "input[0].content[1]"),
        (
            {"input": message({"type": "input_image", "file_id": "file-1"}), "tools": [TOOL]},
            "input[0].content",
        ),
        (
            {
                "input": message({"type": "input_image", "image_url": "http://10.0.0.1/"}),
                "tools": [TOOL],
            },
            "input[0].content",
        ),
        (
            {"input": message(*[{"type": "input_image"}] * 21), "tools": [TOOL]},
            "input[0].content",
        ),
        ({"input": "x"}, "tools"),
        ({"input": "x", "tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"input": "x", "tools": [TOOL] * 101}, "tools"),
        ({"input": "x", "tools": "image_generation"}, "tools"),
        ({"input": "x", "tools": [TOOL], "tool_choice": "none"}, "tool_choice"),
        ({"input": "x", "tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"input": "x", "tools": [TOOL], "background": True}, "background"),
        ({"input": "x", "tools": [{**TOOL, "background": "transparent"}]}, "tools[0].background"),
        ({"input": "x", "tools": [7, {**TOOL, "size": "huge"}]}, "tools[1].size"),
        ({"input": "x", "tools": [{**TOOL, "size": "9x9"}]}, "tools[0].size"),
        ({"input": "x", "tools": [{**TOOL, "output_format": "gif"}]}, "tools[0].output_format"),
        ({"input": "x", "tools": [{**TOOL, "action": "edit"}]}, "tools[0].action"),
        ({"input": "x", "tools": [{**TOOL, "input_image_mask": 7}]}, "tools[0].input_image_mask"),
        (
            {"input": PICTURE, "tools": [{**TOOL, "input_image_mask": {}}]},
            "tools[0].input_image_mask",
        ),
        ({"input": "x", "tools": [{**TOOL, "model": "dev"}]}, "tools[0].model"),
        ({"input": "x", "tools": [TOOL], "model": "dev"}, "model"),
        ({"input": "x", "tools": [{**TOOL, "model": "gpt-image-1"}], "model": "dev"}, "model"),
        (
            {"input": "x", "tools": [{**TOOL, "partial_images": 4}], "stream": True},
            "tools[0].partial_images",
        ),
        ({"input": "x", "tools": [TOOL], "previous_response_id": 7}, "previous_response_id"),
        ({"input": "x", "tools": [TOOL], "previous_response_id": "x"}, "previous_response_id"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(app: DrawingApp, body: Any, param: str) -> None:
    answer = app.http.post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.get_json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_response_that_is_not_here_is_a_404_that_names_the_field(
    app: DrawingApp, client: Any
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(
            input="x", tools=[TOOL], previous_response_id="resp_0123456789abcdef"
        )
    assert caught.value.param == "previous_response_id"
    item: Any = {"type": "image_generation_call", "id": "ig_0123456789abcdef"}
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input=[item, {"role": "user", "content": "x"}], tools=[TOOL])
    assert caught.value.param == "input"


def test_a_long_history_is_taken(app: DrawingApp, client: Any) -> None:
    history: Any = [
        {"role": role, "content": "word"} for _ in range(200) for role in ("user", "assistant")
    ]
    response = client.responses.create(
        input=[*history, {"role": "user", "content": "the last"}], tools=[TOOL]
    )
    assert params_of(app, response)["prompt"] == "the last"


def test_a_failure_is_the_last_event_of_a_stream(app: DrawingApp, client: Any) -> None:
    app.generator.failure = "no such luck"
    try:
        with pytest.raises(openai.InternalServerError):
            client.responses.create(input="x", tools=[TOOL])
        events = list(client.responses.create(input="x", tools=[TOOL], stream=True))
    finally:
        app.generator.failure = ""
    failed: Any = events[-1]
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error.message


def test_pictures_of_other_clients_are_unknown(tmp_path: Path) -> None:
    keys = {"alice": "alice-0123456789", "bob": "bob-0123456789ab"}
    with drawing_app(tmp_path, "noise-flux2", keys=keys) as app:
        alice, bob = (client_of(app, key) for key in keys.values())
        first = alice.responses.create(input="a fox", tools=[TOOL])
        item: Any = {"type": "image_generation_call", "id": call_of(first).id}
        asked: Any = [item, {"role": "user", "content": "at night"}]
        assert call_of(alice.responses.create(input=asked, tools=[TOOL])).action == "edit"
        with pytest.raises(openai.NotFoundError):
            bob.responses.create(input=asked, tools=[TOOL])
        with pytest.raises(openai.NotFoundError):
            bob.responses.create(input="x", tools=[TOOL], previous_response_id=first.id)
        with pytest.raises(openai.AuthenticationError):
            client_of(app).responses.create(input="x", tools=[TOOL])
