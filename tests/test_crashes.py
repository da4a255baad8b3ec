"""The server is killed at any moment, again and again: nothing is lost or doubled."""

import random
import re
import signal
import sqlite3
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess, StartServer, until
from crashing import log_of, status_of
from holding import Hold
from PIL import Image


def pause(seconds: float = 0.01) -> None:
    threading.Event().wait(seconds)


KILLS = ["starting"] * 4 + ["loading"] * 3 + ["running"] * 3 + ["encoding"] * 2
"""The moments at which one life is ended, in shuffled order."""
SAMPLE = 10
"""Pictures of one life that are drawn once more, for comparison."""


class Life:
    """One data dir, and the servers that live on it, one after the other."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.servers: list[ServerProcess] = []
        self.over = False
        self._url = ""
        self._changed = threading.Condition()

    @property
    def server(self) -> ServerProcess:
        return self.servers[-1]

    def start(self, *, wait: bool = True) -> None:
        self.servers.append(ServerProcess(self.data_dir, "--model", "noise-flux1", wait=wait))
        if wait:
            self._set_url(self.server.url)

    def kill(self) -> None:
        assert self.server.process.poll() is None, "it ended by itself:\n" + log_of(self.server)
        self.server.process.kill()
        self._set_url("")
        self.server.stop()

    def end(self) -> None:
        """Nobody waits for another server any more."""
        self.over = True
        self._set_url("")

    def ask(self, method: str, path: str, **request: Any) -> requests.Response:
        """Ask until there is a whole answer, from whichever server lives."""
        while True:
            with suppress(requests.RequestException):
                return self.ask_once(method, path, **request)

    def ask_once(self, method: str, path: str, **request: Any) -> requests.Response:
        with self._changed:
            self._changed.wait_for(lambda: self._url or self.over)
            url = self._url
        if not url:
            raise RuntimeError("the test has ended")
        return requests.request(method, url + path, timeout=60, **request)

    def status(self, task_id: str) -> dict[str, Any]:
        answer = self.ask("GET", "/status", params={"task_id": task_id})
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return status

    def wait_until_ended(self, task_id: str) -> dict[str, Any]:
        until(lambda: self.status(task_id)["status"] not in ("waiting", "running"))
        return self.status(task_id)

    def image(self, task_id: str, *, delete: bool) -> bytes:
        params = {"task_id": task_id, "delete": str(delete)}
        answer = self.ask("GET", "/image", params=params)
        assert answer.status_code == 200, answer.text
        return answer.content

    def _set_url(self, url: str) -> None:
        with self._changed:
            self._url = url
            self._changed.notify_all()


@dataclass
class Story:
    """What a client knows of one accepted task."""

    task_id: str
    body: dict[str, Any]
    key: str | None
    deleted: bool = False
    """It was cancelled or removed."""
    image: bytes | None = None


@dataclass
class Client:
    """Submits, follows, fetches and deletes tasks, and checks the answers."""

    life: Life
    name: int
    stories: list[Story] = field(default_factory=list)
    asked: int = 0
    unanswered: int = 0
    """Submits without a key whose connection broke: nobody knows what came of them."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.name)

    def live(self, storm_over: threading.Event) -> None:
        fates = (self.leave, self.fetch, self.fetch, self.keep, self.remove, self.cancel)
        while not storm_over.is_set():
            side = (64, 128, 192, 256)
            story = self.submit(
                width=self.random.choice(side),
                height=self.random.choice(side),
                steps=self.random.randint(1, 20),
                priority=self.random.random() < 0.2,
            )
            if story:
                self.random.choice(fates)(story)

    def submit(self, **fields: Any) -> Story | None:
        self.asked += 1
        seed = 1_000_000 * self.name + self.asked
        body = {"prompt": f"picture {seed}", "seed": seed, "format": "PNG", **fields}
        key = f"key-{seed}" if self.random.random() < 0.5 else None
        if key:
            answer = self.life.ask("POST", "/generate", json=body, headers={"Idempotency-Key": key})
        else:
            try:
                answer = self.life.ask_once("POST", "/generate", json=body)
            except requests.RequestException:
                self.unanswered += 1
                return None
        assert answer.status_code == 200, answer.text
        assert answer.json()["params"]["prompt"] == body["prompt"]
        self.stories.append(Story(answer.json()["task_id"], body, key))
        return self.stories[-1]

    # -- fates

    def leave(self, story: Story) -> None:
        pass

    def keep(self, story: Story) -> None:
        if self.life.wait_until_ended(story.task_id)["status"] == "done":
            story.image = self.life.image(story.task_id, delete=False)
            assert self.life.status(story.task_id)["status"] == "done"

    def fetch(self, story: Story) -> None:
        if self.life.wait_until_ended(story.task_id)["status"] == "done":
            story.image = self.life.image(story.task_id, delete=True)
            assert self.life.image(story.task_id, delete=True) == story.image

    def remove(self, story: Story) -> None:
        self.keep(story)
        self.delete(story)

    def cancel(self, story: Story) -> None:
        if self.random.random() < 0.5:
            until(lambda: self.life.status(story.task_id)["status"] != "waiting")
        self.delete(story)

    def delete(self, story: Story) -> None:
        story.deleted = True
        answer = self.life.ask("DELETE", "/delete", params={"task_id": story.task_id})
        assert answer.status_code in (200, 410), answer.text  # 410: the broken try did it


