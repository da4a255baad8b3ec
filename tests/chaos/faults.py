"""Faults of the machine: stopped for a while, disks full or gone, a database that is locked."""

import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
from lives import Life, Watch, is_root, pause, until
from report import Report

SMALL_TASK: dict[str, Any] = {"prompt": "x", "width": 64, "height": 64, "steps": 2}
LONG_TASK: dict[str, Any] = {"prompt": "x", "width": 256, "height": 256, "steps": 20}
LOCKED_MOST_S = 1.0
"""Within which /health and /status answer while the database is locked."""


def run_faults(report: Report, folder: Path, *, pause_s: float, lock_s: float) -> None:
    report.attempt("SIGSTOP", lambda: be_stopped(report, folder, pause_s))
    report.attempt("database locked", lambda: lock_database(report, folder, lock_s))
    report.attempt("data dir removed", lambda: remove_data_dir(report, folder))
    if not is_root():
        report.add("faults skipped (no mounts without root)", 2)
        return
    with _small_disk(folder, "temp") as disk:
        report.attempt("temp dir full", lambda: fill_temp_dir(report, folder, disk))
    with _small_disk(folder, "data") as disk:
        report.attempt("data dir full", lambda: fill_data_dir(report, disk))


def be_stopped(report: Report, folder: Path, pause_s: float) -> None:
    """SIGSTOP while a task runs and clients wait."""
    life = Life(report, folder / "stopped")
    process = life.start().process
    task_ids = [_submit(life, LONG_TASK) for _ in range(3)]
    process.send_signal(signal.SIGSTOP)
    pause(pause_s)
    process.send_signal(signal.SIGCONT)
    right = life.answers("after SIGSTOP") and _all_done(life, task_ids)
    report.survived(f"SIGSTOP for {pause_s:.0f} s", right)
    life.close()


def lock_database(report: Report, folder: Path, lock_s: float) -> None:
    """Another process holds the database's lock: reading goes on, changes wait or are refused."""
    life = Life(report, folder / "locked")
    life.start()
    done = _submit(life, SMALL_TASK)
    _all_done(life, [done])
    task_ids = [_submit(life, LONG_TASK) for _ in range(10)]
    slowest_s, refused = 0.0, 0
    with closing(sqlite3.connect(life.data_dir / "tasks.sqlite3", timeout=30)) as database:
        database.execute("BEGIN IMMEDIATE")
        until_s = time.monotonic() + lock_s
        while time.monotonic() < until_s:
            began = time.monotonic()
            for path in ("/health", f"/status?task_id={task_ids[-1]}"):
                life.get(path)
            slowest_s = max(slowest_s, (time.monotonic() - began) / 2)
            with suppress(requests.Timeout):
                answer = requests.post(life.server.url + "/generate", json=SMALL_TASK, timeout=2)
                refused += answer.status_code == 503
                if answer.status_code == 200:
                    task_ids.append(answer.json()["task_id"])
                report.check(answer.status_code in (200, 503), f"locked: {answer.text}")
            pause(0.1)
        database.rollback()
    report.add("slowest /status while the database is locked, ms", round(slowest_s * 1000))
    right = slowest_s < LOCKED_MOST_S and _all_done(life, task_ids)
    report.survived(f"database locked for {lock_s:.0f} s (slowest {slowest_s:.2f} s)", right)
    life.close()


def remove_data_dir(report: Report, folder: Path) -> None:
    """Removes the data dir: /health must report it, and submits are refused."""
    life = Life(report, folder / "removed")
    life.start()
    _all_done(life, [_submit(life, SMALL_TASK)])
    shutil.rmtree(life.data_dir)

    def refused() -> bool:
        answer = requests.post(life.server.url + "/generate", json=SMALL_TASK, timeout=60)
        report.check(answer.status_code in (200, 429, 503), f"data dir removed: {answer.text}")
        return answer.status_code == 503

    right = until(refused, 60) and until(lambda: life.get("/health").status_code == 503, 60)
    right = life.answers("data dir removed") and right
    report.survived("data dir removed while running", right)
    life.close()


def fill_temp_dir(report: Report, folder: Path, disk: Path) -> None:
    """No room for temporary files: large bodies and answers are served or refused."""
    environment = {"TMPDIR": str(disk)}
    life = Life(report, folder / "temp-full", environment=environment)
    life.start()
    # MLX without a GPU compiles what it needs in the temp dir, and keeps it.
    _all_done(life, [_submit(life, LONG_TASK)])
    filler = _fill(disk)
    with Watch(life, "temp dir full"):
        for size in (100_000, 600_000, 900_000, 3_000_000):
            for _ in range(5):
                body = {**SMALL_TASK, "init_image": "A" * size}
                answer = life.ask("POST", "/estimate", json=body)
                expected = (400, 413, 422, 429, 503)
                report.check(answer.status_code in expected, f"temp full: {answer.text[:200]}")
        right = _all_done(life, [_submit(life, LONG_TASK) for _ in range(3)], fetch=True)
    filler.unlink()
    report.survived("temp dir full", right)
    life.close()


def fill_data_dir(report: Report, disk: Path) -> None:
    """Accepted tasks are kept, what is done can be fetched, also after a kill and a start."""
    life = Life(report, disk / "data")
    life.start()
    done = [_submit(life, SMALL_TASK) for _ in range(2)]
    right = _all_done(life, done)
    accepted = [_submit(life, LONG_TASK) for _ in range(5)]
    filler = _fill(disk)

    def refused() -> bool:
        body = {**SMALL_TASK, "prompt": "long " * 1000}
        answer = requests.post(life.server.url + "/generate", json=body, timeout=60)
        if answer.status_code == 200:
            accepted.append(answer.json()["task_id"])
        report.check(answer.status_code in (200, 503), f"data dir full: {answer.text}")
        return answer.status_code == 503

    with Watch(life, "data dir full"):
        right = until(refused, 60) and right
        answer = life.ask("GET", "/image", params={"task_id": done[0], "delete": "false"})
        right = answer.status_code == 200 and right
    life.kill()
    life.start()
    answer = life.ask("GET", "/image", params={"task_id": done[1], "delete": "false"})
    report.check(answer.status_code == 200, f"fetch after a start on a full disk: {answer.text}")
    filler.unlink()
    right = until(lambda: life.get("/health").status_code == 200, 60) and right
    right = _all_done(life, accepted) and right
    report.survived("data dir full, killed and started there", right)
    life.close()


def _submit(life: Life, task: dict[str, Any]) -> str:
    return str(life.ask("POST", "/generate", json=task).json()["task_id"])


def _all_done(life: Life, task_ids: list[str], *, fetch: bool = False) -> bool:
    """Waits for tasks; returns whether all are done. Others count as lost."""
    right = True
    for task_id in task_ids:
        ended = until(lambda task_id=task_id: _status(life, task_id) not in ("waiting", "running"))  # type: ignore[misc]
        if not ended or _status(life, task_id) != "done":
            life.report.violation("lost", f"task {task_id}: {_status(life, task_id)}")
            right = False
        elif fetch:
            answer = life.ask("GET", "/image", params={"task_id": task_id})
            right = answer.status_code == 200 and right
    return right


def _status(life: Life, task_id: str) -> str:
    answer = life.ask("GET", "/status", params={"task_id": task_id})
    return str(answer.json().get("status", answer.text))


@contextmanager
def _small_disk(folder: Path, name: str) -> Iterator[Path]:
    """A tmpfs of 16 MB."""
    disk = folder / f"disk-{name}"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096) == 4096:
            pass
    return filler
