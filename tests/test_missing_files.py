"""Weights that are here in part: a shard is missing, a file is empty, a link leads to nothing."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import allow
from file_hub import FileHub
from huggingface_hub import constants

from declared import with_options
from doctor import _model as finding_of
from errors import ModelLoadError
from generation.pipelines import check_files
from models.build_options import BuildOptions
from models.hub_cache import is_present, needs_download, pinned, unusable, weight_files
from models.missing_files import absent_shards, file_sizes, unusable_files
from models.model_catalog import Model
from models.repositories import loaded_patterns
from models.tiny_models import ensure_checkpoint

KLEIN = "black-forest-labs/FLUX.2-klein-4B"
SHARD = "model-00002-of-00003.safetensors"
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
INDEX = json.dumps({"weight_map": {f"layer.{shard}": shard for shard in SHARDS}}).encode()
FILL = """
import sys
from huggingface_hub import hf_hub_download
repository, revision, *files = sys.argv[1:]
for file in files:
    hf_hub_download(repository, file, revision=revision)
"""
FETCH = """
import sys
from pathlib import Path
from errors import ModelLoadError
from generation.fetching import fetch
from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
model = find_model(sys.argv[1])
try:
    fetch(LoadSpec(model, model.pipelines[0], None), Path(sys.argv[2]))
except ModelLoadError as error:
    print(error)
"""


def write(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def lacks(folder: Path, *patterns: str) -> list[str]:
    return unusable_files(folder, file_sizes(folder), patterns)


# -- in a folder -----------------------------------------------------------------------------------


def test_an_index_names_all_files_that_belong_together(tmp_path: Path) -> None:
    write(tmp_path / "transformer", *SHARDS)
    write(tmp_path / "transformer", "model.safetensors.index.json", content=INDEX)
    assert lacks(tmp_path) == []
    (tmp_path / "transformer" / SHARD).unlink()
    assert lacks(tmp_path) == absent_shards(tmp_path) == [f"transformer/{SHARD}"]
    assert lacks(tmp_path, "vae/*.safetensors") == [], "the transformer is not loaded"
    for shard in (SHARDS[0], SHARDS[2]):
        (tmp_path / "transformer" / shard).unlink()
    assert lacks(tmp_path) == [f"transformer/{shard}" for shard in SHARDS]
    assert absent_shards(tmp_path) == [], "perhaps nothing of it is loaded: mflux reports it"


def test_without_an_index_the_names_say_how_many_files_there_are(tmp_path: Path) -> None:
    write(tmp_path, SHARDS[0], SHARDS[2], "other-00001-of-00001.safetensors", "config.json")
    assert lacks(tmp_path) == absent_shards(tmp_path) == [SHARD]
    write(tmp_path, "model.safetensors.index.json", content=INDEX.replace(SHARD.encode(), b"b"))
    assert lacks(tmp_path) == ["b"], "the index is believed"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"weight_map": 1}',
        b'{"weight_map": {"a": ["b"]}}',
        b'{"weight_map": {"a": "../../secret"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_an_index_that_cannot_be_read_counts_as_none(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "vae", *SHARDS)
    write(tmp_path / "vae", "model.safetensors.index.json", content=content)
    assert absent_shards(tmp_path) == []
    (tmp_path / "vae" / SHARD).unlink()
    assert absent_shards(tmp_path) == [f"vae/{SHARD}"], "the names still say it"
    if content:
        assert lacks(tmp_path) == [f"vae/{SHARD}"]
    else:
        assert lacks(tmp_path, "vae/*.safetensors") == [
            f"vae/{SHARD}",
            "vae/model.safetensors.index.json",
        ], "and the index is downloaded again"


def test_empty_files_and_links_to_nothing_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "vae", "a.safetensors", "b.safetensors", "._c.safetensors")
    write(tmp_path / "vae", "empty.safetensors", "._empty.safetensors", "notes.txt", content=b"")
    (tmp_path / "vae" / "link.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "vae" / "good.safetensors").symlink_to(tmp_path / "vae" / "a.safetensors")
    assert lacks(tmp_path) == ["vae/empty.safetensors", "vae/link.safetensors"]
    write(tmp_path, "all.safetensors", content=b"")
    assert lacks(tmp_path) == ["vae/empty.safetensors", "vae/link.safetensors"], (
        "mflux reads the folders, not what is beside them"
    )
    assert "all.safetensors" in lacks(tmp_path, "all.safetensors")


def test_an_index_is_read_once_until_it_changes(tmp_path: Path) -> None:
    write(tmp_path / "vae", *SHARDS)
    write(tmp_path / "vae", "model.safetensors.index.json", content=INDEX)
    with patch("models.missing_files.json.loads", wraps=json.loads) as read:
        for _ in range(3):
            assert lacks(tmp_path) == []
        assert read.call_count == 1
        changed = INDEX.replace(SHARD.encode(), b"another.safetensors")
        write(tmp_path / "vae", "model.safetensors.index.json", content=changed)
        assert lacks(tmp_path) == ["vae/another.safetensors"]
        assert read.call_count == 2


# -- local folders ---------------------------------------------------------------------------------


def local(folder: Path, name: str = "noise-flux2") -> Model:
    return replace(allow(name).default, path=str(folder))


def test_a_folder_that_lacks_a_shard_is_refused_by_its_name_before_anything_is_loaded(
    data_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(ensure_checkpoint("noise-flux2", data_dir), tmp_path / "mine")
    model = local(folder)
    check_files(model)
    index = {"weight_map": {"a": "0.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    file = folder / "transformer" / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(ModelLoadError) as refused:
        check_files(model)
    assert str(refused.value) == (
        "The weights of noise-flux2 are not complete: 1.safetensors and 1 more are missing. "
        f"Copy or download them again: {folder / 'transformer' / '1.safetensors'}"
    )
    del index["weight_map"]["c"]
    file.write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"1\.safetensors is missing"):
        check_files(model)
    assert is_present(model), "no download would help"
    assert not needs_download(tmp_path, model)
    found = finding_of(replace(model, repositories=("a/b",)), False, 10**12)
    assert found.words == f"not complete: {folder / 'transformer' / '1.safetensors'} is missing"


def test_a_folder_may_lack_what_an_option_replaces(tmp_path: Path) -> None:
    write(tmp_path, "transformer/0.safetensors", "vae/0.safetensors")
    write(tmp_path, *(f"text_encoder/{shard}" for shard in SHARDS[:2]))
    plain = replace(allow("flux2-klein-4b").default, path=str(tmp_path))
    with pytest.raises(ModelLoadError, match=SHARDS[2]):
        check_files(plain)
    with pytest.raises(ModelLoadError, match="is broken"):  # they are no weights
        check_files(with_options(plain, BuildOptions(small_text_encoder=True)))


# -- the cache of Hugging Face ---------------------------------------------------------------------


def files_of(model: Model, repository: str) -> dict[str, bytes]:
    """Weights of a repository: three shards and an index in each folder."""
    files: dict[str, bytes] = {}
    for pattern in loaded_patterns(model, repository):
        folder, _, name = pattern.rpartition("/")
        place = f"{folder}/" if folder else ""
        if "*" not in name:
            files[pattern] = pattern.encode()
            continue
        files |= {f"{place}{shard}": f"{place}{shard}".encode() for shard in SHARDS}
        if folder:
            files[f"{place}model.safetensors.index.json"] = INDEX
    return files


def fill(hub: FileHub, model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a model into the cache; returns the snapshots of its repositories."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    snapshots = []
    for repository in model.repositories:
        files = files_of(model, repository)
        commit = str(pinned(repository))
        for name, content in files.items():
            hub.files[repository, name] = content
        done = hub.run(FILL, repository, commit, *files)
        assert done.returncode == 0, done.stderr
        folder = f"models--{repository.replace('/', '--')}"
        snapshots.append(hub.cache / folder / "snapshots" / commit)
    return snapshots


def blob(path: Path) -> Path:
    assert path.is_symlink()
    return path.resolve()


def test_a_model_with_a_missing_empty_or_lost_file_is_downloaded_again(
    file_hub: FileHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = allow("flux2-klein-4b").default
    (snapshot,) = fill(file_hub, klein, monkeypatch)
    assert is_present(klein)
    assert not needs_download(tmp_path, klein)
    removed, empty, lost = (
        f"{folder}/{SHARD}" for folder in ("text_encoder", "transformer", "vae")
    )
    blob(snapshot / removed).unlink()
    (snapshot / removed).unlink()
    assert not is_present(klein)
    assert [file for _, _, file in unusable(klein)] == [removed]
    small = with_options(klein, BuildOptions(small_text_encoder=True))
    assert unusable(small) == []
    os.truncate(blob(snapshot / empty), 0)
    blob(snapshot / lost).unlink()
    assert unusable(klein) == [(KLEIN, snapshot, file) for file in (removed, empty, lost)]
    assert needs_download(tmp_path, klein)
    file_hub.requested.clear()
    done = file_hub.run(FETCH, klein.name, str(tmp_path))
    assert "flux2-klein-4b cannot be loaded" in done.stdout, "they are no weights"
    assert sorted(file_hub.requested) == [removed, empty, lost]
    assert is_present(klein)
    for file in (removed, empty, lost):
        assert (snapshot / file).read_bytes() == file.encode()
    assert {path.name for path in weight_files(klein)} == set(SHARDS)


def test_shards_without_an_index_are_downloaded_again_too(
    file_hub: FileHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the text encoder of Iris, mflux downloads no index, and takes one shard for all."""
    iris = allow("iris-3b").default
    _, encoder = fill(file_hub, iris, monkeypatch)
    assert is_present(iris)
    (encoder / SHARD).unlink()
    assert not is_present(iris)
    done = file_hub.run(FETCH, iris.name, str(tmp_path))
    assert is_present(iris), done.stdout + done.stderr


