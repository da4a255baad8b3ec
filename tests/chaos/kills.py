"""Kills the server repeatedly while clients submit, poll, fetch and delete."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lives import Life, check_drawn_once, pause, until
from report import Report

CLIENTS = 4


@dataclass
class Story:
    """What a client knows of one accepted task."""

    task_id: str
    key: str
    may_be_gone: bool = False
    """It was cancelled, deleted or fetched."""


class Client:
    """Submits with a key, so that the result is known; then does something random."""

    def __init__(self, life: Life, name: int, seed: int) -> None:
        self.stories: list[Story] = []
        self._life, self._name = life, name
        self._random = random.Random(seed * 1000 + name)

    def work(self, over: threading.Event) -> None:
        while not over.is_set():
            if story := self._submit():
                self._random.choice([self._leave, self._fetch, self._cancel, self._ask])(story)

    def _submit(self) -> Story | None:
        number = self._name * 1_000_000 + len(self.stories)
        body: dict[str, Any] = {
            "prompt": f"picture {number}",
            "seed": number,
            "width": self._random.choice([64, 128, 192]),
            "height": self._random.choice([64, 128]),
            "steps": self._random.randint(1, 10),
        }
        key = f"key-{number}"
        headers = {"Idempotency-Key": key}
        answer = self._life.ask("POST", "/generate", json=body, headers=headers)
        if answer.status_code != 200:
            self._life.report.check(answer.status_code in (429, 503), f"submit: {answer.text}")
            pause(0.2)
            return None
        self.stories.append(Story(answer.json()["task_id"], key))
        self._life.report.add("tasks accepted between kills")
        return self.stories[-1]

    def _leave(self, story: Story) -> None:
        pass

    def _ask(self, story: Story) -> None:
        params = {"task_id": story.task_id, "wait": "2"}
        answer = self._life.ask("GET", "/status", params=params)
        if answer.status_code != 200:
            self._life.report.violation("lost", f"{story}: {answer.text}")

    def _fetch(self, story: Story) -> None:
        params = {"task_id": story.task_id, "wait": "3"}
        story.may_be_gone = True
        answer = self._life.ask("GET", "/image", params=params)
        if answer.status_code not in (200, 409, 410):
            self._life.report.violation("lost", f"{story}: {answer.text}")

    def _cancel(self, story: Story) -> None:
        story.may_be_gone = True
        answer = self._life.ask("DELETE", "/delete", params={"task_id": story.task_id})
        self._life.report.check(answer.status_code in (200, 410), f"delete: {answer.text}")


def kill_again_and_again(report: Report, folder: Path, kills: int, seed: int) -> None:
    life, over = Life(report, folder / "killed"), threading.Event()
    clients = [Client(life, name, seed) for name in range(CLIENTS)]
    moments = random.Random(seed)
    with ThreadPoolExecutor(CLIENTS) as threads:
        try:
            life.start()
            working = [threads.submit(client.work, over) for client in clients]
            for _ in range(kills):
                pause(moments.uniform(0.0, 3.0))
                life.kill()
                life.start()
        finally:
            over.set()
        for work in working:
            work.result()
    drained = until(lambda: life.get("/queue").json()["length"] == 0)
    report.check(drained, "the queue was not worked off after the kills")
    stories = [story for client in clients for story in client.stories]
    for story in stories:
        _check(report, life, story)
    life.close()
    _check_records(report, life, stories)


def _check(report: Report, life: Life, story: Story) -> None:
    answer = life.ask("GET", "/status", params={"task_id": story.task_id})
    if answer.status_code == 410 and story.may_be_gone:
        return
    if answer.status_code != 200:
        report.violation("lost", f"{story}: {answer.text}")
        return
    body = answer.json()
    ended_too_often = body.get("error", {}).get("code") == "ended_too_often"
    if body["status"] == "done" or ended_too_often:
        return
    if body["status"] != "cancelled" or not story.may_be_gone:
        report.violation("lost", f"{story}: {body}")


def _check_records(report: Report, life: Life, stories: list[Story]) -> None:
    """Checks that no task exists twice, and that none was finished twice."""
    kept = check_drawn_once(report, life, [story.task_id for story in stories])
    for story in stories:
        if story.task_id not in kept:
            report.violation("lost", f"{story} is not in the database")
