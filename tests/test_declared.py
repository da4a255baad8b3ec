"""Models that the operator declares: folders that are recognized, repositories, commits, bits."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PlayedQueue, params_for
from fake_generator import FakeGenerator
from memory_stores import memory_store
from on_its_thread import OnItsThread

import commands
import configuration
from allowed import Allowed
from declared import Recognize, nothing_fits, read_allowed
from errors import BadOption, ModelLoadError, StoredOtherwise
from generation.recognition import fitting_models
from models import hub_cache
from models.hub_cache import needs_download, pinned
from models.mflux_registry import find_model, read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import Catalog, LoadSpec, Model
from models.repositories import FOLDERS
from models.tiny_models import ensure_checkpoint
from settings import Settings
from timing_model import TimingModel
from workers.worker import Worker

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
SOME = ("z-image", "flux2-klein-4b", "schnell", "iris-3b", "krea-2", "anima-turbo", "anima-base")


def models(*names: str) -> list[Model]:
    return [model for model in read_catalog().models if model.name in names]


def declared(*arguments: str, recognize: Recognize = nothing_fits) -> Allowed:
    settings = Settings.read(list(arguments), {})
    return read_allowed(
        read_catalog(),
        default=settings.model,
        allowed=settings.models,
        path=settings.path,
        fallback="noise-flux1",
        quantize=settings.quantize,
        quantize_choices=settings.quantize_choices,
        lora_dir=settings.lora_dir,
        allow_lora_repos=False,
        recognize=recognize,
    )


def fits(*names: str) -> Recognize:
    return lambda folder, catalog: (models(*names), "")


# -- folders ------------------------------------------------------------------------------------


def write_arrays(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a file of weights as mflux saves them, all zero: a hole that takes no disk."""
    header: dict[str, Any] = {
        "__metadata__": {"quantization_level": "None", "mflux_version": "0.24.0"}
    }
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def anima_folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names and shapes of Anima at its full size: 2 billion zeros."""
    prepare_mlx()
    from mflux.models.anima.anima_initializer import AnimaInitializer
    from mlx.utils import tree_flatten

    folder = tmp_path_factory.mktemp("weights") / "mine"
    tiny = ensure_checkpoint("noise-anima", data_dir)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny / tokenizer, folder / tokenizer)
    parts = SimpleNamespace()
    AnimaInitializer._init_models(parts)
    for name in ("vae", "transformer", "text_encoder"):
        arrays = tree_flatten(getattr(parts, name).parameters())
        write_arrays(folder / name / "0.safetensors", {path: array.shape for path, array in arrays})
    return folder


def test_a_folder_is_recognized_by_the_names_and_shapes_of_its_weights(anima_folder: Path) -> None:
    fitting, reason = fitting_models(anima_folder, Catalog(models(*SOME)))
    assert [model.name for model in fitting] == ["anima-turbo", "anima-base"]
    assert not reason
    only, _ = fitting_models(anima_folder, Catalog(models("schnell", "anima-base", "z-image")))
    assert [model.name for model in only] == ["anima-base"]


def test_what_mflux_save_notes_decides(anima_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(anima_folder / "tokenizer", tmp_path / "noted")
    (folder / "mflux_model.json").write_text('{"model_name": "my/anima", "base_model": "dev"}')
    fitting, _ = fitting_models(folder, Catalog(models("dev", "anima-base")))
    assert [model.name for model in fitting] == ["dev"]


def test_a_folder_that_lacks_weights_fits_nothing_and_says_what_it_lacks(
    anima_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(anima_folder, tmp_path / "half", copy_function=link)
    file = folder / "transformer" / "0.safetensors"
    from models.weight_files import read_header

    shapes = {name: array.shape for name, array in sorted(read_header(file).items())}
    file.unlink()
    write_arrays(file, dict(list(shapes.items())[: len(shapes) // 2]))
    fitting, reason = fitting_models(folder, Catalog(models("anima-base", "z-image")))
    assert fitting == []
    assert "as weights of anima-base they are not complete" in reason
    with pytest.raises(BadOption, match=r"not clear.*they are not complete.*half@BASE"):
        declared("--models", str(folder), recognize=lambda folder, catalog: ([], reason))


def link(source: str, target: str) -> str:
    Path(target).hardlink_to(source)
    return target


def test_a_folder_without_a_base_is_declared_by_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for arguments, name in (
        (("--models", str(folder)), "mine"),
        (("--models", f"x={folder}"), "x"),
    ):
        model = declared(*arguments, recognize=fits("dev")).default
        assert (model.name, model.key, model.path) == (name, "dev", str(folder))
    model = declared("--path", str(folder), recognize=fits("dev")).default
    assert (model.name, model.path) == ("dev", str(folder))
    named = declared("--path", str(folder), "--model", "schnell", recognize=fits("dev")).default
    assert named.name == "schnell"


def test_a_folder_that_may_be_of_several_models_is_refused_with_their_names(
    tmp_path: Path,
) -> None:
    with pytest.raises(BadOption, match=r"may be of dev, krea-dev: .*Say which with .*@BASE"):
        declared("--models", f"x={tmp_path}", recognize=fits("dev", "krea-dev"))
    with pytest.raises(BadOption, match=r"may be of dev, krea-dev: .*Say which with --model"):
        declared("--path", str(tmp_path), recognize=fits("dev", "krea-dev"))
    with pytest.raises(BadOption, match="not clear of which model"):
        declared("--models", str(tmp_path))


def test_the_server_recognizes_folders(anima_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(anima_folder, tmp_path / "noted", copy_function=link)
    (folder / "mflux_model.json").write_text('{"model_name": "anima-turbo"}')
    settings = Settings.read(["--models", f"fast={folder}"], {})
    assert configuration.allow(settings, has_gpu=False).default.key == "anima-turbo"


# -- repositories -------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face; pins are removed afterwards."""
    prepare_mlx()
    from mflux.models.common.resolution.model_revisions import ModelRevisions

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(hub_cache, "cache_dir", lambda: cache)
    monkeypatch.setattr(ModelRevisions, "PINNED", dict(ModelRevisions.PINNED))
    return cache


