"""The OpenAI Images API: edits of pictures, with and without a mask."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import openai
import pytest
import requests
from conftest import ServerProcess, StartServer
from openai.types import ImageEditCompletedEvent
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


def png(mode: str = "RGB", colour: Any = "red", side: int = 64) -> bytes:
    buffer = BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_edit_is_drawn_by_an_edit_model_where_one_is_allowed(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    answer = client.images.edit(image=png(), prompt="bluer", size=SIZE, response_format="url")
    task_id = images_of(answer)[0].url.rpartition("/img-")[2].partition("_")[0]
    params = server.get("/status", task_id=task_id).json()["params"]
    assert params["model"] == "noise-flux2"
    assert len(params["images"]) == 1


def test_an_edit_of_several_pictures_and_one_in_a_stream(client: openai.OpenAI) -> None:
    pictures: Any = [("a.png", png()), ("b.png", png(colour="blue"))]
    answer = client.images.edit(image=pictures, prompt="both", size=SIZE)
    assert picture_of(images_of(answer)[0].b64_json).size == (64, 64)
    [event] = client.images.edit(image=png(), prompt="x", size=SIZE, stream=True)
    assert isinstance(event, ImageEditCompletedEvent)


def test_a_mask_is_transparent_where_to_repaint(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    buffer = BytesIO()
    mask.save(buffer, "PNG")
    answer = client.images.edit(
        image=png(), mask=buffer.getvalue(), prompt="x", size=SIZE, response_format="url"
    )
    task_id = images_of(answer)[0].url.rpartition("/img-")[2].partition("_")[0]
    params = server.get("/status", task_id=task_id).json()["params"]
    assert params["model"] == "noise-fill"
    assert params["mask"]["width"] == 64
    ours = Image.new("L", (64, 64), 0)
    ours.paste(255, (0, 0, 32, 64))
    buffer = BytesIO()
    ours.save(buffer, "PNG")
    fields = {"prompt": "x", "model": "noise-fill", "width": 64, "height": 64}
    files = {"init_image": png(), "mask": buffer.getvalue()}
    task = requests.post(server.url + "/generate", data=fields, files=files, timeout=60).json()
    assert task["params"]["mask"] == params["mask"]  # the same pixels


def test_without_an_edit_model_drawing_starts_from_the_picture_or_the_answer_says_what_to_allow(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    answer = client.images.edit(image=png(), prompt="x", size=SIZE, response_format="url")
    task_id = images_of(answer)[0].url.rpartition("/img-")[2].partition("_")[0]
    assert server.get("/status", task_id=task_id).json()["params"]["image_strength"] == 0.4
    with pytest.raises(openai.BadRequestError, match="one picture at a time"):
        client.images.edit(image=[png(), png()], prompt="x", size=SIZE)


def test_a_mask_that_no_model_takes_is_refused_with_the_models_that_could(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-kontext")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match=r"--models: .*dev-fill") as caught:
        client.images.edit(image=png(), mask=png("RGBA", (0, 0, 0, 0)), prompt="x", size=SIZE)
    assert caught.value.param == "mask"


def test_addresses_and_broken_pictures_are_refused(client: openai.OpenAI) -> None:
    for content in (b"http://169.254.169.254/", b"", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(image=("a.png", content), prompt="x", size=SIZE)
        assert caught.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="image is required"):
        client.post("/images/edits", body={"prompt": "x"}, cast_to=object)
