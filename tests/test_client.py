"""The client, against the real server, and against far ends that break what can break."""

import base64
import io
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import requests
from awaited import Awaited
from conftest import ROOT, ServerProcess, StartServer, clean_environment
from far_ends import Asked, FakeTask, FarEnd, Time, proxy_of
from PIL import Image as pillow

from api.generate_request import GenerateRequest
from client.mflux_client import (
    Client,
    Fields,
    MfluxError,
    Passed,
    Status,
    TimedOut,
    Unreachable,
)
from client.mflux_client import _retry_after_s as retry_after
from fields import PassedFields

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
LONG: dict[str, Any] = {"width": 1024, "height": 1024, "steps": 60}


@pytest.fixture(autouse=True, params=["requests", "httpx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is one of Client and one of AsyncClient."""
    if request.param == "httpx":
        monkeypatch.setattr(sys.modules[__name__], "Client", Awaited)


@pytest.fixture
def client(transport: None, server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def png(side: int = 64, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    pillow.new("RGB", (side, side), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


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


# -- what passes --------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_tried_for_so_long_and_not_longer() -> None:
    time, received = Time(), []
    client = Client(
        f"127.0.0.1:{free_port()}",
        retry_s=30,
        sleep=time.sleep,
        clock=time.clock,
        on_retry=lambda error, pause_s: received.append((error.code, pause_s)),
    )
    with pytest.raises(Unreachable, match="connection refused"):
        client.submit("x")
    assert 5 < len(time.slept) < 20
    assert 20 < sum(time.slept) <= 30
    assert time.slept[0] < 1 < time.slept[-1]
    assert received == [("unreachable", pause_s) for pause_s in time.slept]


def test_a_date_in_retry_after_is_read_by_the_clock_of_the_server() -> None:
    date, later = "Fri, 01 Jan 2027 00:00:00 GMT", "Fri, 01 Jan 2027 00:00:30 GMT"
    assert retry_after({"Retry-After": later, "Date": date}) == 30.0
    assert retry_after({"Retry-After": date, "Date": later}) == 0.0
    assert retry_after({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0.0
    assert retry_after({"Retry-After": " 7 "}) == 7.0
    for bad in ("", "soon", "-1"):
        assert retry_after({"Retry-After": bad, "Date": date}) is None
    assert retry_after({"Retry-After": later, "Date": "today"}) is None


def test_a_full_queue_is_waited_for_as_the_server_says() -> None:
    time, keys = Time(), []

    def answer(asked: Asked) -> None:
        keys.append(asked.headers["Idempotency-Key"])
        if len(keys) < 3:
            full = {"error": {"code": "queue_full", "message": "The queue is full."}}
            asked.answer(429, full, {"Retry-After": "7"})
        else:
            FakeTask().answer(asked)

    with FarEnd(answer) as far_end:
        client = Client(far_end.url, sleep=time.sleep, clock=time.clock)
        task = client.submit("x")
        assert time.slept == [7, 7]
        assert keys == [task.idempotency_key] * 3
        keys.clear()
        hasty = Client(far_end.url, retry_s=6, sleep=time.sleep, clock=time.clock)
        with pytest.raises(MfluxError) as error:
            hasty.submit("x")
    assert (error.value.code, error.value.retry_after_s) == ("queue_full", 7)
    assert len(keys) == 1


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_its_server_is_asked_again(status: int) -> None:
    time, answers = Time(), iter([status, status, 200])

    def answer(asked: Asked) -> None:
        asked.answer(next(answers), {"length": 0, "tasks": []})

    with FarEnd(answer) as far_end:
        assert Client(far_end.url, sleep=time.sleep, clock=time.clock).queue().length == 0
    assert len(time.slept) == 2


def test_a_submit_whose_answer_was_lost_makes_no_second_task(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    lost: list[str] = []
    endless: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}

    def fault(asked: Asked, answer: requests.Response) -> bool:
        if asked.route != "/generate" or len(lost) == 2:
            return False
        lost.append(answer.json()["task_id"])
        asked.hang_up()
        return True

    with FarEnd(proxy_of(server.url, fault)) as proxy, Client(proxy.url) as client:
        tasks = [client.submit("x", **endless), client.submit("x", init_image=png(), **endless)]
        queued = [task.task_id for task in client.queue().tasks]
        assert lost == [tasks[0].task_id] * 2
        assert queued == [task.task_id for task in tasks]
        key = tasks[1].idempotency_key
        again = client.submit("x", init_image=png(), idempotency_key=key, **endless)
        assert again.task_id == tasks[1].task_id
        with pytest.raises(MfluxError) as refused:
            client.submit("x", idempotency_key=key, **endless)
        assert (refused.value.code, refused.value.http_status) == ("idempotency_key_reused", 422)


def test_a_picture_that_broke_off_is_fetched_again(server: ServerProcess) -> None:
    cut: list[int] = []

    def fault(asked: Asked, answer: requests.Response) -> bool:
        if asked.route != "/image" or cut:
            return False
        cut.append(len(answer.content))
        asked.begin(200, {"Content-Type": "image/jpeg", "Content-Length": str(cut[0])})
        asked.wfile.write(answer.content[: cut[0] // 2])
        asked.hang_up()
        return True

    with FarEnd(proxy_of(server.url, fault)) as proxy, Client(proxy.url) as client:
        task = client.submit("x", **SMALL)
        client.wait(task.task_id)
        image = client.image(task.task_id)
    assert cut == [len(image.data)]
    image.pil().load()


def test_a_cancel_whose_answer_was_lost_leaves_the_record(server: ServerProcess) -> None:
    lost: list[str] = []

    def fault(asked: Asked, answer: requests.Response) -> bool:
        if asked.route != "/delete" or answer.json()["was"] in lost:
            return False
        lost.append(answer.json()["was"])
        asked.hang_up()
        return True

    with FarEnd(proxy_of(server.url, fault)) as proxy, Client(proxy.url) as client:
        task = client.submit("x", **LONG)
        assert client.cancel(task.task_id) in ("waiting", "running")
        assert len(lost) == 1
        assert client.status(task.task_id).status == "cancelled"
        assert client.cancel(task.task_id) == "cancelled"
        with pytest.raises(MfluxError, match="deleted"):
            client.status(task.task_id)


def test_wait_continues_after_kill_9_and_a_restart(start_server: StartServer) -> None:
    first = start_server("--model", "noise-flux1")
    port = first.url.rpartition(":")[2]
    seen: list[str] = []
    retries: list[str] = []
    restart = threading.Thread(
        target=lambda: start_server("--model", "noise-flux1", "--port", port)
    )

    def kill_once_it_runs(status: Status) -> None:
        seen.append(status.status)
        if status.status == "running" and first.process.poll() is None:
            first.stop(signal.SIGKILL)

    def restart_once_it_is_missed(error: MfluxError, pause_s: float) -> None:
        if not retries:
            restart.start()
        retries.append(error.code)

    def hasten(seconds: float) -> None:
        threading.Event().wait(0.02)

    with Client(first.url, on_retry=restart_once_it_is_missed, sleep=hasten) as client:
        task = client.submit("x", **LONG)
        status = client.wait(task.task_id, on_status=kill_once_it_runs)
        restart.join()
        assert status.status == "done", status
        assert "running" in seen
        assert set(retries) == {"unreachable"}
        client.image(task.task_id).pil().load()
        assert client.queue().length == 0


# -- waiting ------------------------------------------------------------------------------------


def test_wait_asks_for_changes_where_the_server_can() -> None:
    task, queries = FakeTask(), []

    def answer(asked: Asked) -> None:
        queries.append(asked.query)
        task.answer(asked)

    with FarEnd(answer) as far_end, Client(far_end.url, sleep=_never) as client:
        seen: list[str] = []

        def move_on(status: Status) -> None:
            seen.append(status.status)
            task.set(status={"waiting": "running"}.get(status.status, "done"))

        assert client.wait("abc123", on_status=move_on).status == "done"
    assert seen == ["waiting", "running", "done"]
    assert queries == [
        {"task_id": "abc123"},
        {"task_id": "abc123", "wait": "30", "since": "1"},
        {"task_id": "abc123", "wait": "30", "since": "2"},
    ]


def _never(seconds: float) -> None:
    raise AssertionError(f"it slept {seconds} s")


def test_wait_sleeps_where_no_place_to_wait_is_free() -> None:
    time, asked_for = Time(), []

    def answer(asked: Asked) -> None:
        asked_for.append(asked.query.get("since"))
        ended = len(asked_for) == 5
        fake = FakeTask(poll_after_s=4, status="done" if ended else "waiting", version=1 + ended)
        asked.answer(200, fake.fields)

    with FarEnd(answer) as far_end:
        Client(far_end.url, sleep=time.sleep, clock=time.clock).wait("abc123")
    assert asked_for == [None, "1", None, "1", None]
    assert time.slept == [4, 4]


def test_wait_ends_in_time() -> None:
    time = Time()
    fields = {k: v for k, v in FakeTask(poll_after_s=4).fields.items() if k != "version"}
    with FarEnd(lambda asked: asked.answer(200, fields)) as far_end:
        client = Client(far_end.url, sleep=time.sleep, clock=time.clock)
        with pytest.raises(TimedOut):
            client.wait("abc123", timeout_s=10)
    assert time.slept == [4, 4, 2]


# -- events -------------------------------------------------------------------------------------


def sse(number: int, kind: str, data: str) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n".encode()


class Streams:
    """A far end of which each connection to /events sends one of these, then breaks."""

    def __init__(self, *streams: bytes, then: int = 503) -> None:
        self.streams = list(streams)
        self.then = then
        self.asked: list[tuple[str | None, str]] = []

    def answer(self, asked: Asked) -> None:
        query = asked.path.partition("?")[2]
        self.asked.append((asked.headers.get("Last-Event-ID"), query))
        if self.streams:
            asked.begin(200, {"Content-Type": "text/event-stream", "Connection": "close"})
            asked.wfile.write(self.streams.pop(0))
            asked.hang_up()
        elif self.then == 204:
            asked.begin(204, {})
        else:
            full = {"error": {"code": "too_many_listeners", "message": "full"}}
            asked.answer(503, full, {"Retry-After": "99"})


def test_events_go_on_where_the_connection_broke() -> None:
    one = '{"task_id": "abc",\ndata: "status": "running"}'
    streams = Streams(
        b"retry: 1500\r\n\r\n: hello\r\n\r\n"
        + sse(7, "running", one)
        + sse(8, "cancelled", '{"task_id": "def"}')
        + b"id: 9\nevent: step\nda",
        sse(9, "step", '{"task_id": "abc", "steps_done": 1}')
        + sse(10, "done", '{"task_id": "abc", "name": "\u00e4"}')
        + sse(11, "queue", '{"length": 0}'),
    )
    time = Time()
    with FarEnd(streams.answer) as far_end:
        client = Client(far_end.url, sleep=time.sleep, clock=time.clock)
        events = list(client.events("abc", "def"))
    assert [event.id for event in events] == [7, 8, 9, 10]
    assert [event.kind for event in events] == ["running", "cancelled", "step", "done"]
    assert events[0].data == {"task_id": "abc", "status": "running"}
    assert (events[3].task_id, events[3].data["name"]) == ("abc", "\u00e4")
    assert streams.asked == [(None, "task_id=abc&task_id=def"), ("8", "task_id=abc")]
    assert time.slept == [1.5]


def test_events_of_the_whole_queue_have_no_end() -> None:
    streams = Streams(sse(5, "queue", '{"length": 3}') + sse(6, "done", '{"task_id": "abc"}'))
    time = Time()
    with FarEnd(streams.answer) as far_end:
        events = Client(far_end.url, sleep=time.sleep, clock=time.clock).events(last_event_id=4)
        assert (next(events).data, next(events).task_id) == ({"length": 3}, "abc")
        with pytest.raises(MfluxError) as error:
            next(events)
    assert error.value.code == "too_many_listeners"
    assert streams.asked == [("4", ""), ("6", "")]


def test_events_end_where_there_is_nothing_to_come() -> None:
    with FarEnd(Streams(then=204).answer) as far_end:
        assert list(Client(far_end.url).events("abc", last_event_id=4)) == []


def test_a_stream_without_events_is_an_error() -> None:
    with FarEnd(Streams(b"data: {\n\n").answer) as far_end, pytest.raises(MfluxError) as error:
        next(Client(far_end.url).events())
    assert error.value.code == "not_mflux"


def test_events_of_the_real_server(server: ServerProcess, client: Client) -> None:
    if "/events" not in server.get("/openapi.json").json()["paths"]:
        pytest.skip("this server has no /events yet")
    task = client.submit("a lighthouse", **SMALL)
    kinds = [event.kind for event in client.events(task.task_id)]
    assert kinds[-1] == "done"
    again = list(client.events(task.task_id))
    assert [event.kind for event in again] == ["done"]
    assert list(client.events(task.task_id, last_event_id=again[-1].id)) == []


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
