"""Calls of the native API and its errors."""

from typing import Any

import requests
from conftest import GIVE_UP_S, ServerProcess


def error_of(answer: requests.Response) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def delete(server: ServerProcess, task_id: str) -> dict[str, Any]:
    answer = requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def fetch(server: ServerProcess, task_id: str, **params: Any) -> bytes:
    answer = server.get("/image", task_id=task_id, **params)
    assert answer.status_code == 200, answer.text
    return answer.content
