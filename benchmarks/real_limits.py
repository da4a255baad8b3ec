"""What the check of memory lets through with a model of real size (real_model.py), long prompts.

How to read it: `estimate` is what the check expects beside the weights, `peak` what the process has
touched in all while the picture was drawn. Each limit is a server of its own (--memory-limit), far
below this machine's memory so that the limit is reached by small pictures. A preview is requested
all the time. What is refused is answered at once; `peak / limit` of the rest must stay below 1.25,
and the process must live.

REAL_SIZE_FOLDER names the checkpoint, which is written if it is missing; beside it is one with 4
bits. `--quick` uses tiny models. Run it alone: 24 GB of memory are needed.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

from common import Results, temporary_folder
from memory import TinyServer
from real_model import MODEL, write_anima
from real_size import FOLDER, POLL_S, RESET_PEAK, stage_of, touched

from generation.memory_guard import MARGIN
from generation.picture_memory import picture_memory
from models.mlx_setup import prepare_mlx

PROMPTS = (100, 2_500, 10_000)
"""Characters; the tokenizer of the checkpoint makes a token of each."""
MOST_TOKENS = 4096
GB = 1e9


class Case(NamedTuple):
    """A server, and the sides of the pictures that it is asked for."""

    limit_bytes: int
    options: tuple[str, ...]
    models: tuple[str, ...]
    """What draws each picture, one after the other."""
    sides: tuple[int, ...]


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    alone = ["--model", "tiny-anima"]
    two = ["--models", "tiny-anima,tiny"]
    names, limits = ("tiny-anima", "tiny"), (760, 1_500)
    prompts: tuple[int, ...] = (10,)
    if not results.quick:
        few_bits = FOLDER.with_name(FOLDER.name + "-q4")
        write_anima(FOLDER, float32=not gpu)
        write_anima(few_bits, 4)
        alone = ["--models", f"real={FOLDER}@{MODEL}"]
        two = ["--models", f"real={FOLDER}@{MODEL},small={few_bits}@{MODEL}"]
        names, limits, prompts = ("real", "small"), (12_600, 19_500), PROMPTS
    low, high = (limit * 10**6 for limit in limits)
    with temporary_folder() as folder:
        show_texts(results, folder / "texts", alone, prompts, gpu=gpu)
        cases = [
            Case(low, (), names[:1], (128, 192, 256, 512, 2048)),
            Case(low, ("--vae-tiling", "128"), names[:1], (256, 2048)),
            Case(high, ("--models-in-memory", "2"), names, (64, 128, 2048)),
        ]
        if results.quick:
            cases = [cases[0]._replace(sides=(128, 2048))]
        rows = []
        for number, case in enumerate(cases):
            model = two if len(case.models) > 1 else alone
            rows += limit_rows(folder / str(number), model, case)
        header = ("limit", "options", "in memory", "model", "size", "result", "peak GB", "of limit")
        results.table("At the limit, with previews", header, rows)
    results.save()


def show_texts(
    results: Results, data_dir: Path, model: Sequence[str], prompts: Sequence[int], *, gpu: bool
) -> None:
    rows = []
    server = TinyServer(data_dir, model)
    try:
        base = wait_until_loaded(server)
        for characters in prompts:
            reset_peak(server)
            start = time.perf_counter()
            draw(server, 64, "".join(chr(97 + n % 26) for n in range(characters)))
            peak = max(touched(server.pid, "VmHWM") - base, 0)
            tokens = min(characters, MOST_TOKENS)
            stage = stage_of(MODEL, 64)
            estimate = MARGIN * max(picture_memory(stage, None, gpu=gpu, text_tokens=tokens))
            seconds = time.perf_counter() - start
            share = f"{(base + estimate) / (base + peak):.2f}"
            rows.append((f"{characters:,}", tokens, seconds, peak / 1e6, estimate / 1e6, share))
    finally:
        server.kill()
    header = ("characters", "tokens", "s", "peak MB", "estimate MB", "all / measured")
    results.table("Long prompts, 64 x 64, one step", header, rows)


def limit_rows(data_dir: Path, model: Sequence[str], case: Case) -> list[tuple[object, ...]]:
    limit = ("--memory-limit", str(case.limit_bytes))
    server = TinyServer(data_dir, [*model, *limit, *case.options])
    rows: list[tuple[object, ...]] = []
    try:
        wait_until_loaded(server)
        for side in case.sides:
            for name in case.models:
                reset_peak(server)
                result = drawn_or_refused(server, name, side)
                peak = touched(server.pid, "VmHWM")
                loaded = server.ask("/health")["loaded_models"]
                shown = f"{case.limit_bytes / GB:g} GB", " ".join(case.options), len(loaded), name
                share = f"{peak / case.limit_bytes:.2f}"
                rows.append((*shown, f"{side} x {side}", result, peak / GB, share))
                print(rows[-1], flush=True)
    finally:
        server.kill()
    return rows


def drawn_or_refused(server: TinyServer, model: str, side: int) -> str:
    """Returns how a picture was drawn, or the figure with which it was refused."""
    try:
        return draw(server, side, f"a lake {time.perf_counter()}", model)
    except HTTPError as error:
        message = error.read().decode()
        needed = message.partition("needs about ")[2].partition(" of memory")[0]
        return f"refused: {needed}" if needed else message


def draw(server: TinyServer, side: int, prompt: str, model: str | None = None) -> str:
    body = {"prompt": prompt, "width": side, "height": side, "steps": 1, "model": model}
    task = server.ask("/generate", {k: v for k, v in body.items() if v is not None})["task_id"]
    while (status := server.ask(f"/status?task_id={task}"))["status"] in ("waiting", "running"):
        ask_for_preview(server, task)
        time.sleep(POLL_S)
    if status["status"] != "done":
        return str(status["error"]["message"])
    return "drawn"


def ask_for_preview(server: TinyServer, task_id: str) -> None:
    with suppress(HTTPError, ValueError):  # a picture, or none yet
        server.ask(f"/preview?task_id={task_id}")


def reset_peak(server: TinyServer) -> None:
    Path(f"/proc/{server.pid}/clear_refs").write_text(RESET_PEAK)


def wait_until_loaded(server: TinyServer) -> float:
    """Returns the bytes that the process has touched then."""
    while server.ask("/health")["status"] == "loading":
        time.sleep(POLL_S)
    return touched(server.pid, "VmRSS")


if __name__ == "__main__":
    main()
