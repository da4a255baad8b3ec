"""Interrupting by AUTOMATIC1111's API while a task is being submitted."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, until
from played_app import PlayedApp

from task import Task, TaskStatus

INTERRUPT, DRAW = "/sdapi/v1/interrupt", "/sdapi/v1/txt2img"
BODY = {"prompt": "x", "width": 64, "height": 64}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[PlayedApp]:
    app = PlayedApp(tmp_path)
    yield app
    app.store.close()


class Submits:
    """Submits, and lets clients interrupt once the task is in the queue and nobody knows its id."""

    def __init__(self, app: PlayedApp, *names: str) -> None:
        self._app, self._names, self._submit = app, names, app.queue.submit
        self.answers: list[tuple[int, Any]] = []
        self.task_ids: list[str] = []

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Task, int]:
        answer = self._submit(*arguments, **options)
        with ThreadPoolExecutor(1) as other:  # Flask has one request in each thread
            for name in self._names:
                said = other.submit(self._app.ask, name, "POST", INTERRUPT).result(GIVE_UP_S)
                self.answers.append((said.status_code, said.get_json()))
        self.task_ids.append(answer[0].task_id)
        return answer


def test_an_interrupt_cancels_a_task_that_is_being_submitted(
    app: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    submits = Submits(app, "bob", "alice", "alice")
    monkeypatch.setattr(app.queue, "submit", submits)
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(app.ask, "alice", "POST", DRAW, json=BODY)
        try:
            until(lambda: submits.task_ids)
            task_id = submits.task_ids[0]
            until(lambda: app.queue.status(task_id).status is TaskStatus.CANCELLED)
        finally:
            app.queue.events.close()  # which ends the call in any case
        answer = drawing.result(GIVE_UP_S)
    assert submits.answers == [(200, {})] * 3
    assert (answer.status_code, answer.get_json()["images"]) == (200, [])


def test_a_task_that_is_being_submitted_is_not_interrupted_by_other_clients(
    app: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    submits = Submits(app, "bob", "root")
    monkeypatch.setattr(app.queue, "submit", submits)
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(app.ask, "alice", "POST", DRAW, json=BODY)
        until(lambda: submits.task_ids)
        app.run()
        assert len(drawing.result(GIVE_UP_S).get_json()["images"]) == 1


def test_a_task_that_runs_is_interrupted_rather_than_one_that_is_being_submitted(
    app: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(app.ask, "alice", "POST", DRAW, json=BODY)
        until(lambda: app.queue.unfinished(1, 0)[1])
        running = app.claim().task_id
        submits = Submits(app, "alice")
        monkeypatch.setattr(app.queue, "submit", submits)
        second = threads.submit(app.ask, "alice", "POST", DRAW, json=BODY)
        assert first.result(GIVE_UP_S).get_json()["images"] == []
        assert app.queue.status(running).status is TaskStatus.CANCELLED
        until(lambda: submits.task_ids)
        app.run()
        assert len(second.result(GIVE_UP_S).get_json()["images"]) == 1
