"""mflux's classes as they are called: every one by its signature."""

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import allow, params_for
from on_its_thread import FILES
from PIL import Image

from fields import CONTROL_TYPES, LORA_STYLES, PRESETS, SCHEDULERS, Takes
from generation import pipelines
from generation.pipelines import arguments, picture_of, remember_prompts
from generation.prompt_cache import PromptCache
from images import to_png
from models import in_context
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Lora, Model, Pipeline
from task import GenerationParams, InputImage, Stage

EACH_PIPELINE = pytest.mark.parametrize(
    ("model", "pipeline"),
    [(model, pipeline) for model in read_catalog().models for pipeline in model.pipelines],
    ids=lambda value: value.name,
)

EACH_CLASS = pytest.mark.parametrize(
    "pipeline",
    {
        (pipeline.module, pipeline.name): pipeline
        for model in read_catalog().models
        for pipeline in model.pipelines
    }.values(),
    ids=lambda pipeline: pipeline.name,
)

INPUTS = Path("/inputs")


def full_params(pipeline: Pipeline) -> GenerationParams:
    """Params that hold everything that a pipeline takes."""
    everything: dict[Takes, dict[str, Any]] = {
        Takes.GUIDANCE: {"guidance": 3.0},
        Takes.NEGATIVE_PROMPT: {"negative_prompt": "blurry"},
        Takes.SCHEDULER: {"scheduler": SCHEDULERS[0]},
        Takes.PRESET: {"preset": PRESETS[0]},
        Takes.INIT_IMAGE: {"init_image": FILES["start"]},
        Takes.IMAGE_STRENGTH: {"image_strength": 0.4},
        Takes.IMAGES: {"images": (FILES["first"], FILES["second"])},
        Takes.MASK: {"mask": FILES["mask"]},
        Takes.MASK_FEATHER: {"mask_feather": 4},
        Takes.CONTROL_IMAGE: {"control_image": FILES["control"]},
        Takes.CONTROL_STRENGTH: {"control_strength": 0.5},
        Takes.CONTROL_TYPE: {"control_type": CONTROL_TYPES[1]},
        Takes.UPSCALE: {"upscale": 2.0},
        Takes.LORAS: {"loras": (Lora("a", 0.5),)},
        Takes.REFERENCE_STRENGTHS: {"reference_strengths": [0.5]},
        Takes.EDIT_STRENGTH: {"edit_strength": 0.5},
        Takes.AUTO_MASK: {"auto_mask": "the shirt"},
        Takes.VERIFY_RETRIES: {"verify_retries": 2},
        Takes.OUTPUT_RESOLUTION: {"output_resolution": 512},
        Takes.STEP_CACHE: {"step_cache": 0.25},
        Takes.CFG_END: {"cfg_end": 0.5},
        Takes.SKIP_LAYERS: {"skip_layers": [3]},
        Takes.SOFTNESS: {"softness": 0.5},
        Takes.BACKGROUND: {"background": "transparent"},
        Takes.LORA_STYLE: {"lora_style": "storyboard"},
        Takes.CONTROL_IMAGES: {"control_images": (FILES["second"],)},
        Takes.CONTROL_TYPES: {"control_types": ["mlsd"]},
        Takes.CONTROL_STRENGTHS: {"control_strengths": [0.5]},
    }
    changes: dict[str, Any] = {}
    for field in pipeline.takes:
        changes |= everything.get(field, {})
    return params_for(**changes)


def class_of(pipeline: Pipeline) -> Any:
    return getattr(importlib.import_module(pipeline.module), pipeline.name)


@EACH_PIPELINE
def test_what_the_params_hold_binds_to_the_signature_of_the_class(
    model: Model, pipeline: Pipeline
) -> None:
    """Classes that have no tiny model (docs/models.md names them) are called only this way and in
    test_contract.py: nothing here draws with them."""
    stage = Stage(LoadSpec(model, pipeline, None), full_params(pipeline))
    call = arguments(stage, INPUTS)
    signature = inspect.signature(class_of(pipeline).generate_image)
    bound = signature.bind(object(), **call)
    taken = set(pipeline.parameters) - {"control_type"}
    assert set(bound.arguments) == taken | {"self"}
    assert set(bound.arguments) <= set(signature.parameters), "nothing lands in **kwargs"
    for parameter, value in call.items():
        annotation = str(signature.parameters[parameter].annotation)
        if isinstance(value, list):
            assert "list" in annotation or "tuple" in annotation, (parameter, annotation)
        elif isinstance(value, str) and "path" in parameter:
            assert "list" not in annotation.replace("| list", ""), (parameter, annotation)


@EACH_PIPELINE
def test_the_least_that_a_pipeline_needs_binds_too(model: Model, pipeline: Pipeline) -> None:
    full = full_params(pipeline).model_dump()
    least = {field: full[field] for field in pipeline.needs}
    stage = Stage(LoadSpec(model, pipeline, None), params_for(**least))
    call = arguments(stage, INPUTS)
    inspect.signature(class_of(pipeline).generate_image).bind(object(), **call)
    assert None not in call.values()