def test_a_file_that_the_repository_itself_lacks_does_not_end_the_download(
    file_hub: FileHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = allow("flux2-klein-4b").default
    (snapshot,) = fill(file_hub, klein, monkeypatch)
    for shard in (SHARDS[0], SHARD):
        (snapshot / "vae" / shard).unlink()
    del file_hub.files[KLEIN, f"vae/{SHARDS[0]}"]
    file_hub.run(FETCH, klein.name, str(tmp_path))
    assert unusable(klein) == [(KLEIN, snapshot, f"vae/{SHARDS[0]}")]


def test_a_folder_of_the_repository_without_weights_is_missing(
    file_hub: FileHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = allow("flux2-klein-4b").default
    (snapshot,) = fill(file_hub, klein, monkeypatch)
    for path in (snapshot / "transformer").iterdir():
        path.unlink()
    write(snapshot, "transformer/config.json")
    assert not is_present(klein)
    assert unusable(klein) == [], "mflux downloads the whole folder"


def test_an_empty_file_from_an_address_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mflux.cli.defaults import defaults

    from models.helpers import DEPTH_PRO
    from models.hub_cache import marked_as_incomplete

    monkeypatch.setattr(defaults, "MFLUX_CACHE_DIR", tmp_path)
    file = tmp_path / "depth_pro" / "depth_pro.pt"
    write(file.parent, file.name, content=b"")
    assert needs_download(tmp_path, DEPTH_PRO)
    with marked_as_incomplete(tmp_path, DEPTH_PRO):
        assert not file.exists(), "mflux would take it for the whole"
