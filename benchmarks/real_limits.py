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
from typing import Any, NamedTuple
from urllib.error import HTTPError

from common import Results, temporary_folder
from memory import TinyServer
from real_model import MODEL, write_model
from real_size import FOLDER, POLL_S, RESET_PEAK, stage_of, touched

from generation.memory_guard import MARGIN
from generation.picture_memory import picture_memory
from images import read_metadata
from models.mlx_setup import prepare_mlx

PROMPTS = (100, 2_500, 10_000)
"""Characters; the tokenizer of the checkpoint makes a token of each."""
MOST_TOKENS = 4096
WHOLE_TILED_REFUSED = ((256, 64), (384, 64), (384, 128), (2048, 2048))
"""A CPU takes minutes for the smallest square of which tiles are less than the whole."""
GB = 1e9


class Case(NamedTuple):
    """A server, and the width and height of the pictures that it is asked for."""

    limit_bytes: int
    options: tuple[str, ...]
    models: tuple[str, ...]
    """What draws each picture, one after the other."""
    sizes: tuple[tuple[int, int], ...]


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    alone = ["--model", "noise-anima"]
    two = ["--models", "noise-anima,noise-flux1"]
    names, limits = ("noise-anima", "noise-flux1"), (760, 1_500)
    prompts: tuple[int, ...] = (10,)
    if not results.quick:
        few_bits = FOLDER.with_name(FOLDER.name + "-q4")
        write_model(FOLDER, float32=not gpu)
        write_model(few_bits, 4)
        alone = ["--models", f"real={FOLDER}@{MODEL}"]
        two = ["--models", f"real={FOLDER}@{MODEL},small={few_bits}@{MODEL}"]
        names, limits, prompts = ("real", "small"), (12_360, 19_500), PROMPTS
    low, high = (limit * 10**6 for limit in limits)
    with temporary_folder() as folder:
        show_texts(results, folder / "texts", alone, prompts, gpu=gpu)
        cases = [
            Case(low, (), names[:1], WHOLE_TILED_REFUSED),
            Case(high, ("--models-in-memory", "2"), names, ((64, 64), (128, 128), (2048, 2048))),
        ]
        if results.quick:
            cases = [cases[0]._replace(sizes=((128, 128), (2048, 2048)))]
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
            draw(server, (64, 64), "".join(chr(97 + n % 26) for n in range(characters)))
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
        for width, height in case.sizes:
            for name in case.models:
                reset_peak(server)
                result = drawn_or_refused(server, name, (width, height))
                peak = touched(server.pid, "VmHWM")
                loaded = server.ask("/health")["loaded_models"]
                shown = f"{case.limit_bytes / GB:g} GB", " ".join(case.options), len(loaded), name
                share = f"{peak / case.limit_bytes:.2f}"
                rows.append((*shown, f"{width} x {height}", result, peak / GB, share))
                print(rows[-1], flush=True)
    finally:
        server.kill()
    return rows


def drawn_or_refused(server: TinyServer, model: str, size: tuple[int, int]) -> str:
    """Returns how a picture was drawn, or the figure with which it was refused."""
    try:
        return draw(server, size, f"a lake {time.perf_counter()}", model)
    except HTTPError as error:
        message = error.read().decode()
        needed = message.partition("needs about ")[2].partition(" of memory")[0]
        return f"refused: {needed}" if needed else message


def draw(server: TinyServer, size: tuple[int, int], prompt: str, model: str | None = None) -> str:
    width, height = size
    body = {"prompt": prompt, "width": width, "height": height, "steps": 1, "model": model}
    drawn = watched(server, {k: v for k, v in body.items() if v is not None})
    if drawn.status["status"] != "done":
        return str(drawn.status["error"]["message"])
    image = server.fetch(f"/image?task_id={drawn.answer['task_id']}")
    tile = (read_metadata(image) or {}).get("vae_tiling")
    how = f"drawn, tiles of {tile}" if tile else "drawn"
    return f"{how}, previews: {len(drawn.previews)}"


class Watched(NamedTuple):
    """A task that has ended, whose previews were fetched all the time."""

    answer: dict[str, Any]
    """To the request."""
    status: dict[str, Any]
    previews: set[bytes]


def watched(server: TinyServer, body: dict[str, Any]) -> Watched:
    answer = server.ask("/generate", body)
    task, previews = answer["task_id"], set[bytes]()
    while (status := server.ask(f"/status?task_id={task}"))["status"] in ("waiting", "running"):
        with suppress(HTTPError):  # there is none yet
            previews.add(server.fetch(f"/preview?task_id={task}"))
        time.sleep(POLL_S)
    return Watched(answer, status, previews - {b""})


def reset_peak(server: TinyServer) -> None:
    Path(f"/proc/{server.pid}/clear_refs").write_text(RESET_PEAK)


def wait_until_loaded(server: TinyServer) -> float:
    """Returns the bytes that the process has touched then."""
    while server.ask("/health")["status"] == "loading":
        time.sleep(POLL_S)
    return touched(server.pid, "VmRSS")


if __name__ == "__main__":
    main()
