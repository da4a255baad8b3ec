"""Kill -9, SIGTERM, a full disk, a damaged database: nothing accepted is lost.

Real servers on a real disk; only where a thread has to die is the generator a fake.
"""

import random
import re
import shutil
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import forking
import pytest
import requests
from conftest import (
    GIVE_UP_S,
    FakeGenerator,
    PlayedQueue,
    ServerProcess,
    StartServer,
    allow,
    fill_disk,
    params_for,
    seen_by_all,
    until,
)
from holding import DECODING, DENOISING, WITHIN, Hold
from PIL import Image

from api.generate_request import Limits
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from application import create_app
from errors import ServerError, StoreError
from generation.previews import Previews
from server import Server
from settings import Settings
from storage.task_store import TaskStore
from task import GenerationParams, Phase, Report, TaskStatus
from timing_model import TimingModel
from workers.worker import Worker

OFFER = allow("tiny")


def pause(seconds: float = 0.01) -> None:
    threading.Event().wait(seconds)


def status_of(server: ServerProcess, task_id: str) -> dict[str, Any]:
    answer = server.get("/status", task_id=task_id)
    assert answer.status_code == 200, answer.text
    status: dict[str, Any] = answer.json()
    return status


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": 2, **fields}
    return requests.post(server.url + "/generate", json=body, timeout=60)


def log_of(server: ServerProcess) -> str:
    return "".join(server.log)


# -- kill -9, again and again -------------------------------------------------------------------

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
        self.servers.append(ServerProcess(self.data_dir, "--model", "tiny", wait=wait))
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
    server = start_server("--model", "tiny", hold=hold)
    deadly = server.submit()["task_id"]
    behind = server.submit()["task_id"]
    for _ in range(2):
        server.wait_for(deadly, lambda s: s["steps_done"] >= 1)
        server.stop(signal.SIGKILL)
        server = start_server("--model", "tiny", hold=hold)
    error = f"task {deadly}: ended_too_often"
    until(lambda: server.get("/health").json().get("last_error") == error)
    hold.open()
    status = status_of(server, deadly)
    assert (status["status"], status["error"]["code"]) == ("failed", "ended_too_often")
    assert server.wait_until_ended(behind)["status"] == "done"
    assert server.get("/image", task_id=deadly).status_code == 410
    assert "last_error" not in server.get("/health").json(), "a later task is done"


# -- SIGTERM ------------------------------------------------------------------------------------


def test_sigterm_in_any_phase_exits_0_and_the_tasks_are_done_after_the_next_start(
    start_server: StartServer, hold: Hold
) -> None:
    """A task is interrupted repeatedly. A graceful stop does not count as an attempt."""
    server = start_server("--model", "tiny", environment=forking.NEW_PROCESS)
    assert server.get("/health").json()["status"] == "loading"
    first = server.submit(width=512, height=512, steps=20, seed=1)["task_id"]
    second = server.submit(seed=2)["task_id"]
    ends: dict[str, Callable[[dict[str, Any]], bool]] = {
        "loading": lambda status: status["status"] == "waiting",
        "text encoding": lambda status: status["status"] != "waiting",
        "the first step": lambda status: status["steps_done"] >= 1,
        "a later step": lambda status: status["steps_done"] >= 10,
        "decoding": lambda status: status.get("phase") == "decoding",
        "image encoding": lambda status: status.get("phase", "image_encoding") == "image_encoding",
        "idle": lambda status: status["status"] == "done",
    }
    held: dict[str, dict[str, Any]] = {  # how the next server holds the task
        "loading": {},
        "text encoding": {},
        "the first step": {"step": 10},
        "a later step": {"phase": DECODING},
    }
    for name, reached in ends.items():
        server.wait_for(first, reached)
        if name == "idle":
            server.wait_until_ended(second)
        assert server.stop(signal.SIGTERM) == 0, name
        assert "Traceback" not in log_of(server), name
        if name in held:
            hold.close(**held[name])
        else:
            hold.open()
        server = start_server("--model", "tiny", hold=hold)
        if "step" in name or name == "loading":
            tasks = server.get("/queue").json()["tasks"]
            assert [task["task_id"] for task in tasks] == [first, second], name
    for task_id in (first, second):
        assert status_of(server, task_id)["status"] == "done"
        assert server.get("/image", task_id=task_id).status_code == 200


