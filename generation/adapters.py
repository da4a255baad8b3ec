"""LoRAs: whether a file fits a model, before the model is loaded with it.

mflux applies the keys that it knows and ignores the others. So an adapter of another model draws
without an effect, and a broken one fails only after the loaded model has made room. Here the
header of the file is compared with mflux's own table of keys, which takes milliseconds, on any
thread. Depends on mflux and mlx.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from errors import UnusableAdapter
from models.model_catalog import LoadSpec
from models.weight_files import ArrayInfo, BadWeightFile, read_header

BLOCK = "{block}"
"""Placeholder for the number of a block in mflux's patterns."""
MATRICES = ("lora_A", "lora_B")
FLOATS = ("F16", "BF16", "F32")


class Target(NamedTuple):
    """The layer and matrix that an array belongs to."""

    layer: str
    matrix: str
    """lora_A, lora_B, alpha, ..."""
    whole: bool
    """Whether the whole array belongs there, or a part of it."""


class Fit(NamedTuple):
    """How many keys of a LoRA match a model."""

    matched: int
    keys: int
    reason: str = ""
    """Why the LoRA cannot be used; empty: it can be used."""


Sizes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of each linear layer of a model, by its name."""


def check_adapters(
    weights: LoadSpec, lora_path: Callable[[str], str], sizes: Sizes | None = None
) -> tuple[str, ...]:
    """Checks the LoRA files of a load spec; files that are not downloaded yet are not checked.

    Args:
        sizes: of the model's layers, if they are known.

    Returns:
        Warnings: a sentence for each adapter that fits in part.

    Raises:
        UnusableAdapter: one is broken, or is for another model.
        NotSupported: there is none of this name.
    """
    warnings = []
    for lora in weights.loras:
        path = Path(lora_path(lora.name))
        if not path.is_absolute() and not path.exists():
            continue  # a repository
        fit = _fit_of(path, weights, sizes)
        if fit.reason:
            raise UnusableAdapter(f"The LoRA {lora.name!r} cannot be used: {fit.reason}.")
        if fit.matched < fit.keys:
            warnings.append(
                f"The LoRA {lora.name!r} fits {weights.model.name} in part: {fit.matched} of its "
                f"{fit.keys} keys match, the other {fit.keys - fit.matched} are ignored."
            )
    return tuple(warnings)


def check_values(weights: LoadSpec, lora_path: Callable[[str], str]) -> None:
    """Reads the values of the LoRAs of a load spec. Takes a second per gigabyte.

    Raises:
        UnusableAdapter: a value is NaN or infinite.
    """
    import mlx.core as mx

    for lora in weights.loras:
        path = Path(lora_path(lora.name))
        if not path.is_file():
            continue  # a repository
        try:
            key = _first_not_finite(mx.load(str(path)))
        except (OSError, RuntimeError, ValueError) as error:
            raise UnusableAdapter(f"The LoRA {lora.name!r} cannot be read.") from error
        if key is not None:
            raise UnusableAdapter(
                f"The LoRA {lora.name!r} cannot be used: {key[:100]} holds values that are not "
                "numbers (NaN or infinity)."
            )


def _first_not_finite(arrays: Any) -> str | None:
    """Returns the name of the first array with NaN or infinity. Reads one array at a time."""
    import mlx.core as mx

    while arrays:
        key, array = arrays.popitem()
        finite = mx.isfinite(array).all()
        mx.eval(finite)
        if not finite.item():
            return str(key)
    return None


def layer_sizes(transformer: Any) -> Sizes:
    """Outputs and inputs of the linear layers of a loaded transformer."""
    sizes = {}
    for name, module in transformer.named_modules():
        weight, scales = getattr(module, "weight", None), getattr(module, "scales", None)
        if weight is None or weight.ndim != 2:
            continue
        inputs = weight.shape[1] if scales is None else scales.shape[1] * module.group_size
        sizes[name] = (weight.shape[0], inputs)
    return sizes


def raised_by_adapter(error: BaseException) -> bool:
    """Whether an exception was raised by mflux's code for LoRAs."""
    seen: BaseException | None = error
    while seen is not None:
        trace = seen.__traceback__
        while trace is not None:
            name = trace.tb_frame.f_globals.get("__name__", "")
            if name.startswith("mflux.models.common.lora.") or name.endswith(".lora_resolution"):
                return True
            trace = trace.tb_next
        seen = seen.__cause__
    return False


