"""Tasks with several images over real HTTP: each image is there once it is stored, also when its
task is cancelled, now or after the image that is being drawn. Readers change nothing."""

import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from batch_calls import delete, draw_image, stop_after, until_stored
from conftest import GIVE_UP_S
from live import EventStream, SteppedServer
from PIL import Image

BIG: dict[str, Any] = {"width": 1024, "height": 1024}
"""Long tasks, so that a change of the forecast is large."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., SteppedServer]]:
    started: list[SteppedServer] = []

    def new(**settings: Any) -> SteppedServer:
        started.append(SteppedServer(tmp_path / "data", **settings))
        return started[-1]

    yield new
    for server in started:
        server.close()


@pytest.fixture
def server(start: Callable[..., SteppedServer]) -> SteppedServer:
    return start()


def until_ended(server: SteppedServer, task_id: str) -> dict[str, Any]:
    status = server.status(task_id)
    while status["status"] in ("waiting", "running"):
        status = server.status(task_id, wait=60, since=status["version"])
    return status


def code(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def fetched(server: SteppedServer, task_id: str, index: int, **query: Any) -> requests.Response:
    return server.get("/image", task_id=task_id, index=index, **{"delete": "false", **query})


def test_each_image_can_be_fetched_while_the_others_are_drawn(server: SteppedServer) -> None:
    task_id = server.running(steps=1, count=3)
    assert code(fetched(server, task_id, 0)) == (409, "not_ready")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(fetched, server, task_id, 0, wait=60)
        draw_image(server)
        image = waiting.result(GIVE_UP_S)
    assert Image.open(BytesIO(image.content)).size == (64, 64)
    assert server.status(task_id)["status"] == "running"
    assert server.status(task_id)["images_done"] == 1
    small = server.get("/thumbnail", task_id=task_id, index=0)
    assert Image.open(BytesIO(small.content)).format == "JPEG"
    metadata = fetched(server, task_id, 0, metadata="true").json()
    assert (metadata["prompt"], metadata["width"]) == ("a lighthouse", 64)
    assert server.get("/preview", task_id=task_id).status_code == 204
    for path in ("/image", "/thumbnail"):
        assert code(server.get(path, task_id=task_id, index=1)) == (409, "not_ready")
        assert code(server.get(path, task_id=task_id, index=3)) == (400, "invalid_input")
    assert code(server.get("/image", task_id=task_id, all="true")) == (409, "not_ready")
    from_it = {"prompt": "x", "steps": 2, "init_image": {"task_id": task_id, "index": 0}}
    answer = requests.post(server.url + "/estimate", json=from_it, timeout=GIVE_UP_S)
    assert answer.json()["params"]["init_image"]["width"] == 64
    server.end()
    assert until_ended(server, task_id)["images_done"] == 3
    assert fetched(server, task_id, 0).content == image.content


def test_the_stream_has_an_event_for_each_image_that_is_stored(server: SteppedServer) -> None:
    task_id = server.running(steps=1, count=3)
    stream = EventStream(server, f"?task_id={task_id}")
    for number in (1, 2):
        draw_image(server)
        _, _, data = stream.until("image")[-1]
        assert (data["images_done"], data["status"]) == (number, "running")
        assert fetched(server, task_id, number - 1).status_code == 200
    draw_image(server)
    *before, (kind, _, data) = list(stream)
    assert (kind, data["images_done"]) == ("done", 3)
    assert "image" not in [event[0] for event in before]


def test_an_image_fetched_while_the_task_runs_stays_until_all_are_fetched(
    start: Callable[..., SteppedServer],
) -> None:
    server = start(refetch_s=0)
    task_id = server.running(steps=1, count=2)
    draw_image(server)
    until_stored(server, task_id, 1)
    assert fetched(server, task_id, 0, delete="true").status_code == 200
    assert fetched(server, task_id, 0).status_code == 200
    server.end()
    assert until_ended(server, task_id)["status"] == "done"
    assert fetched(server, task_id, 0).status_code == 200
    assert fetched(server, task_id, 1, delete="true").status_code == 200
    status = server.get("/status", task_id=task_id)
    while status.status_code != 410:  # the image goes when its last byte was sent
        status = server.get("/status", task_id=task_id)


def test_cancelling_keeps_the_images_that_are_stored(start: Callable[..., SteppedServer]) -> None:
    server = start(refetch_s=0)
    events = EventStream(server)
    task_id = server.running(steps=1, count=4)
    for number in (1, 2):
        draw_image(server)
        until_stored(server, task_id, number)
    assert delete(server, task_id).json()["was"] == "running"
    status = server.status(task_id)
    assert (status["status"], status["images_done"]) == ("cancelled", 2)
    assert server.get("/health").json()["done"] == 1
    assert code(fetched(server, task_id, 2)) == (410, "gone")
    assert code(fetched(server, task_id, 4)) == (400, "invalid_input")
    archive = fetched(server, task_id, 0, all="true")
    names = zipfile.ZipFile(BytesIO(archive.content)).namelist()
    assert names == [f"{task_id}-0.jpg", f"{task_id}-1.jpg"]
    for index in (0, 1):
        assert fetched(server, task_id, index, delete="true").status_code == 200
    gone = events.until("removed")[-1][2]
    assert gone["task_id"] == task_id, "removed like a finished task whose images were fetched"
    assert server.get("/health").json()["images_bytes"] == 0


def test_a_task_is_cancelled_after_the_image_that_is_being_drawn(server: SteppedServer) -> None:
    task_id = server.running(steps=1, count=5, **BIG)
    behind = server.submit(steps=1)
    draw_image(server)
    before = until_stored(server, task_id, 1)
    stream = EventStream(server, f"?task_id={task_id}")
    answer = stop_after(server, task_id)
    assert (answer.was, "is being drawn" in answer.message) == ("running", True)
    status = server.status(task_id)
    assert (status["status"], status["last_image"]) == ("running", 1)
    assert status["wait_p90_s"] < before["wait_p90_s"]
    assert stop_after(server, task_id).was == "running"
    draw_image(server)
    kind, _, data = list(stream)[-1]
    assert (kind, data["images_done"]) == ("cancelled", 2)
    assert [fetched(server, task_id, index).status_code for index in range(3)] == [200, 200, 410]
    server.end()
    assert until_ended(server, behind)["status"] == "done"
    assert server.status(task_id)["images_done"] == 2


def test_the_status_names_the_image_that_is_being_drawn(server: SteppedServer) -> None:
    task_id = server.running(steps=1, count=2)
    assert server.status(task_id)["current_image"] == 0
    draw_image(server)
    status = until_stored(server, task_id, 1)
    while status["current_image"] == 0:
        status = server.status(task_id, wait=60, since=status["version"])
    assert (status["current_image"], status["images_done"]) == (1, 1)
    server.end()
    assert "current_image" not in until_ended(server, task_id)


def test_the_last_image_ends_its_task_as_done(server: SteppedServer) -> None:
    task_id = server.running(steps=1, count=2)
    draw_image(server)
    until_stored(server, task_id, 1)
    stop_after(server, task_id)
    draw_image(server)
    assert until_ended(server, task_id)["status"] == "done"
    alone = server.running(steps=1)
    stop_after(server, alone)
    draw_image(server)
    assert until_ended(server, alone)["status"] == "done"


def test_ending_after_an_image_removes_nothing_of_a_task_that_has_ended(
    server: SteppedServer,
) -> None:
    running = server.running(steps=1)
    waiting = server.submit(steps=1, count=2)
    assert stop_after(server, waiting).was == "waiting"
    assert server.status(waiting)["status"] == "cancelled"
    server.end()
    until_ended(server, running)
    answer = stop_after(server, running)
    assert (answer.was, answer.message) == (
        "done",
        "The task had ended already; nothing was changed.",
    )
    assert fetched(server, running, 0).status_code == 200
    assert code(delete(server, "nobody", after_current="true")) == (404, "unknown_task")
    assert code(delete(server, running, after_current="perhaps")) == (400, "invalid_input")
    delete(server, running)
    assert code(delete(server, running, after_current="true")) == (410, "gone")


def test_a_task_without_images_that_is_cancelled_has_none(server: SteppedServer) -> None:
    task_id = server.running(steps=1, count=3)
    delete(server, task_id)
    for query in ({}, {"all": "true"}, {"index": 1}, {"metadata": "true"}):
        assert code(server.get("/image", task_id=task_id, **query)) == (410, "gone")
    assert code(server.get("/thumbnail", task_id=task_id)) == (410, "gone")


# -- readers change nothing -----------------------------------------------------------------------


def _kept(server: SteppedServer) -> str:
    """All that the scheduler knows of the present tasks' past forecasts and progress."""
    scheduler = server.server.queue._scheduler
    with scheduler.lock:
        return repr([scheduler.baselines._latest, list(scheduler.machine.runs.values())])


