"""Servers for the tests: the real one in a process of its own, real mflux on the tiny models."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from models.mflux_registry import find_model
from models.model_catalog import Weights
from offer import Offer
from task import Drawn, GenerationParams, Memory, Report, Stage

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 120
GIVE_UP_S = 120
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="there is no Chromium here"
)


def offer_of(*names: str, **options: Any) -> Offer:
    """What a server offers that was started with these models."""
    models = []
    for name in names:
        model = find_model(name)
        assert model, name
        models.append(model)
    return Offer(models[0], tuple(models), **options)


def params_for(prompt: str = "a lighthouse", **changes: Any) -> GenerationParams:
    """A small picture."""
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


def clean_environment() -> dict[str, str]:
    """No test picks up the settings of the person who runs it, nor reaches a model hub."""
    dropped = ("MFLUX_SERVER_", "TQDM_")  # mlx_setup.py switches progress bars off in this process
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**inherited, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def until(condition: Callable[[], object]) -> None:
    """Ask again and again until it is true, for GIVE_UP_S at most."""
    pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        pause.wait(0.01)


class ServerProcess:
    """`python3 server.py` on a free port, with a client for its JSON routes."""

    def __init__(
        self,
        data_dir: Path,
        *arguments: str,
        wait: bool = True,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("server.py",),
    ) -> None:
        command = [sys.executable, *program, "--port", "0", "--data-dir", str(data_dir)]
        self.process = subprocess.Popen(
            [*command, *arguments],
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
        return requests.get(self.url + path, params=params, timeout=60)

    def submit(self, prompt: str = "a lighthouse", **fields: Any) -> dict[str, Any]:
        """POST /generate for a small picture, which must be accepted."""
        body = {"prompt": prompt, "width": 64, "height": 64, "steps": 2, **fields}
        answer = requests.post(self.url + "/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        accepted: dict[str, Any] = answer.json()
        return accepted

    def wait_for(self, task_id: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask /status again and again until its answer is as wanted, for GIVE_UP_S at most."""
        pause, deadline = threading.Event(), time.monotonic() + GIVE_UP_S
        while True:
            status: dict[str, Any] = self.get("/status", task_id=task_id).json()
            if until(status):
                return status
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < deadline, status
            pause.wait(0.01)

    def wait_until_ended(self, task_id: str) -> dict[str, Any]:
        return self.wait_for(task_id, lambda s: s["status"] not in ("waiting", "running"))

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ends the server as Ctrl-C does; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(15)
        self._reader.join(5)
        return code

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving .* on (http://\S+)", line):
                self.url = found[1]
                self._listening.set()
        self._listening.set()


class FakeGenerator:
    """Does what it is told instead of drawing."""

    def __init__(
        self, draw: Callable[[GenerationParams, Report], Image.Image] | None = None
    ) -> None:
        self.draw = draw or (lambda params, report: Image.new("RGB", (16, 16)))
        self.memory = Memory()

        self.resident: tuple[str, ...] = ()

    def load(self, weights: Weights) -> int | None:
        self.resident = (weights.key,)
        return None

    def unload(self) -> None:
        self.resident = ()

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        return Drawn(self.draw(stage.params, report))

    def refusal(self, params: GenerationParams) -> str | None:
        return None

    def check_adapters(self, weights: Weights) -> tuple[str, ...]:
        return ()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For generators alone; a server owns its data dir."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the tiny FLUX.1, for tests that leave no unfinished task behind."""
    arguments = ("--model", "tiny", "--log-level", "debug")
    process = ServerProcess(tmp_path_factory.mktemp("server"), *arguments)
    yield process
    process.stop()


class StallingHub:
    """A model hub on this machine that answers nothing until it may go on, and then refuses."""

    def __init__(self, folder: Path) -> None:
        self.go_on = go_on = threading.Event()

        class Hub(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                go_on.wait(GIVE_UP_S)
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hub"),
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stalling_hub(tmp_path: Path) -> Iterator[StallingHub]:
    hub = StallingHub(tmp_path)
    yield hub
    hub.go_on.set()
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk of its own (a tmpfs, in RAM)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tool = shutil.which("mount") if sys.platform == "linux" else None

    def mount(options: str) -> Path:
        if tool is None:
            pytest.skip("this test mounts a tmpfs, which only Linux has")
        mounted = subprocess.run(
            [tool, "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"this test must be allowed to mount a tmpfs: {mounted.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_disk(disk: Path, spare_bytes: int = 0) -> Path:
    """A file that takes all the room there is, but for a spare."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096) == 4096:
            pass
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - spare_bytes)
    return filler


StartServer = Callable[..., ServerProcess]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that end with the test, all on one data dir: one after the other."""
    started: list[ServerProcess] = []

    def start(*arguments: str, **options: Any) -> ServerProcess:
        started.append(ServerProcess(tmp_path / "server", *arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.stop(signal.SIGKILL)
