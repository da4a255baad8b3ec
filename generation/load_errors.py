"""Errors while loading weights, as sentences that say what the operator can do.

Depends on huggingface_hub.
"""

import gc
import traceback
from collections.abc import Collection
from typing import Any

from errors import StoredOtherwise
from generation.loading import UnsuitableWeights
from generation.memory_advice import ask_for_less, fewer_bits, in_words
from models.hub_cache import login_command
from models.mlx_setup import give_back_memory
from models.model_catalog import LoadSpec, Model
from task import Stage


def explain(error: Exception, weights: LoadSpec) -> str:
    """Returns an error while loading as one sentence, with what the operator can do."""
    import httpx
    from huggingface_hub import errors as hub

    model = weights.model
    source = model.path or next(iter(model.repositories), model.name)
    otherwise = _otherwise(model)
    page = f"huggingface.co/{source}"
    if is_out_of_memory(error):
        ways = ["end other programs", *fewer_bits(weights, (), lambda _: True)]
        return (
            f"The weights of {model.name} do not fit into memory now ({first_line(error)}): "
            f"{in_words(ways)}."
        )
    if isinstance(error, UnsuitableWeights):
        named = f"--models {model.name}={source}@BASE" if model.base else "--model"
        again = f"Copy or download them again: {source}."
        other = f"Name that one: {named}, or give other weights for {model.name}: {source}."
        advice = again if error.is_incomplete else other
        return f"The weights of {model.name} cannot be used: {error}. {advice}"
    if model.tiny and model.path is None:
        return (
            f"The model {model.name} cannot be built in the data dir ({first_line(error)}): "
            "make room there, or choose another folder (--data-dir)."
        )
    refused = isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403)
    if isinstance(error, hub.GatedRepoError) or (
        refused and not isinstance(error, hub.RepositoryNotFoundError)
    ):
        return (
            f"The weights of {model.name} are only for those who log in: accept the licence at "
            f"{page}, log in with '{login_command()}', and start again; or {otherwise}."
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"There is no repository {source}, or it is private: log in with "
            f"'{login_command()}' if it is yours, or {otherwise}."
        )
    if isinstance(
        error, hub.LocalEntryNotFoundError | hub.HfHubHTTPError | httpx.HTTPError | OSError
    ):
        on_disk = isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError)
        if on_disk and not isinstance(error, hub.LocalEntryNotFoundError):
            return (
                f"The weights of {model.name} cannot be read from {source} ({error}): {otherwise}."
            )
        return (
            f"The weights of {model.name} cannot be downloaded from {page} "
            f"({first_line(error)}): check the connection, or {otherwise}."
        )
    reason = first_line(error)
    return f"The model {model.name} cannot be loaded from {source} ({reason}): {otherwise}."


def bits_of(pipeline: Any, weights: LoadSpec) -> int | None:
    """Returns the bits of a class that was built.

    Raises:
        StoredOtherwise: the load spec says others.
    """
    bits: int | None = getattr(pipeline, "bits", weights.quantize)
    if bits != weights.quantize:
        raise StoredOtherwise(
            f"The weights of {weights.model.name} are stored at {bits or 16} bits, not at "
            f"{weights.quantize or 16} as when the server started: start it again."
        )
    return bits


def too_little_memory(stage: Stage, bits: Collection[int]) -> str:
    """Args: bits: that tasks may ask for."""
    width, height = stage.params.final_size
    ways = [ask_for_less(stage, "width"), *fewer_bits(stage.load_spec, bits, lambda _: True)]
    return (
        f"This machine's memory does not suffice for {width} x {height} pixels with "
        f"{stage.load_spec.model.name}: {in_words(ways)}."
    )


def _otherwise(model: Model) -> str:
    """What else the operator can do, where they have named the weights."""
    if model.path and model.base:
        return (
            f"give another folder or repository in --models ({model.name}=FOLDER@{model.base}), or "
            "take the entry out"
        )
    if model.path:
        return (
            f"give another folder or repository with --path, or leave --path out, so that "
            f"{model.name} is loaded from its own repository"
        )
    return (
        "choose another model (--model) or give a local folder with its weights (--path, --models)"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX or Python could not get memory; MLX says so in a RuntimeError."""
    words = ("malloc", "unable to allocate", "attempting to allocate", "insufficient memory")
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def free_frames(error: BaseException) -> None:
    """Gives back the memory that a failed call has left in the frames of its exception."""
    import mlx.core as mx

    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    mx.clear_cache()
    give_back_memory()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
