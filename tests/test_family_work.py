"""First forecasts of models of full size: what each family computes, counted in mflux's modules."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from conftest import allow, params_for

from models.build_options import BuildOptions
from models.family_work import FAMILIES, LARGER_TEXT_B, SMALL_TEXT_ENCODERS, family_work
from models.mflux_registry import find_model, read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from scheduler.estimates import Estimates
from task import Stage
from timing.speeds import Product, Speeds
from timing_model import Durations, TimingModel, Work


def named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"mflux.models.{module}"), name)


def billions(module: Any, layers: int | None = None, share: float = 1.0) -> float:
    """Parameters of the linear layers of a text encoder.

    Args:
        layers: so many of its layers are computed; None: all.
        share: of the experts, those that a token chooses.
    """
    from mlx import nn

    found = 0.0
    for name, layer in module.named_modules():
        number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        if layers is not None and number >= layers:
            continue
        if type(layer).__name__ == "SwitchLinear":
            found += layer.weight.size * share
        elif isinstance(layer, nn.Linear):
            found += layer.weight.size
    return found / 1e9


def qwen3(name: str, layers: int | None = None) -> float:
    """Of Qwen3 as a model of the catalog configures it."""
    from mflux.models.common.config.model_config import AVAILABLE_MODELS

    encoder = named("flux2.model.flux2_text_encoder.qwen3_text_encoder:Qwen3TextEncoder")
    return billions(encoder(**AVAILABLE_MODELS[name].text_encoder_overrides), layers)


def klein(name: str) -> float:
    """Of FLUX.2, which uses nothing behind the last of three layers."""
    encode = named("flux2.model.flux2_text_encoder.prompt_encoder:Flux2PromptEncoder").encode_prompt
    return qwen3(name, max(inspect.signature(encode).parameters["text_encoder_out_layers"].default))


def built(path: str, layers: int | None = None) -> float:
    return billions(named(path)(), layers)


def gpt_oss_20b() -> float:
    sizes = {"num_hidden_layers": 24, "num_local_experts": 32}
    args = named("common_models.gpt_oss.gpt_oss:ModelArgs")(**sizes)
    encoder = named("common_models.gpt_oss.gpt_oss:Model")(args)
    selected = named("lens.model.text_encoder.lens_prompt_template:LENS_SELECTED_LAYERS")
    return billions(encoder.model, max(selected) + 1, 4 / 32)


def ling() -> float:
    module = "ming_image.model.ming_text_encoder.ling_moe_encoder"
    share = named(f"{module}:TOP_K") / named(f"{module}:NUM_EXPERTS")
    return billions(named(f"{module}:LingMoeEncoder")(), share=share)


def smallest_qwen3() -> float:
    config = named("anima.anima_initializer:QWEN3_06B_CONFIG")
    return billions(
        named("flux2.model.flux2_text_encoder.qwen3_text_encoder:Qwen3TextEncoder")(**config)
    )


def ideogram() -> float:
    """Its layers have a class of their own for weights of 8 bits: they are Qwen3-VL-8B's."""
    encoder = named("ideogram4.model.ideogram4_text_encoder.text_encoder:Qwen3TextEncoder")
    sizes = inspect.signature(encoder).parameters
    return billions(
        named("qwen21.model.qwen21_text_encoder.qwen21_text_encoder:Qwen21TextEncoder")(
            **{
                name: sizes[name].default
                for name in ("hidden_size", "num_hidden_layers", "intermediate_size")
            }
        )
    )


def fibo2() -> float:
    config = named("fibo2.model.fibo2_text_encoder.fibo2_text_encoder:Fibo2TextEncoder").TEXT_CONFIG
    model = named("common_models.qwen3_vl.qwen3_vl_language_model:Qwen3VLLanguageModel")
    return billions(model(config))


