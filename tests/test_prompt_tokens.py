"""Tokens of prompts: what mflux cuts off or fills up, and counting with a model's own tokenizer."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import allow, params_for

from generation.token_counts import _counted
from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Model
from models.prompt_tokens import MOST_TOKENS, PADDED, most_tokens, tokens
from scheduler.estimates import Estimates
from task import Stage
from timing_model import TimingModel

DEFINITIONS = {
    "anima": "anima.weights.anima_weight_definition:AnimaWeightDefinition",
    "ernie_image": "ernie_image.weights.ernie_weight_definition:ErnieWeightDefinition",
    "fibo": "fibo.weights.fibo_weight_definition:FIBOWeightDefinition",
    "fibo2": "fibo2.weights.fibo2_weight_definition:Fibo2WeightDefinition",
    "flux2": "flux2.weights.flux2_weight_definition:Flux2KleinWeightDefinition",
    "flux3": "flux3.weights.flux3_weight_definition:Flux3KleinWeightDefinition",
    "ideogram4": "ideogram4.weights.ideogram4_weight_definition:Ideogram4WeightDefinition",
    "krea2": "krea2.weights.krea2_weight_definition:Krea2WeightDefinition",
    "moss_image": "moss_image.weights.moss_image_weight_definition:MOSSImageWeightDefinition",
    "qwen": "qwen.weights.qwen_weight_definition:QwenWeightDefinition",
    "qwen21": "qwen21.weights.qwen21_weight_definition:Qwen21WeightDefinition",
    "z_image": "z_image.weights.z_image_weight_definition:ZImageWeightDefinition",
}


def model_of(name: str) -> Model:
    model = find_model(name)
    assert model
    return model


@pytest.mark.parametrize("family", DEFINITIONS)
def test_a_prompt_is_cut_off_and_filled_up_as_in_the_definitions_of_mflux(family: str) -> None:
    module, name = DEFINITIONS[family].split(":")
    definitions = getattr(importlib.import_module(f"mflux.models.{module}"), name)
    first = definitions.get_tokenizers()[0]
    assert first.max_length == MOST_TOKENS[family]
    if family in PADDED:
        assert first.padding == "max_length"


@pytest.mark.parametrize(("name", "most"), [("schnell", 256), ("dev", 512)])
def test_the_encoder_of_flux_1_reads_as_many_tokens_as_mflux_configures(
    name: str, most: int
) -> None:
    from mflux.models.common.config import ModelConfig

    assert ModelConfig.from_name(name).max_sequence_length == most
    assert tokens("a", model_of(name)) == tokens("a" * 100_000, model_of(name)) == most


def test_until_its_tokenizer_is_loaded_a_prompt_has_a_token_for_four_characters() -> None:
    anima = model_of("anima-base")
    assert tokens("x" * 400, anima) == 101
    assert tokens("x" * 400, anima, count=lambda prompt: 77) == 77
    assert tokens("x" * 100_000, anima, count=len) == most_tokens(anima) == 4096


def test_a_loaded_model_counts_its_prompts_from_any_thread_while_it_draws(data_dir: Path) -> None:
    prepare_mlx()
    generator = MfluxGenerator(data_dir)
    model = allow("tiny-qwen").default
    weights, counts = LoadSpec(model, model.pipelines[0], None), generator.token_counts
    assert counts.count(model.name, "abcdefgh") is None
    generator.load(weights)
    prompts = ["abcdefgh" * 499 + f"{number:08}" for number in range(200)]
    with ThreadPoolExecutor(1) as others:
        counted = others.submit(lambda: [counts.count(model.name, prompt) for prompt in prompts])
        for seed in range(3):
            stage = Stage(weights, params_for(prompt=f"{seed} a cat", steps=2, model=model.name))
            assert generator.generate(stage, data_dir, lambda *event: None).picture
        assert set(counted.result(60)) == {4000}
    generator.unload()
    assert counts.count(model.name, "abcdefgh") == 8
    known = _counted.cache_info().hits
    assert counts.count(model.name, "abcdefgh") == 8
    assert _counted.cache_info().hits == known + 1, "a prompt is encoded once"


def test_a_forecast_counts_the_tokens_once_the_model_is_loaded() -> None:
    estimates = Estimates(TimingModel())
    model = model_of("krea-2")
    stage = Stage(
        LoadSpec(model, model.pipelines[0], None), params_for(prompt="x" * 400, model=model.name)
    )
    assert estimates.work(stage).prompt_tokens == 112
    estimates.count_tokens = lambda name, prompt: len(prompt) if name == model.name else None
    estimates.learn_bits(stage.load_spec, None)
    assert estimates.work(stage).prompt_tokens == 400


def test_another_negative_prompt_is_encoded_again_and_the_same_one_is_not() -> None:
    estimates = Estimates(TimingModel())
    model = model_of("qwen-image")
    spec = LoadSpec(model, model.pipelines[0], None)
    first, again, other = (
        Stage(spec, params_for(prompt="a cat", model=model.name, negative_prompt=negative))
        for negative in ("blurred", "blurred", "dark")
    )
    for stage in (first, again, other):
        estimates.joined(stage)
    cached = [estimates.work(stage).prompt_cached for stage in (first, again, other)]
    assert cached == [False, True, False]


def test_long_prompts_push_the_embeddings_of_earlier_ones_out_sooner() -> None:
    estimates = Estimates(TimingModel())
    model = model_of("anima-base")
    spec = LoadSpec(model, model.pipelines[0], None)

    def join(prompt: str) -> bool:
        stage = Stage(spec, params_for(prompt=prompt, model=model.name))
        estimates.joined(stage)
        return estimates.work(stage).prompt_cached

    assert [join("a cat"), join("a cat")] == [False, True]
    assert not any(join(f"{n} ".ljust(20_000, "x")) for n in range(5))
    assert not join("a cat")
