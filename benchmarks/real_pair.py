"""Two models of real size in memory: FLUX.2 klein 4B and Anima, both at 4 bits (real_model.py).

How to read it: the pictures are drawn in this order, the first two after loading their model, the
others with both in memory. `forecast` is the one at submit. `touched` is the most memory that the
process had, `expected` what the check of memory compares with the limit: the interpreter, the
weights in memory, and the picture. `in memory` is what /health lists.

REAL_SIZE_FOLDER names the checkpoint of Anima; klein's is beside it. Both are written if they are
missing: 8 GB. `--quick` uses tiny models. Run it alone: 12 GB of memory are needed.
"""

import time
from typing import Any

from common import Results, temporary_folder
from memory import TinyServer
from real_limits import GB, reset_peak, wait_until_loaded
from real_model import MODEL, write_model
from real_size import FOLDER, POLL_S, stage_of, touched

from generation.memory_guard import MARGIN
from generation.picture_memory import picture_memory
from generation.process_memory import PROCESS_BYTES
from models.mlx_setup import prepare_mlx

KLEIN = "flux2-klein-4b"
STEPS = 1
PRESENT = ("waiting", "running")


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    names = {"noise-flux2": "noise-flux2", "noise-anima": "noise-anima"}
    models, side = ",".join(names), 64
    if not results.quick:
        klein, anima = (FOLDER.with_name(f"mflux-real-{name}-q4") for name in ("klein", "anima"))
        write_model(klein, 4, name=KLEIN)
        write_model(anima, 4)
        names = {"real-klein": KLEIN, "real-anima": MODEL}
        models, side = f"real-klein={klein}@{KLEIN},real-anima={anima}@{MODEL}", 128
    with temporary_folder() as folder:
        server = TinyServer(folder / "data", ["--models", models, "--models-in-memory", "2"])
        try:
            measure(results, server, names, side, gpu=gpu)
        finally:
            server.kill()
    results.save()


def measure(
    results: Results, server: TinyServer, names: dict[str, str], side: int, *, gpu: bool
) -> None:
    start = time.perf_counter()
    base = wait_until_loaded(server)
    results.note(
        f"The server listened after {server.start_s:.1f} s, {time.perf_counter() - start:.1f} s "
        f"later the first model was loaded: {base / GB:.2f} GB touched."
    )
    rows = []
    for name in [*names, *names]:
        rows.append(row(server, name, names[name], side, gpu=gpu))
        print(rows[-1], flush=True)
    results.table(
        f"Pictures of {side} x {side}, {STEPS} steps",
        ("model", "in memory", "forecast s", "actual s", "touched GB", "expected GB", "ratio"),
        rows,
    )


def row(server: TinyServer, name: str, model: str, side: int, *, gpu: bool) -> tuple[object, ...]:
    reset_peak(server)
    start = time.perf_counter()
    forecast_s = draw(server, name, side)["expected_time_seconds"]
    actual_s = time.perf_counter() - start
    peak = touched(server.pid, "VmHWM")
    health = server.ask("/health")
    weights = health["memory"]["active_bytes"]
    picture = MARGIN * max(picture_memory(stage_of(model, side), None, gpu=gpu))
    expected = PROCESS_BYTES + weights + picture
    figures = (peak / GB, expected / GB, f"{peak / expected:.2f}")
    return (name, len(health["loaded_models"]), forecast_s, actual_s, *figures)


def draw(server: TinyServer, name: str, side: int) -> dict[str, Any]:
    """Returns the answer to the request, once the picture is drawn."""
    prompt = f"a lake {time.perf_counter()}"
    body = {"prompt": prompt, "width": side, "height": side, "steps": STEPS, "model": name}
    task = server.ask("/generate", body)
    while (status := server.ask(f"/status?task_id={task['task_id']}"))["status"] in PRESENT:
        time.sleep(POLL_S)
    if status["status"] != "done":
        raise RuntimeError(status["error"]["message"])
    return task


if __name__ == "__main__":
    main()
