"""Tokens of prompts: what mflux cuts off or fills up, and counting with a model's own tokenizer."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import GIVE_UP_S, PlayedQueue, allow, params_for, seen_by_all
from memory_stores import memory_store

from allowed import Allowed
from api.generate_request import Limits, parse_request
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from errors import InvalidInput
from generation.picture_memory import tokens_of_text
from generation.token_counts import TokenCounts, _counted
from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Model
from models.prompt_tokens import (
    CHAT_TOKENS,
    MOST_TOKENS,
    PADDED,
    REFUSED_ABOVE,
    UNCUT_WITH_PICTURES,
    most_tokens,
    tokens,
)
from models.tiny_weights import QWEN_VOCABULARY, byte_pairs, write_tokenizer
from scheduler.estimates import Estimates
from task import InputImage, Stage
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
    model = allow("noise-qwen").default
    weights, counts = LoadSpec(model, model.pipelines[0], None), generator.token_counts
    assert counts.count(model.name, "abcdefgh") is None
    generator.load(weights)
    prompts = ["abcdefgh" * 499 + f"{number:08}" for number in range(200)]
    with ThreadPoolExecutor(1) as others:
        counted = others.submit(lambda: [counts.count(model.name, prompt) for prompt in prompts])
        for seed in range(3):
            stage = Stage(weights, params_for(prompt=f"{seed} a cat", steps=2, model=model.name))
            assert generator.generate(stage, data_dir, lambda *event: None).picture
        assert set(counted.result(GIVE_UP_S)) == {4000}
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


# -- prompts that mflux refuses --------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}"
    "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
"""Qwen's chat template."""
MOST = REFUSED_ABOVE["ideogram4"]
CAPTION = json.dumps({"high_level_description": "x" * (MOST - 29)}, indent=1)
"""As long as it may be, without its spaces."""


@pytest.fixture
def ideogram(tmp_path: Path) -> Model:
    """Ideogram 4 in a folder with a tokenizer of single bytes and no weights."""
    words = ("<|im_start|>", "<|im_end|>", "user", "assistant", "\n")
    special = {word: 1000 + number for number, word in enumerate(words)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT}
    write_tokenizer(tmp_path / "tokenizer", byte_pairs(QWEN_VOCABULARY), config, special)
    return replace(model_of("ideogram-4-fp8"), path=str(tmp_path))


def refused_by_mflux(model: Model, prompt: str) -> bool:
    from mflux.models.ideogram4.model.ideogram4_text_encoder.caption import Ideogram4Caption
    from mflux.models.ideogram4.model.ideogram4_text_encoder.tokenizer import Ideogram4Tokenizer
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(f"{model.path}/tokenizer")
    try:
        read = Ideogram4Tokenizer(own, MOST_TOKENS["ideogram4"]).tokenize_one(
            Ideogram4Caption.prepare(prompt).prompt
        )
    except ValueError:
        return True
    assert len(read) <= MOST + CHAT_TOKENS
    return False


@pytest.mark.parametrize(
    ("prompt", "refused"),
    [
        ("x" * MOST, False),
        ("x" * (MOST + 1), True),
        (CAPTION, False),
        (CAPTION.replace("x", "xx", 1), True),
        ('{"not": JSON' + "x" * MOST, True),
    ],
)
def test_a_prompt_that_ideogram_refuses_for_its_length_is_refused_before_the_queue(
    ideogram: Model, prompt: str, refused: bool
) -> None:
    assert refused_by_mflux(ideogram, prompt) is refused
    allowed = Allowed(ideogram, (ideogram,))
    queue = PlayedQueue(allowed, TimingModel(), memory_store())
    submission = Submission(
        seen_by_all(queue),
        allowed,
        Limits(),
        partial(MfluxGenerator(Path(ideogram.path or "")).refusal, memory=False),
        places=WaitingPlaces(1),
    )
    request = parse_request(json.dumps({"prompt": prompt}).encode(), Limits())
    if not refused:
        assert submission.prepare(request).params.prompt == prompt
        return
    with pytest.raises(
        InvalidInput, match=rf"^prompt has \d+ tokens, and .* reads {MOST}"
    ) as caught:
        submission.prepare(request)
    assert caught.value.field == "prompt"


def test_each_of_several_prompts_is_counted(ideogram: Model) -> None:
    params = params_for(prompt="a", prompts=("a", "x" * 3000), count=2)
    assert TokenCounts().refusal(params, ideogram)
    assert TokenCounts().refusal(params, model_of("anima-base")) is None


def test_without_its_tokenizer_on_this_machine_a_prompt_is_accepted(ideogram: Model) -> None:
    params = params_for(prompt="x" * 3000)
    (Path(ideogram.path or "") / "tokenizer" / "tokenizer.json").write_text("{broken")
    assert TokenCounts().refusal(params, ideogram) is None
    assert TokenCounts().refusal(params, replace(ideogram, path="/nowhere/at/all")) is None


def test_an_edit_of_qwen_image_reads_the_whole_prompt() -> None:
    model = model_of("qwen-image-edit")
    spec = LoadSpec(model, model.pipelines[0], None)
    picture = (InputImage("a", 64, 64),)
    assert model.family in UNCUT_WITH_PICTURES
    long = params_for(prompt="x" * 9000, model=model.name, images=picture)
    assert tokens_of_text(Stage(spec, long), count=len) == 9000
    alone = long.model_copy(update={"images": ()})
    assert tokens_of_text(Stage(spec, alone), count=len) == MOST_TOKENS["qwen"]