def test_a_step_that_takes_longer_is_left_and_its_task_runs_again_after_the_next_start(
    start_server: StartServer, hold: Hold
) -> None:
    """The step never ends, and the process does: not the end of the step is waited for."""
    hold.close(after=1, phase=WITHIN + DENOISING)
    server = start_server("--model", "tiny", "--drain-s", "1", hold=hold)
    first = server.submit(seed=1, count=2)["task_id"]
    second = server.submit(seed=2)["task_id"]
    server.wait_for(first, lambda s: s["images_done"] == 1 and s["steps_done"] >= 1)
    for _ in range(2):  # as often as it takes: a stop is no attempt
        assert server.stop(signal.SIGTERM) == 0
        assert "the running step did not end in time" in log_of(server)
        assert "tasks that wait for the next start: 2" in log_of(server)
        assert "Traceback" not in log_of(server)
        hold.close(phase=WITHIN + DENOISING)
        server = start_server("--model", "tiny", "--drain-s", "1", hold=hold)
        server.wait_for(first, lambda s: s["steps_done"] >= 1)
        assert status_of(server, first)["images_done"] == 1, "it is not drawn again"
    hold.open()
    for task_id, images in ((first, 2), (second, 1)):
        assert server.wait_until_ended(task_id)["images_done"] == images
        for index in range(images):
            assert server.get("/image", task_id=task_id, index=index).status_code == 200


def test_a_drain_finishes_the_running_task_before_the_exit(
    start_server: StartServer, hold: Hold
) -> None:
    hold.close()
    server = start_server("--model", "tiny", "--drain-s", "600", hold=hold)
    running = server.submit()["task_id"]
    waiting = server.submit()["task_id"]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.get("/health").json()["status"] == "draining")
    hold.open()
    assert server.stop(signal.SIGTERM) == 0
    assert f"task {running} is done" in log_of(server)
    server = start_server("--model", "tiny")
    assert status_of(server, running)["status"] == "done"
    assert server.wait_until_ended(waiting)["status"] == "done"
    assert f"task {running} is running" not in log_of(server)


def test_while_draining_a_submit_is_refused_and_health_says_so(
    start_server: StartServer, hold: Hold
) -> None:
    hold.close()
    server = start_server("--model", "tiny", "--drain-s", "3600", hold=hold)
    running = server.submit()["task_id"]
    waiting = server.submit()["task_id"]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json()["status"] == "draining"
    refused = post(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
    assert status_of(server, running)["status"] == "running"
    assert requests.delete(server.url + "/delete", params={"task_id": running}, timeout=60).ok, (
        "a cancel ends the drain"
    )
    assert server.process.wait(GIVE_UP_S) == 0
    hold.open()
    server = start_server("--model", "tiny")
    assert status_of(server, running)["status"] == "cancelled"
    assert server.wait_until_ended(waiting)["status"] == "done"


# -- a worker thread that dies ------------------------------------------------------------------


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[PlayedQueue]:
    store = TaskStore(tmp_path / "data")
    yield PlayedQueue(OFFER, TimingModel(), store)
    store.close()


def test_a_worker_thread_that_dies_is_replaced_and_its_task_is_tried_once_more(
    queue: PlayedQueue, tmp_path: Path
) -> None:
    deaths = {"deadly once": 1, "deadly": 10, "harmless": 0}

    def draw(asked: GenerationParams, _: Report) -> Image.Image:
        deaths[asked.prompt] -= 1
        if deaths[asked.prompt] >= 0:
            raise SystemExit
        return Image.new("RGB", (16, 16))

    generator = FakeGenerator(draw)
    worker = Worker(queue.worker, generator, lambda error: pytest.fail(str(error)))
    ids = {name: queue.submit(params_for(name), priority=0)[0].task_id for name in deaths}
    worker.start()
    until(lambda: not queue.unfinished(1, 0)[1])
    submission = Submission(
        seen_by_all(queue), OFFER, Limits(), generator.refusal, places=WaitingPlaces(1)
    )
    app = create_app(
        queue,
        worker,
        generator,
        submission,
        places=WaitingPlaces(1),
        previews=Previews(on=False),
        data_dir=tmp_path,
        max_body_bytes=1000,
    )
    assert app.test_client().get("/health").get_json()["worker_restarts"] == 3
    assert worker.stop(GIVE_UP_S)
    assert queue.status(ids["deadly once"]).status is TaskStatus.DONE
    assert queue.status(ids["harmless"]).status is TaskStatus.DONE
    view = queue.status(ids["deadly"])
    assert (view.status, view.error_code) == (TaskStatus.FAILED, "ended_too_often")


def test_a_picture_that_comes_after_the_stop_is_left_without_an_error(
    queue: PlayedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)

    def draw(_: GenerationParams, report: Report) -> Image.Image:
        report(Phase.DECODING, 4, 4)
        reached.set()
        go_on.wait(GIVE_UP_S)
        return Image.new("RGB", (16, 16))

    worker = Worker(queue.worker, FakeGenerator(draw), lambda error: pytest.fail(str(error)))
    task_id = queue.submit(params_for(), priority=0)[0].task_id
    worker.start()
    assert reached.wait(GIVE_UP_S)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "worker"]
    assert not worker.stop(0)
    queue.worker.release_all()
    go_on.set()
    thread.join(GIVE_UP_S)
    assert errors == []
    assert queue.status(task_id).status is TaskStatus.WAITING


