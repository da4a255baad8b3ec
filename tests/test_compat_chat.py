"""OpenAI's chat completions that draw, variations, and edits as JSON, with the real package."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from drawing_app import DrawingApp, data_url, drawing_app, png, shown
from openai.types import ImagesResponse
from openai.types.chat import ChatCompletion

from compat.openai_fields import MOST_USER_CHARS

IMAGE: Any = ["image", "text"]
SMALL = {"size": "64x64"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrawingApp]:
    with drawing_app(
        tmp_path_factory.mktemp("app"), "noise-flux1", "noise-flux2", "noise-fill"
    ) as app:
        yield app


@pytest.fixture
def client(app: DrawingApp) -> openai.OpenAI:
    url = "http://localhost/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=app.transport())


def says(text: str, *pictures: bytes) -> Any:
    """A message of the user."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def urls_of(message: Any) -> list[str]:
    """The data URLs of a message or a delta."""
    return [image["image_url"]["url"] for image in getattr(message, "images", None) or ()]


def params_of(app: DrawingApp, answer: ChatCompletion) -> dict[str, Any]:
    return app.params(answer.id.removeprefix("chatcmpl-"))


def test_the_last_message_is_drawn(app: DrawingApp, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="google/gemini-2.5-flash-image",
        messages=[
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": "a fox"},
        ],
        modalities=IMAGE,
        extra_body=SMALL,
    )
    [choice] = answer.choices
    [url] = urls_of(choice.message)
    assert url.startswith("data:image/png;base64,")
    assert shown(url).size == (64, 64)
    assert (choice.finish_reason, choice.message.content) == ("stop", "")
    assert answer.model == "noise-flux1"
    assert params_of(app, answer)["prompt"] == "a fox"


def test_users_stay_different_and_a_long_name_is_stored_as_its_hash(
    app: DrawingApp, client: openai.OpenAI
) -> None:
    def stored(user: Any) -> str:
        answer = client.chat.completions.create(
            model="noise-flux1",
            messages=[says("a fox")],
            modalities=IMAGE,
            extra_body={**SMALL, "user": user},
        )
        return app.queue.status(answer.id.removeprefix("chatcmpl-")).owner.end_user

    long = "u" * MOST_USER_CHARS
    assert [stored(user) for user in ("ann", long, 5, None)] == ["ann", long, "", ""]
    hashes = {stored(long + "x"), stored(long + "y")}
    assert [len(one) for one in hashes] == [64, 64]


def test_each_of_several_images_is_a_choice(client: openai.OpenAI) -> None:
    messages = [says("a fox")]
    answer = client.chat.completions.create(
        model="noise-flux1", messages=messages, modalities=IMAGE, n=2, extra_body=SMALL
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len({url for choice in answer.choices for url in urls_of(choice.message)}) == 2


def test_pictures_of_the_last_message_are_edited(app: DrawingApp, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any", messages=[says("both", png(), png(colour="blue"))], modalities=IMAGE
    )
    params = params_of(app, answer)
    assert (params["model"], params["prompt"], len(params["images"])) == ("noise-flux2", "both", 2)


def test_a_picture_that_was_drawn_before_is_edited(app: DrawingApp, client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="any", messages=[says("a fox")], modalities=IMAGE, extra_body=SMALL
    )
    drawn: Any = first.choices[0].message.model_dump()
    answer = client.chat.completions.create(
        model="any", messages=[says("a fox"), drawn, says("at night")], modalities=IMAGE
    )
    params = params_of(app, answer)
    assert (params["prompt"], len(params["images"])) == ("at night", 1)


def test_a_stream_ends_with_its_images_and_with_usage_if_asked_for(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="any",
            messages=[says("a fox")],
            modalities=IMAGE,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=SMALL,
        )
    )
    drawn = [(c.index, url) for part in chunks for c in part.choices for url in urls_of(c.delta)]
    assert [index for index, _ in drawn] == [0, 1]
    assert all(shown(url).size == (64, 64) for _, url in drawn)
    assert [choice.finish_reason for choice in chunks[-2].choices] == ["stop"] * 2
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == 0


