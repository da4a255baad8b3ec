"""Options of mflux's constructors: which models have them, and that nothing is mixed up."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import PlayedQueue, allow, params_for, slow_except
from on_its_thread import OnItsThread
from test_applied_loras import loaded_of, write_lora

import commands
from allowed import Allowed
from api.models_api import model_answer
from cluster.messages import PROTOCOL, Heartbeat, Registration
from cluster.messages import Model as Registered
from cluster.remote_machine import RemoteMachine
from declared import with_options
from generation.loading import bytes_of
from models.build_options import NO_OPTIONS, PARTS, BuildOptions
from models.hub_cache import as_stored, is_present, needs_download, source_folders
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec, Lora, Model
from models.tiny_models import ensure_checkpoint
from models.weights_cache import WeightsCache
from option_values import COMPUTE_PRECISIONS
from scheduler.estimates import Estimates
from storage.task_store import TaskStore
from task import Stage
from timing.speeds import Product
from timing_model import TimingModel

FLOAT16 = BuildOptions("float16")
ALL = BuildOptions("float16", small_text_encoder=True, small_decoder=True, low_ram=True)
SMALL = params_for(width=64, height=64, steps=2)


def spec_of(name: str, options: BuildOptions, bits: int | None = None) -> LoadSpec:
    model = with_options(allow(name).default, options)
    return LoadSpec(model, model.pipelines[0], bits)


@pytest.fixture
def generating(data_dir: Path) -> Iterator[OnItsThread]:
    one = OnItsThread(data_dir)
    yield one
    one.run(one.generator.unload)


def kinds_of(generating: OnItsThread, module: Any, *words: str) -> set[Any]:
    """Types of the parameters of a module whose names have these words."""
    from mlx.utils import tree_flatten

    arrays = generating.run(lambda: tree_flatten(module.parameters()))
    return {array.dtype for name, array in arrays if all(word in name for word in words)}


def attention_layer(
    generating: OnItsThread, spec: LoadSpec
) -> tuple[dict[str, str], tuple[int, int]]:
    """Keys of a LoRA on a layer of the attention, and the size of the layer."""
    loaded = loaded_of(generating, spec)
    for layer, size in loaded.layer_sizes.items():
        keys = {
            match.matrix_name: pattern.replace("{block}", "0")
            for pattern, matches in loaded._loras.places[0].keys.items()
            for match in matches
            if match.target_path.replace("{block}", "0") == layer and match.transform is None
        }
        if "attn" in layer and "lora_A" in keys:
            return keys, size
    raise AssertionError("no layer of the attention takes a LoRA")


def hub(folder: Path) -> Any:
    return patch("huggingface_hub.constants.HF_HUB_CACHE", str(folder))


def add_file(folder: Path, repository: str, name: str) -> None:
    from mflux.models.common.resolution.model_revisions import ModelRevisions

    commit = ModelRevisions.get(repository) or "0" * 40
    place = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / commit / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"x")


def test_the_choices_and_repositories_are_those_of_mflux() -> None:
    from mflux.models.common.compute_precision import ComputePrecision
    from mflux.models.flux2.model.flux2_text_encoder import small_text_encoder as small
    from mflux.models.flux2.model.flux2_vae import small_decoder
    from mflux.models.qwen21.model.qwen21_small_text_encoder.zen_image_edit_weights import (
        ZenImageEditWeights,
    )

    encoder = "text_encoder/model.safetensors"
    assert tuple(ComputePrecision.CHOICES) == COMPUTE_PRECISIONS
    assert {part: dict(PARTS[part].repositories) for part in PARTS} == {
        ("flux2", "small_text_encoder"): {
            small.SMALL_ENCODER_REPO: ("model.safetensors",),
            small.ADAPTER_REPO: (small.ADAPTER_FILE,),
        },
        ("flux2", "small_decoder"): {
            small_decoder.SMALL_DECODER_REPO: (small_decoder.SMALL_DECODER_FILE,)
        },
        ("qwen21", "small_text_encoder"): {ZenImageEditWeights.REPO: (encoder,)},
    }
    assert encoder in ZenImageEditWeights.SNAPSHOT_PATTERNS


def test_each_model_has_the_options_of_its_classes() -> None:
    from mflux.models.common.config.model_config import AVAILABLE_MODELS
    from mflux.models.flux2.flux2_initializer import Flux2Initializer

    found: dict[str, set[str]] = {}
    for model in read_catalog().models:
        for pipeline in model.pipelines:
            found.setdefault(model.family, set()).update(pipeline.options)
            if model.family == "flux2" and not model.tiny:
                supported = Flux2Initializer.supports_small_text_encoder(
                    AVAILABLE_MODELS[model.key]
                )
                assert ("small_text_encoder" in pipeline.options) == supported, model.name
    assert {family: names for family, names in found.items() if names} == {
        "anima": {"compute_precision"},
        "flux2": {"compute_precision", "small_text_encoder", "small_decoder"},
        "flux3": {"compute_precision"},
        "ming_image": {"low_ram"},
        "qwen21": {"compute_precision", "small_text_encoder"},
        "z_image": {"compute_precision"},
    }


@pytest.mark.parametrize(
    "name",
    slow_except(
        ["noise-flux2"],
        ["noise-flux2", "noise-flux3", "noise-z-image", "noise-qwen21", "noise-anima"],
    ),
)
def test_the_precision_arrives_in_the_class_and_changes_the_image(
    name: str, generating: OnItsThread
) -> None:
    import mlx.core as mx

    plain, other = spec_of(name, NO_OPTIONS), spec_of(name, FLOAT16)
    asked = SMALL.model_copy(update={"guidance": None})
    before = generating.draw(plain, asked)
    after = generating.draw(other, asked)
    built = generating.pipeline(other)
    assert built.compute_precision.dtype == mx.float16
    assert generating.generator.resident == (f"{name}/float16",)
    assert mx.float16 in kinds_of(generating, built.transformer)
    assert before.tobytes() != after.tobytes()


def test_a_lora_is_computed_in_the_same_precision(generating: OnItsThread, tmp_path: Path) -> None:
    import mlx.core as mx

    spec = spec_of("noise-flux2", FLOAT16)
    generating.load(spec)
    before = generating.draw(spec, SMALL)
    lora = Lora(str(tmp_path / "one.safetensors"))
    write_lora(Path(lora.name), *attention_layer(generating, spec), 1)
    with_lora = LoadSpec(spec.model, spec.pipeline, None, (lora,))
    drawn = generating.draw(with_lora, SMALL)
    assert drawn.tobytes() != before.tobytes()
    transformer = generating.pipeline(spec).transformer
    assert kinds_of(generating, transformer, "lora", "attn") == {mx.float16}
    assert generating.draw(spec, SMALL).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("name", "option", "loader"),
    [
        (
            "noise-flux2",
            "small_decoder",
            "mflux.models.flux2.flux2_initializer.Flux2SmallDecoderLoader.with_small_decoder",
        ),
        (
            "noise-qwen21",
            "small_text_encoder",
            "mflux.models.qwen21.qwen21_initializer.Qwen21SmallTextEncoder.load",
        ),
    ],
)
def test_mflux_is_asked_for_the_small_part(
    name: str, option: str, loader: str, generating: OnItsThread, data_dir: Path
) -> None:
    """Its weights are on Hugging Face only: mflux's function that reads them is replaced."""
    model = allow(name).default
    able = tuple(replace(one, options=one.options | {option}) for one in model.pipelines)
    options = ALL.of({option})
    chosen = with_options(replace(model, pipelines=able), options)
    spec = LoadSpec(chosen, chosen.pipelines[0], None)
    other = generating.run(lambda: _text_encoder_of(generating, name))
    asked = []

    def small(*values: Any, **named: Any) -> Any:
        asked.append(values)
        return values[0] if values else other

    with patch(loader, small):
        generating.load(spec)
    assert len(asked) == 1
    assert getattr(generating.pipeline(spec), option) is True
    assert generating.generator.resident == (f"{name}/{option}",)


