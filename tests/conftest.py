"""Fixtures: real servers in separate processes, with real mflux and the tiny models."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forking
import pytest
import requests
from chromium import CHROMIUM
from holding import Hold
from ram_disk import use_ram_disk

from allowed import Allowed
from api.client_queue import ClientQueue, OwnQueue
from key_file import EVERYBODY
from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
from queue_manager import QueueManager
from scheduler.download_api import DownloadApi
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import Encoded, Forecast, GenerationParams, Phase, Progress, Task, Verdict
from timing_model import Measured, TimingModel
from workers.stopwatch import Stopwatch

pytest_plugins = (
    *("memory_stores", "ordering", "stalling_hub", "file_hub", "small_disk", "owned", "studio"),
    *("awaited", "pages", "command_line", "live", "receivers"),
)
use_ram_disk()

SERVER, EAGER_SERVER = ("server.py",), ("tests/eager_server.py",)
FORKED: Mapping[tuple[str, ...], str] = {SERVER: "server", EAGER_SERVER: "eager_server"}
"""The modules of programs that can be forked."""
ROOT, clean_environment = forking.ROOT, forking.clean_environment
START_TIMEOUT_S = 120
GIVE_UP_S = 120
FOREIGN_PATHS = ("/v1/", "/sdapi/", "/api/", "/controlnet/", "/queue/status", "/mcp")
"""What the paths of the foreign APIs begin with."""
needs_chromium = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="there is no Chromium here"
)


def pytest_collection_finish() -> None:
    gc.freeze()  # collections, which tests of memory ask for, do not look at all tests again


def slow_except(usual: Iterable[object], values: Iterable[Any]) -> list[Any]:
    """Parameters of a test: `make test` takes the usual ones, `make test-slow` the others."""
    usual = list(usual)
    rows = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [
        pytest.param(*row, marks=[] if value in usual else pytest.mark.slow) for value, row in rows
    ]


def allow(*names: str, **options: Any) -> Allowed:
    """What a server with these models allows."""
    models = []
    for name in names:
        model = find_model(name)
        assert model, name
        models.append(model)
    return Allowed(models[0], tuple(models), **options)


def params_for(prompt: str = "a lighthouse", **changes: Any) -> GenerationParams:
    """The parameters of a small picture."""
    usual: dict[str, Any] = {
        "seed": 1,
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance": None,
        "format": "PNG",
        "quality": 85,
    }
    return GenerationParams(prompt=prompt, **{**usual, **changes})


def forecast_of(task: Task) -> Forecast:
    """The forecast of an unfinished task."""
    assert task.forecast
    return task.forecast


def seen_by_all(queue: QueueManager) -> OwnQueue:
    """The queue as everybody sees it where everyone is trusted."""
    return lambda: ClientQueue(queue, EVERYBODY)


class PlayedQueue(QueueManager):
    """A queue without threads: the test acts as worker and download thread, and sets the clock."""

    def __init__(
        self,
        allowed: Allowed,
        timing: TimingModel,
        store: TaskStore,
        limits: QueueLimits | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        self.scheduler = Scheduler(allowed, timing, store, limits, monotonic=monotonic, **options)
        super().__init__(self.scheduler)
        self.worker = WorkerApi(self.scheduler)
        self.downloads = DownloadApi(self.scheduler)
        self._clock = monotonic
        self._claimed: dict[str, Task] = {}
        self._at: dict[str, tuple[int, int]] = {}  # stage, image
        self._watches: dict[str, Stopwatch] = {}
        self._drawn: dict[str, list[tuple[int, Measured]]] = {}

    def load(self, spec: LoadSpec | None = None, resident: Sequence[str] | None = None) -> None:
        """LoadSpec are loaded at once; the server's own by default."""
        spec = spec or self.scheduler.allowed.first_spec
        self.worker.load_started(spec)
        self.loaded(spec, resident=resident)

    def loaded(
        self,
        spec: LoadSpec,
        bits: int | None = None,
        resident: Sequence[str] | None = None,
        *,
        learn: bool = True,
    ) -> None:
        """A load has ended. By default only these weights are in memory."""
        self.worker.load_finished(spec, bits, resident or [spec.key], learn=learn)

    def claim(self, timeout_s: float = 0.0) -> Task | None:
        task = self.worker.claim(timeout_s)
        if task:
            self._claimed[task.task_id] = task
            self._at[task.task_id] = 0, task.images_done
            self._watches[task.task_id] = Stopwatch(self._clock)
            self._drawn[task.task_id] = []
        return task

    def image(self, task_id: str, index: int = 0) -> tuple[bytes, GenerationParams]:
        return self.image_of(self.status(task_id), index)

    def all_images(self, task_id: str) -> tuple[list[bytes], GenerationParams]:
        return self.all_images_of(self.status(task_id))

    def attempt(self, task_id: str) -> int:
        """The number of the latest claim; 1 for a task that was not claimed here."""
        return self._claimed[task_id].attempt if task_id in self._claimed else 1

    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool:
        """Returns whether the worker must continue."""
        if task_id in self._watches:
            self._watches[task_id].reached(phase, steps_done)
        stage, image = self._at.get(task_id, (0, 0))
        progress = Progress(phase, steps_done, steps_total, stage, image)
        verdict = self.worker.report(task_id, self.attempt(task_id), progress)
        return verdict is not Verdict.STOP

    def next_image(self, task_id: str, stage: int, index: int) -> bool:
        """The previous picture is generated."""
        was_stage, _ = self._at[task_id]
        self._drawn[task_id].append((was_stage, self._watches[task_id].measured()))
        self._watches[task_id] = Stopwatch(self._clock)
        self._at[task_id] = stage, index
        steps = self._claimed[task_id].stages[stage].params.steps_run
        return self.report(task_id, Phase.TEXT_ENCODING, 0, steps)

    def finish(
        self,
        task_id: str,
        images: Sequence[bytes],
        *,
        image_encoding_s: float | None = None,
        first: int | None = None,
    ) -> bool:
        """Encodes and stores all images. Each took so many seconds; by default the time since the
        report of IMAGE_ENCODING. `first`: index of the first image; by default the first one that
        was not stored at the claim."""
        if task_id not in self._claimed:
            return self.worker.finish(task_id, 1, Encoded(images[-1], len(images) - 1))
        watch, (stage, _) = self._watches[task_id], self._at[task_id]
        own = watch.measured()
        if image_encoding_s is None:
            image_encoding_s = self._clock() - watch._phase_at
        drawn = [*self._drawn[task_id], (stage, own)]
        if len(drawn) < len(images):  # the test reported nothing in between
            drawn *= len(images)
        before, own_stage = drawn[: -len(images)], drawn[-len(images) :]
        attempt, stored = self.attempt(task_id), False
        if first is None:
            first = self._claimed[task_id].images_done
        for number, (image, (at, measured)) in enumerate(zip(images, own_stage, strict=True), 1):
            own = replace(measured, image_encoding_s=image_encoding_s)
            encoded = Encoded(image, first + number - 1, (*before, (at, own)))
            before = []
            is_last = number == len(images)
            store = self.worker.finish if is_last else self.worker.store_image
            stored = store(task_id, attempt, encoded)
        return stored

    def fail(self, task_id: str, code: str, message: str) -> bool:
        return self.worker.fail(task_id, self.attempt(task_id), code, message)

    def release(self, task_id: str, *, interrupted: bool = False) -> bool:
        return self.worker.release(task_id, self.attempt(task_id), interrupted=interrupted)


