"""The stream of events over real HTTP: what comes, resuming, hanging up, hundreds of listeners."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, PlayedQueue, ServerProcess, allow, params_for
from live import Connection, EventStream, SteppedServer
from memory_stores import memory_store
from served import served

from api import event_stream
from api.client_queue import ClientQueue
from api.event_texts import EventTexts, worth_telling
from api.long_poll import watch
from api.waiting_places import WaitingPlaces
from key_file import EVERYBODY
from scheduler.events import Event, EventKind
from timing_model import TimingModel

LISTENERS = 200


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SteppedServer]:
    server = SteppedServer(tmp_path)
    yield server
    server.close()


def delete(server: SteppedServer, task_id: str) -> None:
    answer = requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)
    assert answer.status_code == 200


def test_one_event_is_built_once_and_others_do_not_wait_for_it() -> None:
    """Its task may have to be read from disk."""
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), memory_store())
    texts = EventTexts(queue)
    ended, other = (queue.submit(params_for("noise-flux1"))[0].task_id for _ in range(2))
    events = {task_id: Event(10, EventKind.STEP, task_id, 0.0) for task_id in (ended, other)}
    events[other] = Event(11, EventKind.STEP, other, 0.0)
    status, reads, is_read = queue.status, [], threading.Event()

    def slow(task_id: str) -> Any:
        reads.append(task_id)
        if task_id == ended:
            assert is_read.wait(GIVE_UP_S)
        return status(task_id)

    with ThreadPoolExecutor(3) as listeners, pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "status", slow)
        waiting = [listeners.submit(texts.of, events[ended]) for _ in range(2)]
        until(lambda: ended in reads)
        assert other.encode() in listeners.submit(texts.of, events[other]).result(GIVE_UP_S)
        is_read.set()
        first, second = (future.result(GIVE_UP_S) for future in waiting)
    assert first == second
    assert ended.encode() in first
    assert reads == [ended, other]


def until(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(GIVE_UP_S * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to pass")


def test_the_stream_of_a_task_has_each_step_and_ends_with_the_task(server: SteppedServer) -> None:
    other, task_id = server.running(steps=1), server.submit(steps=3)
    stream = EventStream(server, f"?task_id={task_id}")
    assert stream.headers["content-type"].startswith("text/event-stream")
    kind, number, data = next(iter(stream))
    assert (kind, data["task_id"], data["status"]) == ("waiting", task_id, "waiting")
    assert number >= data["version"]
    assert stream.retry == "2000"
    delete(server, other)
    server.step()  # at which the other one is left
    assert stream.until("running")[-1][2]["pos"] == 0
    for step in range(3):
        server.step()
        kind, _, data = stream.until("step")[-1]
        assert (data["steps_done"], data["steps_total"]) == (step, 3)
    server.step()  # the last one may be passed over, for the end follows
    rest = list(stream)
    assert rest[-1][0] == "done"
    assert set(rest[-1][2]) >= {"task_id", "status", "progress", "version"}
    assert "params" not in rest[-1][2]
    assert [event[0] for event in rest[:-1]] == ["step"] * (len(rest) - 1)


def test_the_stream_of_the_queue_has_all_tasks_and_its_length(
    server: SteppedServer,
) -> None:
    stream = EventStream(server)
    assert stream.until("queue")[-1][2] == {"length": 0}
    first = server.submit()
    assert stream.until("waiting")[-1][2]["task_id"] == first
    second = server.submit()
    seen = stream.until("queue")
    while seen[-1][2] != {"length": 2}:
        seen = stream.until("queue")
    delete(server, second)
    assert stream.until("cancelled")[-1][2]["task_id"] == second
    delete(server, second)
    removed = stream.until("removed")[-1][2]
    assert removed["task_id"] == second
    assert set(removed) == {"task_id", "version"}
    server.end()
    assert stream.until("done")[-1][2]["task_id"] == first
    stream.close()


def test_ids_only_grow_and_versions_are_those_of_the_status(server: SteppedServer) -> None:
    task_id = server.running()
    stream = EventStream(server, f"?task_id={task_id}")
    server.end()
    events = list(stream)
    assert [number for _, number, _ in events] == sorted(number for _, number, _ in events)
    assert server.status(task_id)["version"] == events[-1][1] == events[-1][2]["version"]


def test_a_client_that_comes_back_misses_nothing(server: SteppedServer) -> None:
    task_id = server.running()
    first = EventStream(server, f"?task_id={task_id}")
    _, number, _ = next(iter(first))
    first.close()
    server.step()
    until(lambda: server.status(task_id)["version"] > number)
    second = EventStream(server, f"?task_id={task_id}", f"Last-Event-ID: {number}")
    kind, step, _ = next(iter(second))
    assert (kind, step > number) == ("step", True)
    second.close()
    server.end()
    third = EventStream(server, f"?task_id={task_id}&last_event_id={step}")
    kind, number, _ = third.until("done")[-1]
    again = server.get("/events", task_id=task_id, last_event_id=number)
    assert (again.status_code, again.content) == (204, b"")


def test_a_client_that_was_disconnected_too_long_gets_a_queue_event(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.events.KEPT", 5)
    before = server.queue.events.last_id
    task_id = server.running()
    server.step(20)
    for _ in range(5):
        server.submit()
    for number in (before, before - 10**9, before + 10**12):
        stream = EventStream(server, "", f"Last-Event-ID: {number}")
        assert next(iter(stream))[0] == "queue"
        stream.close()
        stream = EventStream(server, f"?task_id={task_id}", f"Last-Event-ID: {number}")
        (kind, _, _), (_, _, data) = next(iter(stream)), next(iter(stream))
        assert (kind, data["task_id"]) == ("queue", task_id)
        stream.close()


def test_the_stream_of_ended_tasks_has_their_end_and_ends(server: SteppedServer) -> None:
    server.end()
    ids = [server.submit() for _ in range(3)]
    for task_id in ids:
        server.get("/image", task_id=task_id, delete="false", wait=60)
    stream = EventStream(server, "?" + "&".join(f"task_id={task_id}" for task_id in ids))
    assert sorted((kind, data["task_id"]) for kind, _, data in stream) == sorted(
        ("done", task_id) for task_id in ids
    )


def test_a_waiting_task_has_an_event_when_it_moves_up(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.05)
    server.running()
    ahead, task_id = server.submit(), server.submit()
    stream = EventStream(server, f"?task_id={task_id}")
    assert next(iter(stream))[2]["pos"] == 1
    delete(server, ahead)
    for kind, _, data in stream:
        assert kind == "waiting"
        if data["pos"] == 0:
            break
    stream.close()


def test_a_quiet_stream_sends_comments(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.01)
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.02)
    task_id = server.running()
    stream = EventStream(server, f"?task_id={task_id}")
    chunks = stream.chunks()
    assert b": \n\n" in chunks
    stream.close()


@pytest.mark.parametrize("named", [True, False])
def test_disconnecting_releases_the_place(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.05)
    task_id = server.running()
    streams = [EventStream(server, f"?task_id={task_id}" if named else "") for _ in range(10)]
    for stream in streams:
        next(iter(stream))
    assert server.server.places.taken == 10
    for stream in streams:
        stream.close()
    until(lambda: server.server.places.taken == 0)


def test_a_client_that_reads_nothing_is_closed_when_too_much_is_pending(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.01)
    monkeypatch.setattr("api.http_channel.MOST_UNREAD_BYTES", 1000)
    stream = EventStream(server)
    number = 0
    while server.server.places.taken:  # until the buffers of both systems are full
        number += 1
        server.queue.events.publish(EventKind.IMAGE, f"{number}" * 10_000)
    stream.close()
    assert server.get("/health").status_code == 200


def test_without_a_free_place_a_stream_is_refused_and_other_requests_are_answered(
    tmp_path: Path,
) -> None:
    server = SteppedServer(tmp_path, threads=4)
    first, second = EventStream(server), EventStream(server)
    refused = server.get("/events")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "too_many_listeners"
    assert int(refused.headers["Retry-After"]) >= 1
    assert requests.head(server.url + "/events", timeout=GIVE_UP_S).status_code == 503
    task_id = server.submit()
    assert server.status(task_id, wait=300)["status"] in ("waiting", "running")
    server.end()
    for stream in (first, second):
        assert stream.until("done")[-1][2]["task_id"] == task_id
        stream.close()
    server.close()


def test_head_takes_no_place(tmp_path: Path) -> None:
    server = SteppedServer(tmp_path, threads=2)
    for _ in range(3):
        assert requests.head(server.url + "/events", timeout=GIVE_UP_S).status_code == 200
    EventStream(server).close()
    server.close()


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("?task_id=nothing", 404, None),
        ("?task_id=", 400, "task_id"),
        ("?task_id=" + "x" * 65, 400, "task_id"),
        ("?last_event_id=x", 400, "last_event_id"),
        ("?" + "&".join(f"task_id={n}" for n in range(101)), 400, "task_id"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    server: SteppedServer, query: str, status: int, field: str | None
) -> None:
    answer = requests.get(f"{server.url}/events{query}", timeout=GIVE_UP_S)
    assert (answer.status_code, answer.json()["error"].get("field")) == (status, field)


def test_the_stop_of_the_server_ends_the_streams(server: SteppedServer) -> None:
    server.running()
    streams = [EventStream(server) for _ in range(5)]
    server.close()
    for stream in streams:
        list(stream)
    until(lambda: server.server.places.taken == 0)
    assert server.queue.events.listeners == 0


def test_hundreds_listen_and_wait_while_the_server_works(server: SteppedServer) -> None:
    task_id = server.running(steps=4)
    streams = [
        EventStream(server, f"?task_id={task_id}" if number % 2 else "")
        for number in range(LISTENERS)
    ]
    polls = [Connection(server, f"/image?task_id={task_id}&wait=300") for _ in range(LISTENERS)]
    until(lambda: server.server.places.taken == 2 * LISTENERS)
    for _ in range(3):
        server.step()
        assert server.status(task_id)["status"] == "running"
        server.status(server.submit())
    server.end()
    with ThreadPoolExecutor(50) as threads:
        ends = list(threads.map(lambda stream: stream.until("done")[-1], streams))
        assert {data["task_id"] for _, _, data in ends} == {task_id}
        assert {poll.head()[0] for poll in polls} == {200}
    for connection in (*streams, *polls):
        connection.close()
    until(lambda: server.server.places.taken == 0)
    with ThreadPoolExecutor(50) as threads:  # all threads are there for others
        answers = threads.map(lambda _: server.get("/health"), range(500))
        assert {answer.status_code for answer in answers} == {200}


def test_what_passes_is_left_out_when_more_of_it_or_the_end_follows() -> None:
    def events(*kinds: str) -> list[Event]:
        return [
            Event(number, EventKind(kind[1:]), kind[0], 0.0) for number, kind in enumerate(kinds)
        ]

    def merged_kinds(*kinds: str) -> list[str]:
        return [event.task_id + event.kind for event in worth_telling(events(*kinds))]

    assert merged_kinds("astep", "astep", "bstep", "apreview") == ["astep", "bstep", "apreview"]
    assert merged_kinds("arunning", "astep", "adone", "aremoved") == [
        "arunning",
        "adone",
        "aremoved",
    ]
    assert merged_kinds("astep", "bdone", "awaiting") == ["astep", "bdone", "awaiting"]
    assert merged_kinds() == []


def test_following_a_task_without_free_places_falls_back_to_polling(server: SteppedServer) -> None:
    task_id = server.running()
    view, _ = watch(
        ClientQueue(server.queue, EVERYBODY),
        WaitingPlaces(0),
        task_id,
        wait_s=300,
        enough=lambda view, version: False,
    )
    assert view.task_id == task_id


def test_the_real_server_streams_a_real_picture(server_process: ServerProcess) -> None:
    task_id = server_process.submit(steps=4)["task_id"]
    answer = requests.get(
        server_process.url + "/api/events",
        params={"task_id": task_id},
        stream=True,
        timeout=GIVE_UP_S,
    )
    kinds = [line[7:] for line in answer.iter_lines(decode_unicode=True) if line[:6] == "event:"]
    assert kinds[-1] == "done"


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[ServerProcess]:
    yield from served(tmp_path / "process", "--model", "noise-flux1")
