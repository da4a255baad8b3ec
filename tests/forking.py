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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import TextIO

from holding import Hold

ROOT = Path(__file__).parent.parent
CAN_FORK = sys.platform == "linux"
LONGEST_RUN_S = 120
NEW_PROCESS = {"PYTHONUNBUFFERED": "1"}
"""An environment for a server that is not forked: one that is has loaded a tiny model at once."""
READ_AT_IMPORT = ("PYTHON", "TMPDIR")
"""Variables that only a new process takes into account."""
OF_THE_HUB = "HF_"
"""Variables that a forked process reads again."""


def can_fork(environment: Mapping[str, str] | None) -> bool:
    """Whether a forked process can have these variables."""
    return CAN_FORK and not any(name.startswith(READ_AT_IMPORT) for name in environment or {})


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


@dataclass(frozen=True)
class Command:
    """What a forked process does.

    Args:
        environment: see can_fork().
        hold: changes the process before main().
        program: name of the module whose main() it runs.
        stdout: the file that its standard output is written to, if not that of this process.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str] | None = None
    hold: Hold | None = None
    program: str = "server"
    stdout: Path | None = None


class ForkedServer:
    """A command in a process of its own, with the methods of a Popen that the tests use.

    Its standard error is `stderr`; its standard input is empty.
    """

    stdin = None

    def __init__(self, command: Command) -> None:
        context = multiprocessing.get_context("forkserver")
        _start_forking()
        reader, writer = context.Pipe(duplex=False)
        environment = {**clean_environment(), **(command.environment or {})}
        self._process = context.Process(
            target=_serve, args=(command, environment, writer), daemon=True
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
            with suppress(ProcessLookupError):  # it has ended just now, as for Popen
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_server(
    folder: Path, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Runs `python3 server.py` to its end, forked if possible.

    Args:
        folder: for the standard output of a forked process.
    """
    if not can_fork(environment):
        return subprocess.run(
            [sys.executable, "server.py", *arguments],
            cwd=ROOT,
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=LONGEST_RUN_S,
            check=False,
        )
    stdout = folder / "stdout"
    forked = ForkedServer(Command(arguments, environment, stdout=stdout))
    with forked.stderr:
        stderr = forked.stderr.read()
    code = forked.wait(LONGEST_RUN_S)
    return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr)


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


def _serve(command: Command, environment: dict[str, str], stderr: Connection) -> None:
    """What the new process does; the same as `python3 server.py`."""
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    if command.stdout:
        sys.stdout = command.stdout.open("w", encoding="utf-8")
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if any(name.startswith(OF_THE_HUB) for name in command.environment or {}):
        _read_hub_variables()
    from supervision import end_process

    if command.hold:
        command.hold.hold_pictures()
    end_process(importlib.import_module(command.program).main(list(command.arguments)))


def _read_hub_variables() -> None:
    """As if the modules that use the hub were imported now."""
    from huggingface_hub import constants

    before = vars(constants).copy()
    importlib.reload(constants)
    changed = [
        name for name in before if name.isupper() and before[name] != getattr(constants, name)
    ]
    for module in [one for name, one in sys.modules.items() if name.startswith(("hugg", "mflux."))]:
        for name in changed:
            if vars(module).get(name) == before[name]:
                setattr(module, name, getattr(constants, name))
