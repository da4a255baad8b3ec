"""An application with keys in this process. The test is the worker, and moves the clock."""

from pathlib import Path
from typing import Any

from conftest import PlayedQueue, allow
from fake_generator import FakeGenerator
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api.client_queue import own_queue_of
from api.generate_request import Limits
from api.identity import Identity
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from application import create_app
from generation.previews import Previews
from key_file import Client, KeyFile
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import Phase, Task
from timing.speeds import Product
from timing_model import TimingModel
from workers.worker import Worker

KEYS = {"alice": "alice-0123456789", "bob": "bob-0123456789ab", "root": "root-0123456789a"}


class PlayedApp:
    """An application with keys. The test is the worker, and moves the clock; a step takes 2 s."""

    def __init__(self, folder: Path, keys: str = "", usual: Client | None = None) -> None:
        self.folder, self.at = folder, 1000.0
        self.key_file = folder / "keys.toml"
        tables = [f'[{name}]\nkey = "{key}"\n' for name, key in KEYS.items()]
        self.key_file.write_text(
            keys + "".join(tables) + "operator = true\nmay_prioritize = true\n"
        )
        self.usual = usual or Client()
        self.open()

    def open(self) -> None:
        allowed, self.store = allow("noise-flux1"), TaskStore(self.folder / "data")
        self.queue = PlayedQueue(
            allowed,
            TimingModel({Product.BF16: 1e10}),  # slow, so that forecasts differ visibly
            self.store,
            QueueLimits(max_delay_s=60.0),
            monotonic=self.clock,
            now=self.clock,
        )
        self.queue.load()
        own_queue, places = own_queue_of(self.queue), WaitingPlaces(8)
        generator = FakeGenerator()
        self.identity = Identity(
            KeyFile(self.key_file, self.clock), trusted=True, secret=b"s", limits=self.usual
        )
        self.identity.requests._monotonic = self.identity.requests._now = self.clock
        app = create_app(
            self.queue,
            Worker(self.queue.worker, generator, lambda error: None),
            generator,
            Submission(own_queue, allowed, Limits(), generator.refusal, places=places),
            places=places,
            previews=Previews(on=False),
            data_dir=self.folder,
            max_body_bytes=1_000_000,
            identity=self.identity,
        )
        self.http: FlaskClient = app.test_client()

    def reopen(self) -> None:
        self.store.close()
        self.open()

    def clock(self) -> float:
        return self.at

    def ask(self, name: str, method: str, path: str, **options: Any) -> TestResponse:
        headers = {"Authorization": f"Bearer {KEYS[name]}"} if name else {}
        return self.http.open(path, method=method, headers=headers, **options)

    def json(self, name: str, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self.ask(name, method, path, **options)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.get_json()
        return found

    def submit(self, name: str, prompt: str = "x", **fields: Any) -> str:
        body = {"prompt": prompt, "width": 64, "height": 64, "steps": 4, **fields}
        return str(self.json(name, "POST", "/generate", json=body)["task_id"])

    def claim(self) -> Task:
        task = self.queue.claim()
        assert task
        return task

    def run(self) -> str:
        """The next task is claimed and finished, in 8 s; its prompt."""
        task = self.claim()
        for step in range(task.params.steps + 1):
            self.queue.report(task.task_id, Phase.DENOISING, step, task.params.steps)
            self.at += 2.0 if step < task.params.steps else 0.0
        self.queue.report(task.task_id, Phase.IMAGE_ENCODING, task.params.steps, task.params.steps)
        assert self.queue.finish(task.task_id, [b"image"])
        return task.params.prompt

    def fail(self) -> str:
        task = self.claim()
        self.queue.fail(task.task_id, "task_failed", "It broke.")
        return task.task_id

    def status(self, name: str, task_id: str) -> dict[str, Any]:
        return self.json(name, "GET", "/status", query_string={"task_id": task_id})

    def waiting(self) -> list[str]:
        tasks = self.json("root", "GET", "/queue")["tasks"]
        return [task["params"]["prompt"] for task in tasks if task["status"] == "waiting"]