def _text_encoder_of(generating: OnItsThread, name: str) -> Any:
    spec = spec_of(name, NO_OPTIONS)
    generating.generator.load(spec)
    pipeline = generating.pipeline(spec)
    return pipeline.text_encoder, pipeline.tokenizers


def test_low_ram_arrives_in_ming_image() -> None:
    from generation.pipelines import build_class

    spec = spec_of("ming-image", ALL)
    module = importlib.import_module(spec.pipeline.module)
    with patch.object(module.MingImageInitializer, "init", lambda **_: None):
        assert build_class(spec, Path()).low_ram is True
        assert build_class(spec_of("ming-image", NO_OPTIONS), Path()).low_ram is False


def test_a_model_without_an_option_is_unaffected() -> None:
    for name in ("schnell", "qwen-image", "noise-flux1", "seedvr2-3b"):
        model = allow(name).default
        assert with_options(model, ALL) is model
    nine, four = (with_options(allow(f"flux2-klein-{size}").default, ALL) for size in ("9b", "4b"))
    assert nine.options.in_use == ("compute_precision", "small_decoder")
    assert four.options.in_use == ("compute_precision", "small_text_encoder", "small_decoder")


def test_two_settings_share_no_times_memory_or_copies(tmp_path: Path) -> None:
    settings = [
        NO_OPTIONS,
        FLOAT16,
        BuildOptions(small_decoder=True),
        BuildOptions(small_text_encoder=True),
        ALL,
    ]
    specs = [spec_of("flux2-klein-4b", options, 4) for options in settings]
    estimates = Estimates(TimingModel())
    cache = WeightsCache(tmp_path, 10**9)
    assert len({spec.key for spec in specs}) == len(settings)
    assert len({estimates.load_key(spec) for spec in specs}) == len(settings)
    stages = [Stage(spec, SMALL.model_copy(update={"quantize": 4})) for spec in specs]
    assert len({estimates.timing_key(stage) for stage in stages}) == len(settings)
    assert [cache.takes(spec) for spec in specs] == [True, False, False, False, False]
    from generation.memory_guard import _phases

    assert len({_phases(stage, None) for stage in stages}) == len(settings)


