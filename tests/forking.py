"""Server processes for the tests that start in a moment: forked from a process that has imported
everything. Importing mflux takes a second of CPU time, and the tests start hundreds of servers.

On Linux alone: on a Mac, a process that has loaded Metal must not be forked.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import TextIO

from holding import Hold

ROOT = Path(__file__).parent.parent
CAN_FORK = sys.platform == "linux"


def clean_environment() -> dict[str, str]:
    """Returns an environment without the settings of the user and without a model hub. Compiled
    modules are kept, because compiling takes a fifth of the start of a process. Models that are
    named and never loaded are accepted on a machine of any size."""
    # mlx_setup.py switches progress bars off in this process; xdist sets the size of a terminal.
    dropped = ("MFLUX_SERVER_", "TQDM_", "COLUMNS", "LINES")
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(dropped) and k != "PYTHONDONTWRITEBYTECODE"
    }
    return {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "MFLUX_SERVER_MEMORY_LIMIT": "128000000000",
    }


class ForkedServer:
    """server.main() in a process of its own, with the methods of a Popen that the tests use.

    Its standard error is `stderr`; its standard input is empty.

    Args:
        program: name of the module whose main() it runs.
    """

    stdin = None

    def __init__(
        self, arguments: Sequence[str], hold: Hold | None = None, program: str = "server"
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        _start_forking()
        reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve,
            args=(program, list(arguments), clean_environment(), writer, hold),
            daemon=True,
        )
        self._process.start()
        writer.close()
        self.stderr: TextIO = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal, once it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("server.py", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_one_at_a_time = Lock()


def _start_forking() -> None:
    """Start the process that imports everything, if it does not run yet."""
    with _one_at_a_time:  # tests start servers in several threads
        _ensure_forking()


@cache
def _ensure_forking() -> None:
    """The new process finds modules by PYTHONPATH alone: Python 3.11 does not give it the sys.path
    of this one, and leaves out what cannot be imported."""
    forkserver.set_forkserver_preload(["forking_imports"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _serve(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    stderr: Connection,
    hold: Hold | None,
) -> None:
    """What the new process does; the same as `python3 server.py`."""
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    from supervision import end_process

    if hold:
        hold.hold_pictures()
    end_process(importlib.import_module(program).main(arguments))
