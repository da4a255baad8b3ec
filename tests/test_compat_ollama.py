"""Ollama's API, spoken by the real ollama package to the application."""

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import ollama
import pytest
from drawing_app import DrawingApp, drawing_app, png, shown

SMALL: Any = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrawingApp]:
    with drawing_app(
        tmp_path_factory.mktemp("app"), "noise-flux1", "noise-flux2", "seedvr2-3b"
    ) as app:
        yield app


@pytest.fixture
def client(app: DrawingApp) -> ollama.Client:
    return ollama.Client("http://localhost", transport=httpx.WSGITransport(app=app.app))


def post(app: DrawingApp, body: Any) -> Any:
    return app.http.post("/api/generate", json=body)


def test_a_picture_is_drawn_with_the_values_of_the_request(client: ollama.Client) -> None:
    answer = client.generate(
        "noise-flux1", "a fox", width=96, height=64, steps=2, options={"seed": 7}
    )
    assert (answer.done, answer.done_reason, answer.response) == (True, "stop", "")
    assert answer.model == "noise-flux1"
    picture = shown(answer.image)
    assert (picture.size, picture.format) == ((96, 64), "PNG")
    assert picture.getpixel((0, 0)) == (7, 0, 0)  # the generator draws its seed
    assert answer.total_duration
    assert answer.total_duration > 0


def test_a_stream_has_the_steps_and_ends_with_the_picture(client: ollama.Client) -> None:
    lines = list(client.generate("noise-flux1", "a fox", stream=True, **SMALL))
    *progress, last = lines
    assert all(line.total == 4 and not line.done and line.image is None for line in progress)
    steps = [line.completed or 0 for line in progress]
    assert steps == sorted(set(steps))
    assert last.done
    assert shown(last.image).size == (64, 64)


@pytest.mark.parametrize(
    "name", ["noise-flux1", "noise-flux1:latest", "x/noise-flux1:4b", "NOISE-Flux1"]
)
def test_a_name_may_have_a_tag_and_a_namespace(client: ollama.Client, name: str) -> None:
    assert client.generate(name, "x", **SMALL).model == name
    assert client.show(name).capabilities == ["image"]


def test_pictures_are_edited(app: DrawingApp, client: ollama.Client) -> None:
    answer = client.generate("noise-flux2", "both", images=[png(), png(colour="blue")], **SMALL)
    assert shown(answer.image).size == (64, 64)
    started = client.generate("noise-flux1", "bluer", images=[png()])
    assert shown(started.image).size == (64, 64)  # that of the picture
    with pytest.raises(ollama.ResponseError, match="one picture at a time"):
        client.generate("noise-flux1", "both", images=[png(), png()])


