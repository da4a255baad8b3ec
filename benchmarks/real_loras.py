"""Switching LoRAs on a loaded model of real size (real_model.py), compared with loading it.

How to read it: two LoRAs of rank 16 on all layers that can have one are applied in turn, removed,
and rescaled; each row is the median of the rounds. `first` also reads and checks the file, as the
server does once for each file. Goal: at most 5 % of the load. The load is that of files which the
system has in its cache: a load from the disk takes longer.

REAL_SIZE_FOLDER names the checkpoint, which is written if it is missing. `--quick` uses a tiny
model.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from common import Results, median, temporary_folder
from real_model import MODEL, write_model
from real_size import FOLDER

from generation.loaded_model import LoadedModel
from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Lora, Model

RANK = 16
ROUNDS = 5
GOAL = 0.05


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    model = find_model("noise-anima" if results.quick else MODEL)
    assert model
    if not results.quick:
        model = replace(model, path=str(write_model(FOLDER, float32=not gpu)))
    with temporary_folder() as folder, ThreadPoolExecutor(1) as thread:
        thread.submit(measure, results, folder, model).result()
    results.save()


def measure(results: Results, folder: Path, model: Model) -> None:
    plain = LoadSpec(model, model.pipelines[0], None)
    generator = MfluxGenerator(folder)
    generator.load(plain)  # code and files are read from the disk now
    generator.unload()
    load_s = seconds_of(lambda: generator.load(plain))
    loaded = next(iter(generator._loaded.values()))
    files = [Lora(str(write_lora(folder / f"{seed}.safetensors", loaded, seed))) for seed in (1, 2)]
    size_mb = Path(files[0].name).stat().st_size / 1e6

    def switch(*loras: Lora) -> float:
        spec = replace(plain, loras=loras)
        return seconds_of(lambda: generator.apply_adapters(spec))

    one, two = files
    times = {"first one": [switch(one)], "first two": [switch(two)]}
    for _ in range(ROUNDS):
        times.setdefault("one, in place of two", []).append(switch(one))
        times.setdefault("two, in place of one", []).append(switch(two))
        times.setdefault("two at 0.5", []).append(switch(replace_scale(two, 0.5)))
        times.setdefault("both", []).append(switch(one, two))
        times.setdefault("none", []).append(switch())
        switch(two)
    generator.unload()
    results.note(f"Loading takes {load_s:.1f} s; each LoRA has {size_mb:.0f} MB.")
    rows = [
        (what, 1e3 * median(seconds), f"{100 * median(seconds) / load_s:.1f} %")
        for what, seconds in times.items()
    ]
    results.table("Switches", ("to", "ms", "of a load"), rows)


def replace_scale(lora: Lora, scale: float) -> Lora:
    return lora._replace(scale=scale)


def seconds_of(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def write_lora(path: Path, loaded: LoadedModel, seed: int) -> Path:
    """Writes a LoRA with random matrices on all layers of a model that mflux has keys for."""
    import mlx.core as mx

    mx.random.seed(seed)
    arrays = {}
    for pattern, matches in loaded._loras.places[0].keys.items():
        for match in matches:
            for block in range(100 if "{block}" in match.target_path else 1):
                layer = match.target_path.replace("{block}", str(block))
                size = loaded.layer_sizes.get(layer)
                if size is None or match.transform is not None:
                    break
                shape = {"lora_B": (size[0], RANK), "lora_A": (RANK, size[1])}.get(
                    match.matrix_name
                )
                if shape is None or (layer, match.matrix_name) in arrays:
                    continue
                key = pattern.replace("{block}", str(block))
                value = (0.01 * mx.random.normal(shape)).astype(mx.bfloat16)
                arrays[layer, match.matrix_name] = key, value
    mx.save_safetensors(str(path), dict(arrays.values()))
    return path


if __name__ == "__main__":
    main()
