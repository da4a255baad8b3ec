"""Each error about weights, adapters, bits and memory names its cause and what to do about it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import allow, params_for
from on_its_thread import OnItsThread
from safetensors.numpy import load_file, save_file
from test_declared import declared, fits
from test_loading import is_half_gone, is_truncated, spec_of

from allowed import Allowed
from errors import BadOption, ModelLoadError, ServerError
from generation import memory_guard
from generation.load_errors import explain, too_little_memory
from generation.memory_guard import MemoryGuard
from models import tiny_models
from models.model_catalog import LoadSpec, Lora
from models.tiny_models import ensure_checkpoint
from task import Stage

ADAPTER = "Leave it out, choose another one (GET /models says which fit), or replace its file"


@pytest.fixture(scope="module")
def generating(data_dir: Path) -> Iterator[OnItsThread]:
    one = OnItsThread(data_dir, models_in_memory=2)
    one.load(spec_of("noise-flux2"))
    one.load(spec_of("noise-flux1"))
    yield one
    one.run(one.generator.unload)


@pytest.fixture
def folder(tmp_path: Path, generating: OnItsThread) -> Path:
    return shutil.copytree(ensure_checkpoint("noise-flux2", generating.inputs), tmp_path / "mine")


# -- adapters --------------------------------------------------------------------------------------


def is_a_web_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html>")


def is_for_another_model(path: Path) -> None:
    tiny_models.write_lora(path, "noise-flux1")


def is_not_numbers(path: Path) -> None:
    save_file({key: array * np.nan for key, array in load_file(path).items()}, path)


def has_half_of_a_pair(path: Path) -> None:
    save_file(dict(sorted(load_file(path).items())[:1]), path)


def has_other_sizes(path: Path) -> None:
    arrays = load_file(path)
    smaller = {key: a[:, :4] if key.endswith("A.weight") else a for key, a in arrays.items()}
    save_file(smaller, path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (is_a_web_page, "it is a web page"),
        (is_for_another_model, "it is for another one"),
        (is_not_numbers, "not numbers (NaN or infinity)"),
        (has_half_of_a_pair, "one of its two matrices only"),
        (has_other_sizes, "the model's layer needs"),
        (Path.unlink, "No such file"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_named_with_the_cause_and_what_to_do(
    change: Callable[[Path], None], cause: str, generating: OnItsThread, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    tiny_models.write_lora(path, "noise-flux2")
    change(path)
    spec = replace(spec_of("noise-flux2"), loras=(Lora(str(path)),))
    with pytest.raises(ServerError) as refused:
        generating.run(generating.generator.apply_adapters, spec)
    message = str(refused.value)
    assert "mine" in message
    assert cause in message
    assert ADAPTER in message
    assert "--lora-dir" in message


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "name", "cause", "advice"),
    [
        (is_truncated, "noise-flux2", "0.safetensors is broken (it is truncated", "replace it: "),
        (is_half_gone, "noise-flux2", "they are not complete", "Copy or download them again"),
        (shutil.rmtree, "dev", "there is no folder", "leave --path out"),
        (shutil.rmtree, "mine=dev", "there is no folder", "in --models (mine=FOLDER@dev)"),
    ],
)
def test_weights_that_cannot_be_loaded_are_named_with_the_cause_and_what_to_do(
    damage: Callable[[Path], None],
    name: str,
    cause: str,
    advice: str,
    *,
    generating: OnItsThread,
    folder: Path,
) -> None:
    damage(folder)
    own, _, base = name.rpartition("=")
    spec = spec_of(base, folder)
    if own:
        spec = replace(spec, model=replace(spec.model, name=own, base=base))
    with pytest.raises(ModelLoadError) as refused:
        generating.load(spec)
    message = str(refused.value)
    assert cause in message
    assert advice in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("name", "base", "advice"),
    [
        ("z-image", None, "Name that one: --model,"),
        ("mine", "z-image", "Name that one: --models mine="),
    ],
)
def test_weights_of_another_model_are_refused_with_the_option_that_names_it(
    name: str, base: str | None, advice: str, generating: OnItsThread, folder: Path
) -> None:
    spec = spec_of("z-image", folder)
    spec = replace(spec, model=replace(spec.model, name=name, base=base))
    with pytest.raises(ModelLoadError) as refused:
        generating.load(spec)
    assert "of another model" in str(refused.value)
    assert advice in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "recognized", "cause", "advice"),
    [
        (("--models", "org/turbo"), (), "the repository org/turbo", "turbo=org/turbo@BASE"),
        (("--models", "{folder}"), (), "not clear of which model", "with --models {folder}@BASE"),
        (
            ("--models", "{folder}"),
            ("z-image", "z-image-turbo"),
            "may be of z-image, z-image-turbo",
            "with --models {folder}@BASE",
        ),
        (("--path", "{folder}"), (), "not clear of which model", "with --model"),
        (("--models", "{folder}/none"), (), "no folder {folder}/none", "--models"),
        (
            ("--model", "noise-flux1", "--path", "{folder}"),
            (),
            "builds its own weights",
            "--model which",
        ),
        (("--lora-dir", "{folder}/none"), (), "no folder {folder}/none", "--lora-dir"),
        (("--model", "fluks"), (), "no model 'fluks'", "docs/models.md"),
        (("--model", "anima-base", "--quantize", "3"), (), "3 bits", "--quantize"),
    ],
)
def test_an_option_about_models_is_refused_with_the_cause_and_what_to_write(
    arguments: tuple[str, ...],
    recognized: tuple[str, ...],
    cause: str,
    advice: str,
    folder: Path,
) -> None:
    with pytest.raises(BadOption) as refused:
        declared(*(one.format(folder=folder) for one in arguments), recognize=fits(*recognized))
    message = str(refused.value)
    assert cause.format(folder=folder) in message
    assert advice.format(folder=folder) in message


def test_bits_that_are_not_allowed_are_refused_with_those_that_are() -> None:
    offer = Allowed(
        allow("noise-flux1").default, allow("noise-flux1").models, quantize=4, quantize_choices=(8,)
    )
    with pytest.raises(ServerError, match=r"5 is not allowed on this server. Allowed: 4, 8\."):
        offer.bits(5)


# -- memory ----------------------------------------------------------------------------------------


def stage_of(spec: LoadSpec, side: int = 64, **params: Any) -> Stage:
    return Stage(spec, params_for(width=side, height=side, **params))


@pytest.mark.parametrize(
    ("limit_gb", "side", "bits", "changes", "advice"),
    [
        (8.0, 4096, (3, 4), {}, ": ask for a smaller picture."),
        (7.0, 1024, (), {}, "a smaller picture, or start the server with --quantize 8."),
        (7.0, 1024, (3, 4), {}, "a smaller picture, or set quantize to 4."),
        (2.2, 1024, (3, 4), {"quantize": 3}, ": ask for a smaller picture."),
        (7.0, 1024, (3, 4), {"stored_bits": 8}, ": ask for a smaller picture."),
        (5.5, 1024, (3, 4), {}, ": set quantize to 4."),
        (1.5, 1024, (3, 4), {}, ": choose a smaller model."),
        (6.5, 64, (3, 4), {"prompt": 99_999 * "x"}, ": ask for a shorter prompt, or set quantize"),
        (4.0, 64, (3, 4), {"prompt": 99_999 * "x"}, ": set quantize to 4."),
        (2.5, 64, (4,), {"prompt": 99_999 * "x", "quantize": 4}, ": ask for a shorter prompt."),
    ],
)
def test_the_refusal_of_a_picture_says_what_would_make_it_fit(
    limit_gb: float, side: int, bits: tuple[int, ...], changes: dict[str, Any], advice: str
) -> None:
    prompt, stored_bits = changes.get("prompt", "x"), changes.get("stored_bits")
    model = replace(allow("anima-turbo").default, weights_gb=5.6, stored_bits=stored_bits)
    spec = LoadSpec(model, model.pipelines[0], changes.get("quantize"))
    stage = stage_of(spec, side, prompt=prompt)
    refusal = MemoryGuard(int(limit_gb * 1e9), gpu=True, bits=bits).plan(stage).refusal or ""
    cause = "a prompt of 4096 tokens" if len(prompt) > 1 else f"A picture of {side} x {side}"
    assert cause in refusal
    assert " GB of memory" in refusal
    assert "(--memory-limit)" in refusal
    assert advice in refusal, refusal


def test_the_refusal_of_an_upscaling_advises_a_smaller_factor() -> None:
    """The bits of the upscaler are the operator's, and its weights are small beside a picture."""
    model = allow("seedvr2-3b").default
    spec = LoadSpec(model, model.pipelines[0], None)
    stage = Stage(spec, params_for(width=4096, height=4096, upscale=2.0))
    guard = MemoryGuard(16 * 10**9, gpu=False, bits=(3, 4))
    refusal = guard.plan(stage).refusal or ""
    assert "A picture of 8192 x 8192" in refusal
    assert refusal.endswith(": ask for less upscaling, or upscale a smaller picture."), refusal
    assert too_little_memory(stage, (3, 4)).count("upscaling") == 1
    assert "set quantize" not in too_little_memory(stage, (3, 4))


