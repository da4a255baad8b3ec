"""Threads that die: each one is started again, or the process ends so that it can be."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ROOT, ServerProcess, StartServer
from live import SteppedServer

import images
import supervision
from supervision import MOST_DEATHS, SupervisedQueue, SupervisedThread

SCRIPT = "tests/dying_server.py"


class Receiver:
    """Somebody who wants to be called back."""

    def __init__(self) -> None:
        self.called = threading.Event()
        called = self.called

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                called.set()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class DyingServer(ServerProcess):
    """A real server whose threads the test can kill."""

    def __init__(self, data_dir: Path) -> None:
        self.receiver = Receiver()
        self._kills = 0
        super().__init__(
            data_dir,
            *("--model", "noise-flux1", "--models", "noise-flux1,schnell", "--threads", "8"),
            *("--callback-hosts", "127.0.0.1", "--expand-url", self.receiver.url),
            environment={"HF_HOME": str(data_dir / "hub")},
            program=(SCRIPT,),
        )
        self.watched = self.submit(width=64)["task_id"]
        self.wait_until_ended(self.watched)

    def order(self, line: str, answer: str) -> str:
        """Give an order; returns the line of the log with which it is answered."""
        seen = len(self.log)
        self.tell(line)
        return self.logged(answer, seen)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def logged(self, text: str, seen: int = 0, poke: Callable[[], object] = lambda: None) -> str:
        """The first line with this text behind those that were seen; waits for it."""
        pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
        while True:
            for line in self.log[seen:]:
                if text in line:
                    return line
            assert time.monotonic() < deadline, "".join(self.log)
            poke()
            pause.wait(0.01)

    def kill(self, name: str, poke: Callable[[], object]) -> None:
        """Strike a thread until it dies once: waitress survives an error while it reads a socket.

        Args:
            poke: makes the thread run.
        """
        self._kills += 1
        seen, deadline = len(self.log), time.monotonic() + GIVE_UP_S
        pause = threading.Event()
        while not any(f"the thread {name}" in line for line in self.log[seen:]):
            assert time.monotonic() < deadline, "".join(self.log)
            with suppress(BrokenPipeError):
                self.tell(f"{self._kills} {name}")
            with suppress(requests.RequestException):
                poke()
            pause.wait(0.05)

    def knock(self) -> None:
        """Wakes the HTTP loop, which may not live to answer."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            pass

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def close(self) -> None:
        self.receiver.server.shutdown()
        self.receiver.server.server_close()
        self.stop()

    # -- What makes a thread run, and shows that it does its work ---------------------------------

    def ask(self) -> None:
        assert self.get("/health").status_code == 200

    def ask_often(self) -> None:
        for _ in range(20):
            self.ask()

    def draw(self) -> None:
        assert self.wait_until_ended(self.submit()["task_id"])["status"] == "done"

    def listen(self) -> None:
        """A stream of events sees the end of a task that is submitted meanwhile."""
        with requests.get(self.url + "/events", stream=True, timeout=GIVE_UP_S) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line.startswith(b"event: queue"))
            task_id = self.submit()["task_id"]
            next(line for line in lines if line.startswith(b"event: done"))
            self.wait_until_ended(task_id)

    def be_called(self) -> None:
        self.receiver.called.clear()
        self.submit(callback_url=self.receiver.url)
        assert self.receiver.called.wait(GIVE_UP_S)

    def expand(self) -> None:
        """The endpoint is asked for a prompt. Its answer is none, so the task's own one is used."""
        self.receiver.called.clear()
        ended = self.wait_until_ended(self.submit(expand=True)["task_id"])
        assert ended["status"] == "done"
        assert self.receiver.called.is_set()

    def want_weights(self) -> None:
        """The download, which cannot be here, fails; so does the task."""
        task_id = self.submit(model="schnell")["task_id"]
        ended = self.wait_until_ended(task_id)
        assert ended["error"]["code"] == "model_load_failed"


WORK: dict[str, Callable[[DyingServer], None]] = {
    "http": DyingServer.ask,
    "clock": DyingServer.ask,
    "checks": DyingServer.ask,
    "waitress-": DyingServer.ask_often,
    "worker": DyingServer.draw,
    "encoder": DyingServer.draw,
    "previews": DyingServer.draw,
    "events": DyingServer.listen,
    "webhooks": DyingServer.be_called,
    "downloads": DyingServer.want_weights,
    "expander": DyingServer.expand,
}


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DyingServer]:
    server = DyingServer(tmp_path_factory.mktemp("dying") / "data")
    server.listen()  # the last of its threads starts with the first listener
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_a_thread_that_dies_is_started_again_and_does_its_work(
    dying: DyingServer, name: str
) -> None:
    dying.kill(name, dying.knock if name == "http" else lambda: WORK[name](dying))
    WORK[name](dying)
    health = dying.get("/health")
    assert health.status_code == 200
    assert health.json()["worker_restarts"] == "".join(dying.log).count("the thread worker died")


