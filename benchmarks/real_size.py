"""A server with a model of real size, random weights (real_model.py): Anima, or with
REAL_SIZE_MODEL=flux2-klein-4b FLUX.2 klein 4B at 4 bits.

How to read it: the model is loaded and draws a picture of each size, the first without anything
learned. `forecast` is the one at submit, `early` the lowest share of the true rest that the
countdown showed in the first tenth of the time. `peak` is what the process has touched beside the
weights; `estimate` is the figure that the check of memory compares. While a picture is drawn,
/queue is asked all the time. At the end a picture is cancelled in its first step, and the server
stopped in one. On a CPU Anima has parameters in 32 bits, which are many times faster than 16 (11.3
GB); sizes and steps are small. The last table has no measurement: it says what the check of memory
does at each size on a machine with so much memory.

REAL_SIZE_FOLDER names the checkpoint of Anima; that of klein has its name and `-klein`. It is
written if it is missing. `--quick` uses a tiny model. Run it alone: other programs change all
figures.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

from common import Results, median, percentile, temporary_folder
from memory import TinyServer
from real_model import MODEL, write_model

from generation.memory_guard import MARGIN, MemoryGuard
from generation.picture_memory import picture_memory
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from task import GenerationParams, Stage

FOLDER = Path(
    os.environ.get("REAL_SIZE_FOLDER", Path(tempfile.gettempdir(), "mflux-real-size-float32"))
)
NAME = os.environ.get("REAL_SIZE_MODEL", MODEL)
POLL_S = 0.25
RESET_PEAK = "5"
LIMITS_GB = (16, 24, 64)
SIDES = (512, 1024, 1536, 2048)


class Drawn(NamedTuple):
    """A measured picture."""

    side: int
    forecast_s: float
    p90_s: float
    actual_s: float
    early: float
    peak_bytes: float


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    with temporary_folder() as folder:
        sides: tuple[int, ...] = (64, 64, 128)
        name, model = "noise-anima", ["--model", "noise-anima"]
        if not results.quick:
            checkpoint = FOLDER
            if NAME == MODEL:
                write_model(FOLDER, float32=not gpu)
                sides = (128, 128, 256)
            else:
                checkpoint = write_model(FOLDER.with_name(f"{FOLDER.name}-klein"), 4, name=NAME)
            name, model = NAME, ["--models", f"real={checkpoint}@{NAME}"]
        measure(results, folder / "data", name, model, sides, gpu=gpu)
    show_limits(results, gpu=gpu)
    results.save()


def measure(
    results: Results,
    data_dir: Path,
    name: str,
    model: Sequence[str],
    sides: Sequence[int],
    *,
    gpu: bool,
) -> None:
    server = TinyServer(data_dir, model)
    try:
        measure_server(results, server, name, sides, gpu=gpu)
    finally:
        server.kill()


def measure_server(
    results: Results, server: TinyServer, name: str, sides: Sequence[int], *, gpu: bool
) -> None:
    start = time.perf_counter()
    while (health := server.ask("/health"))["status"] == "loading":
        time.sleep(0.05)
    load_s = time.perf_counter() - start
    weights = health["memory"]["active_bytes"]
    base = touched(server.pid, "VmRSS")
    results.note(
        f"The server listened after {server.start_s:.1f} s, {load_s:.1f} s later the model was "
        f"loaded: {weights / 1e9:.2f} GB active, {base / 1e9:.2f} GB touched."
    )
    latency = Latency(server)
    pictures = [draw(server, side, base) for side in sides]
    asked = latency.end()
    rows = []
    for one in pictures:
        figures = picture_memory(stage_of(name, one.side), None, gpu=gpu)
        estimate = MARGIN * max(figures)
        rows.append(
            (
                f"{one.side} x {one.side}",
                one.forecast_s,
                one.p90_s,
                one.actual_s,
                f"{100 * one.early:.0f} %",
                one.peak_bytes / 1e6,
                estimate / 1e6,
                f"{(base + estimate) / (base + one.peak_bytes):.2f}",
            )
        )
    results.table(
        "Pictures of one step, in the order in which they were drawn",
        (
            "size",
            "forecast s",
            "p90 s",
            "actual s",
            "early",
            "peak MB",
            "estimate MB",
            "all / measured",
        ),
        rows,
    )
    results.note(
        f"GET /queue while they were drawn: p50 {1e3 * median(asked):.1f} ms, "
        f"p99 {1e3 * percentile(asked, 99):.1f} ms, {len(asked)} requests."
    )
    results.note(
        f"Cancelled in its first step: the next task began {cancel_s(server):.1f} s later."
    )
    submit(server, sides[-1], 20)
    time.sleep(2 * POLL_S)
    results.note(f"Stopped in a step: {server.stop():.1f} s.")


def draw(server: TinyServer, side: int, base: float) -> Drawn:
    Path(f"/proc/{server.pid}/clear_refs").write_text(RESET_PEAK)
    task = submit(server, side, 1)
    start = time.perf_counter()
    shown: list[tuple[float, float]] = []
    while (status := server.ask(f"/status?task_id={task['task_id']}"))["status"] != "done":
        shown.append((time.perf_counter() - start, status.get("wait_remaining") or 0.0))
        time.sleep(POLL_S)
    actual = time.perf_counter() - start
    early = [left / (actual - at) for at, left in shown if at < actual / 10]
    peak = touched(server.pid, "VmHWM") - base
    forecast = task["expected_time_seconds"], task["wait_p90_s"]
    return Drawn(side, *forecast, actual, min(early, default=0.0), max(peak, 0))


def submit(server: TinyServer, side: int, steps: int) -> dict[str, Any]:
    prompt = f"a lake {time.perf_counter()}"
    body = {"prompt": prompt, "width": side, "height": side, "steps": steps}
    return server.ask("/generate", body)


def cancel_s(server: TinyServer) -> float:
    """Seconds from cancelling a picture until the next one has the GPU."""
    first, second = submit(server, 128, 20), submit(server, 64, 1)
    while server.ask(f"/status?task_id={first['task_id']}")["status"] != "running":
        time.sleep(0.01)
    time.sleep(POLL_S)
    start = time.perf_counter()
    server.delete(first["task_id"])
    while server.ask(f"/status?task_id={second['task_id']}")["status"] == "waiting":
        time.sleep(0.01)
    return time.perf_counter() - start


class Latency:
    """Asks for /queue in a separate thread until end() is called."""

    def __init__(self, server: TinyServer) -> None:
        self._server, self._ended = server, Event()
        self._seconds: list[float] = []
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            start = time.perf_counter()
            self._server.ask("/queue")
            self._seconds.append(time.perf_counter() - start)

    def end(self) -> list[float]:
        self._ended.set()
        self._thread.join()
        return self._seconds


def touched(pid: int, field: str) -> float:
    """Bytes of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024.0
    raise KeyError(field)


def stage_of(name: str, side: int) -> Stage:
    model = find_model(name)
    assert model
    params = GenerationParams(
        prompt="a lake",
        seed=1,
        width=side,
        height=side,
        steps=1,
        guidance=None,
        format="PNG",
        quality=85,
        model=name,
    )
    return Stage(LoadSpec(model, model.pipelines[0], None), params)


def show_limits(results: Results, *, gpu: bool) -> None:
    rows = []
    for limit in LIMITS_GB:
        guard = MemoryGuard(limit * 10**9, gpu)
        cells = []
        for side in SIDES:
            plan = guard.plan(stage_of(MODEL, side))
            needed = f"{plan.picture_bytes / 1e9:.1f} GB"
            how = "refused" if plan.refusal else f"tiles of {plan.tile}" if plan.tile else "whole"
            cells.append(f"{how}, {needed}")
        rows.append((f"{limit} GB", *cells))
    header = ("memory", *(f"{side} x {side}" for side in SIDES))
    results.table(f"{MODEL} in 16 bits, 5.6 GB: what a picture takes beside it", header, rows)


if __name__ == "__main__":
    main()