@EACH_PIPELINE
def test_what_loads_a_pipeline_binds_to_its_constructor(model: Model, pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"quantize": 8, "model_path": "folder", "model_config": object()}
    if pipeline.loras:
        call |= {"lora_paths": ["a"], "lora_scales": [1.0]}
    if pipeline.loads_control_strength:
        call["controlnet_strength"] = 0.5
    signature = inspect.signature(class_of(pipeline).__init__)
    bound = signature.bind(object(), **call)
    assert set(bound.arguments) == {"self", *call}


def test_pictures_are_passed_as_files_of_the_inputs_and_one_alone_where_one_is_taken() -> None:
    kontext, klein, seedvr2 = allow("noise-kontext", "noise-flux2", "noise-seedvr2").models
    pair = params_for(images=(FILES["first"], FILES["second"]))
    call = arguments(Stage(LoadSpec(klein, klein.pipelines[1], None), pair), INPUTS)
    assert call["image_paths"] == ["/inputs/first.png", "/inputs/second.png"]
    one = params_for(images=(FILES["first"],))
    call = arguments(Stage(LoadSpec(kontext, kontext.pipelines[0], None), one), INPUTS)
    assert call["image_path"] == "/inputs/first.png"
    enlarge = params_for(init_image=FILES["start"], upscale=1.5, width=80, height=64)
    call = arguments(Stage(LoadSpec(seedvr2, seedvr2.pipelines[0], None), enlarge), INPUTS)
    assert call == {"seed": 1, "image_path": "/inputs/start.png", "resolution": 96}


def test_a_control_becomes_what_mflux_calls_one() -> None:
    model = allow("z-image-controlnet").default
    weights = LoadSpec(model, model.pipelines[0], None)
    for kind in (*CONTROL_TYPES, None):
        asked = params_for(control_image=FILES["control"], control_type=kind)
        (control,) = arguments(Stage(weights, asked), INPUTS)["controls"]
        assert (control.type, control.image_path) == (kind or "canny", "/inputs/control.png")


def test_the_size_of_an_upscaled_image_is_computed_like_mflux() -> None:
    from mflux.models.seedvr2.variants.upscale.seedvr2_util import SeedVR2Util

    prepare_mlx()
    for width, height in ((64, 64), (80, 64), (37, 61), (101, 16), (17, 90)):
        for factor in (1.01, 1.3, 1.5, 2.0, 3.7, 4.0):
            asked = params_for(width=width, height=height, upscale=factor)
            file = Path("/dev/shm") / f"mflux-server-{width}x{height}.png"
            file.write_bytes(to_png(Image.new("RGB", (width, height))))
            _, true_h, true_w = SeedVR2Util.preprocess_image(str(file), asked.shorter_side)
            file.unlink()
            assert asked.final_size == (true_w, true_h)


# -- the prompt ------------------------------------------------------------------------------------


class Embeddings:
    nbytes = 10


class Encoder:
    """A pipeline of a class that encodes each prompt again."""

    calls = 0

    def _encode_prompts(self, prompt: str, *others: Any, **named: Any) -> Embeddings:
        self.calls += 1
        return Embeddings()


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    encoder = Encoder()
    monkeypatch.setattr(PromptCache, "evaluate", lambda cache: None)
    remember_prompts(encoder, PromptCache(1000))
    return encoder


def test_a_prompt_that_was_encoded_is_not_encoded_again(remembering: Encoder) -> None:
    first = remembering._encode_prompts("a", negative="b", images=["x", "y"], config=object())
    again = remembering._encode_prompts("a", images=["x", "y"], negative="b", config=object())
    assert again is first
    assert remembering.calls == 1
    remembering._encode_prompts("a", negative="b", images=["x"], config=object())
    remembering._encode_prompts("b", negative="b", images=["x"])
    assert remembering.calls == 3


def test_a_prompt_that_is_encoded_with_pictures_is_encoded_each_time(remembering: Encoder) -> None:
    """Fibo2Edit encodes it with lists of pictures, by position."""
    picture = Image.new("RGB", (16, 16))
    for _ in range(2):
        remembering._encode_prompts("a", [picture], [picture], False)
        remembering._encode_prompts("a", images=[picture])
    assert remembering.calls == 4


@EACH_CLASS
def test_no_encoder_of_a_prompt_is_left_that_would_work_for_each_picture(
    pipeline: Pipeline,
) -> None:
    """But for those of mflux's classes that call a function of their module: FIBO, Lens, and the
    controls of Z-Image encode a prompt for each picture of a task."""
    real = class_of(pipeline)
    source = "".join(
        inspect.getsource(importlib.import_module(base.__module__))
        for base in real.__mro__
        if base.__module__.startswith("mflux.models") and ".variants." in base.__module__
    )
    remembered = any(getattr(real, name, None) for name in pipelines.ENCODERS)
    if real.__name__ in ("FIBO", "FIBOEdit", "LensImage", "ZImageTurboControlnet", "SeedVR2"):
        assert not remembered
        assert "prompt_cache" not in source
    else:
        assert remembered or "prompt_cache" in source