TEXT = "text_encoder:"
ENCODERS: Mapping[str, Callable[[], float]] = {
    "anima": smallest_qwen3,
    "boogu": lambda: built("boogu.model.boogu_text_encoder:BooguTextEncoder"),
    "ernie_image": lambda: built(
        f"ernie_image.model.ernie_text_encoder.{TEXT}ErnieMistralTextEncoder", 25
    ),
    "fibo": lambda: built(
        "fibo.model.fibo_text_encoder.smol_lm3_3b_text_encoder:SmolLM3_3B_TextEncoder"
    ),
    "fibo2": fibo2,
    "flux": lambda: built("flux.model.flux_text_encoder.t5_encoder.t5_encoder:T5Encoder"),
    "flux2": lambda: klein("flux2-klein-4b"),
    "flux3": lambda: qwen3(
        "flux3-image-klein",
        max(
            named("flux3.model.flux3_text_encoder.prompt_encoder:Flux3PromptEncoder").OUTPUT_LAYERS
        ),
    ),
    "ideogram4": ideogram,
    "iris": lambda: qwen3(
        "iris-3b",
        max(named("iris.model.iris_text_encoder.prompt_encoder:IrisPromptEncoder").HIDDEN_LAYERS),
    ),
    "krea2": lambda: built(
        f"krea2.model.krea2_text_encoder.{TEXT}Krea2TextEncoder",
        max(named(f"krea2.model.krea2_text_encoder.{TEXT}KREA2_TAP_LAYERS")),
    ),
    "lens": gpt_oss_20b,
    "ming_image": ling,
    "moss_image": lambda: built("common_models.qwen3_5:Qwen35TextModel"),
    "qwen": lambda: built("qwen.model.qwen_text_encoder.qwen_text_encoder:QwenTextEncoder"),
    "qwen21": lambda: built(
        "qwen21.model.qwen21_text_encoder.qwen21_text_encoder:Qwen21TextEncoder"
    ),
    "z_image": lambda: built(f"z_image.model.z_image_text_encoder.{TEXT}TextEncoder", 35),
}
"""Counts the text encoder of a family. Those of ERNIE and Z-Image give the result of their last
layer but one; mflux has the number in their loops."""


@pytest.mark.parametrize("family", ENCODERS)
def test_text_encoders_have_as_many_parameters_as_those_of_mflux(family: str) -> None:
    prepare_mlx()
    assert FAMILIES[family].text_b == pytest.approx(ENCODERS[family](), rel=0.02)


@pytest.mark.parametrize("name", LARGER_TEXT_B)
def test_models_with_a_larger_text_encoder_are_known(name: str) -> None:
    prepare_mlx()
    assert LARGER_TEXT_B[name] == pytest.approx(klein(name), rel=0.02)


def test_every_family_is_described() -> None:
    families = {model.family for model in read_catalog().models if not model.tiny}
    assert families == set(FAMILIES) == {*ENCODERS, "seedvr2"}
    assert FAMILIES["seedvr2"].text_b == 0.0


# -- against published and measured seconds --------------------------------------------------------

OF_PEAK = 0.8
M1_MAX, M4_PRO, M4 = 10.4e12, 9.2e12, 4.3e12
"""Peak FLOP/s of the GPU in float32."""


def stage_of(name: str, side: int, steps: int, bits: int | None) -> Stage:
    model = find_model(name)
    assert model
    params = params_for(
        prompt="a lighthouse",
        width=side,
        height=side,
        steps=steps,
        model=name,
        guidance=model.default_guidance,
    )
    return Stage(LoadSpec(model, model.pipelines[0], bits), params)


def forecast(
    name: str, speeds: Speeds, *, side: int = 1024, steps: int = 1, bits: int | None = None
) -> Durations:
    timing = TimingModel()
    timing.calibrate(speeds)
    return Estimates(timing).durations(stage_of(name, side, steps, bits))


@pytest.mark.parametrize(
    ("name", "bits", "peak", "step_s"),
    [
        ("flux2-klein-4b", 4, M1_MAX, 6.8),
        ("flux2-klein-9b", None, M1_MAX, 11.6),
        ("z-image-turbo", 4, M1_MAX, 10.7),
        ("flux3-image-klein", None, M4_PRO, 6.4),
        ("iris-3b", None, M4_PRO, 4.4),
        ("iris-3b-base", None, M4_PRO, 8.6),
        ("ming-image-design", 8, M4, 20.0),
    ],
)
def test_first_steps_are_within_a_factor_of_two_of_what_mflux_publishes(
    name: str, bits: int | None, peak: float, step_s: float
) -> None:
    """1024 x 1024 pixels, from the READMEs of mflux 0.24."""
    found = forecast(name, {Product.BF16: OF_PEAK * peak}, bits=bits)
    assert step_s / 2 < found.step_s < step_s * 2


