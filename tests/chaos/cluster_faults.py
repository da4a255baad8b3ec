"""A cluster that breaks: a head, a Redis and workers in processes, and what may happen to each."""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forking
import redis
import requests
from cluster_bench import PASSWORD, Redis
from conftest import ServerProcess
from far_network import Namespace, Proxy
from lives import SMALL, Life, is_root, pause, until
from report import Report
from sleeping import Sleeping

LEASE_S = 3
STEP_S = 0.03
WORKERS = 5
HOUR_S = 3600


class Head(Life):
    """The heads of one data dir; each of them also draws."""

    def __init__(self, report: Report, data_dir: Path, url: str) -> None:
        super().__init__(report, data_dir, "--broker", url, "--lease-s", str(LEASE_S))

    def start(self) -> ServerProcess:
        options = (*SMALL, *self._options)
        server = ServerProcess(self.data_dir, *options, hold=Sleeping(STEP_S))  # type: ignore[arg-type]
        self.servers.append(server)
        self._up.set()
        return server


class Worker:
    """The processes of one worker, one after the other, and its network.

    Args:
        clock: file that says by how much its clock is wrong; None: its clock is right.
    """

    def __init__(
        self,
        name: str,
        data_dir: Path,
        port: int,
        *,
        seed: int,
        namespace: Namespace | None = None,
        clock: Path | None = None,
    ) -> None:
        self.name, self.namespace, self.clock = name, namespace, clock
        self.broken = False
        """Whether a fault of it lasts."""
        self.proxy = Proxy(port, seed)
        self.log: list[str] = []
        host, to_port = ("127.0.0.1", self.proxy.port)
        if namespace:
            host, to_port = namespace.here, port
        url = f"redis://:{PASSWORD}@{host}:{to_port}"
        self._arguments = ("--broker", url, "--worker-name", name, "--data-dir", str(data_dir))
        self.start()

    def start(self) -> None:
        arguments = (*self._arguments, "--model", "noise-flux1", "--log-level", "info")
        namespace = self.namespace.file if self.namespace else None
        sleeping: Any = Sleeping(STEP_S, namespace, self.clock)
        self.process = forking.ForkedServer(
            forking.Command(arguments, hold=sleeping, program="remote_worker")
        )
        threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True).start()

    def _read(self, stderr: Iterable[str]) -> None:
        with suppress(ValueError, OSError):
            self.log.extend(stderr)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def close(self) -> None:
        self.kill()
        self.proxy.close()


@dataclass
class Fault:
    name: str
    begin: Callable[[], None]
    end: Callable[[], None]
    lasts_s: tuple[float, float]
    worker: Worker | None = None


