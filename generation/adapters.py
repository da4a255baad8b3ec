"""LoRAs: whether a file fits a model, before the model is loaded with it.

mflux applies the keys that it knows and ignores the others. So an adapter of another model draws
without an effect, and a broken one fails only after the loaded model has made room. Here the
header of the file is compared with mflux's own table of keys, which takes milliseconds, on any
thread. Depends on mflux and mlx.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from errors import UnusableAdapter
from generation.lora_keys import known_keys, matches_of
from models.hub_cache import weight_files
from models.model_catalog import LoadSpec, LoraFit, Model
from models.weight_files import ArrayInfo, BadWeightFile, read_header

MATRICES = ("lora_A", "lora_B")
FLOATS = ("F16", "BF16", "F32")
PREFIX = re.compile(r"^(transformer|diffusion_model|base_model\.model)\.")
SUFFIX = re.compile(r"\.lora[._](A|B|up|down)(\.default)?(\.weight)?$")
ARRAYS_AT_A_TIME = 32
GROUP_SIZE = 64
"""Inputs of a quantized layer for each of its scales, as mflux quantizes."""
FOLDERS_OF_TRANSFORMERS = ("transformer", "diffusion_models")


Sizes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of each linear layer of a model, by mflux's name or that in its files."""
NOT_KNOWN: Sizes = {}


class AdapterChecks:
    """Compares the headers of LoRAs with models; any thread may call.

    Args:
        lora_path: what mflux loads a LoRA of this name from.
    """

    def __init__(self, lora_path: Callable[[str], str]) -> None:
        self._lora_path = lora_path
        self._sizes: dict[str, Sizes] = {}
        """By model."""
        self._fits: dict[tuple[Path, str, str], tuple[object, Sizes, LoraFit]] = {}
        """By file, model and pipeline: the version of the file and the sizes of which it was found,
        and the result. A file that was not replaced is not read again."""

    def learn(self, model: Model, sizes: Sizes) -> None:
        """A model is loaded: these are the sizes of its layers."""
        self._sizes[model.name] = sizes

    def check(self, weights: LoadSpec) -> tuple[str, ...]:
        """Checks the LoRAs of a load spec; files that are not downloaded yet are not checked.

        Returns:
            Warnings: a sentence for each LoRA that fits in part.

        Raises:
            UnusableAdapter: one is broken, or is for another model.
            NotSupported: there is none of this name.
        """
        warnings = []
        for lora in weights.loras:
            path = Path(self._lora_path(lora.name))
            if not path.is_absolute() and not path.exists():
                continue  # a repository
            fit = self.fit(path, weights)
            if fit.reason:
                raise unusable(lora.name, fit.reason)
            if fit.matched < fit.keys:
                ignored = fit.keys - fit.matched
                warnings.append(
                    f"The LoRA {lora.name!r} fits {weights.model.name} in part: {fit.matched} of "
                    f"its {fit.keys} keys match, the other {ignored} are ignored."
                )
        return tuple(warnings)

    def fit(self, path: Path, weights: LoadSpec) -> LoraFit:
        """Returns how the LoRA in a file fits the model of a load spec, from its header."""
        sizes = self._sizes_of(weights.model)
        key = path, weights.model.name, weights.pipeline.name
        version, known = version_of(path), self._fits.get(key)
        if known is None or known[0] != version or known[1] is not sizes:
            self._fits[key] = known = version, sizes, fit_of(path, weights, sizes)
        return known[2]

    def _sizes_of(self, model: Model) -> Sizes:
        """Of the layers of a model, as far as it was loaded once or is on this machine."""
        if model.name not in self._sizes:
            with suppress(BadWeightFile):
                if sizes := stored_sizes(weight_files(model)):
                    self._sizes[model.name] = sizes
        return self._sizes.get(model.name, NOT_KNOWN)


def fit_of(path: Path, weights: LoadSpec, sizes: Sizes) -> LoraFit:
    """Returns how the LoRA in a file fits the model of a load spec, from its header."""
    version = version_of(path)
    family = weights.pipeline.module.split(".")[2]
    fit = _fit_of_family(path, version, family)
    if fit.reason or not sizes:
        return fit
    return fit._replace(reason=_misfit(_compared(path, version, family)[1], sizes))


