"""Calls of tests of tasks with several images."""

from typing import Any

import requests
from conftest import GIVE_UP_S
from live import SteppedServer

from api.queue_answers import DeleteAnswer
from api.task_answers import StatusAnswer


def delete(server: SteppedServer, task_id: str, **query: Any) -> requests.Response:
    return requests.delete(
        server.url + "/delete", params={"task_id": task_id, **query}, timeout=GIVE_UP_S
    )


def stop_after(server: SteppedServer, task_id: str) -> DeleteAnswer:
    answer = delete(server, task_id, after_current="true")
    assert answer.status_code == 200, answer.text
    return DeleteAnswer.model_validate(answer.json())


def draw_image(server: SteppedServer) -> None:
    """The running task, of one step for each image, draws its present image."""
    server.step(2)


def until_stored(server: SteppedServer, task_id: str, images: int) -> dict[str, Any]:
    """The status of a task once it has so many images."""
    status = server.status(task_id)
    while status["images_done"] < images:
        status = server.status(task_id, wait=60, since=status["version"])
    StatusAnswer.model_validate(status)
    return status