class BrokenCluster:
    """Args:
    options: the number of workers, of which one has a clock of its own and one a namespace, where
        that is possible.
    """

    def __init__(self, report: Report, folder: Path, seed: int, workers: int = WORKERS) -> None:
        self.report = report
        self._random = random.Random(seed)
        self.namespace: Namespace | None = None
        hosts = ["127.0.0.1"]
        if is_root():
            with suppress(OSError, subprocess.SubprocessError):
                self.namespace = Namespace(f"chaos{seed % 1000}", (213, seed % 250))
                hosts.append(self.namespace.here)
        self.redis = Redis(folder, "--bind", *hosts)
        self.head = Head(report, folder / "head", self.redis.url)
        self.head.start()
        self.workers = []
        for number in range(workers):
            clock = folder / "clock" if number == 1 else None
            namespace = self.namespace if number == 0 else None
            place = (f"worker-{number}", folder / f"worker-{number}", self.redis.port)
            self.workers.append(
                Worker(*place, seed=seed + number, namespace=namespace, clock=clock)
            )

    def all_there(self) -> bool:
        """Whether the head has all workers."""
        machines = self.head.ask("GET", "/machines").json()["machines"]
        there = {machine["name"] for machine in machines if machine["state"] != "lost"}
        return there >= {worker.name for worker in self.workers}

    def next_fault(self) -> Fault | None:
        """A random one; None: everything is broken already."""
        whole = [worker for worker in self.workers if not worker.broken]
        if self._random.random() < 0.2:
            return self._random.choice([self._kill_head, self._kill_redis, self._wipe])()
        if not whole:
            return None
        worker = self._random.choice(whole)
        kinds = [self._kill, self._freeze, self._drain, self._network, self._network]
        if worker.clock:
            kinds += [self._set_clock] * 2
        return self._random.choice(kinds)(worker)

    # -- the kinds --------------------------------------------------------------------------------

    def _kill_head(self) -> Fault:
        return Fault("kill -9 of the head", self.head.kill, self._start_head, (0, 2))

    def _start_head(self) -> None:
        self.head.start()

    def _kill_redis(self) -> Fault:
        return Fault("kill -9 of Redis", self._redis_gone, self.redis.start, (0, 8))

    def _redis_gone(self) -> None:
        self.redis.kill()
        for path in ("/health", "/queue", "/machines"):
            began = time.monotonic()
            answer = self.head.get(path)
            self.report.check(answer.status_code in (200, 503), f"{path}: {answer.text}")
            taken_s = time.monotonic() - began
            self.report.check(taken_s < 5, f"{path} took {taken_s:.1f} s without Redis")

    def _wipe(self) -> Fault:
        return Fault("Redis wiped (FLUSHALL)", self._flush, lambda: None, (0, 0))

    def _flush(self) -> None:
        with redis.Redis("127.0.0.1", self.redis.port, password=PASSWORD) as client:
            client.flushall()

    def _kill(self, worker: Worker) -> Fault:
        return Fault("kill -9 of a worker", worker.kill, worker.start, (0, 5), worker)

    def _freeze(self, worker: Worker) -> Fault:
        send = worker.process.send_signal
        begin, end = (lambda: send(signal.SIGSTOP)), (lambda: send(signal.SIGCONT))
        return Fault("SIGSTOP of a worker", begin, end, (LEASE_S + 1, LEASE_S + 6), worker)

    def _drain(self, worker: Worker) -> Fault:
        path = f"/machines/{worker.name}"
        drain, resume = (
            (lambda: self._post(f"{path}/drain")),
            (lambda: self._post(f"{path}/resume")),
        )
        return Fault("drain and resume", drain, resume, (1, 4), worker)

    def _post(self, path: str) -> None:
        answer = self.head.ask("POST", path)
        self.report.check(answer.status_code in (200, 404), f"{path}: {answer.text}")

    def _network(self, worker: Worker) -> Fault:
        long = (1.0, LEASE_S + 7.0)
        if namespace := worker.namespace:
            kinds = {"packets dropped": namespace.drop, "answers dropped": namespace.drop_answers}
            name = self._random.choice(list(kinds))
            return Fault(name, kinds[name], namespace.heal, long, worker)
        proxy = worker.proxy
        faults = {
            "network stalled": (proxy.stall, long),
            "connections half-open": (proxy.forget, long),
            "connections cut": (proxy.cut, (0.0, 0.0)),
            "300 ms delay, 1 % loss": (proxy.slow, (2.0, 8.0)),
        }
        name = self._random.choice(list(faults))
        begin, lasts_s = faults[name]
        return Fault(name, begin, proxy.heal, lasts_s, worker)

    def _set_clock(self, worker: Worker) -> Fault:
        clock, sign = worker.clock, self._random.choice("+-")
        assert clock
        begin, end = (lambda: _write(clock, f"{sign}{HOUR_S}")), (lambda: _write(clock, "0"))
        return Fault("clock of a worker set by an hour", begin, end, (2, 6), worker)

    # -- running ----------------------------------------------------------------------------------

    def rage(self, faults: int, over: Callable[[], bool], pause_s: tuple[float, float]) -> None:
        """Faults, some at the same time, until there were so many or over() is true."""
        ends: list[tuple[float, Fault]] = []
        begun = 0
        while begun < faults and not over():
            ends = self._end(ends, time.monotonic())
            fault = self.next_fault()
            broker_is_away = any(other.name == "kill -9 of Redis" for _, other in ends)
            if fault and not (broker_is_away and fault.name.startswith(("kill -9 of R", "Redis"))):
                begun += 1
                self._begin(fault)
                lasts_s = self._random.uniform(*fault.lasts_s)
                if fault.name == "kill -9 of the head":  # nothing else can be done meanwhile
                    pause(lasts_s)
                    lasts_s = 0
                    fault.end()
                else:
                    ends.append((time.monotonic() + lasts_s, fault))
            pause(self._random.uniform(*pause_s))
        self._end(ends, float("inf"))

    def _begin(self, fault: Fault) -> None:
        if fault.worker:
            fault.worker.broken = True
        print(
            f"{time.strftime('%H:%M:%S')} {fault.name} {fault.worker.name if fault.worker else ''}"
        )
        self.report.add(f"fault: {fault.name}")
        self.report.add("faults")
        fault.begin()

    def _end(self, ends: list[tuple[float, Fault]], now: float) -> list[tuple[float, Fault]]:
        for _, fault in (one for one in ends if one[0] <= now):
            fault.end()
            if fault.worker:
                fault.worker.broken = False
        return [one for one in ends if one[0] > now]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
            self.report.add("tracebacks of workers", "".join(worker.log).count("Traceback"))
        self.head.close()
        self.redis.kill()
        if self.namespace:
            self.namespace.close()

    def write_logs(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for worker in self.workers:
            (folder / worker.name).write_text("".join(worker.log))
        (folder / "head").write_text("".join(self.head.log))

    def draws_without_the_broker(self, submit: Callable[[], str]) -> None:
        """While Redis is away the head answers, queues, and draws itself."""
        self.redis.kill()
        task_ids = [submit() for _ in range(10)]
        done = until(lambda: all(self._is_done(task_id) for task_id in task_ids), 120)
        self.report.survived("10 tasks submitted and drawn while Redis is away", done)
        self.redis.start()

    def _is_done(self, task_id: str) -> bool:
        with suppress(requests.RequestException):
            answer = self.head.get("/status", task_id=task_id)
            return bool(answer.json().get("status") == "done")
        return False


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n")
