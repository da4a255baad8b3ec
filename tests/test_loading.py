"""Weights that are damaged, incomplete or of another model, on copies of the tiny checkpoints."""

import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import allow, params_for, slow_except
from on_its_thread import OnItsThread
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from declared import read_allowed
from errors import ModelLoadError
from generation.load_errors import explain
from generation.loading import UnsuitableWeights
from models.mflux_registry import read_catalog
from models.mlx_setup import give_back_memory
from models.model_catalog import LoadSpec
from models.tiny_models import ensure_checkpoint
from models.weight_files import read_header

TINY, FLUX2, Z_IMAGE = (
    allow(name).default for name in ("noise-flux1", "noise-flux2", "noise-z-image")
)


def spec_of(model: str, path: Path | None = None, quantize: int | None = None) -> LoadSpec:
    known = allow(model).default
    there = replace(known, path=str(path) if path else None)
    return LoadSpec(there, known.pipelines[0], quantize)


def is_half_gone(folder: Path) -> None:
    """As if the second of two files had not been copied, and no index named it."""
    file = folder / "transformer" / "0.safetensors"
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    arrays = sorted(load_file(file).items())
    save_file(dict(arrays[: len(arrays) // 2]), file, metadata)


def is_truncated(folder: Path) -> None:
    file = folder / "transformer" / "0.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def is_empty(folder: Path) -> None:
    (folder / "transformer" / "0.safetensors").write_bytes(b"")


def lacks_a_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


@pytest.fixture
def generating(data_dir: Path) -> Iterator[OnItsThread]:
    one = OnItsThread(data_dir)
    yield one
    one.run(one.generator.unload)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (is_half_gone, "not complete: .* parameters of the transformer are missing"),
        (is_truncated, "0.safetensors is broken .it is truncated"),
        (is_empty, "0.safetensors is broken .it is empty"),
        (lacks_a_component, "vae"),
    ],
)
def test_a_damaged_model_is_refused_before_the_loaded_one_is_dropped(
    damage: Callable[[Path], None], words: str, generating: OnItsThread, tmp_path: Path
) -> None:
    tiny = spec_of("noise-flux1")
    before = generating.draw(tiny, params_for())
    folder = shutil.copytree(
        ensure_checkpoint("noise-flux2", generating.inputs), tmp_path / "damaged"
    )
    undamaged = spec_of("noise-flux2", folder)
    damage(folder)
    with pytest.raises(ModelLoadError, match=words) as refused:
        generating.load(undamaged)
    assert str(folder) in str(refused.value)
    assert generating.generator.resident == ("noise-flux1",)
    assert generating.draw(tiny, params_for()).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "model",
    slow_except(  # those with other names, and with the same names and other shapes
        ["flux2-klein-4b", "z-image"],
        ["flux2-klein-4b", "qwen-image", "z-image", "krea-2", "iris-3b"],
    ),
)
def test_weights_of_another_model_are_refused_from_their_names_and_shapes(
    model: str, generating: OnItsThread
) -> None:
    """The classes are as large as the real ones: nothing of them is evaluated."""
    import mlx.core as mx

    generating.draw(spec_of("noise-flux1"), params_for())
    foreign = spec_of(model, ensure_checkpoint("noise-z-image", generating.inputs))
    generating.run(mx.reset_peak_memory)
    with pytest.raises(ModelLoadError, match=r"of another model.*Name that one: --model"):
        generating.load(foreign)
    assert generating.generator.resident == ("noise-flux1",)
    assert generating.run(mx.get_peak_memory) < 200_000_000


def test_a_copy_of_a_model_draws_as_the_model_itself(
    generating: OnItsThread, tmp_path: Path
) -> None:
    folder = shutil.copytree(ensure_checkpoint("noise-flux1", generating.inputs), tmp_path / "copy")
    own = generating.draw(spec_of("noise-flux1"), params_for())
    generating.run(generating.generator.unload)
    assert generating.draw(spec_of("noise-flux1", folder), params_for()).tobytes() == own.tobytes()


