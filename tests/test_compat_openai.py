"""The OpenAI Images API, spoken by the real openai package to the running server."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import openai
import pytest
import requests
from conftest import ServerProcess, StartServer
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse
from openai_calls import SIZE, images_of, picture_of
from PIL import Image
from served import served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--models", "noise-flux1,noise-flux2,noise-fill", "--max-body-bytes", "1000000")
    yield from served(tmp_path_factory.mktemp("server"), *options)


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def post(server: ServerProcess, body: Any, **headers: str) -> requests.Response:
    url = server.url + "/v1/images/generations"
    return requests.post(url, json=body, headers=headers, timeout=60)


def test_images_come_as_base64_with_the_size_asked_for(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="gpt-image-1", prompt="a fox", size="96x64", n=2)
    first, second = images_of(answer)
    assert picture_of(first.b64_json).size == (96, 64)
    assert first.url is None
    assert first.b64_json != second.b64_json
    assert answer.output_format == "png"
    assert answer.size == "96x64"
    assert answer.usage
    assert answer.usage.total_tokens == 0


def test_the_same_seed_gives_the_same_image_and_every_image_has_its_seed(
    client: openai.OpenAI,
) -> None:
    def draw(**extra: Any) -> Any:
        return images_of(client.images.generate(prompt="a fox", size=SIZE, extra_body=extra))[0]

    first = draw(seed=7, steps=2)
    assert first.seed == "7"
    assert picture_of(draw(seed="7", steps=2).b64_json) == picture_of(first.b64_json)
    assert draw().seed != draw().seed


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1", "", "whatever", None])
def test_any_name_that_is_no_model_means_the_servers_own(server: ServerProcess, model: Any) -> None:
    answer = post(server, {"model": model, "prompt": "x", "size": "64x64"})
    assert answer.status_code == 200
    [image] = answer.json()["data"]
    assert ("url" in image) == (model or "").startswith("dall-e")
    assert len({"url", "b64_json"} & set(image)) == 1


def test_a_name_may_have_the_tag_of_ollama(server: ServerProcess, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="noise-flux2:latest", prompt="x", size=SIZE, response_format="url"
    )
    task_id = images_of(answer)[0].url.rpartition("/img-")[2].partition("_")[0]
    params = server.get("/status", task_id=task_id).json()["params"]
    assert params["model"] == "noise-flux2"


def test_a_model_of_the_catalog_that_is_not_allowed_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Allowed: noise-flux1, noise-flux2") as caught:
        client.images.generate(model="dev", prompt="x", size=SIZE)
    assert caught.value.code == "model_not_allowed"
    assert caught.value.param == "model"


@pytest.mark.parametrize("form", ["url", "b64_json"])
def test_each_image_comes_in_exactly_the_form_that_was_asked_for(
    client: openai.OpenAI, form: Any
) -> None:
    for model in ("dall-e-3", "gpt-image-1"):
        answer = client.images.generate(model=model, prompt="x", size=SIZE, response_format=form)
        [image] = images_of(answer)
        assert (image.url is None) == (form == "b64_json")
        assert (image.b64_json is None) == (form == "url")


@pytest.mark.parametrize(
    ("output_format", "ending"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")]
)
def test_a_url_can_be_fetched_again_and_again_without_a_key(
    server: ServerProcess, client: openai.OpenAI, output_format: Any, ending: str
) -> None:
    answer = client.images.generate(
        model="dall-e-3", prompt="x", size=SIZE, output_format=output_format, output_compression=50
    )
    url = images_of(answer)[0].url
    assert url.startswith(server.url + "/")
    assert url.endswith("." + ending)
    for _ in range(3):
        fetched = requests.get(url, timeout=60)
        assert fetched.headers["Content-Type"] == f"image/{output_format}"
        assert Image.open(BytesIO(fetched.content)).size == (64, 64)
    other = url.removesuffix(ending) + ("png" if ending != "png" else "jpg")
    assert requests.get(other, timeout=60).status_code == 404


def test_urls_have_the_host_of_the_request_or_the_public_url(
    server: ServerProcess, start_server: StartServer
) -> None:
    body = {"model": "dall-e-2", "prompt": "x", "size": "64x64"}
    host = server.url.replace("127.0.0.1", "localhost").removeprefix("http://")
    url = post(server, body, Host=host).json()["data"][0]["url"]
    assert url.startswith(f"http://{host}/v1/images/")
    public = start_server("--model", "noise-flux1", "--public-url", "https://pictures.example/mac/")
    url = post(public, body).json()["data"][0]["url"]
    assert url.startswith("https://pictures.example/mac/v1/images/img-")
    name = url.rpartition("/")[2]
    assert public.get(f"/v1/images/{name}").status_code == 200


@pytest.mark.parametrize(
    "name", ["img-00_0.png", "..%2f..%2ftasks.sqlite3", "img-zz_0.png", "img-1_0.gif", "%00"]
)
def test_names_that_are_no_images_are_404(server: ServerProcess, name: str) -> None:
    answer = server.get(f"/v1/images/{name}")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_models_are_listed_and_described_one_by_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        "noise-flux1",
        "noise-flux2",
        "noise-fill",
    ]
    assert client.models.retrieve("NOISE-flux2").id == "noise-flux2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": "64x64"}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "size": "huge"}, "size"),
        ({"prompt": "x", "size": "99999x64"}, "size"),
        ({"prompt": "x", "size": "8000x8000"}, "size"),
        ({"prompt": "x", "response_format": "gif"}, "response_format"),
        ({"prompt": "x", "output_format": "gif"}, "output_format"),
        ({"prompt": "x", "seed": -5}, "seed"),
        ({"prompt": "x", "size": "64x64", "negative_prompt": "y"}, "negative_prompt"),
        ([], None),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(
    server: ServerProcess, body: Any, param: str | None
) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert error["code"]


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("9x9", "size 9x9: width must be a whole number from 16 to 8192, not 9."),
        ("64x9", "size 64x9: height must be a whole number from 16 to 8192, not 9."),
        ("8000x8000", "size 8000x8000: width x height must be at most 4194304 pixels"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_called_size(
    server: ServerProcess, size: str, sentence: str
) -> None:
    error = post(server, {"prompt": "x", "size": size}).json()["error"]
    assert error["param"] == "size"
    assert error["message"].startswith(sentence)


def test_every_field_has_its_name_of_this_api(
    start_server: StartServer, client: openai.OpenAI
) -> None:
    server = start_server("--model", "noise-flux1", "--max-count", "2")
    error = post(server, {"prompt": "x", "n": 3}).json()["error"]
    assert error["param"] == "n"
    assert error["message"] == "n must be a whole number from 1 to 2, not 3."
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("a.png", b"no picture"), prompt="x", size=SIZE)
    assert caught.value.param == "image"
    assert "init_image" not in caught.value.message


def test_bad_json_unknown_paths_and_methods_have_openais_form(server: ServerProcess) -> None:
    url = server.url + "/v1/images/generations"
    for answer, status in (
        (requests.post(url, data="{", timeout=60), 400),
        (requests.get(server.url + "/v1/embeddings", timeout=60), 404),
        (requests.get(url + "/x", timeout=60), 404),
        (requests.get(url, timeout=60), 405),
        (requests.put(url, timeout=60), 405),
        (requests.post(url, data=b" " * 2_000_000, timeout=60), 413),
    ):
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/json"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_empty_and_null_fields_are_ignored(server: ServerProcess) -> None:
    body = {
        "prompt": "x",
        "size": "64x64",
        "style": "vivid",
        "moderation": "low",
        "quality": "hd",
        "background": "auto",
        "user": "me",
        "n": None,
        "response_format": "",
        "seed": None,
    }
    answer = post(server, body, **{"Content-Type": "text/plain", "Authorization": "Basic "})
    assert answer.status_code == 200
    assert answer.json()["background"] == "opaque"


def test_a_transparent_background_is_refused_where_the_model_draws_none(
    server: ServerProcess,
) -> None:
    refused = post(server, {"prompt": "x", "size": "64x64", "background": "transparent"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "background"
    opaque = post(server, {"prompt": "x", "size": "64x64", "background": "opaque"})
    assert opaque.status_code == 200
    assert opaque.json()["background"] == "opaque"


def test_steps_are_cut_to_twice_the_models_own_unless_the_operator_says_otherwise(
    server: ServerProcess, start_server: StartServer
) -> None:
    def steps_drawn(process: ServerProcess) -> int:
        body = {"prompt": "x", "size": "64x64", "steps": 30, "model": "dall-e-2"}
        url = post(process, body).json()["data"][0]["url"]
        task_id = url.rpartition("/")[2].removeprefix("img-").partition("_")[0]
        steps: int = process.get("/status", task_id=task_id).json()["params"]["steps"]
        return steps

    assert steps_drawn(server) == 8
    assert steps_drawn(start_server("--model", "noise-flux1", "--clamp", "off")) == 30


def test_a_stream_ends_with_one_completed_event_for_each_image(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            model="gpt-image-1", prompt="x", size=SIZE, n=2, stream=True, partial_images=2
        )
    )
    completed = [event for event in events if isinstance(event, ImageGenCompletedEvent)]
    assert [picture_of(event.b64_json).size for event in completed] == [(64, 64)] * 2
    assert events[-1] is completed[-1]
    partial = [event for event in events if isinstance(event, ImageGenPartialImageEvent)]
    assert len(partial) == len(events) - 2 <= 2  # there are some once previews have been learned
    assert all(picture_of(event.b64_json).format == "JPEG" for event in partial)


def test_a_stream_that_cannot_start_is_an_error_like_any_other(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="x", size="0x0", stream=True)


def test_async_clients_are_served_side_by_side(server: ServerProcess) -> None:
    async def draw() -> list[ImagesResponse]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            asked = [client.images.generate(prompt=f"{n}", size=SIZE) for n in range(5)]
            return await asyncio.gather(*asked)

    with ThreadPoolExecutor(1) as thread:  # the browser tests have an event loop in this one
        answers = thread.submit(asyncio.run, draw()).result()
    assert len({images_of(answer)[0].b64_json for answer in answers}) == 5


def test_a_failed_generation_has_a_header_against_retries_of_sdks(
    start_server: StartServer,
) -> None:
    server = start_server(  # offline, the weights of schnell cannot be had
        *("--models", "noise-flux1,schnell", "--sync-max-wait-s", "0")
    )
    answer = post(server, {"model": "schnell", "prompt": "x", "size": "64x64"})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.json()["error"]["code"] == "task_failed"
    sent: list[Any] = []
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    client = openai.OpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=2, http_client=http_client
    )
    with pytest.raises(openai.InternalServerError):
        client.images.generate(model="schnell", prompt="x", size=SIZE)
    assert len(sent) == 1
    with pytest.raises(openai.APIError, match="schnell"):
        list(client.images.generate(model="schnell", prompt="x", size=SIZE, stream=True))


def test_the_same_idempotency_key_answers_with_the_same_images(server: ServerProcess) -> None:
    body = {"prompt": "x", "size": "64x64"}
    first, second = (post(server, body, **{"Idempotency-Key": "k1"}).json() for _ in range(2))
    assert first["data"] == second["data"]
    other = post(server, {**body, "prompt": "y"}, **{"Idempotency-Key": "k1"})
    assert other.status_code == 400
    error = other.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
