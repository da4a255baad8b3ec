"""Downloads the files that a class of mflux is built from.

Depends on mflux, mlx and huggingface_hub.
"""

import logging
import os
from pathlib import Path

from errors import ModelLoadError
from generation.load_errors import explain
from generation.pipelines import build
from models.hub_cache import unusable
from models.model_catalog import LoadSpec, Model

log = logging.getLogger(__name__)


def fetch(weights: LoadSpec, data_dir: Path) -> None:
    """Downloads the files that build() needs. To be called in a separate process.

    Builds the class, with an `mx.eval` that computes nothing: some classes evaluate their weights
    as soon as they are made, and these are whole, not quantized. Downloading by patterns
    (`snapshot_download`) would repeat mflux: its patterns stand in 25 weight definitions, its
    initializers choose among them by model, and six modules fetch single files by themselves.

    Raises:
        ModelLoadError: with what the operator can do.
    """
    import mlx.core as mx

    try:
        complete(weights.model)
    except Exception as error:
        raise ModelLoadError(explain(error, weights)) from error
    evaluate, mx.eval = mx.eval, lambda *arrays: None
    try:
        build(weights, data_dir)
    finally:
        mx.eval = evaluate


def complete(model: Model) -> None:
    """Downloads the files that its repositories lack here, if others are here: shards that an
    interrupted download has left out, empty files, links to nothing.

    mflux would not download all of them: it takes an empty file for a whole one, and does not count
    the shards of weights without an index.

    Raises:
        Exception: huggingface_hub's.
    """
    from huggingface_hub import errors, hf_hub_download

    for repository, snapshot, file in unusable(model):
        log.info("%s of %s is downloaded again", file, repository)
        try:
            hf_hub_download(
                repository,
                file,
                revision=snapshot.name,
                force_download=os.path.lexists(snapshot / file),
            )
        except errors.RemoteEntryNotFoundError:  # the repository itself lacks what its index names
            log.warning("%s is not in %s", file, repository)
