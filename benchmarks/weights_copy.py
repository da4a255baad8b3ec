"""Loading of quantized weights: from the original files, and from the copy that the server saves.

    python benchmarks/weights_copy.py --folder FOLDER --model NAME

FOLDER: weights of the model, not quantized. Without them, a tiny checkpoint and no result.

How to read it: loads take turns (copy, original, copy, original), so that both meet the same load
of the machine and the same file cache. CPU seconds depend less on other processes than wall
seconds. When the copy is saved it is read back and compared with the loaded weights, array by
array: an unequal one is not used. Goal: a load from the copy takes at most 0.3 of one from the
original files.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from common import Results, temporary_folder

from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from models.tiny_models import ensure_checkpoint
from models.weights_cache import WeightsCache

GOAL = 0.3
BITS = (4, 8)
ROUNDS = 3
CACHE_BYTES = 30_000_000_000
TINY = "noise-flux2"

Taken = dict[str, list[tuple[float, float, float]]]
"""By what was done: wall seconds, CPU seconds, peak of MLX's memory in 10^9 bytes, each time."""


def main() -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--folder", type=Path)
    options.add_argument("--model", default=TINY)
    chosen, sys.argv[1:] = options.parse_known_args()
    results = Results(__file__, __doc__)
    prepare_mlx()
    with temporary_folder() as data_dir, ThreadPoolExecutor(1) as thread:  # MLX wants one thread
        folder = chosen.folder or ensure_checkpoint(TINY, data_dir)
        rows, notes = [], []
        for bits in BITS:
            spec = spec_of(chosen.model, folder, bits)
            taken = thread.submit(measure, spec, data_dir, 1 if results.quick else ROUNDS).result()
            for what, times in taken.items():
                best = (min(values) for values in zip(*times, strict=True))
                rows.append((f"{spec.key}, {what}", len(times), *best))
            notes.append(ratio(spec, taken))
    results.table("Best of each", ("", "n", "wall s", "CPU s", "peak GB"), rows)
    results.note(f"Goal {GOAL:g}. {' '.join(notes)}")
    if chosen.folder:
        results.save()


def spec_of(name: str, folder: Path, bits: int) -> LoadSpec:
    model = find_model(name)
    if model is None:
        sys.exit(f"There is no model {name}.")
    there = replace(model, path=str(folder))
    return LoadSpec(there, there.pipelines[0], bits)


def measure(spec: LoadSpec, data_dir: Path, rounds: int) -> Taken:
    cache = WeightsCache(data_dir / "weights", CACHE_BYTES)
    without, saving = MfluxGenerator(data_dir), MfluxGenerator(data_dir, weights_cache=cache)
    taken: Taken = defaultdict(list)
    without.load(spec)  # imports the class, fills the file cache
    without.unload()
    saving.load(spec)
    timed(taken, "saving the copy", lambda: saving.save_copies(lambda: True))
    saving.unload()
    if spec.key not in cache.keys:
        sys.exit(f"No copy of {spec.key} was saved: is there room on the disk?")
    for _ in range(rounds):
        timed(taken, "load from the copy", lambda: saving.load(spec))
        saving.unload()
        timed(taken, "load from the original files", lambda: without.load(spec))
        without.unload()
    cache.remove(spec)
    return taken


def timed(taken: Taken, what: str, call: Callable[[], object]) -> None:
    import mlx.core as mx

    mx.reset_peak_memory()
    wall, cpu = time.monotonic(), time.process_time()
    call()
    seconds = time.monotonic() - wall, time.process_time() - cpu
    taken[what].append((*seconds, mx.get_peak_memory() / 1e9))


def ratio(spec: LoadSpec, taken: Taken) -> str:
    copy, original = (
        [min(values) for values in zip(*taken[f"load from the {what}"], strict=True)]
        for what in ("copy", "original files")
    )
    return (
        f"{spec.key}: {copy[0] / original[0]:.2f} of the wall seconds, "
        f"{copy[1] / original[1]:.2f} of the CPU seconds."
    )


if __name__ == "__main__":
    main()
