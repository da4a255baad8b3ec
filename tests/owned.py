"""A server with keys, and tasks of one of its clients."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess
from holding import Hold

PROMPT = "a secret of alice"
ALICE, BOB, ROOT_KEY = "alice-0123456789", "bob-0123456789ab", "root-0123456789a"


class Owned:
    """A server with keys, with a finished task, a running one, which is held, and a waiting one of
    alice."""

    def __init__(self, server: ServerProcess, keys: Path) -> None:
        self.server = server
        self.keys = keys
        self.done = self.submit(ALICE)
        self.wait_until(self.done, "done")
        self.running = self.submit(ALICE)
        self.wait_until(self.running, "running")
        self.waiting = self.submit(ALICE)

    def ask(self, key: str, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
        return requests.request(
            method, self.server.url + path, headers=headers, timeout=GIVE_UP_S, **options
        )

    def submit(self, key: str, **fields: Any) -> str:
        body = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 2, **fields}
        answer = self.ask(key, "POST", "/generate", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["task_id"])

    def wait_until(self, task_id: str, wanted: str) -> None:
        """Waits for a status of a task of alice's."""
        params: dict[str, str | int] = {"task_id": task_id, "wait": 60}
        while True:
            status = self.ask(ALICE, "GET", "/status", params=params).json()
            if status["status"] == wanted:
                return
            assert status["status"] in ("waiting", "running"), status
            params["since"] = status["version"]

    @property
    def ids(self) -> tuple[str, ...]:
        return self.done, self.running, self.waiting


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owned]:
    folder = tmp_path_factory.mktemp("owned")
    keys = folder / "keys.toml"
    keys.write_text(
        f'[alice]\nkey = "{ALICE}"\n[bob]\nkey = "{BOB}"\n[root]\nkey = "{ROOT_KEY}"\n'
        "operator = true\nmay_prioritize = true\n"
    )
    hold = Hold(folder / "hold")
    hold.close(after=1)
    arguments = ("--keys", str(keys), "--preempt", "off")  # so that nobody's task runs meanwhile
    server = ServerProcess(folder / "data", *arguments, hold=hold)
    try:
        yield Owned(server, keys)
    finally:
        server.stop()


def operations_of(server: ServerProcess) -> set[str]:
    spec = server.get("/openapi.json").json()
    return {
        f"{method.upper()} {path}"
        for path, methods in spec["paths"].items()
        for method in methods
        if method in ("get", "post", "put", "delete")
    }
