"""Builds mflux's classes without reading their weights, and checks that files fill them.

mflux applies weights with `Module.update(strict=False)`: a parameter that no file holds keeps its
random values, and shapes are not compared. Arrays are lazy, so both can be seen from names and
shapes before anything is read.

Depends on mflux and mlx.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

from task import Memory

SMALL_BYTES = 64_000_000
"""Arrays of up to this size are evaluated while a class is built: some are tables (of positions)
that must not be lazy when mflux compiles its step."""
MOST_MISSING_SHARE = 0.5
"""Of a component's parameters, in files that mflux has not saved: it checks by itself the names
that it translates, and a class may have layers that it does not use."""
FOREIGN_MISSING_SHARE, FOREIGN_ODD_SHARE = 0.8, 0.1
"""With more missing or of another shape, the files are of another model."""
BITS = (2, 3, 4, 5, 6, 8)
READ_AT_ONCE = ("torch", "fp8")
"""How the names of mflux's loading modes begin that read whole files, not lazily."""
QUANTIZED = (".scales", ".biases")
"""Parameters of quantized layers."""
SHOWN = 3


PART_BYTES = 128_000_000
"""Weights are read and quantized in parts of about this size: between two of them a load can be
stopped."""


LoadReport = Callable[[float], None]
"""Called after each part of a load with the share that is in memory, 0 to 1. It may raise."""


def not_reported(share: float) -> None:
    """A LoadReport that does nothing."""


class UnsuitableWeights(Exception):
    """Weights do not fill the modules of a class. The message is the reason."""

    is_incomplete = False
    """Whether they are of this class, as far as they are there."""


class _Unfilled(NamedTuple):
    """What the files of a component lack."""

    component: str
    missing: list[str]
    """Names of parameters that no file holds."""
    odd: list[str]
    """Names of parameters that have another shape in the files."""
    expected: int
    """Parameters of its layers."""
    saved: bool
    """Whether mflux has saved the files: then they hold all parameters of the component."""

    @property
    def is_foreign(self) -> bool:
        """Whether these are the weights of another model."""
        missing, odd = len(self.missing) / self.expected, len(self.odd) / self.expected
        return missing > FOREIGN_MISSING_SHARE or odd > FOREIGN_ODD_SHARE

    def error(self) -> UnsuitableWeights | None:
        names = ", ".join([*self.missing, *self.odd][:SHOWN])
        if self.is_foreign:
            return UnsuitableWeights(
                f"they are of another model: {len(self.missing)} of {self.expected} parameters of "
                f"the {self.component} are missing, {len(self.odd)} have another shape ({names})"
            )
        if len(self.missing) > (0 if self.saved else MOST_MISSING_SHARE * self.expected):
            error = UnsuitableWeights(
                f"they are not complete: {len(self.missing)} of {self.expected} parameters of the "
                f"{self.component} are missing ({names})"
            )
            error.is_incomplete = True
            return error
        return None