def test_the_models_that_draw_are_listed(client: ollama.Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == ["noise-flux1:latest", "noise-flux2:latest"]
    assert models[0].details
    assert models[0].details.family == "flux"
    assert client.show("noise-flux1").modelinfo == {"general.architecture": "flux"}


def test_the_models_in_memory_are_listed(client: ollama.Client) -> None:
    client.generate("noise-flux2", "x", **SMALL)
    loaded = client.ps().models
    assert loaded[0].model == "noise-flux2:latest"
    assert all(isinstance(model.size, int) for model in loaded)


def test_lists_say_what_apps_read(app: DrawingApp) -> None:
    assert app.http.get("/api/version").get_json()["version"]
    [first, _] = app.http.get("/api/tags").get_json()["models"]
    assert first["capabilities"] == ["image"]
    assert first["name"] == first["model"]
    assert set(first["details"]) == {
        "parent_model",
        "format",
        "family",
        "families",
        "parameter_size",
        "quantization_level",
    }


def test_without_a_prompt_nothing_is_drawn(app: DrawingApp, client: ollama.Client) -> None:
    answer = client.generate("noise-flux1", keep_alive=0)
    assert (answer.done, answer.done_reason, answer.image) == (True, "load", None)


def test_a_body_without_fields_of_ollama_is_a_native_one(app: DrawingApp) -> None:
    body = {"model": "noise-flux1", "prompt": "a fox", **SMALL}
    native = post(app, body).get_json()
    assert native["status"] in ("waiting", "running", "done")
    assert app.params(native["task_id"])["prompt"] == "a fox"
    for field in ({"stream": False}, {"stream": False, "options": None}):
        assert post(app, {**body, **field}).get_json()["image"]
    lines = post(app, {**body, "options": {}}).text.splitlines()
    assert json.loads(lines[-1])["image"]
    form = {"prompt": 'a "stream"', "steps": "4", "init_image": (BytesIO(png()), "a.png")}
    assert app.http.post("/api/generate", data=form).get_json()["task_id"]
    quoted = post(app, {**body, "prompt": 'he says "stream"'}).get_json()
    assert quoted["task_id"]


def test_the_native_route_without_api_stays_as_it_was(app: DrawingApp) -> None:
    answer = app.http.post("/generate", json={"prompt": "x", "stream": False})
    assert answer.status_code == 400
    assert answer.get_json()["error"]["field"] == "stream"
    answer = post(app, {"prompt": "x", "no_such_field": 1})
    assert answer.get_json()["error"]["field"] == "no_such_field"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"prompt": "x"}, 400, "model"),
        ({"model": "no-such", "prompt": "x"}, 404, "model"),
        ({"model": 7, "prompt": "x"}, 400, "model"),
        ({"model": "x" * 1000, "prompt": "x"}, 400, "model"),
        ({"model": "dev", "prompt": "x"}, 422, "model"),
        ({"model": "noise-flux1", "prompt": ["x"]}, 400, "prompt"),
        ({"model": "noise-flux1", "prompt": "x" * 20_000}, 400, "prompt"),
        ({"model": "noise-flux1", "prompt": "x", "width": 9}, 400, "width"),
        ({"model": "noise-flux1", "prompt": "x", "width": 1 << 70}, 400, "width"),
        ({"model": "noise-flux1", "prompt": "x", "height": "tall"}, 400, "height"),
        ({"model": "noise-flux1", "prompt": "x", "steps": -1}, 400, "steps"),
        ({"model": "noise-flux1", "prompt": "x", "stream": "perhaps"}, 400, "stream"),
        ({"model": "noise-flux1", "prompt": "x", "options": {"seed": "dice"}}, 400, "seed"),
        ({"model": "noise-flux1", "prompt": "x", "options": {"seed": 1 << 80}}, 400, "seed"),
        ({"model": "noise-flux1", "prompt": "x", "images": "x"}, 400, "images"),
        ({"model": "noise-flux1", "prompt": "x", "images": [7]}, 400, "images"),
        ({"model": "noise-flux1", "prompt": "x", "images": ["http://10.0.0.1/"]}, 400, "images"),
        ({"model": "noise-flux1", "prompt": "x", "images": ["aGVsbG8="]}, 400, "images"),
        ({"model": "noise-flux1", "prompt": "x", "images": ["aGVsbG8="] * 21}, 400, "images"),
        ({"model": "noise-flux1", "prompt": "x", "images": ["aGVsbG8="] * 101}, 400, "images"),
    ],
)
def test_a_bad_request_is_refused_in_ollamas_form_and_names_the_field(
    app: DrawingApp, body: Any, status: int, word: str
) -> None:
    answer = post(app, {"stream": False, **body})
    assert answer.status_code == status, answer.text
    assert set(answer.get_json()) == {"error"}
    assert word in answer.get_json()["error"]


def test_errors_of_the_package_tell_what_is_wrong(app: DrawingApp, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.generate("llama3.2", "x")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("llama3.2")
    assert "model" in app.http.post("/api/show", json={}).get_json()["error"]
    app.generator.failure = "no such luck"
    try:
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError):
                list(client.generate("noise-flux1", "x", stream=stream, **SMALL))
    finally:
        app.generator.failure = ""


def test_chats_are_not_there(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="POST /api/chat: Not Found") as caught:
        client.chat("noise-flux1", [{"role": "user", "content": "hello"}])
    assert caught.value.status_code == 404
