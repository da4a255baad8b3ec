"""Clients of a cluster under chaos, and what they check: each task ends as it must, with its own
pictures, which never change."""

import io
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import requests
from lives import Life, check_drawn_once, pause, until
from PIL import Image
from report import Report
from sleeping import signature_of

MOST_WAITING = 40
"""The clients pause while more tasks wait, so that faults meet all states of tasks."""
CANCELLED = 0.06
"""Share of tasks that are cancelled soon after they were submitted; as many while they run."""


@dataclass
class Story:
    """What a client knows of one accepted task."""

    task_id: str
    number: int
    count: int
    cancelled: bool = False
    seen: dict[int, bytes] = field(default_factory=dict)
    """By index, images as they were fetched the first time."""


class Clients:
    """Threads that submit tasks, cancel some, and fetch images when they are there."""

    def __init__(self, report: Report, life: Life, seed: int, tasks: int, threads: int = 3) -> None:
        self.stories: list[Story] = []
        self._report, self._life = report, life
        self._numbers = iter(range(1, tasks + 1))
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(seed + n),), daemon=True)
            for n in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def submit(self, number: int, **fields: Any) -> Story:
        """Submits a task with a key, so that it is accepted once."""
        body = {"prompt": f"picture {number}", "seed": number * 100, "steps": 2, **fields}
        body = {"width": 64, "height": 64, "format": "PNG", "metadata": False, **body}
        headers = {"Idempotency-Key": f"key-{number}"}
        while True:
            answer = self._life.ask("POST", "/generate", json=body, headers=headers)
            if answer.status_code == 200:
                break
            self._report.check(answer.status_code in (429, 503), f"submit: {answer.text}")
            pause(0.5)
        story = Story(answer.json()["task_id"], number, int(body.get("count", 1)))
        with self._lock:
            self.stories.append(story)
        self._report.add("tasks accepted")
        return story

    def _work(self, choice: random.Random) -> None:
        while (number := self._next()) is not None:
            while self._life.ask("GET", "/queue").json()["length"] > MOST_WAITING:
                pause(0.2)
            fields = {
                "steps": choice.randint(1, 12),
                "count": choice.choice([1, 1, 1, 3]),
                "priority": choice.random() < 0.1,
            }
            story = self.submit(number, **fields)
            what = choice.random()
            if what < CANCELLED:
                self._cancel(story)
            elif what < 2 * CANCELLED:
                until(lambda story=story: self.status(story)["status"] != "waiting", 20)  # type: ignore[misc]
                self._cancel(story)
            with self._lock:
                earlier = choice.choice(self.stories)
            self.look_at(earlier)

    def _next(self) -> int | None:
        with self._lock:
            return next(self._numbers, None)

    def _cancel(self, story: Story) -> None:
        story.cancelled = True
        params = {"task_id": story.task_id, "delete": "false"}
        answer = self._life.ask("DELETE", "/delete", params=params)
        self._report.check(answer.status_code in (200, 410), f"delete: {answer.text}")
        self._report.add("tasks cancelled")

    def status(self, story: Story) -> dict[str, Any]:
        answer = self._life.ask("GET", "/status", params={"task_id": story.task_id})
        found: dict[str, Any] = answer.json()
        return found if "status" in found else {"status": f"none ({answer.text})"}

    def look_at(self, story: Story) -> None:
        """Compares the images of a task that are there with what they were before."""
        for index in range(self.status(story).get("images_done") or 0):
            params = {"task_id": story.task_id, "index": index, "delete": "false"}
            answer = self._life.ask("GET", "/image", params=params)
            if answer.status_code == 200:
                self._compare(story, index, answer)
            elif not story.cancelled:
                self._report.violation("lost", f"image {index} of {story.number}: {answer.text}")

    def _compare(self, story: Story, index: int, answer: requests.Response) -> None:
        first = story.seen.setdefault(index, answer.content)
        if first != answer.content:
            self._report.violation("drawn twice", f"image {index} of {story.number} has changed")
        try:
            signature = signature_of(Image.open(io.BytesIO(answer.content)))
        except ValueError as error:
            self._report.violation("wrong pictures", f"{story.number}, {index}: {error}")
            return
        right = signature["prompt"] == f"picture {story.number}"
        right = right and signature["seed"] == story.number * 100 + index
        if not right:
            self._report.violation("wrong pictures", f"{story.number}, {index}: {signature}")

    # -- the end ----------------------------------------------------------------------------------

    def check(self) -> None:
        """After everything has ended."""
        drawn: Counter[str] = Counter()
        for story in self.stories:
            self._check_end(story)
            self.look_at(story)
            for content in story.seen.values():
                drawn[str(signature_of(Image.open(io.BytesIO(content)))["drawn"])] += 1
        for name in (name for name, times in drawn.items() if times > 1):
            self._report.violation("wrong pictures", f"{name} is in two tasks")
        self._report.add("pictures checked", sum(drawn.values()))

    def _check_end(self, story: Story) -> None:
        status = self.status(story)
        ended = str(status["status"])
        error = status.get("error") or {}
        if ended == "failed" and error.get("code") == "ended_too_often":
            self._report.add("tasks failed because two workers died during them")
            return
        if ended == "done" and status.get("images_done") == story.count:
            self._report.add("tasks done")
            return
        if not (story.cancelled and (ended == "cancelled" or "410" in ended or "gone" in ended)):
            self._report.violation("lost", f"{story.number}, {story.task_id}: {status}")

    def check_records(self) -> None:
        """After the last head has ended: no task exists twice, and none was finished twice."""
        task_ids = [story.task_id for story in self.stories]
        kept = check_drawn_once(self._report, self._life, task_ids)
        for story in self.stories:
            if story.task_id not in kept and not story.cancelled:
                self._report.violation("lost", f"{story.task_id} is not in the database")
