"""The catalog names every repository that a class of mflux loads, and which files of it."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
from conftest import allow, slow_except

from declared import with_options
from generation.pipelines import build_class
from models import hub_cache, in_context
from models.build_options import PARTS, BuildOptions
from models.hub_cache import as_stored
from models.mflux_registry import read_catalog
from models.mflux_source import MfluxSource
from models.model_catalog import LoadSpec, Model
from models.repositories import FOLDERS, LOADED, SAVED_TOO, further, loaded_patterns

REAL = [model for model in read_catalog().models if not model.tiny]
BESIDE = [model for model in REAL if model.name in LOADED]
FAMILIES = sorted({model.family for model in REAL})
REPOSITORY = re.compile(r'REPO\w* = "([\w.-]+/[\w.-]+)"')
LENS = "mflux.models.lens.variants.txt2img.lens_image"
SNAPSHOTS = (
    "huggingface_hub",
    "mflux.models.z_image.variants.controlnet.transformer_controlnet",
)
"""Modules by whose function of the hub classes of mflux find a configuration."""
KLEIN = "black-forest-labs/FLUX.2-klein-4B"
ENCODER = "Qwen/Qwen3-VL-4B-Instruct"


@contextmanager
def recorded(folder: Path) -> Iterator[dict[str, set[str]]]:
    """Classes of mflux find every repository in an empty folder, and are built without weights.

    Yields:
        Repository -> patterns of the files that they have asked for.
    """
    from mflux.models.common.resolution.path_resolution import PathResolution
    from mflux.models.common.tokenizer.tokenizer_loader import TokenizerLoader
    from mflux.models.common.weights.loading.weight_applier import WeightApplier
    from mflux.models.common.weights.loading.weight_loader import WeightLoader

    asked: dict[str, set[str]] = {}

    def resolve(path: str | None, patterns: Any = None, saved_subdirs: Any = None) -> Path:
        if path != str(folder):
            assert path, "it is from no repository"
            asked.setdefault(path, set()).update(patterns or ["*.safetensors"])
        return folder

    def tokenizer(definition: Any, model_path: str) -> Any:
        resolve(model_path, definition.download_patterns or [f"{definition.hf_subdir}/**"])
        return MagicMock()

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def weights(*_: Any, **__: Any) -> Any:
        return MagicMock(), None, None

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (PathResolution, "resolve", resolve),
        (TokenizerLoader, "load", tokenizer),
        (WeightLoader, "_load_component", weights),
        (WeightApplier, "apply_and_quantize", nothing),
        (WeightApplier, "apply_and_quantize_single", nothing),
    )
    with ExitStack() as patches:
        for owner, name, instead in replaced:
            patches.enter_context(patch.object(owner, name, staticmethod(instead)))
        patches.enter_context(patch(f"{LENS}.LensGptOssEncoder"))  # reads its configuration
        patches.enter_context(patch("mlx.core.eval", nothing))
        for module in SNAPSHOTS:
            patches.enter_context(patch(f"{module}.snapshot_download", lambda *_, **__: folder))
        yield asked


def asked_by(model: Model, folder: Path) -> dict[str, set[str]]:
    """Builds the first class of a model, as far as it comes in an empty folder."""
    first = model.pipelines[0]
    strength = 1.0 if first.loads_control_strength else None
    with recorded(folder) as asked, suppress(Exception):
        build_class(LoadSpec(model, first, None, control_strength=strength), folder)
    return asked


@pytest.mark.parametrize("model", slow_except(BESIDE, REAL), ids=[one.name for one in REAL])
def test_a_class_loads_from_the_repositories_of_its_model_and_from_no_other_one(
    model: Model, tmp_path: Path
) -> None:
    asked = asked_by(model, tmp_path)
    first, *others = model.repositories
    if model.pipelines[0].name == "QwenImage21Controlnet":
        others.clear()  # it reads the configuration of the first one before
    assert set(asked) == {first, *others}
    weights = {pattern for pattern in asked[first] if pattern.endswith(".safetensors")}
    saved = {f"{folder}/*.safetensors" for folder in SAVED_TOO.get(model.pipelines[0].name, ())}
    assert set(loaded_patterns(model, first)) == weights - saved
    for repository, patterns in model.files.items():
        assert set(patterns) <= asked[repository], repository


@pytest.mark.parametrize("family", FAMILIES)
def test_each_repository_that_the_source_of_a_family_names_is_one_of_its_models(
    family: str,
) -> None:
    root: Path = MfluxSource()._root
    source = "".join(path.read_text("utf-8") for path in root.glob(f"models/{family}/**/*.py"))
    assert source
    parts = [part for (of, _), part in PARTS.items() if of == family]
    in_options = {repository for part in parts for repository in part.repositories}
    loras = {lora.name.partition(":")[0] for lora in (in_context.EDIT, in_context.style("font"))}
    named = set(REPOSITORY.findall(source)) - in_options - loras
    for model in (model for model in REAL if model.family == family):
        assert named <= set(model.repositories), model.name


def put(cache: Path, repository: str, file: str, size: int = 1) -> None:
    commit = hub_cache.pinned(repository) or "newest"
    folder = hub_cache._repository(repository)
    assert folder.is_relative_to(cache)
    blob = folder / "blobs" / file.replace("/", "-")
    link = folder / "snapshots" / commit / file
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(bytes(size))
    link.symlink_to(blob)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub_cache, "cache_dir", lambda: tmp_path)
    return tmp_path


def test_of_a_shared_repository_only_what_is_loaded_counts(cache: Path) -> None:
    lens, klein = allow("lens-turbo").default, allow("flux2-klein-4b").default
    small = replace(klein, options=BuildOptions(small_text_encoder=True))
    assert KLEIN in lens.repositories
    for repository in lens.repositories[:-1]:
        file = next(iter(lens.files.get(repository, ())), "") or "model.safetensors"
        put(cache, repository, file, 100)
    put(cache, KLEIN, "transformer/diffusion_pytorch_model.safetensors", 1000)
    put(cache, KLEIN, "vae/config.json")
    assert not hub_cache.is_present(lens), "its decoder is missing"
    assert hub_cache.bytes_on_disk(lens) == 200
    put(cache, KLEIN, "vae/diffusion_pytorch_model.safetensors", 10)
    assert hub_cache.is_present(lens)
    assert hub_cache.bytes_on_disk(lens) == 210
    assert sorted(path.parent.name for path in hub_cache.weight_files(lens))[-1] == "vae"
    assert len(hub_cache.weight_files(lens)) == 3
    assert not hub_cache.is_present(klein), "its text encoder is missing"
    assert hub_cache.bytes_on_disk(klein) == 1011
    (part,) = hub_cache._snapshots(KLEIN)
    (part / "transformer").rename(part / "elsewhere")
    for one in small.parts:
        for repository, (file,) in one.repositories.items():
            put(cache, repository, file)
    assert not hub_cache.is_present(small), "only its decoder was downloaded"


def test_a_download_of_a_part_is_counted_while_it_runs(cache: Path) -> None:
    iris = allow("iris-3b").default
    put(cache, "speridlabs/iris-3b", "turbo/model.safetensors", 100)
    assert not hub_cache.is_present(iris), "its text encoder is missing"
    put(cache, ENCODER, "model-00001-of-00002.safetensors", 20)
    partial = hub_cache._repository(ENCODER) / "blobs" / "second.incomplete"
    partial.write_bytes(bytes(3))
    assert not hub_cache.is_present(iris)
    assert hub_cache.bytes_on_disk(iris) == 123
    assert hub_cache.partial_files(iris) == {partial}
    partial.unlink()
    assert not hub_cache.is_present(iris), "one of two files is missing"
    put(cache, ENCODER, "model-00002-of-00002.safetensors", 20)
    assert hub_cache.is_present(iris)
    assert not hub_cache.is_present(allow("iris-3b-base").default), "another file is its weights"


def test_saved_weights_of_a_family_that_is_saved_whole_need_nothing_else(cache: Path) -> None:
    anima = replace(allow("anima-turbo").default, path="somebody/anima-q4")
    put(cache, "somebody/anima-q4", "transformer/0.safetensors")
    assert hub_cache.is_present(anima)
    redux = replace(allow("dev-redux").default, path="somebody/dev-q4")
    for part in FOLDERS["flux"]:
        put(cache, "somebody/dev-q4", f"{part}/0.safetensors")
    for part in ("image_encoder", "image_embedder"):
        assert not hub_cache.is_present(redux)
        put(cache, "black-forest-labs/FLUX.1-Redux-dev", f"{part}/model.safetensors")
    assert hub_cache.is_present(redux)


def test_a_folder_of_lens_needs_the_encoder_and_the_decoder_besides(cache: Path) -> None:
    lens = replace(allow("lens-turbo").default, path=str(cache / "mine"), name="mine")
    (cache / "mine").mkdir()
    put(cache, KLEIN, "vae/diffusion_pytorch_model.safetensors")
    assert hub_cache.needs_download(cache, lens)
    put(cache, lens.repositories[1], "model.safetensors")
    assert not hub_cache.needs_download(cache, lens)


def test_a_folder_needs_a_controlnet_unless_mflux_has_saved_one_there(cache: Path) -> None:
    folder = cache / "mine"
    controlled = replace(allow("schnell-controlnet-canny").default, path=str(folder))
    (folder / "transformer_controlnet").mkdir(parents=True)
    assert hub_cache.needs_download(cache, controlled)
    (folder / "transformer_controlnet" / "0.safetensors").write_bytes(b"x")
    assert not hub_cache.needs_download(cache, controlled)
    depth = replace(allow("krea-2-controlnet-depth").default, path=str(folder))
    assert hub_cache.needs_download(cache, depth), "mflux never saves this one"
    put(cache, depth.repositories[1], "model.safetensors")
    assert not hub_cache.needs_download(cache, depth)


@pytest.mark.parametrize("model", REAL, ids=[one.name for one in REAL])
def test_the_memory_of_a_folder_counts_what_is_loaded_from_elsewhere(
    model: Model, cache: Path
) -> None:
    """A folder with another file of 8 KB in each repository that the model could need."""
    folder = cache / "mine"
    mine = replace(model, path=str(folder), name="mine", base=model.key)
    write_array(folder / "text_encoder" / "0.safetensors", 4000)
    for repository in model.repositories:
        for pattern in loaded_patterns(model, repository) or ("model.safetensors",):
            if pattern.endswith(".safetensors"):
                write_array(cached(repository, pattern.replace("*", "model")), 8000)
            else:
                put(cache, repository, pattern)
    beside = further(mine, folder)
    patterns = [p for name in beside for p in loaded_patterns(mine, name) or ("model.safetensors",)]
    expected = 4000 + 8000 * sum(pattern.endswith(".safetensors") for pattern in patterns)
    stored = as_stored(mine)
    assert stored.loaded_shares
    spec = LoadSpec(stored, model.pipelines[0], None)
    assert expected <= spec.expected_bytes < expected * 1.1


@pytest.mark.parametrize("model", slow_except(BESIDE, REAL), ids=[one.name for one in REAL])
def test_with_a_folder_a_class_loads_only_what_its_model_needs_beside_it(
    model: Model, tmp_path: Path
) -> None:
    mine = replace(model, path=str(tmp_path), name="mine", base=model.key)
    asked = asked_by(mine, tmp_path)
    expected = set(further(mine, tmp_path))
    if model.pipelines[0].name == "QwenImage21Controlnet":
        expected.clear()  # it reads the configuration in the folder before
    assert set(asked) == expected


@pytest.mark.parametrize(("family", "option"), PARTS, ids=lambda value: value)
def test_the_memory_of_a_folder_counts_the_small_parts_once(
    family: str, option: str, cache: Path
) -> None:
    folder = cache / "mine"
    model = next(m for m in REAL if m.family == family and option in m.pipelines[0].options)
    small = {name: name == option for name in ("small_text_encoder", "small_decoder")}
    mine = with_options(replace(model, path=str(folder)), BuildOptions(None, **small))
    for part in FOLDERS[family]:
        write_array(folder / part / "0.safetensors", 4000)
    (part_of,) = mine.parts
    for repository, files in part_of.repositories.items():
        for file in files:
            write_array(cached(repository, file), 8000)
    stored = as_stored(mine)
    assert stored.loaded_shares
    added = part_of.dense_gb + part_of.quantized_gb - part_of.replaced_gb
    expected = LoadSpec(stored, model.pipelines[0], None).expected_bytes - added * 1e9
    assert 4000 * len(FOLDERS[family]) <= expected < 4400 * len(FOLDERS[family])


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", ["flux2-klein-4b", "qwen-image-2.1"])
def test_a_text_encoder_that_is_replaced_counts_the_same_whether_it_is_there_or_not(
    name: str, bits: int | None, cache: Path
) -> None:
    small = BuildOptions(small_text_encoder=True)
    model = with_options(allow(name).default, small)
    by_facts = LoadSpec(model, model.pipelines[0], bits).expected_bytes
    (part,) = model.parts
    for repository, files in part.repositories.items():
        for file in files:
            write_array(cached(repository, file), 64)
    found = []
    for folders in (("vae", "transformer"), ("vae", "transformer", "text_encoder")):
        folder = cache / "-".join(folders)
        for one in folders:
            write_rows(folder / one / "0.safetensors", part.replaced_gb)
        mine = with_options(as_stored(replace(allow(name).default, path=str(folder))), small)
        found.append(LoadSpec(as_stored(mine), model.pipelines[0], bits).expected_bytes)
    assert found[0] == pytest.approx(found[1], rel=0.01)
    added = part.dense_gb + part.quantized_gb * (1 if bits is None else (bits + 0.5) / 16)
    assert min(*found, by_facts) > added * 1e9


def write_rows(path: Path, gigabytes: float) -> None:
    """Writes a header whose matrix has this size. Its numbers take no room on the disk."""
    rows = int(gigabytes * 1e9 / 2 / 4096)
    place = [0, rows * 4096 * 2]
    said = {"a": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": place}}
    header = json.dumps(said).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + place[1])


def cached(repository: str, file: str) -> Path:
    """Where a file of a repository is in the cache."""
    commit = hub_cache.pinned(repository) or "newest"
    return hub_cache._repository(repository) / "snapshots" / commit / file


def write_array(path: Path, size: int) -> None:
    """Args: size: bytes of its only array, of 16 bits. The header comes before it."""
    import numpy as np
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": np.zeros(size // 2, np.float16)}, path)