def put(hub: Path, commit: str = COMMIT, bits: str = "None") -> None:
    """The repository org/turbo is in the cache, at this commit."""
    snapshot = hub / "models--org--turbo" / "snapshots" / commit
    stored = b'"quantization_level": "%s"' % bits.encode()
    for part in FOLDERS["z_image"]:
        file = snapshot / part / "0.safetensors"
        write_arrays(file, {"a": (2, 2)})
        all_bytes = file.read_bytes().replace(b'"quantization_level": "None"', stored.ljust(28))
        file.write_bytes(all_bytes)


def test_a_repository_is_one_of_several_models(hub: Path, tmp_path: Path) -> None:
    allowed = declared("--models", "noise-flux1,fast=org/turbo@z-image-turbo,org/other@dev")
    fast = allowed.model("fast")
    assert (fast.key, fast.path, fast.base) == ("z-image-turbo", "org/turbo", "z-image-turbo")
    assert fast.repositories[0] == "Tongyi-MAI/Z-Image-Turbo"
    assert allowed.model("other").path == "org/other"
    assert needs_download(tmp_path, fast)
    put(hub)
    assert not needs_download(tmp_path, fast)


def test_the_download_of_a_declared_repository_knows_its_source(hub: Path, tmp_path: Path) -> None:
    entry = f"fast=org/turbo:{COMMIT}@z-image-turbo"
    fast = declared("--models", f"noise-flux1,{entry}").model("fast")
    spec = LoadSpec(fast, fast.pipelines[0], None)
    command = commands.download_command(tmp_path, spec)
    settings = Settings.read(command[2:], {})
    again = configuration.allow(
        replace(settings, model=settings.download), False, "--download"
    ).default
    assert (again.name, again.key, again.path) == ("fast", "z-image-turbo", "org/turbo")
    assert settings.models == (entry,)
    at_path = declared("--model", "schnell", "--path", f"org/turbo:{COMMIT}").default
    command = commands.download_command(tmp_path, LoadSpec(at_path, at_path.pipelines[0], None))
    assert Settings.read(command[2:], {}).path == f"org/turbo:{COMMIT}"


