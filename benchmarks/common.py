"""Shared code of the benchmarks: a server with a fake generator, objects in separate processes, a
store that is filled quickly, percentiles, and the page of results.

Importing it puts the folder of the repository on the path, so it is imported before the modules of
the server. Because machines are noisy, compared variants run in the same run, in alternating
rounds, and the median of the rounds is shown.
"""

import argparse
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from fake_generator import FakeGenerator
from PIL import Image

from allowed import Allowed
from models.mflux_registry import find_model
from queue_manager import QueueManager
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from server import Server
from settings import Settings
from storage.task_store import TaskStore
from task import GenerationParams, Report, Task
from timing_model import TimingModel

ROOT = Path(__file__).parent.parent
MAX_QUEUE = 1_000_000
SEED = 20240917
"""Seed of all random numbers."""
_model = find_model("noise-flux1")
assert _model
OFFER = Allowed(_model, (_model,))

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
Draw = Callable[[GenerationParams, Report], Image.Image]


# -- the server, with a scripted generator -----------------------------------------------------


def small_picture(params: GenerationParams, report: Report) -> Image.Image:
    """Returns a small picture at once."""
    return Image.new("RGB", (16, 16))


class FakeServer:
    """The real server in this process, on a free port of 127.0.0.1, with a fake generator."""

    def __init__(self, data_dir: Path, draw: Draw = small_picture) -> None:
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        settings = Settings(port=0, data_dir=data_dir, max_queue=MAX_QUEUE)
        self._server = Server(settings, OFFER, FakeGenerator(draw))
        self.queue = self._server.queue
        self._server.start()

    @property
    def port(self) -> int:
        return self._server.port

    def close(self) -> None:
        self._server.stop()


def make_scheduler(store: TaskStore) -> Scheduler:
    """A scheduler on this store, for any number of tasks."""
    return Scheduler(OFFER, TimingModel(), store, QueueLimits(max_queue=MAX_QUEUE))


def make_params(
    *, side: int = 1024, image_format: Literal["JPEG", "PNG"] = "JPEG"
) -> GenerationParams:
    seed = random.getrandbits(64)
    return GenerationParams(
        prompt=f"A beautiful landscape with a lake, at dawn, seen from the hill number {seed}",
        seed=seed,
        width=side,
        height=side,
        steps=4,
        guidance=None,
        format=image_format,
        quality=85,
    )


def set_synchronous(store: TaskStore, mode: Literal["FULL", "NORMAL", "OFF"]) -> None:
    """Sets PRAGMA synchronous; the server always uses FULL."""
    store._database.connection.execute(f"PRAGMA synchronous = {mode}")


def fill(data_dir: Path, tasks: int) -> list[str]:
    """Writes waiting tasks into a data dir, as after a stop of the server; returns their ids."""
    store = TaskStore(data_dir)
    set_synchronous(store, "OFF")
    ids = [f"{number:016x}" for number in range(tasks)]
    for number, task_id in enumerate(ids, 1):
        task = Task(task_id, make_params(side=64), 0, time.time(), sequence=number, group=number)
        store.insert(task)
    store.close()
    return ids


def run_waiting(queue: QueueManager, tasks: int) -> None:
    """Returns when all of these tasks have ended."""
    while queue.unfinished(1, 0)[1]:
        time.sleep(0.01)
    assert queue.images()[0] >= tasks


# -- separate processes ----------------------------------------------------------------------


class Remote(Generic[T]):
    """An object in a separate process, so that neither the GIL nor the garbage collector is shared:
    `Remote(Thing, ...)` makes it there, `call(Thing.method, ...)` asks it."""

    def __init__(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_settle, initargs=(make, args, kwargs)
        )
        self.pid = self._pool.submit(os.getpid).result()

    def call(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._pool.submit(_ask, method, args, kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()


_resident: Any = None


def _settle(make: Callable[..., object], args: Any, kwargs: Any) -> None:
    global _resident  # noqa: PLW0603  # the one object of this process
    _resident = make(*args, **kwargs)


def _ask(method: Callable[..., R], args: Any, kwargs: Any) -> R:
    return method(_resident, *args, **kwargs)


def rss_mb(pid: int) -> float:
    """Resident memory of a process in megabytes."""
    ps = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(ps.stdout) * 1024 / 1e6


# -- disks ---------------------------------------------------------------------------------------

RAM_DISK = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""A folder in memory, to measure the code without the disk. Not on every system."""


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder in `parent`, or in the default place."""
    with tempfile.TemporaryDirectory(
        prefix="mflux-bench-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def disks() -> dict[str, Path | None]:
    """Parents of temporary folders, by name: the disk, and memory where there is such a folder."""
    return {"disk": None, **({"RAM disk": RAM_DISK} if RAM_DISK else {})}


def fsyncs(folder: Path, count: int) -> list[float]:
    """Measures seconds of appends and fsyncs of 4 KB."""
    took = []
    with (folder / "fsyncs").open("ab", buffering=0) as file:
        for _ in range(count):
            start = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took.append(time.perf_counter() - start)
    return took


def describe_fsyncs(took: Sequence[float]) -> str:
    return (
        f"A bare 4 KB append and fsync in the same run: {1e3 * median(took):.2f} ms median, "
        f"{1e3 * percentile(took, 99):.2f} ms p99."
    )


# -- figures -------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


median = statistics.median


class Results:
    """Prints tables, and writes them to results/<name>.md."""

    def __init__(self, script: str, description: str | None) -> None:
        """Reads the command line: --quick and --date."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--quick", action="store_true", help="a few seconds; keeps no result")
        parser.add_argument("--date", default=date.today().isoformat(), help="day of the result")
        options = parser.parse_args()
        self.quick: bool = options.quick
        self._date: str = options.date
        self._name = Path(script).stem
        self._lines: list[str] = []
        random.seed(SEED)
        print(self._machine)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        cells = [list(header), *([_shown(value) for value in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [_table_line(row, widths) for row in cells]
        lines.insert(1, "|-" + "-|-".join("-" * width for width in widths) + "-|")
        self._add("", f"## {title}", "", *lines)

    def note(self, text: str) -> None:
        self._add("", text)

    def save(self) -> None:
        if self.quick:
            return
        page = [f"# {self._name}", "", self._machine, *self._lines]
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{self._name}.md").write_text("\n".join(page) + "\n")

    def _add(self, *lines: str) -> None:
        self._lines += lines
        print(*lines, sep="\n", flush=True)

    @cached_property
    def _machine(self) -> str:
        load = ""
        with suppress(OSError):
            load = f", load {os.getloadavg()[0]:.1f} at the start"
        return (
            f"{self._date}, {platform.platform(terse=True)} {platform.machine()}, "
            f"{os.cpu_count()} CPUs, Python {platform.python_version()}{load}"
        )


def _table_line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    return "| " + " | ".join([first, *(other.strip().rjust(len(other)) for other in others)]) + " |"


def _shown(value: object) -> str:
    """Rounds to three figures."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