def until(condition: Callable[[], object]) -> None:
    """Polls until it is true, for at most GIVE_UP_S. Most of the time is left to what it waits for,
    also where the condition is a request."""
    pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
    while True:
        asked_at = time.monotonic()
        if condition():
            return
        assert asked_at < deadline, "it never became true"
        pause.wait(max(0.01, 4 * (time.monotonic() - asked_at)))


def ask(method: str, url: str, **options: Any) -> requests.Response:
    """A request that uses no proxy: looking for one takes a third of the time of a request."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, timeout=GIVE_UP_S, **options)


class ServerProcess:
    """`python3 server.py` on a free port, with a client for its JSON routes.

    It is forked if possible (see FORKED and can_fork()). `hold` stops its pictures when the test
    wants. `model` is for arguments that name none.
    """

    def __init__(
        self,
        data_dir: Path,
        *arguments: str,
        wait: bool = True,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = SERVER,
        hold: Hold | None = None,
        model: str | None = "noise-flux1",
    ) -> None:
        if model and not any(argument.startswith("--model") for argument in arguments):
            arguments = ("--model", model, *arguments)
        arguments = ("--port", "0", "--data-dir", str(data_dir), *arguments)
        self.process: subprocess.Popen[str] | forking.ForkedServer
        if tuple(program) in FORKED and forking.can_fork(environment):
            module = FORKED[tuple(program)]
            command = forking.Command(arguments, environment, hold, module)
            self.process = forking.ForkedServer(command)
        else:
            if hold:
                program = ("tests/holding.py",)
                environment = {"HOLD": str(hold.file), **(environment or {})}
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=ROOT,
                env={**clean_environment(), **(environment or {})},
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        self.log: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if wait:
            self.wait_until_listening()

    def wait_until_listening(self) -> None:
        assert self._listening.wait(START_TIMEOUT_S), "".join(self.log)
        assert self.url, "the server ended:\n" + "".join(self.log)

    def get(self, path: str, **params: Any) -> requests.Response:
        return ask("GET", self.url + path, params=params)

    def submit(self, prompt: str = "a lighthouse", **fields: Any) -> dict[str, Any]:
        """Submits a small picture, which must be accepted."""
        body = {"prompt": prompt, "width": 64, "height": 64, "steps": 2, **fields}
        answer = ask("POST", self.url + "/generate", json=body)
        assert answer.status_code == 200, answer.text
        accepted: dict[str, Any] = answer.json()
        return accepted

    def delete(self, task_id: str) -> requests.Response:
        """Cancels or removes a task."""
        return ask("DELETE", self.url + "/delete", params={"task_id": task_id})

    def wait_for(self, task_id: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Follows /status until the answer is as wanted, for at most GIVE_UP_S."""
        pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
        status: dict[str, Any] = self.get("/status", task_id=task_id).json()
        while not until(status):
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < deadline, status
            pause.wait(0.01)
            waiting = {"wait": 1, "since": status.get("version", 0)}
            status = self.get("/status", task_id=task_id, **waiting).json()
        return status

    def wait_until_ended(self, task_id: str) -> dict[str, Any]:
        return self.wait_for(task_id, lambda s: s["status"] not in ("waiting", "running"))

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stops the server with SIGINT; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(GIVE_UP_S)
        self._reader.join(GIVE_UP_S)
        return code

    def refused(self) -> tuple[int, str]:
        """Exit code and log of a start that ends by itself."""
        code = self.process.wait(START_TIMEOUT_S)
        self._reader.join(GIVE_UP_S)
        return code, "".join(self.log)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving .* on (http://[\w.:\[\]-]+)", line):
                self.url = found[1]
                self._listening.set()
        self._listening.set()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data dir for tests without a server."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the tiny FLUX.1, for tests that leave no unfinished task behind."""
    arguments = ("--model", "noise-flux1", "--log-level", "debug")
    process = ServerProcess(tmp_path_factory.mktemp("server"), *arguments)
    yield process
    process.stop()


StartServer = Callable[..., ServerProcess]
RunServer = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    """For start_server(..., hold=hold): open at first."""
    return Hold(tmp_path / "hold")


@pytest.fixture
def run_server(tmp_path: Path) -> RunServer:
    """Runs `python3 server.py` with these arguments and this environment to its end."""
    usual = {"MFLUX_SERVER_DATA_DIR": str(tmp_path / "data")}

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return forking.run_server(tmp_path, *arguments, **(usual | environment))

    return run


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers one after the other on one data dir. They are stopped after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str, **options: Any) -> ServerProcess:
        started.append(ServerProcess(tmp_path / "server", *arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.stop(signal.SIGKILL)
