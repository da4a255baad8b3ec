"""Calls of /generate, and the images of finished tasks."""

from typing import Any

import requests
from conftest import GIVE_UP_S, ServerProcess

from api.server_answers import HealthAnswer


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {"width": 64, "height": 64, "steps": 3, "format": "PNG", "seed": 1, **fields}
    body = {name: value for name, value in body.items() if value is not None}
    return requests.post(server.url + "/generate", json=body, timeout=GIVE_UP_S)


def submit(server: ServerProcess, **fields: Any) -> str:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


def drawn(server: ServerProcess, **fields: Any) -> bytes:
    """The file that a task makes."""
    return fetched(server, submit(server, **fields))


def fetched(server: ServerProcess, task_id: str, **query: Any) -> bytes:
    done = server.wait_until_ended(task_id)
    assert done["status"] == "done", done
    answer = server.get("/image", task_id=task_id, delete="false", **query)
    assert answer.status_code == 200
    return answer.content


def health_of(server: ServerProcess) -> HealthAnswer:
    return HealthAnswer.model_validate(server.get("/health").json())