def check_values(weights: LoadSpec, lora_path: Callable[[str], str]) -> None:
    """Reads the values of the LoRAs of a load spec. Takes a second per gigabyte.

    Raises:
        UnusableAdapter: a value is NaN or infinite.
    """

    for lora in weights.loras:
        path = Path(lora_path(lora.name))
        if not path.is_file():
            continue  # a repository
        try:
            key = _first_not_finite(path, version_of(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise unusable(lora.name, "it cannot be read") from error
        if key:
            reason = f"{key[:100]} holds values that are not numbers (NaN or infinity)"
            raise unusable(lora.name, reason)


def unusable(name: str, reason: str) -> UnusableAdapter:
    """The error about a LoRA that cannot be used, with what client and operator can do."""
    return UnusableAdapter(
        f"The LoRA {name!r} cannot be used: {reason.rstrip('.')}. Leave it out, choose another one "
        "(GET /models says which fit), or replace its file (--lora-dir)."
    )


def version_of(path: Path) -> tuple[int, int, int]:
    """Changes when a file is replaced."""
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=4096)
def _first_not_finite(path: Path, version: tuple[int, int, int]) -> str:
    """Returns the name of an array with NaN or infinity; empty: there is none. Reads some arrays at
    a time."""
    import mlx.core as mx

    arrays: Any = mx.load(str(path))
    while arrays:
        keys = list(arrays)[:ARRAYS_AT_A_TIME]
        finite: Any = mx.stack([mx.isfinite(arrays.pop(key)).all() for key in keys]).tolist()
        if not all(finite):
            return str(keys[finite.index(False)])
    return ""


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


def stored_sizes(files: Iterable[Path]) -> Sizes:
    """Returns the sizes of the layers in a model's files; empty: they are not on this machine, or
    not in a folder of their own. Reads their headers.

    Raises:
        BadWeightFile
    """
    sizes: dict[str, set[tuple[int, int]]] = {}
    for path in files:
        if path.parent.name not in FOLDERS_OF_TRANSFORMERS:
            continue
        header = read_header(path)
        for name, array in header.items():
            layer = name.removesuffix(".weight")
            scales = header.get(f"{layer}.scales")
            if layer == name or len(array.shape) != 2 or (array.dtype == "U32" and not scales):
                continue
            inputs = scales.shape[1] * GROUP_SIZE if scales else array.shape[1]
            sizes.setdefault(layer, set()).add((array.shape[0], inputs))
    # Two files may have different layers of a name: those of a ControlNet, for example.
    return {layer: found.pop() for layer, found in sizes.items() if len(found) == 1}


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


class Part(NamedTuple):
    """An array of a LoRA that belongs to a layer."""

    array: ArrayInfo
    whole: bool
    """Whether the whole array belongs there."""
    key: str


Arrays = dict[str, dict[str, Part]]
"""Of each layer, the arrays of a LoRA by matrix."""


@lru_cache(maxsize=4096)
def _fit_of_family(path: Path, version: tuple[int, int, int], family: str) -> LoraFit:
    return _compared(path, version, family)[0]


@lru_cache(maxsize=16)
def _compared(path: Path, version: tuple[int, int, int], family: str) -> tuple[LoraFit, Arrays]:
    """Args:
    version: of the file; another one is another file.
    """
    try:
        header = _header(path, version)
    except BadWeightFile as error:
        return LoraFit(0, 0, None, str(error)), {}
    known, matched = known_keys(family), 0
    found: Arrays = {}
    for key, array in header.items():
        matches = list(matches_of(key, known))
        matched += bool(matches)
        for layer, match in matches:
            part = Part(array, match.transform is None, key)
            found.setdefault(layer, {})[match.matrix_name] = part
    reason = _inconsistency(found)
    if dora := next((key for key in header if _is_dora(key, header)), None):
        reason = f"it is a DoRA with LoRA matrices, which mflux cannot apply ({dora[:100]})"
    if not matched:
        reason = f"none of its {len(header)} keys matches the model, so it is for another one"
    return LoraFit(matched, len(header), _rank(header), reason), found


def _rank(header: Mapping[str, ArrayInfo]) -> int | None:
    """The highest rank of the layers; None: there is no pair of matrices."""
    names = ((SUFFIX.search(key), array.shape) for key, array in header.items())
    ranks = [shape[0] for name, shape in names if name and name[1] in ("A", "down") and shape]
    return max(ranks, default=None)


@lru_cache(maxsize=4)
def _header(path: Path, version: tuple[int, int, int]) -> dict[str, ArrayInfo]:
    return read_header(path)


def _inconsistency(arrays: Arrays) -> str:
    """Returns why the LoRA cannot be applied to any model; empty: it can."""
    for layer, parts in arrays.items():
        pair = [parts[matrix].array for matrix in MATRICES if matrix in parts]
        if not pair:
            continue
        if len(pair) < len(MATRICES):
            return f"{layer} has one of its two matrices only"
        down, up = pair
        if {down.dtype, up.dtype} - set(FLOATS):
            return f"the matrices of {layer} are {down.dtype} and {up.dtype}, not floats"
        if len(down.shape) == len(up.shape) == 2 and down.shape[0] != up.shape[1]:
            return f"the matrices of {layer} have different ranks, {down.shape} and {up.shape}"
    return ""


def _is_dora(key: str, header: Mapping[str, ArrayInfo]) -> bool:
    layer = key.split(".lora_magnitude_vector", maxsplit=1)[0].removesuffix(".dora_scale")
    matrices = (f"{layer}.{matrix}{ending}" for matrix in MATRICES for ending in ("", ".weight"))
    return layer != key and any(matrix in header for matrix in matrices)


def _misfit(arrays: Arrays, sizes: Sizes) -> str:
    """Returns which sizes of the LoRA differ from the layers of the model; empty: none."""
    for layer, parts in arrays.items():
        for matrix, axis in (("lora_B", 0), ("lora_A", 1)):
            if matrix not in parts or not parts[matrix].whole:
                continue
            shape = parts[matrix].array.shape
            size = sizes.get(layer) or sizes.get(_layer_in_file(parts[matrix].key))
            if size and len(shape) == 2 and shape[axis] != size[axis]:
                return (
                    f"its {matrix} of {layer} has the shape {shape}, the model's layer needs "
                    f"{size[axis]} in place of {shape[axis]}"
                )
    return ""


def _layer_in_file(key: str) -> str:
    """Returns the name that the layer of a LoRA's key has in the files of its model, probably."""
    return PREFIX.sub("", SUFFIX.sub("", key))