def test_each_thread_is_in_the_table_of_the_documentation_and_among_those_that_die_here(
    dying: DyingServer,
) -> None:
    line = dying.order("", "threads: ")
    names = {re.sub(r"\d+$", "", name) for name in line.partition("threads: ")[2].split()} - {
        "MainThread",
        "tqdm_monitor",
    }
    assert names == set(WORK)
    section = (ROOT / "docs/architecture.md").read_text().partition("\n## Threads\n")[2]
    rows = re.findall(r"^\| ([^|]+) \|", section.partition("\n## ")[0], re.MULTILINE)
    documented = {name.removesuffix("N") for row in rows for name in row.split(", ")}
    assert names <= documented


def test_a_thread_that_dies_again_and_again_ends_the_process_which_loses_nothing(
    tmp_path: Path, start_server: StartServer
) -> None:
    first = DyingServer(tmp_path / "server")
    done = first.watched
    waiting = first.submit(width=2048, height=2048, steps=100)["task_id"]
    for _ in range(MOST_DEATHS + 1):
        first.kill("http", first.knock)
    assert first.process.wait(GIVE_UP_S) == 1
    first.close()
    assert "the server ends with exit code 1" in first.log[-1]
    second = start_server("--model", "noise-flux1")
    assert second.get("/status", task_id=done).json()["status"] == "done"
    assert second.get("/status", task_id=waiting).json()["status"] in ("waiting", "running")
    requests.delete(second.url + "/delete", params={"task_id": waiting}, timeout=GIVE_UP_S)


def test_a_task_whose_picture_was_being_encoded_when_the_encoder_died_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, deaths = images.encode_image, iter([SystemExit])

    def encode_once_dead(*given: Any, **options: Any) -> bytes:
        for death in deaths:
            raise death
        return encode(*given, **options)

    monkeypatch.setattr("workers.encoder.encode_image", encode_once_dead)
    server = SteppedServer(tmp_path)
    task_id = server.submit()
    server.end()
    assert server.get("/image", task_id=task_id, wait=60).status_code == 200
    assert server.get("/health").json()["worker_restarts"] == 0
    server.close()


def test_deaths_that_are_rare_do_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes pass between two deaths."""
    seconds = iter(range(0, 100_000, int(supervision.WITHIN_S)))
    monkeypatch.setattr("supervision.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr(supervision, "end_process", lambda code: pytest.fail("it has ended"))
    deaths = iter(range(20))
    recovered: list[int] = []

    def loop() -> None:
        for number in deaths:
            raise ValueError(number)

    thread = SupervisedThread("mortal", loop, lambda: recovered.append(1))
    thread.run()
    assert thread.restarts == len(recovered) == 20


def test_a_thread_that_may_end_is_not_started_again() -> None:
    runs: list[int] = []

    def loop() -> None:
        runs.append(1)
        thread.let_end()
        raise ValueError

    thread = SupervisedThread("mortal", loop)
    thread.start()
    thread.join(GIVE_UP_S)
    assert (runs, thread.is_alive()) == ([1], False)


def test_a_queue_goes_on_after_the_item_that_killed_its_thread() -> None:
    handled: list[int] = []
    lost: list[int] = []

    def handle(item: int) -> None:
        if item == 2:
            raise SystemExit
        handled.append(item)

    queue = SupervisedQueue("items", handle, lost.append)
    assert queue.stop(0), "it was never started"
    for item in range(5):
        queue.put(item)
    assert queue.stop(GIVE_UP_S)
    assert (handled, lost) == ([0, 1, 3, 4], [2])


def test_draining_a_queue_waits_for_its_items_also_for_one_that_kills_the_thread() -> None:
    go_on = threading.Event()
    handled: list[int] = []
    lost: list[int] = []

    def handle(item: int) -> None:
        assert go_on.wait(GIVE_UP_S)
        handled.append(item)
        if item == 1:
            raise SystemExit

    queue = SupervisedQueue("items", handle, lost.append)
    queue.drain()  # of nothing
    for item in range(3):
        queue.put(item)
    drained = threading.Thread(target=queue.drain)
    drained.start()
    assert handled == []
    go_on.set()
    drained.join(GIVE_UP_S)
    assert not drained.is_alive()
    assert (handled, lost) == ([0, 1, 2], [1])
    assert queue.stop(GIVE_UP_S)


def test_a_full_queue_makes_the_next_one_wait_and_does_not_hold_up_the_stop() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def handle(item: int) -> None:
        reached.set()
        go_on.wait(GIVE_UP_S)

    queue = SupervisedQueue("items", handle, lambda item: None, size=1)
    queue.put(1)
    assert reached.wait(GIVE_UP_S)
    queue.put(2)
    third = threading.Thread(target=queue.put, args=(3,), daemon=True)
    third.start()
    assert not queue.stop(0)
    assert third.is_alive()
    go_on.set()
    third.join(GIVE_UP_S)
    assert queue.stop(GIVE_UP_S)
