"""Saves copies of loaded weights with mflux's own saver, and loads from them.

Depends on mflux and mlx. To be called on the worker's thread.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar
from unittest.mock import patch

from errors import ServerError, WeightsTooLarge
from generation.load_errors import first_line, free_frames, is_out_of_memory
from models.model_catalog import LoadSpec
from models.weights_cache import WeightsCache, at_path

log = logging.getLogger(__name__)

INTERRUPTIONS = 2
"""So often saving a copy makes way for a task; then it is saved to its end."""
ADAPTER_LAYERS = ("LoRA", "LoKr", "FusedLoRA")
"""How the names of mflux's layers begin that hold an adapter: its saver would merge it."""
Result = TypeVar("Result")


class _Interrupted(Exception):
    """A task needs the thread."""


class _NotSaved(Exception):
    """There can be no copy. The message is the reason."""


class WeightsCopies:
    """Args:
    cache: None: no copies are made or used.
    build: builds a class from a load spec, not evaluated.
    """

    def __init__(self, cache: WeightsCache | None, build: Callable[[LoadSpec], Any]) -> None:
        self._cache = cache
        self._build = build
        self._interruptions: dict[str, int] = {}
        self._not_saved: set[str] = set()
        """Keys of load specs whose copy could not be saved since the start."""

    def load(self, spec: LoadSpec, load: Callable[[LoadSpec], Result]) -> Result:
        """Calls load() with the copy of these weights, if there is one. If that fails, or there is
        none, with the weights themselves.

        Raises: what load() raises.
        """
        copy = self._cache.find(spec) if self._cache else None
        if self._cache and copy:
            try:
                return load(copy)
            except (ServerError, WeightsTooLarge):  # a LoRA or the memory, not the copy
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                log.warning("the saved copy of %s is removed: %s", spec.key, first_line(error))
                self._cache.remove(spec)
                free_frames(error)
        return load(spec)

    def wants(self, spec: LoadSpec) -> bool:
        """Whether save() would try to save a copy of these weights."""
        cache = self._cache
        if cache is None or spec.key in cache.keys | self._not_saved:
            return False
        return cache.takes(spec)

    def save(self, pipeline: Any, spec: LoadSpec, may_continue: Callable[[], bool]) -> bool:
        """Saves a copy of loaded weights, if there is none: writes it, reads it back, compares.
        What goes wrong is logged. Returns whether there is a new copy.

        Args:
            may_continue: asked between two files and two arrays; False: the copy is given up, and
                the next call begins again.
        """
        cache = self._cache
        if cache is None or not self.wants(spec):
            return False
        interruptions = self._interruptions.get(spec.key, 0)
        if interruptions >= INTERRUPTIONS:
            may_continue = _always
        try:
            self._write(pipeline, spec, cache, may_continue)
        except _Interrupted:
            self._interruptions[spec.key] = interruptions + 1
            return False
        except Exception as error:
            log.info("no copy of the quantized weights of %s is saved: %s", spec.key, error)
            self._not_saved.add(spec.key)
            free_frames(error)
            return False
        log.info("a copy of the quantized weights of %s is saved", spec.key)
        return True

    def prune(self) -> None:
        """Removes copies while the disk is nearly full."""
        if self._cache:
            self._cache.prune()

    def _write(
        self,
        pipeline: Any,
        spec: LoadSpec,
        cache: WeightsCache,
        may_continue: Callable[[], bool],
    ) -> None:
        """Raises: Exception: there is no copy."""
        import mlx.core as mx

        if not _is_savable(pipeline):
            raise _NotSaved("mflux does not save it as it is loaded.")
        if not cache.has_room(spec, sum(array.nbytes for array in _arrays(pipeline).values())):
            raise _NotSaved("there is no room for it (--weights-cache).")
        save = mx.save_safetensors

        def save_if_wanted(*values: Any, **named: Any) -> None:
            if not may_continue():
                raise _Interrupted
            save(*values, **named)

        with cache.writing(spec) as folder:
            with patch.object(mx, "save_safetensors", save_if_wanted):
                pipeline.save_model(str(folder))
            _compare(pipeline, self._build(at_path(spec, folder)), may_continue)


def _always() -> bool:
    return True


def _is_savable(pipeline: Any) -> bool:
    if not hasattr(pipeline, "save_model"):
        return False
    return not any(type(one).__name__.startswith(ADAPTER_LAYERS) for one in pipeline.modules())


def _arrays(pipeline: Any) -> dict[str, Any]:
    """Its parameters by name."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(pipeline.parameters()))


def _settings(pipeline: Any) -> dict[str, Any]:
    """Simple attributes of a class, without paths: a class may decide something by its folder."""
    simple = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(pipeline).items()
        if isinstance(value, simple) and "path" not in name
    }


def _compare(loaded: Any, copy: Any, may_continue: Callable[[], bool]) -> None:
    """Raises: _NotSaved: they are not equal; _Interrupted."""
    import mlx.core as mx

    arrays, copied = _arrays(loaded), _arrays(copy)
    if copied.keys() != arrays.keys():
        odd = sorted(copied.keys() ^ arrays.keys())
        raise _NotSaved(f"mflux does not save all of it ({len(odd)} parameters, like {odd[0]}).")
    for name, value in _settings(copy).items():
        if value != _settings(loaded).get(name, value):
            raise _NotSaved(f"{name} differs in what was read back.")
    for module in copy.modules():
        module.clear()  # so that each array is freed when it was compared
    for name, array in arrays.items():
        if not may_continue():
            raise _Interrupted
        saved = copied.pop(name)
        same_kind = array.dtype == saved.dtype and array.shape == saved.shape
        if not same_kind or not mx.array_equal(array, saved).item():
            raise _NotSaved(f"what was read back is not equal ({name}).")
    mx.eval(mx.random.state)  # the modules of the copy drew from it
    mx.clear_cache()