def test_when_other_programs_have_the_memory_the_refusal_says_so(
    generating: OnItsThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: 1000)
    with pytest.raises(ServerError) as refused:
        generating.draw(spec_of("noise-flux2"), params_for())
    assert "0.0 GB are free: other programs use the rest. End some of them" in str(refused.value)


def test_when_the_server_itself_has_the_memory_no_other_program_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = MemoryGuard(8 * 10**9, gpu=True)
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: 10**12)
    monkeypatch.setattr(memory_guard, "used_bytes", lambda: int(7.9e9))
    stage = stage_of(spec_of("anima-turbo", quantize=4), 512)
    refusal = guard.plan_now(stage, iter(())).refusal or ""
    assert "0.1 GB are free of the 8.0 GB that the server may use (--memory-limit): " in refusal
    assert "other programs" not in refusal


@pytest.mark.parametrize(
    ("limit_gb", "available_gb", "bits", "advice"),
    [
        (
            9.0,
            50.0,
            (4,),
            "has 9.0 GB for it (--memory-limit): raise --memory-limit, or set quanti",
        ),
        (9.0, 50.0, (), "raise --memory-limit, or start the server with --quantize 8."),
        (2.0, 50.0, (4,), "raise --memory-limit, or choose a smaller model."),
        (
            90.0,
            8.0,
            (4,),
            "9.0 GB can be had: other programs use the rest. End some of them, or set",
        ),
        (90.0, 1.0, (4,), "End some of them, or choose a smaller model."),
    ],
)
def test_refused_weights_name_who_has_the_memory(
    limit_gb: float,
    available_gb: float,
    bits: tuple[int, ...],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: int(available_gb * 1e9))
    model = replace(allow("anima-turbo").default, weights_gb=11.3)
    spec = LoadSpec(model, model.pipelines[0], None)
    guard = MemoryGuard(int(limit_gb * 1e9), gpu=True, bits=bits)
    refusal = guard.load_refusal(spec, int(11.3e9), 10**9) or ""
    assert refusal.startswith("The weights of anima-turbo take 11.3 GB of memory, and ")
    assert advice in refusal, refusal


def test_fewer_bits_are_no_advice_where_the_weights_are_stored_quantized() -> None:
    model = replace(allow("noise-flux1").default, stored_bits=4)
    spec = LoadSpec(model, model.pipelines[0], None)
    message = explain(RuntimeError("[malloc] Unable to allocate 9 bytes"), spec)
    assert message.endswith("end other programs.")
    assert "quantize" not in message