def live_and_die(data_dir: Path, number: int) -> tuple[Life, list[Client]]:
    """Kill the server at each of the moments while clients work; it runs on return, idle."""
    life, storm_over = Life(data_dir), threading.Event()
    killer = Client(life, 100 * number)
    clients = [Client(life, 100 * number + n) for n in (1, 2, 3)]
    moments = killer.random.sample(KILLS, len(KILLS))
    with ThreadPoolExecutor() as threads:
        try:
            working: list[Future[Any]] = [
                threads.submit(client.live, storm_over) for client in clients
            ]
            for kill, moment in enumerate(moments):
                life.start(wait=moment != "starting")
                go_to(moment, killer)
                if moment != "starting":  # some submits are under way
                    for n in (10, 50):
                        clients.append(Client(life, 100 * number + n + kill))
                        working.append(threads.submit(clients[-1].submit, width=64, height=64))
                    pause(killer.random.uniform(0.0, 0.01))
                life.kill()
            life.start()
            storm_over.set()
            for work in working:
                work.result()
        except BaseException:
            storm_over.set()
            life.end()
            raise
    until(lambda: life.ask("GET", "/queue").json()["length"] == 0)
    return life, [killer, *clients]


def go_to(moment: str, killer: Client) -> None:
    life = killer.life
    if moment == "encoding":  # of a picture that takes a while to encode
        story = killer.submit(width=512, height=512, steps=1, priority=True)
        while story:
            status = life.status(story.task_id)
            if status.get("phase") == "image_encoding":
                return
            if status["status"] not in ("waiting", "running"):
                story = killer.submit(width=512, height=512, steps=1, priority=True)
    if moment == "running":
        until(lambda: life.ask("GET", "/health").json()["running"])
    pause(killer.random.uniform(0.0, 0.6))


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """`make chaos` does it for minutes."""
    life, clients = live_and_die(tmp_path, 1)
    try:
        stories = [story for client in clients for story in client.stories]
        check_stories(life, stories)
        check_pictures(life, stories)
    finally:
        life.server.stop()
    check_records(life, stories, unanswered=sum(client.unanswered for client in clients))
    check_logs(life)
    assert len(life.servers) - 1 == len(KILLS)