class Loading:
    """Watches mflux while it builds one class."""

    def __init__(
        self, before_reading: Callable[[], None], report: LoadReport, *, tiny: bool
    ) -> None:
        self._before_reading = before_reading
        self._report = report
        self._tiny = tiny
        self._saved: list[Any] = []
        """Trees of weights that mflux had saved."""
        self.differences = 0
        """Parameters that the files lack, have in another shape, or have besides those of the
        class."""
        self._unfilled: list[tuple[_Unfilled, Any]] = []

    def finish(self) -> None:
        """To be called when a tiny model is built and reduced to its layers.

        Raises:
            UnsuitableWeights
        """
        for unfilled, module in self._unfilled:
            expected = _layers_of(module) if unfilled.missing else {}
            left = [name for name in unfilled.missing if name in expected]
            if left and (error := unfilled._replace(missing=left).error()):
                raise error

    def compare(self, name: str, module: Any, weights: Any) -> None:
        """
        Raises:
            UnsuitableWeights
        """
        from mlx.utils import tree_flatten

        given = {path: array.shape for path, array in tree_flatten(weights)}
        expected = _layers_of(module)
        missing = [path for path in expected if path not in given]
        odd = [path for path, shape in expected.items() if not _fits(path, shape, given)]
        saved = any(tree is weights for tree in self._saved)
        if not expected:
            return
        known = {path for path, _ in tree_flatten(module.parameters())}
        besides = [path for path in given if path not in known and not path.endswith(QUANTIZED)]
        self.differences += len(missing) + len(odd) + len(besides)
        unfilled = _Unfilled(name, missing, [] if self._tiny else odd, len(expected), saved)
        if self._tiny:  # its files hold a few layers, and they are narrower
            self._unfilled.append((unfilled._replace(saved=True), module))
        elif error := unfilled.error():
            raise error

    # -- in place of mflux's functions -----------------------------------------------------------

    def read_saved(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: Any) -> Any:
            self._report(0.0)
            weights, bits, version = original(path)
            if weights is not None:
                self._saved.append(weights)
            return weights, bits, version

        return read

    def read(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: Any, loading_mode: str, *others: Any) -> Any:
            self._report(0.0)
            if loading_mode.startswith(READ_AT_ONCE):
                self._before_reading()
            return original(path, loading_mode, *others)

        return read

    def apply(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(weights: Any, models: Any, quantize_arg: Any, weight_definition: Any) -> Any:
            definitions = {one.name: one for one in weight_definition.get_components()}
            for name, module in models.items():
                tree = weights.components.get(name)
                subkey = getattr(definitions.get(name), "weight_subkey", None)
                if tree is not None:
                    self.compare(name, module, tree.get(subkey, tree) if subkey else tree)
            return original(weights, models, quantize_arg, weight_definition)

        return apply

    def apply_single(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply(weights: Any, model: Any, component: Any, *others: Any, **named: Any) -> Any:
            tree = weights.components.get(component.name)
            if tree is not None:
                self.compare(component.name, model, tree)
            return original(weights, model, component, *others, **named)

        return apply


@contextmanager
def checked_and_lazy(
    before_reading: Callable[[], None], report: LoadReport = not_reported, *, tiny: bool
) -> Iterator[Loading]:
    """While a class of mflux is built: weights are compared with its modules, and not evaluated.

    Args:
        before_reading: called before files are read that cannot be read lazily.
        report: called before the files of each component.
        tiny: whether it is a tiny model.
    """
    import mlx.core as mx
    from mflux.models.common.weights.loading.weight_applier import WeightApplier
    from mflux.models.common.weights.loading.weight_loader import WeightLoader
    from mlx.utils import tree_flatten

    evaluate = mx.eval

    def evaluate_small(*trees: Any) -> None:
        sizes = (array.nbytes for _, array in tree_flatten(trees) if isinstance(array, mx.array))
        if sum(sizes) <= SMALL_BYTES:
            evaluate(*trees)

    loading = Loading(before_reading, report, tiny=tiny)
    loader, applier = WeightLoader, WeightApplier
    saved = loading.read_saved(loader._try_load_mflux_format)
    with (
        patch.object(mx, "eval", evaluate_small),
        patch.object(loader, "_try_load_mflux_format", staticmethod(saved)),
        patch.object(
            loader, "_load_safetensors", staticmethod(loading.read(loader._load_safetensors))
        ),
        patch.object(
            applier, "apply_and_quantize", staticmethod(loading.apply(applier.apply_and_quantize))
        ),
        patch.object(
            applier,
            "apply_and_quantize_single",
            staticmethod(loading.apply_single(applier.apply_and_quantize_single)),
        ),
    ):
        yield loading


def weights_of(part: Any) -> Any:
    """The tree of weights of a class of mflux. LensImage and its text encoder are no modules of
    MLX: the modules in their attributes count."""
    if hasattr(part, "parameters"):
        return part.parameters()
    if type(part).__module__.startswith("mflux.models."):
        return {name: weights_of(value) for name, value in vars(part).items()}
    return {}


def bytes_of(pipeline: Any) -> int:
    """Bytes of a pipeline's weights; those that several of its modules share count once."""
    from mlx.utils import tree_flatten

    arrays = {id(array): array.nbytes for _, array in tree_flatten(weights_of(pipeline))}
    return sum(arrays.values())


def evaluate_in_parts(pipeline: Any, report: LoadReport) -> None:
    """Reads and quantizes the weights of a class that was built."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = list({id(array): array for _, array in tree_flatten(weights_of(pipeline))}.values())
    total_bytes = sum(array.nbytes for array in arrays)
    part, read_bytes = [], 0
    for array in arrays:
        part.append(array)
        if sum(one.nbytes for one in part) >= PART_BYTES:
            mx.eval(part)
            read_bytes += sum(one.nbytes for one in part)
            part.clear()
            report(read_bytes / total_bytes)
    mx.eval(part)


def counted_now(memory: Memory) -> Memory:
    """The same memory, with what MLX counts at this moment. Any thread may call."""
    import mlx.core as mx

    active = mx.get_active_memory()
    peak = max(memory.peak_bytes, active)
    return replace(memory, active_bytes=active, peak_bytes=peak, cache_bytes=mx.get_cache_memory())


def _layers_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of MLX's own layers in a module, by name.

    Arrays of other modules may be tables that mflux computes and nobody stores.
    """
    import mlx.core as mx
    from mlx import nn

    kinds: Any = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kinds += (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.QuantizedLinear, nn.QuantizedEmbedding)
    layers: list[tuple[str, Any]] = [
        (path, layer) for path, layer in module.named_modules() if isinstance(layer, kinds)
    ]
    return {
        f"{path}.{name}" if path else name: layer[name].shape
        for path, layer in layers
        for name in ("weight", "bias")
        if isinstance(layer.get(name), mx.array)
    }


def _fits(path: str, shape: tuple[int, ...], given: dict[str, tuple[int, ...]]) -> bool:
    """Whether a stored array has the shape of its parameter, or is missing. Quantized ones hold
    several values in 32 bits."""
    stored = given.get(path)
    if stored is None or stored == shape:
        return True
    quantized = f"{path.rpartition('.')[0]}.scales" in given
    return (
        quantized
        and stored[:-1] == shape[:-1]
        and any(stored[-1] * 32 == shape[-1] * bits for bits in BITS)
    )