def test_a_stream_that_fails_ends_with_an_error(app: DrawingApp, client: openai.OpenAI) -> None:
    app.generator.failure = "no such luck"
    try:
        with pytest.raises(openai.APIError):
            list(
                client.chat.completions.create(
                    model="any", messages=[says("x")], modalities=IMAGE, stream=True
                )
            )
    finally:
        app.generator.failure = ""


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [says("x")]}, "modalities"),
        ({"messages": [says("x")], "modalities": ["text"]}, "modalities"),
        ({"messages": [says("x")], "modalities": "image"}, "modalities"),
        ({"modalities": IMAGE}, "messages"),
        ({"modalities": IMAGE, "messages": []}, "messages"),
        ({"modalities": IMAGE, "messages": {"role": "user"}}, "messages"),
        ({"modalities": IMAGE, "messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"modalities": IMAGE, "messages": [{"role": "user"}]}, "messages[0].content"),
        ({"modalities": IMAGE, "messages": [says("x", b"no picture")]}, "messages"),
        ({"modalities": IMAGE, "messages": [says("x" * 20_000)]}, "messages"),
        ({"modalities": IMAGE, "messages": [says("x")], "n": 11}, "n"),
        ({"modalities": IMAGE, "messages": [says("x")], "size": "9x9"}, "size"),
        ({"modalities": IMAGE, "messages": [says("x")], "model": "dev"}, "model"),
        (
            {
                "modalities": IMAGE,
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}],
                    }
                ],
            },
            "messages[0].content",
        ),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(app: DrawingApp, body: Any, param: str) -> None:
    answer = app.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.get_json()["error"]["param"] == param


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_variation_starts_from_the_picture(app: DrawingApp, client: openai.OpenAI) -> None:
    answer = client.images.create_variation(image=png(), n=2, size="256x256", model="dall-e-2")
    assert answer.data
    assert all(one.url and one.b64_json is None for one in answer.data)
    task_id = str(answer.data[0].url).rpartition("/img-")[2].partition("_")[0]
    params = app.params(task_id)
    assert (params["count"], params["width"], params["prompt"]) == (2, 256, "")
    assert params["init_image"]["width"] == 64
    answer = client.images.create_variation(image=png(), response_format="b64_json")
    assert answer.data
    assert shown(answer.data[0].b64_json).size == (64, 64)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.create_variation(image=("a.png", b"no picture"))
    assert caught.value.param == "image"


@pytest.mark.parametrize(
    "pictures",
    [
        {"images": [{"image_url": data_url(png())}, {"image_url": data_url(png())}]},
        {"image": [data_url(png()), data_url(png())]},
        {"image": [{"url": data_url(png())}, {"image_url": {"url": data_url(png())}}]},
    ],
)
def test_an_edit_may_come_as_json(client: openai.OpenAI, pictures: dict[str, Any]) -> None:
    body = {"prompt": "both", "size": "64x64", **pictures}
    answer = client.post("/images/edits", body=body, cast_to=ImagesResponse)
    assert answer.data
    assert shown(answer.data[0].b64_json).size == (64, 64)


def test_an_edit_as_json_may_have_a_mask(client: openai.OpenAI, app: DrawingApp) -> None:
    body = {
        "prompt": "x",
        "images": [{"image_url": data_url(png())}],
        "mask": {"image_url": data_url(png("RGBA", (0, 0, 0, 0)))},
        "response_format": "url",
    }
    answer = client.post("/images/edits", body=body, cast_to=ImagesResponse)
    assert answer.data
    task_id = str(answer.data[0].url).rpartition("/img-")[2].partition("_")[0]
    assert app.params(task_id)["model"] == "noise-fill"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x"}, "image"),
        ({"prompt": "x", "images": []}, "image"),
        ({"prompt": "x", "images": [7]}, "images"),
        ({"prompt": "x", "images": [{"file_id": "file-1"}]}, "images"),
        ({"prompt": "x", "images": ["http://10.0.0.1/"] * 3}, "images"),
        ({"prompt": "x", "images": [""] * 101}, "images"),
        ({"prompt": "x", "image": data_url(png()), "mask": {"file_id": "file-1"}}, "mask"),
        ({"prompt": "x", "image": data_url(png()), "mask": [[]]}, "mask"),
    ],
)
def test_a_bad_edit_as_json_is_a_400_that_names_the_field(
    app: DrawingApp, body: Any, param: str
) -> None:
    answer = app.http.post("/v1/images/edits", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.get_json()["error"]["param"] == param
