"""Two models of real size in memory: Anima and FLUX.2 klein 4B, both at 4 bits (real_model.py).

How to read it: Anima draws alone, then klein is loaded beside it, then both draw, and previews are
fetched all the time. `in memory` is the number of models that /health lists. `touched` is the most
memory that the process had, and `expected` what the check of memory compares with the limit: the
interpreter, the weights in memory, and the picture. On a CPU a picture of klein takes minutes.

REAL_SIZE_FOLDER names the checkpoint of Anima; that of klein has its name and `-klein`. Both are
written if they are missing: 8 GB. `--quick` uses tiny models. 12 GB of memory are needed.
"""

import time
from typing import Any

from common import Results, temporary_folder
from memory import TinyServer
from real_limits import GB, reset_peak, wait_until_loaded, watched
from real_model import MODEL, write_model
from real_size import FOLDER, POLL_S, stage_of, touched

from generation.memory_guard import MARGIN
from generation.picture_memory import picture_memory
from generation.process_memory import PROCESS_BYTES
from models.mlx_setup import prepare_mlx

KLEIN = "flux2-klein-4b"


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    anima, klein = "noise-anima", "noise-flux2"
    models, names = f"{anima},{klein}", {anima: anima, klein: klein}
    if not results.quick:
        folders = FOLDER, FOLDER.with_name(f"{FOLDER.name}-klein")
        for name, folder in zip((MODEL, KLEIN), folders, strict=True):
            write_model(folder, 4, name=name)
        anima, klein = "real-anima", "real-klein"
        models = f"{anima}={folders[0]}@{MODEL},{klein}={folders[1]}@{KLEIN}"
        names = {anima: MODEL, klein: KLEIN}
    with temporary_folder() as folder:
        server = TinyServer(folder / "data", ["--models", models, "--models-in-memory", "2"])
        try:
            measure(results, server, names, gpu=gpu)
        finally:
            server.kill()
    results.save()


def measure(results: Results, server: TinyServer, names: dict[str, str], *, gpu: bool) -> None:
    start = time.perf_counter()
    base = wait_until_loaded(server)
    results.note(
        f"The server listened after {server.start_s:.1f} s, {time.perf_counter() - start:.1f} s "
        f"later the first model was loaded: {base / GB:.2f} GB touched."
    )
    anima, klein = names
    rows = []
    for name, side in ((anima, 64), (anima, 128)):
        rows.append(row(server, name, names[name], side, gpu=gpu))
        print(rows[-1], flush=True)
    start = time.perf_counter()
    server.ask(f"/models/{klein}/load", {})
    while len(server.ask("/health")["loaded_models"]) < len(names):
        time.sleep(POLL_S)
    both = touched(server.pid, "VmRSS")
    results.note(
        f"Loading the second one took {time.perf_counter() - start:.1f} s: {both / GB:.2f} GB "
        "touched."
    )
    for name, side in ((anima, 64), (anima, 128), (klein, 64), (anima, 512), (klein, 256)):
        rows.append(row(server, name, names[name], side, gpu=gpu))
        print(rows[-1], flush=True)
    results.table(
        "Pictures of one step",
        (
            "model",
            "size",
            "in memory",
            "forecast s",
            "actual s",
            "touched GB",
            "expected GB",
            "ratio",
        ),
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
    return (name, f"{side} x {side}", len(health["loaded_models"]), forecast_s, actual_s, *figures)


def draw(server: TinyServer, name: str, side: int) -> dict[str, Any]:
    """Returns the answer to the request, once the picture is drawn."""
    prompt = f"a lake {time.perf_counter()}"
    body = {"prompt": prompt, "width": side, "height": side, "steps": 1, "model": name}
    drawn = watched(server, body)
    if drawn.status["status"] != "done":
        raise RuntimeError(drawn.status["error"]["message"])
    return drawn.answer


if __name__ == "__main__":
    main()
