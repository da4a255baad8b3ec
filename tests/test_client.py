"""The client against the real server, and its errors."""

import base64
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import ROOT, ServerProcess, StartServer, clean_environment
from far_ends import Asked, FarEnd
from PIL import Image as pillow

from api.generate_request import GenerateRequest
from client.mflux_client import Client, Fields, MfluxError, Passed, Status
from fields import PassedFields

pytestmark = pytest.mark.usefixtures("transport")
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}

LONG: dict[str, Any] = {"width": 1024, "height": 1024, "steps": 60}


@pytest.fixture
def client(transport: None, server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def png(side: int = 64, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    pillow.new("RGB", (side, side), colour).save(buffer, format="PNG")
    return buffer.getvalue()


# -- the whole flow -----------------------------------------------------------------------------


def test_a_picture_from_submit_to_removal(client: Client, tmp_path: Path) -> None:
    estimate = client.estimate("a lighthouse", **SMALL)
    assert estimate.expected_time_seconds > 0
    task = client.submit("a lighthouse", seed="18446744073709551615", format="PNG", **SMALL)
    assert task.params["seed"] == "18446744073709551615"
    seen: list[Status] = []
    status = client.wait(task.task_id, on_status=seen.append)
    assert status.ended
    assert status.status == "done", status
    assert seen[-1] == status
    image = client.image(task.task_id)
    path = image.save(tmp_path / f"picture.{image.extension}")
    assert path.suffix == ".png"
    with pillow.open(path) as picture:
        assert picture.size == (64, 64)
    assert image.pil().size == (64, 64)
    assert client.image(task.task_id) == image, "fetching leaves it on the server"
    assert client.cancel(task.task_id) == "done"
    with pytest.raises(MfluxError) as gone:
        client.image(task.task_id)
    assert (gone.value.code, gone.value.http_status) == ("gone", 410)


def test_several_pictures_one_by_one_and_as_an_archive(client: Client) -> None:
    task = client.submit("a lighthouse", count=3, **SMALL)
    assert client.wait(task.task_id).images_done == 3
    images = client.images(task.task_id)
    assert [image.index for image in images] == [0, 1, 2]
    assert len({image.data for image in images}) == 3
    with zipfile.ZipFile(io.BytesIO(client.archive(task.task_id))) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [i.data for i in images]
    assert client.keep(task.task_id) == len(images)
    assert client.status(task.task_id).kept
    assert client.release(task.task_id) == 0
    assert client.status(task.task_id).expires_at
    with zipfile.ZipFile(io.BytesIO(client.zip(f"{task.task_id}:1"))) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [images[1].data]


def test_the_pictures_of_a_batch_come_one_by_one_until_it_is_ended_after_one_of_them(
    client: Client,
) -> None:
    task = client.submit("a lighthouse", count=10, **LONG)
    images = []
    for image in client.images_as_stored(task.task_id):
        images.append(image)
        if len(images) == 1:
            assert client.status(task.task_id).status == "running"
            assert client.cancel(task.task_id, after_current=True) == "running"
    status = client.status(task.task_id)
    assert status.status == "cancelled"
    assert 2 <= len(images) == status.images_done < 10
    assert client.cancel(task.task_id, after_current=True) == "cancelled", "and nothing is removed"
    assert client.images(task.task_id) == images


def test_pictures_go_in_as_paths_bytes_pillow_images_and_results(
    client: Client, tmp_path: Path
) -> None:
    task = client.submit("a lighthouse", format="PNG", **SMALL)
    client.wait(task.task_id)
    result = client.image(task.task_id)
    path = result.save(tmp_path / "picture.png")
    data_url = "data:image/png;base64," + base64.b64encode(result.data).decode()
    ways: list[Any] = [path, str(path), result.data, result, result.pil(), data_url]
    ways.append({"task_id": task.task_id})
    ids = [
        client.estimate("x", init_image=way, **SMALL).raw["params"]["init_image"] for way in ways
    ]
    assert ids == [ids[0]] * len(ways)
    drawn = client.submit("x", init_image=path, image_strength=0.5, priority=True, **SMALL)
    assert drawn.params["image_strength"] == 0.5
    assert drawn.params["priority"] is True
    assert client.wait(drawn.task_id).status == "done"
    for not_a_picture in (17, None):
        with pytest.raises(TypeError, match="a picture is a path"):
            client.submit("x", images=[not_a_picture])  # type: ignore[list-item]


def test_lists_of_pictures_keep_their_order(start_server: StartServer) -> None:
    with Client(start_server("--model", "noise-flux2").url) as client:
        task = client.submit("x", format="PNG", **SMALL)
        client.wait(task.task_id)
        red, own = png(), {"task_id": task.task_id}

        def sizes(*images: Any) -> list[str]:
            params = client.estimate("x", images=list(images), **SMALL).raw["params"]
            return [picture["id"] for picture in params["images"]]

        one, other = sizes(red, png(32)), sizes(red, own)
        assert one[0] == other[0]
        assert sizes(own, red) == other[::-1]
        assert sizes(png(32), red) == one[::-1]


def test_queue_and_models(client: Client) -> None:
    task = client.submit("a lighthouse", **LONG, tags=["chat-42"])
    assert task.params["tags"] == ["chat-42"]
    assert [queued.task_id for queued in client.queue(tag="chat-42").tasks] == [task.task_id]
    assert client.queue(tag="other").length == 0
    queue = client.queue()
    assert (queue.length, queue.tasks[0].task_id) == (1, task.task_id)
    assert client.cancel(task.task_id) in ("waiting", "running")
    assert client.wait(task.task_id).status == "cancelled"
    models = client.models()
    assert models.default == "noise-flux1"
    assert next(model.allowed for model in models.models if model.name == "noise-flux1")


def test_every_field_of_a_request_has_its_type() -> None:
    own = {"prompt", "client_task_id", "n"}  # an argument, idempotency_key, count
    assert set(GenerateRequest.model_fields) - own <= set(Fields.__annotations__)
    later = {"callback_url"}
    assert set(Fields.__annotations__) - later <= set(GenerateRequest.model_fields)


def test_the_fields_that_answers_repeat_have_the_types_of_the_server() -> None:
    properties = PassedFields.model_json_schema()["properties"]
    types = {"string": str, "number": float, "integer": int, "boolean": bool}

    def type_of(schema: dict[str, Any]) -> object:
        (schema, *_) = schema.get("anyOf", [schema])
        return list[type_of(schema["items"])] if "items" in schema else types[schema["type"]]  # type: ignore[misc]

    assert get_type_hints(Passed) == {name: type_of(field) for name, field in properties.items()}


# -- errors -------------------------------------------------------------------------------------


def test_errors_name_the_field(client: Client) -> None:
    with pytest.raises(MfluxError, match="steps must be a whole number") as error:
        client.submit("x", steps=0)
    assert (error.value.code, error.value.field) == ("invalid_input", "steps")
    assert error.value.http_status == 400
    with pytest.raises(MfluxError) as error:
        client.submit("x", init_image=b"no picture")
    assert error.value.field == "init_image"
    with pytest.raises(MfluxError) as error:
        client.status("nobody")
    assert (error.value.code, error.value.http_status) == ("unknown_task", 404)


@pytest.mark.parametrize(
    ("status", "headers", "body", "code"),
    [
        (500, {}, b"<html>", "http_500"),
        (301, {"Location": "https://elsewhere/"}, b"", "http_301"),
        (200, {}, b"<html>", "not_mflux"),
        (200, {}, b"{}", "not_mflux"),
        (403, {}, b'{"error": "text"}', "http_403"),
    ],
)
def test_a_server_that_is_not_mflux_server_is_an_error(
    status: int, headers: dict[str, str], body: bytes, code: str
) -> None:
    with (
        FarEnd(lambda asked: asked.answer(status, body, headers)) as far_end,
        Client(far_end.url) as client,
        pytest.raises(MfluxError) as error,
    ):
        client.status("abc")
    assert error.value.code == code


def test_an_impossible_url_is_an_error() -> None:
    with pytest.raises(MfluxError) as error:
        Client("http://[").queue()
    assert error.value.code == "cannot_ask"


# -- keys, rooms --------------------------------------------------------------------------------


def test_the_key_is_sent_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent: list[str | None] = []

    def answer(asked: Asked) -> None:
        sent.append(asked.headers.get("Authorization"))
        asked.answer(200, {"length": 0, "tasks": []})

    with FarEnd(answer) as far_end:
        Client(far_end.url, key="abc").queue()
        Client(far_end.url).queue()
    assert sent == ["Bearer abc", None]


def test_the_client_is_one_file_that_imports_no_library_before_it_is_needed(tmp_path: Path) -> None:
    source = (ROOT / "client" / "mflux_client.py").read_text()
    (tmp_path / "mflux_client.py").write_text(source)
    code = "import sys, mflux_client; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**clean_environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"PIL", "tqdm", "client", "flask", "pydantic", "httpx", "requests"}