def test_switches_of_mflux_are_on_where_their_field_is_given() -> None:
    model = allow("qwen-image-2.1").default
    edit = model.pipeline_for(frozenset({Takes.PROMPT, Takes.IMAGES}))
    assert edit
    pictures: dict[str, Any] = {"images": (FILES["first"],)}
    asked = params_for(verify_retries=2, step_cache=0.12, edit_strength=0.6, **pictures)
    call = arguments(Stage(LoadSpec(model, edit, None), asked), INPUTS)
    assert (call["verify"], call["verify_retries"], call["strength"]) == (True, 2, 0.6)
    assert (call["use_step_cache"], call["step_cache_threshold"]) == (True, 0.12)
    call = arguments(Stage(LoadSpec(model, edit, None), params_for(**pictures)), INPUTS)
    assert not {"verify", "verify_retries", "use_step_cache", "strength"} & set(call)


def test_a_model_that_draws_mattes_needs_no_prompt_and_returns_the_cut_out(tmp_path: Path) -> None:
    from mflux.models.fibo.variants.edit.util import FiboEditUtil

    model = allow("fibo-edit-rmbg").default
    source = Image.new("RGB", (96, 64), "teal")
    (tmp_path / "first.png").write_bytes(to_png(source))
    asked = params_for(prompt="", images=(InputImage("first", 96, 64),), width=64, height=48)
    stage = Stage(LoadSpec(model, model.pipelines[0], None), asked)
    call = arguments(stage, tmp_path)
    assert FiboEditUtil.ensure_edit_instruction(call["prompt"])
    matte = Image.new("RGB", (64, 48), "black")
    matte.paste("white", (0, 0, 32, 48))
    picture = picture_of(SimpleNamespace(image=matte), stage, tmp_path)
    assert (picture.mode, picture.size) == ("RGBA", (64, 48))
    assert picture.getpixel((8, 8)) == (0, 128, 128, 255)
    assert picture.getpixel((60, 8)) == (0, 128, 128, 0)


def test_an_edit_in_context_is_called_as_by_the_command_of_mflux() -> None:
    from mflux.models.flux.variants.in_context.utils import in_context_loras
    from mflux.models.flux.variants.in_context.utils.in_context_fill_util import (
        FluxInContextFillUtil,
    )

    model = allow("dev-fill").default
    pipeline = model.pipeline_for(frozenset({Takes.PROMPT, Takes.IMAGES}))
    assert pipeline
    asked = params_for("the sky is red", images=(FILES["first"],))
    call = arguments(Stage(LoadSpec(model, pipeline, None), asked), INPUTS)
    expected = FluxInContextFillUtil.get_effective_ic_edit_prompt(
        SimpleNamespace(instruction="the sky is red")
    )
    assert call["prompt"] == expected
    assert call["left_image_path"] == "/inputs/first.png"
    assert not {"right_image_path", "masked_image_path"} & set(call)
    assert (
        Lora(in_context_loras.get_ic_edit_lora_path(), in_context_loras.IC_EDIT_LORA_SCALE)
        == in_context.EDIT
    )
    assert set(LORA_STYLES) == set(in_context_loras.LORA_NAME_MAP) == set(in_context.STYLE_FILES)
    for name in LORA_STYLES:
        assert in_context.style(name).name == in_context_loras.get_lora_path(name)


def test_a_merged_control_strength_goes_to_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = allow("krea-2-controlnet-depth").default
    given: dict[str, Any] = {}

    def constructor(**values: Any) -> object:
        given.update(values)
        return object()

    monkeypatch.setattr(pipelines, "_class_of", lambda pipeline: constructor)
    for strength in (None, 0.5):
        given.clear()
        weights = LoadSpec(model, model.pipelines[0], 8, (), strength)
        pipelines.build(weights, Path("/nowhere"))
        assert given.get("controlnet_strength") == strength
        assert given["quantize"] == 8


def test_qwen_gets_a_prompt_for_a_transparent_background() -> None:
    model = allow("qwen-image-2.1").default
    pipeline = model.pipeline_for(frozenset({Takes.PROMPT, Takes.BACKGROUND}))
    assert pipeline
    asked = params_for("A sticker.", background="transparent")
    call = arguments(Stage(LoadSpec(model, pipeline, None), asked), INPUTS)
    assert call["prompt"].startswith("This is an RGBA image with transparency. A sticker.")
    assert "image_paths" not in call


@EACH_CLASS
def test_each_class_checks_its_pictures_for_nan_before_they_become_bytes(
    pipeline: Pipeline,
) -> None:
    """check_decoded_pictures() wraps ImageUtil.to_pil, which to_image alone calls."""
    from mflux.utils.image_util import ImageUtil

    source = "".join(
        inspect.getsource(importlib.import_module(base.__module__))
        for base in class_of(pipeline).__mro__
        if ".variants." in base.__module__
    )
    assert "ImageUtil.to_image(" in source
    assert "to_pil(" not in source
    assert "_numpy_to_pil(" not in source
    assert "ImageUtil.to_pil(decoded_latents)" in inspect.getsource(ImageUtil.to_image)
