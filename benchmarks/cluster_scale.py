"""Several machines: throughput, gaps between tasks, and what dispatching costs.

    python benchmarks/cluster_scale.py [--quick]

How to read it: `machines` are real Celery workers in processes of their own, over a real Redis on
the loopback interface, with a generator that sleeps DRAW_S for a picture (as a thread does whose
GPU works); the head does not draw. Throughput is in machines: pictures x DRAW_S / seconds from the
first start to the last end; goal: 0.95 N. It includes that a thread of a busy machine wakes up late
from each sleep; `at work` leaves that out: the share of the time in which workers had a picture.
A gap is the time from the end of a picture on a worker to the start of its next one; goal: p50 < 15
ms. CPU is that of the processes, for each task; that of the head includes the requests over HTTP.
All processes share the CPUs of this machine, so a picture takes long enough that these are not the
limit.

The second table has no processes but registered machines: 10,000 tasks wait, and each machine that
is free must be given the next one; goal: < 5 ms. /status is that of a random waiting task, beside
that of a server with one machine. All in CPU time, which leaves out what other processes take.
"""

import io
import logging
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from operator import sub
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

from common import (
    OFFER,
    RAM_DISK,
    Results,
    fill,
    make_scheduler,
    median,
    percentile,
    temporary_folder,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cluster_bench import Cluster, Redis
from forking import Command, ForkedServer
from PIL import Image
from sleeping import Sleeping, signature_of

from cluster.carrier import Carrier
from cluster.dispatcher import Dispatcher
from cluster.inbox import Inbox
from cluster.messages import PROTOCOL
from cluster.registry import Registry
from queue_manager import QueueManager
from scheduler.scheduler import Scheduler
from storage.task_store import TaskStore
from timing.speeds import Product

STEPS, STEP_S = 4, 1.0
DRAW_S = STEPS * STEP_S
MACHINES = (1, 2, 4, 8)
WAITING, REGISTERED = 10_000, 32
GOAL_OF_N, GOAL_GAP_MS, GOAL_DISPATCH_MS = 0.95, 15.0, 5.0


def main() -> None:
    logging.disable(logging.WARNING)
    results = Results(__file__, __doc__)
    numbers, tasks = ((1, 2), 2) if results.quick else (MACHINES, 8)
    rows = [measure(number, tasks) for number in numbers]
    results.table(
        f"{tasks} tasks for each machine, of {DRAW_S:g} s",
        (
            "machines", "throughput", "of N", "at work", "gap p50, ms", "p90", "max",
            "CPU of the head, ms/task", "of Redis", "of the worker",
        ),
        rows,
    )  # fmt: skip
    results.note(f"Goals: {GOAL_OF_N:g} of N, gap p50 < {GOAL_GAP_MS:g} ms.")
    waiting = 500 if results.quick else WAITING
    few = [asked(waiting, machines) for machines in (0, REGISTERED)]
    results.table(
        f"{waiting:,} waiting tasks",
        (
            "registered machines", "dispatch p50, ms", "p90", "max", "/status p50, ms", "p99",
            "end of a task p50, ms", "report of a step p50, ms",
        ),
        few,
    )  # fmt: skip
    results.note(f"Goals: dispatch < {GOAL_DISPATCH_MS:g} ms, /status as with one machine.")
    results.save()


# -- real workers ----------------------------------------------------------------------------------


def measure(machines: int, tasks: int) -> tuple[object, ...]:
    """A row of the first table."""
    with temporary_folder() as folder:
        broker = Redis(folder)
        cluster = Cluster(folder, "--lease-s", "20", redis=broker)
        workers = [worker(folder, broker, f"machine-{number}") for number in range(machines)]
        try:
            wait_until(lambda: len(cluster.machines()) == machines)
            warm = [submit(cluster, 1) for _ in range(machines * 2)]
            wait_until(lambda: all(is_done(cluster, task_id) for task_id in warm))
            pids = [cluster.head.process.pid, broker.process.pid, *(w.pid for w in workers)]
            before = [cpu_s(pid) for pid in pids]
            task_ids = [submit(cluster, STEPS) for _ in range(machines * tasks)]
            wait_until(lambda: is_done(cluster, task_ids[-1]), pause_s=0.5)
            wait_until(lambda: all(is_done(cluster, task_id) for task_id in task_ids))
            head_s, redis_s, *workers_s = map(sub, map(cpu_s, pids), before)
            drawn = [signature(cluster, task_id) for task_id in task_ids]
        finally:
            for process in workers:
                process.kill()
                process.wait(60)
            cluster.close()
    seconds = max(one["ended"] for one in drawn) - min(one["began"] for one in drawn)
    throughput = len(drawn) * DRAW_S / seconds
    gaps = [1e3 * gap for gap in gaps_of(drawn)]
    overhead = [1e3 * s / len(drawn) for s in (head_s, redis_s, sum(workers_s))]
    at_work = sum(one["ended"] - one["began"] for one in drawn) / seconds / machines
    shown = (percentile(gaps, 50), percentile(gaps, 90), max(gaps))
    return machines, throughput, throughput / machines, at_work, *shown, *overhead


def worker(folder: Path, broker: Redis, name: str) -> ForkedServer:
    options = ("--broker", broker.url, "--worker-name", name, "--data-dir", str(folder / name))
    sleeping: Any = Sleeping(STEP_S)
    command = Command((*options, "--model", "noise-flux1"), hold=sleeping, program="remote_worker")
    return ForkedServer(command)


def submit(cluster: Cluster, steps: int) -> str:
    return cluster.submit(steps=steps, format="PNG", metadata=False)


def is_done(cluster: Cluster, task_id: str) -> bool:
    status = cluster.status(task_id)["status"]
    assert status in ("waiting", "running", "done"), status
    return bool(status == "done")


def signature(cluster: Cluster, task_id: str) -> dict[str, Any]:
    return signature_of(Image.open(io.BytesIO(cluster.image(task_id))))


def gaps_of(drawn: Iterable[dict[str, Any]]) -> list[float]:
    """Seconds between the pictures of each process."""
    by_process: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in sorted(drawn, key=lambda one: float(one["began"])):
        by_process[one["drawn"].partition("-")[0]].append(one)
    return [
        after["began"] - before["ended"]
        for pictures in by_process.values()
        for before, after in pairwise(pictures)
    ]


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, from /proc: this benchmark runs on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def wait_until(condition: Any, pause_s: float = 0.05) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(pause_s)


# -- registered machines without processes ---------------------------------------------------------


class Registered:
    """A head whose workers are messages."""

    def __init__(self, folder: Path, machines: int) -> None:
        self.scheduler: Scheduler = make_scheduler(TaskStore(folder))
        self.queue = QueueManager(self.scheduler)
        self.carrier = create_autospec(Carrier, instance=True)
        registry = self.registry = Registry(self.scheduler, lease_s=3600)
        self.inbox = Inbox(self.scheduler, registry, self.carrier, lambda task_id, jpeg: None)
        self.dispatcher = Dispatcher(self.scheduler, registry, self.carrier)
        self.workers = [f"{number:032x}" for number in range(machines)]
        for number, one in enumerate(self.workers):
            self.say(one, "heartbeat", protocol=PROTOCOL, registration=about(number),
                     resident=[OFFER.first_spec.key], held=[])  # fmt: skip
        self.step()

    def say(self, worker: str, kind: str, **content: Any) -> None:
        self.inbox.handle({"kind": kind, "worker": worker, "session": "s", **content})

    def step(self) -> float:
        """CPU seconds of one step of the dispatcher."""
        return seconds_of(partial(self.dispatcher.step, 0.0))

    def offers(self) -> dict[str, dict[str, Any]]:
        """By worker, the latest offer."""
        sent = (call.args for call in self.carrier.send.call_args_list)
        return {to: message for to, message in sent if message["kind"] == "offer"}


def about(number: int) -> dict[str, Any]:
    return {
        "name": f"machine {number}",
        "hardware": "x",
        "system": "x",
        "memory_bytes": 0,
        "speeds": dict.fromkeys(Product, 1e12),
        "versions": {},
        "models": [{"name": model.name} for model in OFFER.models],
        "bits": [None],
        "loras": [],
        "lora_repos": False,
        "models_in_memory": 1,
    }


def asked(waiting: int, machines: int) -> tuple[object, ...]:
    """A row of the second table."""
    with temporary_folder(RAM_DISK) as folder:
        ids = fill(folder, waiting)
        head = Registered(folder, machines)
        dispatch_s, end_s, report_s, status_s = [], [], [], []
        offers = head.offers()
        for one in head.workers * 3:
            offer = offers[one]
            content: dict[str, Any] = {"task_id": offer["task_id"], "attempt": offer["attempt"]}
            step = {"steps_total": 4, "stage": 0, "image": 0, "phase": "denoising"}
            report = partial(head.say, one, "report", **content, **step)
            report(steps_done=0)
            report_s.append(seconds_of(partial(report, steps_done=1)))
            dispatch_s.append(head.step())
            remote = head.registry.find(one, "s")
            assert remote
            end_s.append(seconds_of(partial(remote.api.fail, **content, code="x", message="x")))
            dispatch_s.append(head.step())
            offers = head.offers()
        for task_id in random.sample(ids[waiting // 10 :], min(200, waiting // 2)):
            status_s.append(seconds_of(partial(head.queue.status, task_id)))
        head.inbox.stop(5)
        head.scheduler.store.close()
    dispatches = dispatch_s or [0.0]
    return (
        machines or "1, the server's own",
        *(1e3 * percentile(dispatches, p) for p in (50, 90, 100)),
        *(1e3 * percentile(status_s, p) for p in (50, 99)),
        1e3 * median(end_s or [0.0]),
        1e3 * median(report_s or [0.0]),
    )


def seconds_of(do: Any) -> float:
    """CPU seconds."""
    began = time.process_time()
    do()
    return time.process_time() - began


if __name__ == "__main__":
    main()