# -- a damaged database ---------------------------------------------------------------------------


def refusal(server: ServerProcess) -> str:
    """The one sentence with which a start ended that could not use its data dir."""
    with pytest.raises(AssertionError, match="the server ended"):
        server.wait_until_listening()
    assert server.stop() == 1
    log = log_of(server)
    assert len(log.strip().splitlines()) == 1, log
    assert log.startswith("server.py: ")
    return log


def fill_data_dir(data_dir: Path) -> list[str]:
    """What a killed server leaves: tasks that wait, one that runs, some that are done."""
    store = TaskStore(data_dir)
    queue = PlayedQueue(OFFER, TimingModel(), store)
    ids = [
        queue.submit(params_for(f"{n} " * 200), priority=0, client_key=f"key {n}")[0].task_id
        for n in range(60)
    ]
    for n in range(9):
        task = queue.claim(0)
        assert task
        if n < 8:
            assert queue.finish(task.task_id, [b"image" * 1000])
    store.close()
    return ids


def bytes_for(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"\xff" * 100 + content[100:], id="header"),
        pytest.param(lambda content: content[:100] + b"\xff" * 500 + content[600:], id="schema"),
        pytest.param(
            lambda content: content[:20000] + b"\xa5" * 9000 + content[29000:], id="middle"
        ),
        pytest.param(lambda content: content[:-5000] + b"\x00" * 5000, id="end"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut in half"),
        pytest.param(lambda content: content[:1000], id="cut short"),
        pytest.param(lambda content: b"no database at all\n" * 1000, id="text"),
        pytest.param(bytes_for(b'"prompt":"', b'"prompt":\xff'), id="encoding of params"),
    ],
)
def test_a_damaged_database_is_refused_with_one_sentence(
    start_server: StartServer, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    data_dir = tmp_path / "server"
    fill_data_dir(data_dir)
    database = data_dir / "tasks.sqlite3"
    damaged = damage(database.read_bytes())
    database.write_bytes(damaged)
    log = refusal(start_server("--model", "tiny", wait=False))
    assert f"The data dir {data_dir} cannot be used: " in log
    assert database.read_bytes() == damaged, "it stays as it is, for whoever wants to rescue it"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(bytes_for(b'"tokens":', b'"toxins":'), id="timing samples"),
        pytest.param(bytes_for(b'"prompt":"50 ', b'"pro\x00pt":"50 '), id="params of one task"),
    ],
)
def test_a_damaged_record_does_not_affect_other_tasks(
    start_server: StartServer, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    data_dir = tmp_path / "server"
    ids = fill_data_dir(data_dir)
    database = data_dir / "tasks.sqlite3"
    database.write_bytes(damage(database.read_bytes()))
    server = start_server("--model", "tiny")
    assert any("damaged" in line for line in server.log)
    assert server.wait_until_ended(ids[-1])["status"] == "done"
    assert server.get("/health").status_code == 200


def test_wherever_bytes_are_overwritten_the_start_is_refused_or_every_task_is_answered(
    tmp_path: Path,
) -> None:
    """In this process, for many places: nothing but the documented errors comes out."""
    pristine = tmp_path / "pristine"
    ids = fill_data_dir(pristine)
    refused = 0
    for seed in range(60):
        places = random.Random(seed)
        data_dir = tmp_path / str(seed)
        shutil.copytree(pristine, data_dir)
        content = bytearray((data_dir / "tasks.sqlite3").read_bytes())
        for _ in range(places.choice((1, 3, 10))):
            length = places.choice((1, 16, 64))
            at = places.randrange(len(content) - length)
            content[at : at + length] = places.randbytes(length)
        (data_dir / "tasks.sqlite3").write_bytes(content)
        arguments = ["--model", "tiny", "--port", "0", "--data-dir", str(data_dir)]
        try:
            server = Server(Settings.read(arguments, {}), OFFER, FakeGenerator())
        except StoreError:
            refused += 1
            continue
        for task_id in ids:
            with suppress(ServerError):
                server.queue.status(task_id)
            with suppress(ServerError):
                server.queue.image_of(server.queue.status(task_id))
        server.queue.health()
        server.stop()
    assert refused > 20


def test_a_database_of_a_newer_version_is_refused_and_left_alone(
    start_server: StartServer, tmp_path: Path
) -> None:
    data_dir = tmp_path / "server"
    fill_data_dir(data_dir)
    database = data_dir / "tasks.sqlite3"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA user_version = 99")
    content = database.read_bytes()
    log = refusal(start_server("--model", "tiny", wait=False))
    assert "schema version 99" in log
    assert "newer version" in log
    assert database.read_bytes() == content


def test_a_second_server_on_the_same_data_dir_is_refused(
    start_server: StartServer, tmp_path: Path
) -> None:
    first = start_server("--model", "tiny")
    second = start_server("--model", "tiny", wait=False)
    assert f"Another server uses the data dir {tmp_path / 'server'}" in refusal(second)
    assert first.wait_until_ended(first.submit()["task_id"])["status"] == "done"
    first.stop(signal.SIGKILL)
    third = start_server("--model", "tiny")
    assert third.get("/health").status_code == 200


@pytest.mark.parametrize("place", ["file", "file/below", "database/is/a/folder", "/proc/nowhere"])
def test_a_data_dir_that_cannot_be_used_is_refused_with_one_sentence(
    start_server: StartServer, tmp_path: Path, place: str
) -> None:
    if place.startswith("/proc") and sys.platform != "linux":
        pytest.skip("there is no /proc here")
    (tmp_path / "file").write_text("")
    data_dir = tmp_path / place
    if place.startswith("database"):
        (data_dir / "tasks.sqlite3").mkdir(parents=True)
    server = start_server("--model", "tiny", "--data-dir", str(data_dir), wait=False)
    assert f"The data dir {data_dir} cannot be used: " in refusal(server)


def test_health_reports_that_the_data_dir_has_vanished(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "tiny")
    server.wait_until_ended(server.submit()["task_id"])
    shutil.rmtree(tmp_path / "server")
    post(server)
    until(lambda: server.get("/health").status_code != 200)
    health = server.get("/health")
    assert (health.status_code, health.json().get("status")) == (503, "failed")
    assert "Traceback" not in log_of(server)


# -- a full disk ----------------------------------------------------------------------------------


def test_a_full_disk_is_reported_loses_nothing_and_is_recovered_from(
    start_server: StartServer, hold: Hold, mount: Callable[[str], Path]
) -> None:
    disk = mount("size=8m")
    server = start_server("--model", "tiny", "--data-dir", str(disk / "data"), hold=hold)
    finished = server.submit(format="PNG")["task_id"]
    assert server.wait_until_ended(finished)["status"] == "done"
    image = server.get("/image", task_id=finished, delete="false").content
    hold.close()
    running = server.submit(width=1024, height=1024, format="PNG")["task_id"]
    waiting = server.submit()["task_id"]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    filler = fill_disk(disk)

    accepted = [finished, running, waiting]
    refused = 0
    while refused < 20:
        answer = post(server, prompt="a long prompt " * 500)
        if answer.status_code == 200:
            accepted.append(answer.json()["task_id"])
        else:
            refused += 1
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "storage_unavailable")
    hold.open()
    server.wait_for(running, lambda s: s.get("phase") == "image_encoding")
    for _ in range(5):
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "full" in health.json()["last_error"] or "No space" in health.json()["last_error"]
        answer = requests.delete(server.url + "/delete", params={"task_id": waiting}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert status_of(server, waiting)["status"] == "waiting"
        assert status_of(server, finished)["status"] == "done"
        image_now = server.get("/image", task_id=finished, delete="false").content
        assert image_now == image
        assert server.get("/queue").json()["length"] == len(accepted) - 1

    filler.unlink()
    until(lambda: server.get("/health").status_code == 200)
    for task_id in accepted:
        assert server.wait_until_ended(task_id)["status"] == "done"
        picture = Image.open(BytesIO(server.get("/image", task_id=task_id).content))
        picture.load()
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"
    assert server.get("/health").json()["worker_restarts"] == 0
    assert "Traceback" not in log_of(server)
    responses = server.get("/openapi.json").json()["paths"]["/delete"]["delete"]["responses"]
    assert "503" in responses


def test_while_there_is_no_room_for_a_finished_picture_health_is_503(
    start_server: StartServer, hold: Hold, mount: Callable[[str], Path]
) -> None:
    """The database still finds room, the picture does not: nothing can be finished."""
    disk = mount("size=8m")
    hold.close()
    server = start_server("--model", "tiny", "--data-dir", str(disk / "data"), hold=hold)
    task_id = server.submit(width=1024, height=1024, format="PNG")["task_id"]
    server.wait_for(task_id, lambda s: s["steps_done"] >= 1)
    filler = fill_disk(disk, spare_bytes=300_000)
    hold.open()
    until(lambda: server.get("/health").status_code == 503)
    server.wait_for(task_id, lambda s: s.get("phase") == "image_encoding")
    for _ in range(5):
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "No space" in health.json()["last_error"]
    filler.unlink()
    assert server.wait_until_ended(task_id)["status"] == "done"
    until(lambda: server.get("/health").status_code == 200)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_and_a_start_on_a_full_disk_lose_nothing(
    start_server: StartServer, hold: Hold, mount: Callable[[str], Path], number: int
) -> None:
    disk = mount("size=8m")
    start = ("--model", "tiny", "--data-dir", str(disk / "data"))
    hold.close()
    server = start_server(*start, hold=hold)
    running = server.submit(width=1024, height=1024, format="PNG")["task_id"]
    waiting = [server.submit()["task_id"] for _ in range(3)]
    server.wait_for(running, lambda s: s["steps_done"] >= 1)
    filler = fill_disk(disk)
    until(lambda: server.get("/health").status_code == 503)
    assert server.stop(number) == (0 if number == signal.SIGTERM else -number)
    assert "Traceback" not in log_of(server)

    for _ in range(2):  # a start on the full disk is no attempt
        server = start_server(*start)
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "No space left on device" in health.json()["last_error"]
        assert server.get("/queue").json()["length"] == 4
        assert [status_of(server, id_)["status"] for id_ in (running, *waiting)] == ["waiting"] * 4
        assert server.stop() == 0
    server = start_server(*start)
    filler.unlink()
    for task_id in (running, *waiting):
        assert server.wait_until_ended(task_id)["status"] == "done"


def test_a_read_only_disk_is_refused_with_one_sentence(
    start_server: StartServer, mount: Callable[[str], Path]
) -> None:
    data_dir = mount("ro") / "data"
    server = start_server("--model", "tiny", "--data-dir", str(data_dir), wait=False)
    assert f"The data dir {data_dir} cannot be used: " in refusal(server)
