"""Keeping a Mac awake, with a program on PATH in place of caffeinate."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GIVE_UP_S, ROOT, PlayedQueue, allow, params_for

from keep_awake import KeepAwake
from storage.task_store import TaskStore
from task import Phase
from timing_model import TimingModel

STAND_IN = """\
#!/bin/sh
echo "$@" > "{folder}/arguments"
echo >> "{folder}/started"
exec tail -f /dev/null --pid "$3"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with a program `caffeinate`, which ends with the process of its option."""
    program = tmp_path / "caffeinate"
    program.write_text(STAND_IN.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[PlayedQueue]:
    store = TaskStore(tmp_path / "data")
    queue = PlayedQueue(allow("noise-flux1"), TimingModel(), store)
    queue.load()
    yield queue
    store.close()


def held(awake: KeepAwake) -> int | None:
    """The id of the process that keeps it awake."""
    process = awake._process
    return process.pid if process and process.poll() is None else None


def test_it_is_awake_from_the_first_waiting_task_to_the_end_of_the_last(
    folder: Path, queue: PlayedQueue
) -> None:
    awake = KeepAwake(lambda: queue.health().has_work, "darwin")
    awake.check()
    assert held(awake) is None
    queue.submit(params_for())
    awake.check()
    process = held(awake)
    assert process
    task = queue.claim()
    assert task
    awake.check()
    assert held(awake) == process, "the same one"
    queue.report(task.task_id, Phase.IMAGE_ENCODING, 4, 4)
    queue.finish(task.task_id, [b"image"])
    awake.check()
    assert held(awake) is None


def test_a_paused_queue_lets_it_sleep_unless_a_task_runs(queue: PlayedQueue) -> None:
    running, _ = queue.submit(params_for())
    queue.submit(params_for("another"))
    assert queue.claim()
    queue.control.pause(True)
    assert queue.health().has_work
    queue.report(running.task_id, Phase.IMAGE_ENCODING, 4, 4)
    queue.finish(running.task_id, [b"image"])
    assert not queue.health().has_work
    queue.control.pause(False)
    assert queue.health().has_work


def test_a_program_that_was_ended_is_started_again(folder: Path) -> None:
    awake = KeepAwake(lambda: True, "darwin")
    awake.check()
    assert awake._process
    awake._process.kill()
    awake._process.wait(GIVE_UP_S)
    awake.check()
    assert held(awake)
    awake.release()
    assert held(awake) is None


def test_it_does_nothing_on_other_systems_and_without_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linux, off = KeepAwake(lambda: True, "linux"), KeepAwake(lambda: True, "darwin", on=False)
    monkeypatch.setenv("PATH", str(folder / "none"))
    without = KeepAwake(lambda: True, "darwin")
    for awake in (linux, without, off):
        awake.check()
        awake.release()
        assert held(awake) is None


def test_it_ends_with_a_server_that_is_killed(folder: Path) -> None:
    script = (
        "import os, signal, time; from keep_awake import KeepAwake\n"
        "awake = KeepAwake(lambda: True, 'darwin'); awake.check()\n"
        f"while not os.path.exists('{folder}/started'): time.sleep(0.02)\n"
        "print(awake._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    server = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
    )
    child = int(server.stdout)
    ended = subprocess.run(
        ["tail", "-f", "/dev/null", "--pid", str(child)], timeout=GIVE_UP_S, check=False
    )
    assert ended.returncode == 0
    assert (folder / "arguments").read_text().split()[:2] == ["-i", "-w"]