def test_a_small_text_encoder_sees_no_pictures() -> None:
    plain, small = (spec_of("qwen-image-2.1", o).model for o in (NO_OPTIONS, ALL))
    assert plain.takes - small.takes == {"auto_mask", "verify_retries"}


def test_small_parts_are_downloaded_with_their_model(tmp_path: Path) -> None:
    plain, small = (spec_of("flux2-klein-4b", o).model for o in (NO_OPTIONS, ALL))
    with hub(tmp_path):
        for folder in ("transformer", "vae"):
            assert not is_present(plain)
            add_file(tmp_path, plain.repositories[0], f"{folder}/model.safetensors")
        assert not is_present(plain), "it was downloaded without its own text encoder"
        assert needs_download(tmp_path, small)
        for part in small.parts:
            for repository, files in part.repositories.items():
                assert not is_present(small)
                add_file(tmp_path, repository, files[0])
        assert is_present(small)
        assert len(source_folders(small)) == 4
        add_file(tmp_path, plain.repositories[0], "text_encoder/model.safetensors")
        assert is_present(plain)
    assert plain.download_bytes == 15e9
    assert small.download_bytes == pytest.approx(10.05e9)
    command = commands.download_command(tmp_path, LoadSpec(small, small.pipelines[0], 4))
    assert {"--small-text-encoder", "--small-decoder"} < set(command)


def test_a_folder_of_weights_needs_its_small_parts_too(tmp_path: Path) -> None:
    mine = replace(spec_of("flux2-klein-9b", ALL).model, path=str(tmp_path), name="mine")
    with hub(tmp_path / "hub"):
        assert needs_download(tmp_path, mine)
        assert as_stored(mine) is mine
        ((repository, files),) = mine.parts[0].repositories.items()
        add_file(tmp_path / "hub", repository, files[0])
        assert not needs_download(tmp_path, mine)


@pytest.mark.parametrize(("bits", "gigabytes"), [(None, 9.3), (8, 5.4), (4, 3.3)])
def test_the_memory_with_a_small_text_encoder_is_what_mflux_has_measured(
    bits: int | None, gigabytes: float
) -> None:
    spec = spec_of("flux2-klein-4b", BuildOptions(small_text_encoder=True), bits)
    assert spec.expected_bytes / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_models_tell_their_options(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    queue = PlayedQueue(allow("noise-flux2"), TimingModel(), store)
    model = spec_of("noise-flux2", FLOAT16).model
    answer = model_answer(model, queue.scheduler.allowed, queue.health())
    assert answer.options == ["compute_precision"]
    assert answer.options_in_use == ["compute_precision"]
    flux = model_answer(allow("schnell").default, queue.scheduler.allowed, queue.health())
    assert (flux.options, flux.options_in_use) == ([], [])
    store.close()


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(
    "name",
    slow_except(["noise-ernie"], ["noise-anima", "noise-krea2", "noise-qwen21", "noise-ernie"]),
)
def test_weights_take_the_memory_that_their_headers_say(
    name: str, bits: int | None, generating: OnItsThread, data_dir: Path
) -> None:
    """Before they are loaded for the first time, whatever mflux leaves unquantized."""
    spec = _at_folder(allow(name).default, ensure_checkpoint(name, data_dir), bits)
    assert spec.model.loaded_shares
    generating.load(spec)
    taken = generating.run(bytes_of, generating.pipeline(spec))
    assert spec.expected_bytes == pytest.approx(taken, rel=0.1)


def _at_folder(model: Model, folder: Path, bits: int | None) -> LoadSpec:
    real = replace(model, path=str(folder), repositories=("org/name",))
    stored = as_stored(real)
    return LoadSpec(replace(stored, repositories=()), model.pipelines[0], bits)


def test_a_worker_with_other_options_gets_no_tasks_of_the_model(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    plain, tiny = allow("noise-flux2", "noise-flux1").models
    both = Allowed(with_options(plain, FLOAT16), (with_options(plain, FLOAT16), tiny))
    queue = PlayedQueue(both, TimingModel(), store)
    first, second = (
        queue.submit(params_for(model=name))[0] for name in ("noise-flux2", "noise-flux1")
    )
    allows = {}
    for suffix in ("", FLOAT16.suffix):
        models = [Registered(name="noise-flux2", options=suffix), Registered(name="noise-flux1")]
        remote = RemoteMachine.registered(heartbeat(models), queue.scheduler)
        allows[suffix] = [remote.allows(task) for task in (first, second)]
    assert allows == {"": [False, True], "/float16": [True, True]}
    store.close()


def heartbeat(models: list[Registered]) -> Heartbeat:
    registration = Registration(
        name="other",
        hardware="a",
        system="b",
        memory_bytes=10**9,
        speeds=dict.fromkeys(Product, 1e12),
        versions={},
        models=models,
        bits=[None],
        loras=[],
        lora_repos=False,
        models_in_memory=1,
    )
    return Heartbeat(
        worker="0" * 32,
        session="s",
        protocol=PROTOCOL,
        registration=registration,
        resident=[],
        held=[],
    )
