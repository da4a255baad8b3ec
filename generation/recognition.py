"""Finds out of which model the weights in a folder are, from their names and shapes.

What mflux-save notes beside them decides, if it is there. Else each class of mflux is built with
them, nothing evaluated: those whose layers they fill exactly are left. Models that need further
repositories are left out.

Depends on mflux and mlx.
"""

import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from generation.loading import Loading, UnsuitableWeights, checked_and_lazy
from generation.pipelines import build_class
from models.model_catalog import Catalog, LoadSpec, Model
from models.repositories import further

log = logging.getLogger(__name__)

NOTE = "mflux_model.json"
"""What mflux-save writes about the weights."""


class _Reads(Exception):
    """A class would read whole files."""


def fitting_models(folder: Path, catalog: Catalog) -> tuple[list[Model], str]:
    """Returns the models that the weights in a folder may be of, and if there is none, why not
    ("" if nothing is known). Takes some seconds, and uses no network."""
    if noted := _noted(folder, catalog):
        return [noted], ""
    differences: dict[str, int] = {}
    reason = ""
    candidates = [model for model in catalog.models if model.pipelines and not model.tiny]
    with _offline():
        for model in candidates:
            if further(model):
                continue
            try:
                differences[model.name] = _differences(folder, model)
            except UnsuitableWeights as error:
                if error.is_incomplete:
                    reason = f"as weights of {model.name} {error}"
            except Exception as error:  # files of another layout: each class says so in its own way
                log.debug("%s is not %s: %s", folder, model.name, error)
    _forget_modules()
    least = min(differences.values(), default=0)
    fitting = [model for model in candidates if differences.get(model.name) == least]
    return fitting, "" if fitting else reason


def _differences(folder: Path, model: Model) -> int:
    """Counts parameters that the files lack, have in another shape, or have besides.

    Raises:
        Exception: the files do not fit at all.
    """

    def refuse() -> None:
        raise _Reads

    spec = LoadSpec(replace(model, path=str(folder)), model.pipelines[0], None)
    loading: Loading
    with checked_and_lazy(refuse, tiny=False) as loading:
        build_class(spec, folder)
    return loading.differences


def _noted(folder: Path, catalog: Catalog) -> Model | None:
    try:
        note = json.loads((folder / NOTE).read_text())
        name = note.get("base_model") or note.get("model_name")
    except (OSError, ValueError, AttributeError):
        return None
    return next((model for model in catalog.models if model.name == name), None)


@contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield


def _forget_modules() -> None:
    import mlx.core as mx

    gc.collect()  # the modules of a class refer to each other
    mx.eval(mx.random.state)  # they drew from it: left lazy, all these draws would be kept