@pytest.mark.parametrize(("small", "seconds"), [(False, 27.0), (True, 20.0)])
def test_a_first_picture_of_klein_takes_what_mflux_publishes(small: bool, seconds: float) -> None:
    """M4 Pro, 16 bits, 4 steps, 1024 x 1024, with either text encoder."""
    model = find_model("flux2-klein-4b")
    assert model
    timing = TimingModel({Product.BF16: OF_PEAK * M4_PRO})
    options = BuildOptions(small_text_encoder=small)
    stage = stage_of(model.name, 1024, 4, None)
    built_so = LoadSpec(replace(model, options=options), model.pipelines[0], None)
    found = Estimates(timing).durations(Stage(built_so, stage.params))
    assert seconds / 2 < found.total_s < seconds * 2
    text_b = SMALL_TEXT_ENCODERS["flux2"].text_b if small else FAMILIES["flux2"].text_b
    assert family_work(built_so).text_b == text_b


CPU = {
    Product.BF16: 3e9,
    Product.FLOAT32: 67e9,
    Product.Q4: 67e9,
    Product.CONVOLUTION: 20e9,
}
"""FLOP/s of two cores."""


@pytest.mark.parametrize(
    ("name", "bits", "side", "seconds"),
    [
        ("flux2-klein-4b", 4, 64, 125.0),
        ("flux2-klein-4b", 4, 128, 157.0),
        ("anima-turbo", 4, 64, 15.3),
        ("anima-turbo", 4, 128, 22.1),
    ],
)
def test_first_forecasts_of_small_pictures_on_a_cpu_count_the_text(
    name: str, bits: int, side: int, seconds: float
) -> None:
    """Of one step, as measured by benchmarks/real_size.py and real_pair.py on such a machine. The
    text of klein is filled up to 512 tokens, in its text encoder and in each step."""
    found = forecast(name, CPU, side=side, bits=bits)
    assert seconds / 2 < found.gpu_s < seconds * 2


def test_the_text_of_klein_is_most_of_what_a_small_picture_computes() -> None:
    speed = 1e12
    found = forecast("flux2-klein-4b", {Product.BF16: speed}, side=64)
    assert found.text_encoding_s == pytest.approx(2 * 2.72e9 * 512 / speed, rel=0.05)
    assert found.step_s == pytest.approx(2 * 4e9 * (512 + 16) / speed, rel=0.05)
    larger = forecast("flux2-klein-4b", {Product.BF16: speed}, side=1024)
    assert larger.text_encoding_s == found.text_encoding_s


def work_on(name: str, side: int = 1024) -> Work:
    return Estimates(TimingModel()).work(stage_of(name, side, 4, 4))


def test_text_of_other_families_is_counted_as_mflux_encodes_it() -> None:
    assert work_on("schnell").step_text_tokens == 256
    assert work_on("dev").step_text_tokens == 512
    assert work_on("flux2-klein-9b").text_b == LARGER_TEXT_B["flux2-klein-9b"]
    assert work_on("flux2-klein-4b").fixed_text_tokens == 0
    assert work_on("flux2-klein-base-4b").fixed_text_tokens == 512, "a negative prompt"
    assert work_on("krea-2").product is Product.Q4
    assert work_on("krea-2").text_product is Product.BF16, "mflux does not quantize it"
    assert work_on("anima-turbo").text_product is Product.FLOAT32
    assert work_on("qwen-image").parameters_b == 20.0, "half of them, twice"
    small, large = (work_on("ideogram-4-fp8", side).place.text for side in (512, 1024))
    assert 512 * (large - small) == 4096 - 1024, "it encodes tokens of the picture, too"


def test_samples_of_earlier_versions_are_read() -> None:
    old = '{"model": "m", "parameters_b": 4.0, "tokens": 16, "steps": 1, "format": "PNG"}'
    assert Work.from_json(old) == Work("m", 4.0, 16, 1, "PNG")
    assert Work.from_json(old).prior.text_b is None
    new = work_on("krea-2")
    assert Work.from_json(new.to_json()) == new


def test_tiny_models_are_forecast_as_before() -> None:
    spec = LoadSpec(allow("noise-flux2").default, allow("noise-flux2").default.pipelines[0], None)
    assert family_work(spec).text_b is None
    assert family_work(spec).step_text_tokens == Work("m", 1.0, 16, 1, "PNG").step_text_tokens