def check_stories(life: Life, stories: list[Story]) -> None:
    """Every accepted task is done, cancelled, removed by its client, or ended too often."""
    ids = Counter(story.task_id for story in stories)
    assert max(ids.values()) == 1
    for story in stories:
        answer = life.ask("GET", "/status", params={"task_id": story.task_id})
        key_is_free = True
        if story.deleted:
            assert answer.status_code == 410 or answer.json()["status"] == "cancelled", answer.text
        else:
            assert answer.status_code == 200, answer.text
            status = answer.json()
            if status["status"] == "failed":
                assert status["error"]["code"] == "ended_too_often"
                assert story.image is None
            else:
                assert status["status"] == "done"
                image = life.image(story.task_id, delete=False)
                assert story.image in (None, image)
                story.image, key_is_free = image, False
        if story.key and not key_is_free:
            headers = {"Idempotency-Key": story.key}
            again = life.ask("POST", "/generate", json=story.body, headers=headers)
            assert again.json()["task_id"] == story.task_id


def check_pictures(life: Life, stories: list[Story]) -> None:
    """Every fetched picture is whole, and a sample is what an undisturbed server draws."""
    fetched = [story for story in stories if story.image]
    for story in fetched:
        picture = Image.open(BytesIO(story.image or b""))
        picture.load()
        assert (picture.width, picture.height) == (story.body["width"], story.body["height"])
    assert len(fetched) >= 5
    for story in random.Random(0).sample(fetched, min(len(fetched), SAMPLE)):
        answer = life.ask("POST", "/generate", json=story.body)
        task_id = answer.json()["task_id"]
        assert life.wait_until_ended(task_id)["status"] == "done"
        assert life.image(task_id, delete=True) == story.image


def check_records(life: Life, stories: list[Story], unanswered: int) -> None:
    """The data dir holds each task once, in the order in which they ran, and no strays."""
    with closing(sqlite3.connect(life.data_dir / "tasks.sqlite3")) as database:
        rows = database.execute(
            "SELECT task_id, client_key, priority, status, started_at, gone FROM tasks"
            " ORDER BY number"
        ).fetchall()
    keys = Counter(key for _, key, *_ in rows if key)
    assert set(keys) == {story.key for story in stories if story.key}
    known = {story.task_id for story in stories}
    assert known <= {row[0] for row in rows}
    assert len(rows) <= len(known) + unanswered + SAMPLE
    assert {status for *_, status, _, _ in rows} <= {"done", "failed", "cancelled"}
    for level in (0, 1):
        starts = [
            start
            for _, _, urgent, status, start, _ in rows
            if urgent == level and status in ("done", "failed")
        ]
        assert starts == sorted(starts)
    files = {path.name for path in (life.data_dir / "images").iterdir()}
    assert files == {row[0] for row in rows if row[3] == "done" and row[5] is None}


def check_logs(life: Life) -> None:
    log = "".join(line for server in life.servers for line in server.log)
    assert "Traceback" not in log
    ran = Counter(re.findall(r"task (\w+) is running", log))
    done = Counter(re.findall(r"task (\w+) is done", log))
    assert max(ran.values()) <= 2, "a task is tried twice at most"
    assert max(done.values()) == 1


def test_a_task_during_which_the_process_died_twice_is_failed_and_the_next_one_runs(
    start_server: StartServer, hold: Hold
) -> None:
    hold.close()
    server = start_server("--model", "noise-flux1", hold=hold)
    deadly = server.submit()["task_id"]
    behind = server.submit()["task_id"]
    for _ in range(2):
        server.wait_for(deadly, lambda s: s["steps_done"] >= 1)
        server.stop(signal.SIGKILL)
        server = start_server("--model", "noise-flux1", hold=hold)
    error = f"task {deadly}: ended_too_often"
    until(lambda: server.get("/health").json().get("last_error") == error)
    hold.open()
    status = status_of(server, deadly)
    assert (status["status"], status["error"]["code"]) == ("failed", "ended_too_often")
    assert server.wait_until_ended(behind)["status"] == "done"
    assert server.get("/image", task_id=deadly).status_code == 410
    assert "last_error" not in server.get("/health").json(), "a later task is done"
