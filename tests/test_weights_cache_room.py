"""Room for copies of quantized weights: which ones go, and when."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from copied_weights import PLENTY, spec_of

from models.model_catalog import LoadSpec, Lora
from models.tiny_models import ensure_checkpoint
from models.weights_cache import MIN_FREE_BYTES, MIN_KEPT_S, WeightsCache


@pytest.fixture
def checkpoint(data_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ensure_checkpoint("noise-flux2", data_dir), tmp_path / "mine")


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "weights", 10**9, free_bytes=lambda folder: PLENTY)


def write(cache: WeightsCache, spec: LoadSpec, size: int = 1000) -> None:
    with cache.writing(spec) as folder:
        (folder / "arrays").write_bytes(b"1" * size)


def used(folder: Path, spec: LoadSpec, ago_s: float) -> None:
    (copy,) = folder.glob(f"{spec.key.replace('/', '-')}-*")
    os.utime(copy / "copy.json", (time.time() - ago_s,) * 2)


def test_the_copy_used_longest_ago_makes_room_unless_it_was_used_just_now(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    cache = WeightsCache(folder, 2500, free_bytes=lambda folder: PLENTY)
    three, four, five = (spec_of(checkpoint, bits) for bits in (3, 4, 5))
    write(cache, three)
    write(cache, four)
    assert not cache.has_room(five, 1000), "both are in use"
    used(folder, three, MIN_KEPT_S + 1)
    used(folder, four, MIN_KEPT_S + 2)
    assert cache.has_room(five, 1000)
    assert cache.keys == {three.key}
    write(cache, five)
    assert WeightsCache(folder, 2500).keys == cache.keys == {three.key, five.key}
    used(folder, three, -100 * MIN_KEPT_S)
    assert cache.has_room(four, 1000), "a time in the future is of a clock that was set back"


def test_copies_make_way_when_the_disk_is_nearly_full(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    free = [PLENTY]
    cache = WeightsCache(folder, 10**9, free_bytes=lambda folder: free[0])
    three, four = (spec_of(checkpoint, bits) for bits in (3, 4))
    write(cache, three)
    write(cache, four)
    cache.prune()
    assert cache.keys == {three.key, four.key}
    used(folder, four, 10.0)
    cache._free_bytes = lambda folder: MIN_FREE_BYTES - (len(cache.keys) - 1)
    cache.prune()
    assert cache.keys == {three.key}


def test_what_a_dead_process_left_unfinished_is_removed_by_the_next_start(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    cache = WeightsCache(folder, 10**9, free_bytes=lambda folder: PLENTY)
    write(cache, spec_of(checkpoint))
    draft = folder / ".noise-flux2-q8-00000000"
    draft.mkdir()
    (draft / "0.safetensors").write_bytes(b"1")
    WeightsCache(folder, 10**9)
    assert not draft.exists()
    assert len(list(folder.iterdir())) == 1


def test_a_lower_limit_removes_copies_at_the_next_start(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    cache = WeightsCache(folder, 10**9, free_bytes=lambda folder: PLENTY)
    three, four = (spec_of(checkpoint, bits) for bits in (3, 4))
    write(cache, three)
    write(cache, four)
    used(folder, four, 10.0)
    assert WeightsCache(folder, 1500).keys == {three.key}
    assert WeightsCache(folder, 0).keys == frozenset()
    assert list(folder.iterdir()) == []


def test_only_weights_that_loading_quantizes_have_copies(
    checkpoint: Path, cache: WeightsCache
) -> None:
    spec = spec_of(checkpoint)
    assert cache.takes(spec)
    assert not cache.takes(spec_of(checkpoint, None))
    assert not cache.takes(spec_of(None)), "it builds its own weights in no time"
    stored = replace(spec.model, stored_bits=4)
    assert not cache.takes(LoadSpec(stored, spec.pipeline, 8))
    assert cache.takes(LoadSpec(spec.model, spec.pipeline, 4, (Lora("a"),)))
    assert not cache.takes(LoadSpec(spec.model, spec.pipeline, 4, control_strength=0.5))
