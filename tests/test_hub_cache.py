"""What the cache of Hugging Face is said to hold."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import allow
from huggingface_hub import constants
from mflux.models.common.resolution.model_revisions import ModelRevisions
from studio import OFFER

from allowed import Allowed
from api.models_api import download_answer, model_answer
from models.hub_cache import bytes_on_disk, cache_dir, is_present, weight_files
from models.model_catalog import LoadSpec, Model
from models.repositories import FOLDERS
from scheduler.health import QueueHealth, ServerState


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(
    cache: Path, repository: str, size: int, *, whole: bool = True, revision: str | None = None
) -> None:
    """As huggingface_hub lays a repository out: blobs, and links to them in a snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    blob = folder / "blobs" / ("abc" if whole else "def.incomplete")
    blob.write_bytes(bytes(size))
    if whole:
        pinned = revision or ModelRevisions.get(repository) or "123"
        snapshot = folder / "snapshots" / pinned
        for part in FOLDERS["flux"]:
            (snapshot / part).mkdir(parents=True)
            (snapshot / part / "model.safetensors").symlink_to(blob)


def model(known: str, **changes: Any) -> Model:
    return replace(allow(known).default, **changes)


def test_a_model_is_present_when_each_of_its_repositories_is_whole(cache: Path) -> None:
    schnell, controlled = model("schnell"), model("schnell-controlnet-canny")
    assert cache_dir() == cache
    assert (is_present(schnell), bytes_on_disk(schnell)) == (False, 0)
    first, second = controlled.repositories
    put(cache, first, 1000, whole=False)
    assert (is_present(schnell), bytes_on_disk(schnell)) == (False, 1000)
    put(cache, first, 500)
    assert not is_present(schnell), "the rest is still on its way"
    assert bytes_on_disk(schnell) == 1500
    (cache / f"models--{first.replace('/', '--')}" / "blobs" / "def.incomplete").unlink()
    assert (is_present(schnell), bytes_on_disk(schnell)) == (True, 500)
    assert not is_present(controlled)
    put(cache, second, 20)
    assert (is_present(controlled), bytes_on_disk(controlled)) == (True, 520)


def test_weights_of_a_folder_or_of_another_repository_are_looked_for_there(
    cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    local = model("schnell", name="mine", base="schnell", path=str(folder))
    assert (is_present(local), bytes_on_disk(local)) == (False, 0)
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "0.safetensors").write_bytes(bytes(77))
    assert (is_present(local), bytes_on_disk(local)) == (True, 77)
    other = model("schnell", path="somebody/else")
    assert not is_present(other)
    put(cache, "somebody/else", 5)
    assert (is_present(other), bytes_on_disk(other)) == (True, 5)


def test_weights_of_another_revision_than_mflux_loads_are_not_present(cache: Path) -> None:
    """A new release of mflux may pin another one; then it downloads again."""
    schnell = model("schnell")
    put(cache, schnell.repositories[0], 500, revision="an-older-one")
    assert not is_present(schnell)
    assert weight_files(schnell) == []
    put(cache, schnell.repositories[0], 500)
    assert is_present(schnell)
    assert {path.parent.name for path in weight_files(schnell)} == set(FOLDERS["flux"])


def test_of_a_repository_without_a_pin_the_newest_revision_is_checked(cache: Path) -> None:
    other = model("schnell", path="somebody/else")
    for age_s, revision in enumerate(("newest", "older", "oldest")):
        put(cache, "somebody/else", 5, revision=revision)
        folder = cache / "models--somebody--else" / "snapshots" / revision
        os.utime(folder, (1_000 - age_s, 1_000 - age_s))
    assert is_present(other)
    assert {path.parents[1].name for path in weight_files(other)} == {"newest"}


def health_while_loading(weights: LoadSpec | None) -> QueueHealth:
    return QueueHealth(ServerState.LOADING, 0, 0, (), weights, None, None, None)


def test_a_download_is_reported_with_its_bytes_and_total(cache: Path) -> None:
    schnell = model("schnell")
    weights = LoadSpec(schnell, schnell.pipelines[0], None)
    put(cache, schnell.repositories[0], 1000, whole=False)
    answer = download_answer(health_while_loading(weights))
    assert answer
    assert (answer.model, answer.bytes_done, answer.bytes_total) == (
        "schnell",
        1000,
        34_000_000_000,
    )
    unknown = replace(schnell, weights_gb=None)
    answer = download_answer(health_while_loading(LoadSpec(unknown, unknown.pipelines[0], None)))
    assert answer
    assert answer.bytes_total is None
    assert download_answer(health_while_loading(None)) is None
    put(cache, schnell.repositories[0], 500)
    (cache / "models--black-forest-labs--FLUX.1-schnell/blobs/def.incomplete").unlink()
    assert download_answer(health_while_loading(weights)) is None
    tiny = OFFER.default
    assert download_answer(health_while_loading(LoadSpec(tiny, tiny.pipelines[0], None))) is None


def test_a_model_shows_what_is_on_disk_and_in_memory(cache: Path) -> None:
    allowed = Allowed(model("schnell"), (model("schnell"), model("noise-seedvr2")))
    put(cache, "black-forest-labs/FLUX.1-schnell", 500)
    weights = LoadSpec(allowed.default, allowed.default.pipelines[0], 8)
    health = QueueHealth(ServerState.READY, 0, 0, (weights,), None, None, 8, None)
    answer = model_answer(allowed.default, allowed, health)
    assert (answer.allowed, answer.loaded, answer.present) == (True, True, True)
    assert (answer.bytes_on_disk, answer.default_steps, answer.gated) == (500, 4, True)
    assert "upscale" in answer.takes
    other = model_answer(model("dev"), allowed, health)
    assert (other.allowed, other.loaded, other.present) == (False, False, False)
