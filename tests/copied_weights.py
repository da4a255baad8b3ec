"""Weights of which copies are saved."""

from dataclasses import replace
from pathlib import Path

from conftest import allow

from models.model_catalog import LoadSpec
from models.weights_cache import MIN_FREE_BYTES

PLENTY = MIN_FREE_BYTES + 10**12


def spec_of(path: Path | None, bits: int | None = 4, model: str = "noise-flux2") -> LoadSpec:
    known = allow(model).default
    there = replace(known, path=str(path) if path else None)
    return LoadSpec(there, known.pipelines[0], bits)
