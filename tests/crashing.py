"""Servers that are killed and stopped."""

from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, allow

OFFER = allow("noise-flux1")


def status_of(server: ServerProcess, task_id: str) -> dict[str, Any]:
    answer = server.get("/status", task_id=task_id)
    assert answer.status_code == 200, answer.text
    status: dict[str, Any] = answer.json()
    return status


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": 2, **fields}
    return requests.post(server.url + "/generate", json=body, timeout=GIVE_UP_S)


def log_of(server: ServerProcess) -> str:
    return "".join(server.log)


def refusal(server: ServerProcess) -> str:
    """The one sentence with which a start ended that could not use its data dir."""
    with pytest.raises(AssertionError, match="the server ended"):
        server.wait_until_listening()
    assert server.stop() == 1
    log = log_of(server)
    assert len(log.strip().splitlines()) == 1, log
    assert log.startswith("server.py: ")
    return log
