"""A head and its workers in processes of their own, over a real Redis, with real mflux."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import forking
import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, until

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")
needs_redis = pytest.mark.skipif(
    not REDIS and not os.environ.get("CI"),
    reason="there is no redis-server here: install Redis or Valkey to test the cluster",
)
PASSWORD = "broker-password"
LEASE_S = 2


def free_port() -> int:
    """A port that nothing gets by chance while its Redis is restarted: connections have theirs
    above 32,767."""
    while True:
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return int(free.getsockname()[1])


class Redis:
    """A Redis without persistence: what it held is gone when it was killed."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.port = free_port()
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        assert REDIS
        options = ("--requirepass", PASSWORD, "--save", "", "--appendonly", "no")
        self.process = subprocess.Popen(
            [REDIS, *self.listening(), *options, "--dir", str(self._folder), *self._options],
            stdout=subprocess.DEVNULL,
        )
        until(self.answers)

    def listening(self) -> tuple[str, ...]:
        return ("--port", str(self.port))

    def answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(GIVE_UP_S)

    close = kill


class TlsRedis(Redis):
    """With a certificate of its own, for localhost."""

    def __init__(self, folder: Path) -> None:
        self.certificate, key = folder / "broker.crt", folder / "broker.key"
        make = (
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=localhost",
        )
        files = ("-keyout", str(key), "-out", str(self.certificate))
        names = ("-addext", "subjectAltName=DNS:localhost")
        subprocess.run([*make, *names, *files], check=True, capture_output=True)
        tls = ("--tls-cert-file", str(self.certificate), "--tls-key-file", str(key))
        super().__init__(folder, *tls, "--tls-auth-clients", "no")
        self.bare_url = f"rediss://:{PASSWORD}@localhost:{self.port}"
        self.url = f"{self.bare_url}?ssl_ca_certs={self.certificate}"

    def listening(self) -> tuple[str, ...]:
        return ("--port", "0", "--tls-port", str(self.port))


class WorkerProcess:
    """`python3 remote_worker.py`, forked if possible.

    Args:
        hold: changes the process before its main(); only where it is forked.
    """

    def __init__(
        self, data_dir: Path, url: str, name: str, *arguments: str, hold: Any = None
    ) -> None:
        self.name = name
        arguments = (
            *("--broker", url, "--worker-name", name, "--data-dir", str(data_dir)),
            *(arguments or ("--model", "noise-flux1")),
        )
        self.process: subprocess.Popen[str] | forking.ForkedServer
        if forking.CAN_FORK:
            self.process = forking.ForkedServer(
                forking.Command(arguments, hold=hold, program="remote_worker")
            )
        else:
            self.process = subprocess.Popen(
                [sys.executable, "remote_worker.py", *arguments],
                cwd=forking.ROOT,
                env=forking.clean_environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        code = self.process.wait(GIVE_UP_S)
        self._reader.join(GIVE_UP_S)
        return code

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)


class Cluster:
    """Args:
    options: of the head.
    hold: changes the process of the head before its main().
    """

    def __init__(
        self, folder: Path, *options: str, redis: Redis | None = None, hold: Any = None
    ) -> None:
        self.folder, self.options, self._hold = folder, options, hold
        self.redis = redis or Redis(folder)
        self.workers: list[WorkerProcess] = []
        self.start_head()

    def start_head(self) -> None:
        usual = ("--model", "noise-flux1", "--no-local-worker", "--lease-s", str(LEASE_S))
        arguments = (*usual, "--broker", self.redis.url, *self.options)
        self.head = ServerProcess(self.folder / "head", *arguments, hold=self._hold)

    def worker(
        self, name: str, *arguments: str, hold: Any = None, url: str = "", wait: bool = True
    ) -> WorkerProcess:
        """Starts a worker; waits until the head has it."""
        url = url or self.redis.url
        worker = WorkerProcess(self.folder / name, url, name, *arguments, hold=hold)
        self.workers.append(worker)
        if wait:
            until(lambda: name in self.machines() or worker.process.poll() is not None)
        return worker

    def machines(self) -> dict[str, dict[str, Any]]:
        """By name, those that are registered and alive."""
        machines = self.head.get("/machines").json()["machines"]
        return {m["name"]: m for m in machines if m["state"] != "lost"}

    def submit(self, prompt: str = "a lighthouse", **fields: Any) -> str:
        return str(self.head.submit(prompt, **fields)["task_id"])

    def status(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.head.get("/status", task_id=task_id).json()
        return found

    def running(self, steps: int = 100, **fields: Any) -> str:
        """Submits a task that takes long, and waits until a worker is at a step of it."""
        task_id = self.submit(steps=steps, **{"width": 512, "height": 512, "count": 10, **fields})
        self.head.wait_for(task_id, lambda status: status.get("steps_done", 0) > 0)
        return task_id

    def until_running(self, name: str, task_id: str) -> None:
        """Waits until this machine draws this task."""
        until(lambda: self.machines().get(name, {}).get("running") == [task_id])

    def ended(self, task_id: str) -> dict[str, Any]:
        return self.head.wait_until_ended(task_id)

    def image(self, task_id: str) -> bytes:
        answer = self.head.get("/image", task_id=task_id)
        assert answer.status_code == 200, answer.text
        return answer.content

    def post(self, path: str) -> None:
        answer = requests.post(self.head.url + path, timeout=GIVE_UP_S)
        assert answer.status_code == 200, answer.text

    def delete(self, task_id: str) -> None:
        answer = requests.post(
            f"{self.head.url}/delete", params={"task_id": task_id}, timeout=GIVE_UP_S
        )
        assert answer.status_code == 200, answer.text

    def close(self) -> None:
        for worker in self.workers:
            worker.stop(signal.SIGKILL)
        self.head.stop(signal.SIGKILL)
        self.redis.kill()


def logged(worker: WorkerProcess, pattern: str) -> Callable[[], bool]:
    return lambda: any(re.search(pattern, line) for line in worker.log)