def test_a_commit_is_pinned(hub: Path, tmp_path: Path) -> None:
    fast = declared("--models", f"fast=org/turbo:{COMMIT}@z-image-turbo").default
    assert pinned("org/turbo") == COMMIT
    put(hub, OTHER_COMMIT)
    assert needs_download(tmp_path, fast), "another commit is none of it"
    put(hub, COMMIT)
    assert not needs_download(tmp_path, fast)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("fast=org/turbo", "say which model the repository org/turbo has weights of"),
        ("fast=org/turbo:main@dev", "a whole commit after ':', 40 hexadecimal digits"),
        ("fast=org/turbo:@dev", "a whole commit"),
        (f"a=org/turbo:{COMMIT}@dev,b=org/turbo:{OTHER_COMMIT}@dev", "several commits"),
        (f"a=org/turbo:{COMMIT}@dev,b=org/turbo@dev", "several commits"),
        ("fast=org/turbo@noise-flux1", "a BASE with real weights"),
        ("a/b/c@dev", "there is no folder a/b/c"),
        ("dev=org/turbo@dev", "a NAME of its own"),
    ],
)
def test_an_entry_that_is_not_clear_is_refused_with_a_sentence(
    entry: str, words: str, hub: Path
) -> None:
    with pytest.raises(BadOption, match=words):
        declared("--models", entry)


# -- bits ---------------------------------------------------------------------------------------


def test_bits_that_a_model_refuses_are_refused_at_the_start() -> None:
    for arguments in (("--model", "anima-base"), ("--models", "noise-flux1,anima-base")):
        with pytest.raises(BadOption, match="anima-base cannot be quantized to 3 bits"):
            declared(*arguments, "--quantize", "3")
    assert declared("--models", "all", "--quantize", "3"), "then only tasks with it are refused"


def test_a_task_is_named_by_the_bits_that_its_download_shows(hub: Path, tmp_path: Path) -> None:
    allowed = declared("--models", "noise-flux1,fast=org/turbo@z-image-turbo", "--quantize", "8")
    queue = PlayedQueue(
        allowed,
        TimingModel(),
        memory_store(),
        needs_download=lambda model: needs_download(tmp_path, model),
    )
    queue.load()
    task_id = queue.submit(params_for(model="fast", quantize=8))[0].task_id
    before = queue.status(task_id).stages[0].load_spec
    assert before.key == "fast/q8"
    put(hub, bits="4")
    queue.downloads.download_began(before, 0)
    queue.downloads.download_ended(before)
    (stage,) = queue.status(task_id).stages
    assert (stage.load_spec.key, stage.load_spec.quantize) == ("fast/q4", 4)
    other_id = queue.submit(params_for(model="fast", quantize=8))[0].task_id
    assert queue.status(other_id).stages[0].load_spec.key == "fast/q4"


def test_the_first_model_is_loaded_under_the_bits_that_its_download_shows(hub: Path) -> None:
    """The worker downloads it while it loads it."""
    allowed = declared("--path", "org/turbo", "--model", "z-image-turbo", "--quantize", "8")
    queue = PlayedQueue(allowed, TimingModel(), memory_store())

    class Downloading(FakeGenerator):
        def load(self, weights: LoadSpec, report: object = None) -> int | None:
            put(hub, bits="4")
            if weights.quantize != 4:
                raise StoredOtherwise("They are stored at 4 bits.")
            return super().load(weights) or 4

    generator = Downloading()
    worker = Worker(queue.worker, generator, lambda error: pytest.fail(str(error)))
    assert worker.load()
    assert generator.resident == ("z-image-turbo/q4",)


def test_weights_that_were_replaced_by_others_are_not_loaded_under_a_wrong_name(
    data_dir: Path, tmp_path: Path
) -> None:
    known = find_model("noise-flux2")
    assert known
    generating = OnItsThread(data_dir)
    folder = shutil.copytree(ensure_checkpoint("noise-flux2", data_dir), tmp_path / "mine")
    there = replace(known, path=str(folder))
    spec = LoadSpec(there, there.pipelines[0], 8)
    generating.load(spec)
    saved = tmp_path / "saved"
    generating.run(generating.pipeline(spec).save_model, str(saved))
    other = replace(known, path=str(saved))
    with pytest.raises(ModelLoadError, match="stored at 8 bits, not at 4"):
        generating.load(LoadSpec(other, other.pipelines[0], 4))
    assert generating.generator.resident == (spec.key,)
    generating.run(generating.generator.unload)