def test_models_stay_together_in_memory_by_what_they_really_take(data_dir: Path) -> None:
    """The download of Z-Image has 31 GB; what is loaded here has a megabyte."""
    large = replace(FLUX2, weights_gb=31.0)
    specs = [
        spec_of("noise-flux1"),
        LoadSpec(large, large.pipelines[0], None),
        spec_of("noise-z-image"),
    ]
    generating = OnItsThread(data_dir, models_in_memory=3)
    generator = generating.generator
    generator.guard.limit_bytes = 10_000_000
    for spec in specs:
        generating.load(spec)
    assert list(generator.resident) == ["noise-z-image", "noise-flux2", "noise-flux1"]
    taken = generator.memory.loaded_bytes
    assert sum(taken.values()) == generator.memory.weights_bytes
    generator.guard.limit_bytes = int((taken["noise-flux2"] + taken["noise-z-image"]) / 0.75) + 1
    generating.load(specs[1])
    generating.run(generator._make_room, 0)
    generating.load(specs[0])
    assert generator.resident[0] == "noise-flux1"
    assert generator.memory.weights_bytes <= generator.memory.room_bytes
    generating.run(generator.unload)


def test_a_folder_that_is_stored_at_4_bits_is_named_and_loaded_so_whatever_is_requested(
    generating: OnItsThread, tmp_path: Path
) -> None:
    z_image = spec_of("noise-z-image", quantize=4)
    generating.load(z_image)
    folder = tmp_path / "saved"
    generating.run(generating.pipeline(z_image).save_model, str(folder))
    allowed = read_allowed(
        read_catalog(),
        default="mine",
        allowed=[f"mine={folder}@z-image"],
        path=None,
        fallback="noise-flux1",
        quantize=8,
        quantize_choices=[6],
        lora_dir=None,
        allow_lora_repos=False,
    )
    for quantize in (None, 8, 6):
        (stage,) = allowed.stages(params_for(model="mine", quantize=quantize))
        assert (stage.load_spec.key, stage.load_spec.quantize) == ("mine/q4", 4)
    there = replace(Z_IMAGE, path=str(folder), stored_bits=allowed.default.stored_bits)
    loaded = LoadSpec(there, there.pipelines[0], 8)
    generating.run(generating.generator.unload)
    assert generating.load(loaded) == 4
    assert generating.generator.resident == ("noise-z-image/q4",)
    assert generating.pipeline(loaded).transformer.layers[0].attention.to_q.bits == 4


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fragmented() -> tuple[int, int]:
    """Resident bytes of a process after most of its small blocks were freed, and after that."""
    blocks = [bytearray(b"1" * 64_000) for _ in range(4_000)]
    last = blocks.pop()
    blocks.clear()
    before = resident_bytes()
    give_back_memory()
    assert last
    return before, resident_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc of glibc")
def test_memory_that_malloc_keeps_is_given_back() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        before, after = process.submit(fragmented).result()
    assert before - after > 200_000_000


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"base": "dev", "name": "mine"}, "--models .mine=FOLDER@dev."),
        ({}, "with --path, or leave --path out"),
        ({"path": None}, "choose another model .--model."),
    ],
)
def test_the_message_about_weights_that_cannot_be_read_names_the_option_that_named_them(
    declared: dict[str, Any], words: str
) -> None:
    changes: dict[str, Any] = {"path": "/weights/mine", **declared}
    model = replace(allow("dev").default, **changes)
    weights = LoadSpec(model, model.pipelines[0], None)
    message = explain(FileNotFoundError(2, "No such file", "/weights/mine"), weights)
    assert re.search(words, message), message
    assert ("--path" in message) == ("base" not in declared), message
    foreign = explain(UnsuitableWeights("they are of another model"), weights)
    assert ("--models mine=/weights/mine@BASE" in foreign) == ("base" in declared), foreign


def test_weights_that_do_not_fit_are_refused_before_the_loaded_model_is_dropped(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generating = OnItsThread(data_dir)
    tiny, other = spec_of("noise-flux1"), spec_of("noise-flux2")
    generating.load(tiny)
    monkeypatch.setattr("generation.memory_guard.available_bytes", lambda: -(10**9))
    with pytest.raises(ModelLoadError, match=r"noise-flux2 take 0.0 GB of memory, and 0.0 GB can"):
        generating.load(other)
    assert generating.generator.resident == ("noise-flux1",)
    generating.generator.guard.on = False
    generating.load(other)
    generating.generator.guard.on = True
    generating.run(generating.generator.unload)
    generating.load(tiny)  # with nothing in memory, as at the start
    generating.run(generating.generator.unload)
    generating.generator.guard.limit_bytes = 0
    with pytest.raises(ModelLoadError, match=r"has 0\.0 GB for it: choose a smaller model"):
        generating.load(tiny)


def test_a_healthy_file_is_accepted_whatever_the_length_of_its_header(tmp_path: Path) -> None:
    """The length is the first of its bytes: 60 looks like the "<" of a web page."""
    described = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for low_byte in range(256):
        header = described.ljust(256 + low_byte)
        path = tmp_path / f"{low_byte}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert list(read_header(path)) == ["a"], low_byte
