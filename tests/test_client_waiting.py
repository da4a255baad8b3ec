"""The client, while it waits: for changes, for a place to wait, for events."""

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ServerProcess
from far_ends import Asked, FakeTask, FarEnd, Time

from client.mflux_client import Client, MfluxError, Status, TimedOut

pytestmark = pytest.mark.usefixtures("transport")
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}


@pytest.fixture
def client(transport: None, server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


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