def test_every_reader_gets_the_reason_of_a_later_end_each_time(server: SteppedServer) -> None:
    server.running(steps=1, **BIG)
    task_id = server.submit(steps=1)
    assert "reason" not in server.status(task_id)
    server.submit(steps=1, count=4, priority=True, **BIG)
    for _ in range(2):
        assert server.status(task_id)["reason"] == "overtaken"
        stream = EventStream(server, f"?task_id={task_id}")
        _, _, data = next(iter(stream))
        assert data["reason"] == "overtaken"
        stream.close()
        queued = server.get("/queue").json()["tasks"]
        reasons = {task["task_id"]: task.get("reason") for task in queued}
        # The others may be slower than expected, on a busy machine.
        assert [other for other in reasons if reasons[other] == "overtaken"] == [task_id]


def test_reading_changes_neither_forecasts_nor_progress(server: SteppedServer) -> None:
    running, waiting = server.running(steps=2, **BIG), server.submit(steps=1)
    server.submit(steps=1, count=4, priority=True, **BIG)
    server.step()
    status = server.status(running)
    while status["phase"] != "denoising":
        status = server.status(running, wait=60, since=status["version"])
    before = _kept(server)
    for _ in range(3):
        for task_id in (running, waiting):
            server.status(task_id)
            stream = EventStream(server, f"?task_id={task_id}")
            assert next(iter(stream))[2]["task_id"] == task_id
            stream.close()
        server.get("/queue")
    assert _kept(server) == before
