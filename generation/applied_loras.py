"""LoRAs on a loaded model: applied, scaled and removed without loading it again.

mflux applies LoRAs while it builds a class, and adds them to the weights ("bakes" them). Here a
class is built without them. Each layer gets a wrapper of mflux's that adds the LoRA when the layer
is called (as its --no-bake-lora), and the layer before it is kept, so removing is exact. Nothing of
a LoRA is lost by rounding, also where the weights are quantized.

Depends on mflux and mlx.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from generation.adapters import unusable, version_of
from generation.lora_keys import Keys, keys_of, matches_of
from models.model_catalog import Lora


class Place(NamedTuple):
    """Where mflux applies LoRAs in a class."""

    transformer: Any
    keys: Keys


@contextmanager
def places_of_loras() -> Iterator[list[Place]]:
    """While a class of mflux is built: it applies no LoRA. Yields the places where it would."""
    from mflux.models.common.lora.mapping.lora_loader import LoRALoader

    places = []

    def note(lora_mapping: list[Any], transformer: Any, **_: Any) -> tuple[list[str], list[float]]:
        places.append(Place(transformer, keys_of(lora_mapping)))
        return [], []

    with patch.object(LoRALoader, "load_and_apply_lora", staticmethod(note)):
        yield places


def with_second_transformer(places: Sequence[Place], pipeline: Any) -> list[Place]:
    """Ideogram 4 has a second transformer, which mflux gives the same LoRAs by itself."""
    second = getattr(pipeline, "unconditional_transformer", None)
    more = [] if second is None else [Place(second, place.keys) for place in places]
    return [*places, *more]


class AppliedLoras:
    """The LoRAs on a loaded model."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.applied: list[tuple[str, float]] = []
        """Their files and scales."""
        self.bytes = 0
        """Memory that they take."""
        self._versions: list[object] = []
        """Of the files: a file that was replaced is another one."""
        self._undo: list[Callable[[], None]] = []
        """What removes them, in the order in which they were applied."""

    def apply(self, loras: Sequence[Lora], lora_path: Callable[[str], str]) -> bool:
        """Apply these LoRAs in place of others.

        Args:
            lora_path: what mflux loads a LoRA of this name from.

        Returns:
            Whether that has changed the model. A file that was replaced is read again.

        Raises:
            UnusableAdapter: a layer is not in the model.
            Exception: mflux's, if one cannot be read or applied. The model has none then.
        """
        from mflux.models.common.resolution.lora_resolution import LoraResolution

        files = LoraResolution.resolve_paths([lora_path(lora.name) for lora in loras])
        scaled = [(file, lora.scale) for file, lora in zip(files, loras, strict=True)]
        versions: list[object] = [version_of(Path(file)) for file in files]
        if (scaled, versions) == (self.applied, self._versions):
            return False
        self.remove()
        try:
            for place in self.places if scaled else ():
                self._apply(place, scaled)
        except Exception:
            self.remove()
            raise
        self.applied, self._versions = scaled, versions
        return True

    def remove(self) -> None:
        """Remove all LoRAs."""
        while self._undo:
            self._undo.pop()()
        self.applied, self._versions, self.bytes = [], [], 0

    def _apply(self, place: Place, scaled: list[tuple[str, float]]) -> None:
        import mlx.core as mx
        from mflux.models.common.lora.mapping.lora_loader import LoRALoader

        replace, layer_at = LoRALoader._replace_target_module, LoRALoader._get_target_module
        arrays_before: dict[str, dict[int, Any]] = {}

        def replace_and_note(transformer: Any, path: str, layer: Any) -> None:
            before = layer_at(transformer, path)
            self._undo.append(lambda: replace(transformer, path, before))
            arrays_before.setdefault(path, _arrays(before))
            replace(transformer, path, layer)

        vectors: list[tuple[str, dict[str, Any], float]] = []
        with patch.object(LoRALoader, "_replace_target_module", staticmethod(replace_and_note)):
            for file, scale in scaled:
                _apply_file(place, file, scale, vectors)
        for path, deltas, scale in vectors:
            layer = LoRALoader._direct_delta_module(place.transformer, path)
            self._undo.append(_restoring(layer))
            arrays_before.setdefault(path, _arrays(layer))
            LoRALoader._apply_direct_deltas(place.transformer, path, deltas, scale)
        added: dict[int, Any] = {}
        for path, before in arrays_before.items():
            now = _arrays(layer_at(place.transformer, path))
            added |= {key: now[key] for key in now.keys() - before.keys()}
        mx.eval(list(added.values()), mx.random.state)  # the wrappers drew from it, to no purpose
        self.bytes += sum(array.nbytes for array in added.values())


def _apply_file(
    place: Place, file: str, scale: float, vectors: list[tuple[str, dict[str, Any], float]]
) -> None:
    """As LoRALoader._apply_single_lora, for one layer at a time: with all layers at once, it would
    compare each key with each pattern.

    Args:
        vectors: changes of vectors are added to it. They are applied after all LoRAs.

    Raises:
        UnusableAdapter: a layer is not in the model.
    """
    import mlx.core as mx
    from mflux.models.common.lora.mapping.lora_loader import LoRALoader
    from mflux.models.common.lora.mapping.peft_lora_metadata import PeftLoRAMetadata

    loaded: Any
    loaded, metadata = mx.load(file, return_metadata=True)
    configs = PeftLoRAMetadata.configs(metadata)
    layers: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for key, array in loaded.items():
        for layer, match in matches_of(key, place.keys):
            arrays, patterns = layers.setdefault(layer, ({}, []))
            arrays[key] = array
            patterns.append(match)
    failed: list[str] = []
    for arrays, patterns in layers.values():
        failed += LoRALoader._apply_lora_with_mapping(
            place.transformer,
            arrays,
            scale,
            patterns,
            role=None,
            direct_deltas=vectors,
            adapter_configs=configs,
        )[2]
    if failed or not layers:
        shown = ", ".join(failed[:3])
        reason = f"{len(failed)} of its {len(layers)} layers cannot be applied to the model"
        raise unusable(Path(file).stem, f"{reason} ({shown})")


def _restoring(layer: Any) -> Callable[[], None]:
    """Returns what gives a layer its present weight and bias again."""
    before = {name: layer[name] for name in ("weight", "bias") if name in layer}
    return lambda: layer.update(before)


def _arrays(module: Any) -> dict[int, Any]:
    """The arrays of a module by id()."""
    from mlx.utils import tree_flatten

    return {id(array): array for _, array in tree_flatten(module)}