def _fit_of(path: Path, weights: LoadSpec, sizes: Sizes | None) -> Fit:
    try:
        stat = path.stat()
        version = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    except OSError:
        version = (0, 0, 0)
    family = weights.pipeline.module.split(".")[2]
    fit, targets = _compared(path, version, family)
    if fit.reason or not sizes:
        return fit
    return fit._replace(reason=_misfit(targets, sizes))


Arrays = dict[str, dict[str, tuple[ArrayInfo, bool]]]
"""Of each layer, the arrays of an adapter by matrix, and whether they go there whole."""


@lru_cache(maxsize=64)
def _compared(path: Path, version: tuple[int, int, int], family: str) -> tuple[Fit, Arrays]:
    """Args:
    version: of the file; another one is another file.
    """
    try:
        header = read_header(path)
    except BadWeightFile as error:
        return Fit(0, 0, str(error)), {}
    known, matched = _known_keys(family), 0
    found: Arrays = {}
    for key, array in header.items():
        targets = list(_targets_of(key, known))
        matched += bool(targets)
        for target in targets:
            found.setdefault(target.layer, {})[target.matrix] = (array, target.whole)
    reason = _inconsistency(found)
    if not matched:
        reason = f"none of its {len(header)} keys matches the model, so it is for another one"
    return Fit(matched, len(header), reason), found


@cache
def _known_keys(family: str) -> dict[str, list[Target]]:
    """Returns the LoRA keys that mflux applies to a family, with BLOCK for a number."""
    from mflux.models.common.lora.mapping.lora_loader import LoRALoader

    known: dict[str, list[Target]] = {}
    for mapping in _mappings(family):
        for match in LoRALoader._build_pattern_mappings(mapping.get_mapping()):
            target = Target(match.target_path, match.matrix_name, match.transform is None)
            pattern = match.source_pattern
            for key in {pattern, pattern.removesuffix(".weight")}:
                known.setdefault(key, []).append(target)
    return known


def _mappings(family: str) -> Iterator[Any]:
    """mflux's tables of keys for the models of a family."""
    import mflux.models

    folder = Path(mflux.models.__path__[0], family, "weights")
    for path in sorted(folder.glob("*_lora_mapping.py")):
        module = importlib.import_module(f"mflux.models.{family}.weights.{path.stem}")
        for name, mapping in vars(module).items():
            if name.endswith("LoRAMapping") and mapping.__module__ == module.__name__:
                yield mapping


def _targets_of(key: str, known: Mapping[str, list[Target]]) -> Iterator[Target]:
    """Matches a key like mflux: BLOCK is one of the numbers in the key."""
    yield from known.get(key, ())
    for number in re.finditer(r"\d+", key):
        block = str(int(number[0])) if len(number[0]) < 6 else ""
        if block != number[0]:
            continue
        for target in known.get(key[: number.start()] + BLOCK + key[number.end() :], ()):
            yield target._replace(layer=target.layer.replace(BLOCK, block))


def _inconsistency(arrays: Arrays) -> str:
    """Returns why the LoRA cannot be applied to any model; empty: it can."""
    for layer, parts in arrays.items():
        down, up = (parts.get(matrix, (None,))[0] for matrix in MATRICES)
        if down is None and up is None:
            continue
        if down is None or up is None:
            return f"{layer} has one of its two matrices only"
        if {down.dtype, up.dtype} - set(FLOATS):
            return f"the matrices of {layer} are {down.dtype} and {up.dtype}, not floats"
        if len(down.shape) == len(up.shape) == 2 and down.shape[0] != up.shape[1]:
            return f"the matrices of {layer} have different ranks, {down.shape} and {up.shape}"
    return ""


def _misfit(arrays: Arrays, sizes: Sizes) -> str:
    """Returns which sizes of the LoRA differ from the layers of the model; empty: none."""
    for layer, parts in arrays.items():
        if layer not in sizes:
            continue
        for matrix, axis, size in (("lora_B", 0, sizes[layer][0]), ("lora_A", 1, sizes[layer][1])):
            array, whole = parts.get(matrix, (None, False))
            if array is not None and whole and len(array.shape) == 2 and array.shape[axis] != size:
                return (
                    f"its {matrix} of {layer} has the shape {array.shape}, the model's layer needs "
                    f"{size} in place of {array.shape[axis]}"
                )
    return ""
