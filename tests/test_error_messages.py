"""Each error about weights, adapters, bits and memory names its cause and what to do about it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import allow, params_for
from safetensors.numpy import load_file, save_file
from test_declared import declared, fits
from test_loading import is_half_gone, is_truncated, spec_of
from test_pipelines import OnItsThread

from allowed import Allowed
from errors import BadOption, ModelLoadError, ServerError
from generation import memory_guard
from generation.load_errors import explain
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
    ("side", "prompt", "quantize", "cause", "advice"),
    [
        (2048, "x", None, "A picture of 2048 x 2048", "a smaller picture, or for fewer bits"),
        (2048, "x", 3, "A picture of 2048 x 2048", "(--memory-limit): ask for a smaller"),
        (64, 99_999 * "x", 3, "a prompt of 4096 tokens", "ask for a shorter prompt."),
    ],
)
def test_a_picture_that_does_not_fit_is_refused_with_the_figure_and_what_to_ask_for(
    side: int, prompt: str, quantize: int | None, cause: str, advice: str
) -> None:
    model = replace(allow("anima-turbo").default, weights_gb=1.0)
    stage = stage_of(LoadSpec(model, model.pipelines[0], quantize), side, prompt=prompt)
    refusal = MemoryGuard(2 * 10**9, gpu=False).plan(stage).refusal or ""
    assert cause in refusal
    assert " GB of memory" in refusal
    assert advice in refusal
    assert ("bits" in refusal) == (quantize is None)


def test_when_other_programs_have_the_memory_the_refusal_says_so(
    generating: OnItsThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_guard, "available_bytes", lambda: 1000)
    with pytest.raises(ServerError) as refused:
        generating.draw(spec_of("noise-flux2"), params_for())
    assert "0.0 GB are free: other programs use the rest. End some of them" in str(refused.value)
    monkeypatch.setattr(generating.generator.guard, "limit_bytes", 0)
    with pytest.raises(ModelLoadError, match=r"fewer bits \(quantize\), or end other programs"):
        generating.load(spec_of("noise-z-image"))


def test_fewer_bits_are_no_advice_where_the_weights_are_stored_quantized() -> None:
    model = replace(allow("noise-flux1").default, stored_bits=4)
    message = explain(RuntimeError("[malloc] Unable to allocate 9 bytes"), model)
    assert message.endswith("end other programs.")
    assert "quantize" not in message
