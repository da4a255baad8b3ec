"""mflux's classes as they are called: every one by its signature, the tiny ones for real."""

import importlib
import inspect
import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import pytest
from conftest import allow, params_for, slow_except
from huggingface_hub import errors as hub
from PIL import Image, ImageDraw

from errors import ModelLoadError, UnusableAdapter
from fields import CONTROL_TYPES, LORA_STYLES, PRESETS, SCHEDULERS, Takes
from generation import compiling, pipelines
from generation.load_errors import explain
from generation.pipelines import arguments, picture_of, remember_prompts
from generation.prompt_cache import PromptCache
from generator import MfluxGenerator
from images import to_png
from models import in_context, tiny_models
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Lora, Model, Pipeline
from task import GenerationParams, InputImage, Stage

Result = TypeVar("Result")
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
FILES = {name: InputImage(name, 64, 64) for name in ("start", "mask", "control", "first", "second")}


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


# -- for real --------------------------------------------------------------------------------------


class OnItsThread:
    """A generator on one thread of its own, as MLX wants it."""

    def __init__(self, data_dir: Path, **options: Any) -> None:
        prepare_mlx()
        self._thread = ThreadPoolExecutor(1)
        self.generator = MfluxGenerator(data_dir, **options)
        self.inputs = data_dir

    def run(self, function: Callable[..., Result], *values: Any) -> Result:
        return self._thread.submit(function, *values).result()

    def load(self, weights: LoadSpec) -> int | None:
        return self.run(self.generator.load, weights)

    def draw(self, weights: LoadSpec, asked: GenerationParams) -> Image.Image:
        if weights.key not in self.generator.resident:
            self.load(weights)
        self.run(self.generator.apply_adapters, weights)
        stage = Stage(weights, asked)
        return self.run(self.generator.generate, stage, self.inputs, lambda *_: None).picture

    def pipeline(self, weights: LoadSpec) -> Any:
        return self.generator._loaded[weights.key].pipeline


@pytest.fixture
def on_thread(data_dir: Path) -> Iterator[OnItsThread]:
    generating = OnItsThread(data_dir, models_in_memory=2)
    yield generating
    generating.run(generating.generator.unload)


@pytest.fixture(scope="module", autouse=True)
def pictures(data_dir: Path) -> None:
    circle = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(circle).ellipse((8, 8, 40, 40), fill="black")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 32))
    for name, picture in (("first", circle), ("second", circle.rotate(90)), ("mask", mask)):
        (data_dir / f"{name}.png").write_bytes(to_png(picture))


PROMPTED: dict[str, dict[str, Any]] = {
    "noise-flux1": {},
    "noise-flux2": {},
    "noise-kontext": {"images": (FILES["first"],)},
    "noise-redux": {"images": (FILES["first"], FILES["second"])},
    "noise-controlnet": {"control_image": FILES["first"]},
    "noise-fill": {"init_image": FILES["first"], "mask": FILES["mask"]},
    "noise-z-image": {"guidance": 3.0, "negative_prompt": "red"},
    "noise-qwen": {"guidance": 3.0, "negative_prompt": "red"},
}


@pytest.mark.parametrize("name", slow_except(["noise-flux1", "noise-fill"], PROMPTED))
def test_the_images_of_a_task_encode_its_prompt_once(
    name: str, on_thread: OnItsThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = allow(name).default
    weights = LoadSpec(model, model.pipelines[0], None)
    on_thread.load(weights)
    pipeline = on_thread.pipeline(weights)
    part = "t5_text_encoder" if hasattr(pipeline, "t5_text_encoder") else "text_encoder"
    encoder = type(getattr(pipeline, part))
    calls = []
    encode = next(
        method for method in ("get_prompt_embeds", "__call__") if hasattr(encoder, method)
    )
    original = getattr(encoder, encode)

    def counting(*values: Any, **named: Any) -> Any:
        calls.append(1)
        return original(*values, **named)

    monkeypatch.setattr(encoder, encode, counting)
    asked = params_for(steps=2, **PROMPTED[name])
    first = on_thread.draw(weights, asked)
    once = len(calls)
    assert once == (2 if "negative_prompt" in PROMPTED[name] else 1)
    second = on_thread.draw(weights, asked.model_copy(update={"seed": 2}))
    assert len(calls) == once
    assert first.tobytes() != second.tobytes()
    again = on_thread.draw(weights, asked)
    assert again.tobytes() == first.tobytes()
    assert len(calls) == once
    on_thread.draw(weights, asked.model_copy(update={"prompt": "a fox"}))
    assert len(calls) > once


def test_the_edits_of_klein_share_its_weights_and_draw_as_if_loaded_alone(
    on_thread: OnItsThread,
) -> None:
    import mlx.core as mx
    from mflux.models.common.config.model_config import ModelConfig

    klein = allow("noise-flux2").default
    text, edit, _ = (LoadSpec(klein, pipeline, None) for pipeline in klein.pipelines)
    assert text.key == edit.key
    edited = params_for(images=(FILES["first"],))
    plain = on_thread.draw(text, params_for())
    picture = on_thread.draw(edit, edited)
    assert on_thread.draw(text, params_for()).tobytes() == plain.tobytes()
    assert on_thread.draw(edit, edited).tobytes() == picture.tobytes()
    assert plain.tobytes() != picture.tobytes()
    assert on_thread.generator.resident == (text.key,)

    def alone() -> Image.Image:
        module, name = tiny_models.PIPELINES["noise-flux2-edit"].split(":")
        pipeline = getattr(importlib.import_module(module), name)(
            quantize=None,
            model_path=str(tiny_models.ensure_checkpoint("noise-flux2-edit", on_thread.inputs)),
            model_config=ModelConfig(**tiny_models.TINY_CONFIGS["noise-flux2-edit"]),
        )
        tiny_models.slim(pipeline, "noise-flux2-edit")
        mx.eval(pipeline.parameters())
        call = arguments(Stage(edit, edited), on_thread.inputs)
        drawn: Image.Image = pipeline.generate_image(**call).image
        return drawn

    assert on_thread.run(alone).tobytes() == picture.tobytes()


def test_the_softness_of_an_upscaler_changes_its_picture(on_thread: OnItsThread) -> None:
    model = allow("noise-seedvr2").default
    weights = LoadSpec(model, model.pipelines[0], None)
    asked = params_for(init_image=FILES["first"], upscale=2.0, steps=1)
    sharp = on_thread.draw(weights, asked)
    soft = on_thread.draw(weights, asked.model_copy(update={"softness": 0.8}))
    assert sharp.size == soft.size == (128, 128)
    assert sharp.tobytes() != soft.tobytes()


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


def test_an_edit_may_be_the_first_task_after_loading(on_thread: OnItsThread) -> None:
    klein = allow("noise-flux2").default
    edit = LoadSpec(klein, klein.pipelines[1], None)
    edited = on_thread.draw(edit, params_for(images=(FILES["first"], FILES["second"])))
    assert edited.size == (64, 64)
    assert on_thread.generator.resident == ("noise-flux2",)


def test_two_models_in_memory_are_those_used_last(on_thread: OnItsThread) -> None:
    keys = {}
    for name in ("noise-flux1", "noise-flux2", "noise-qwen"):
        model = allow(name).default
        keys[name] = LoadSpec(model, model.pipelines[0], None)
    for name, resident in (
        ("noise-flux1", ("noise-flux1",)),
        ("noise-flux2", ("noise-flux2", "noise-flux1")),
        ("noise-flux1", ("noise-flux1", "noise-flux2")),
        ("noise-qwen", ("noise-qwen", "noise-flux1")),
        ("noise-flux2", ("noise-flux2", "noise-qwen")),
    ):
        on_thread.draw(keys[name], params_for(steps=2))
        assert on_thread.generator.resident == resident
    on_thread.run(on_thread.generator.unload)
    assert on_thread.generator.resident == ()
    assert on_thread.generator.memory.weights_bytes == 0


def memory_of_switching(data_dir: Path, rounds: int) -> list[tuple[list[int], int]]:
    """For each round: MLX's active bytes with each of three models, and the process's kilobytes."""
    import mlx.core as mx

    generating = OnItsThread(data_dir)
    models = allow("noise-flux1", "noise-flux2", "noise-z-image").models
    measured = []
    for _ in range(rounds):
        active = []
        for model in models:
            weights = LoadSpec(model, model.pipelines[0], None)
            generating.draw(weights, params_for(steps=1, width=32, height=32))
            active.append(generating.run(mx.get_active_memory))
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        held = subprocess.run(command, check=True, capture_output=True)
        measured.append((active, int(held.stdout)))
    generating.run(generating.generator.unload)
    return measured


@pytest.mark.slow
def test_fifty_switches_between_models_leave_no_memory_behind(data_dir: Path) -> None:
    """In a process of its own: MLX counts the arrays of all tests together."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        measured = process.submit(memory_of_switching, data_dir, 18).result()
    before, after = measured[1], measured[-1]
    for active_before, active_after in zip(before[0], after[0], strict=True):
        assert active_after - active_before < 10_000  # the 48 models between them have 36 MB
    assert after[1] - before[1] < 10_000


def test_fetching_computes_nothing_even_where_a_class_wants_to(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the classes of Krea 2, ERNIE, Ideogram, MOSS and Anima do when they are made."""
    import mlx.core as mx

    prepare_mlx()
    (model,) = allow("noise-flux1").models
    weights, evaluate = LoadSpec(model, model.pipelines[0], None), mx.eval
    build, grown = pipelines.build, []

    def build_and_evaluate(*arguments: Any) -> Any:
        built, before = build(*arguments), mx.get_active_memory()
        mx.eval(built[0].parameters())
        grown.append(mx.get_active_memory() - before)
        if len(grown) == 2:
            raise ModelLoadError("no")

    monkeypatch.setattr(pipelines, "build", build_and_evaluate)
    pipelines.fetch(weights, data_dir)
    with pytest.raises(ModelLoadError):
        pipelines.fetch(weights, data_dir)
    assert max(grown) < 10_000
    assert mx.eval is evaluate


def test_a_step_is_compiled_once_for_many_pictures(data_dir: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling, "PICTURES_OF_A_STEP", 3)
    generating = OnItsThread(data_dir)
    (model,) = allow("noise-flux2").models
    built = []
    drawing = importlib.import_module(model.pipelines[0].module)
    compile_step = drawing.Flux2Klein._predict

    def noted(transformer: Any) -> Any:
        built.append(transformer)
        return compile_step(transformer)

    monkeypatch.setattr(drawing.Flux2Klein, "_predict", staticmethod(noted))
    weights = LoadSpec(model, model.pipelines[0], None)
    sizes = (64, 32, 64, 64)
    drawn = [generating.draw(weights, params_for(width=size, height=size)) for size in sizes]
    assert len(built) == 2
    assert drawn[0].tobytes() == drawn[2].tobytes() == drawn[3].tobytes()


def test_a_lora_has_its_scale_and_none_needs_another_load(data_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_models.write_lora(tmp_path / f"{name}.safetensors", "noise-flux1")
    allowed = allow("noise-flux1", lora_dir=tmp_path)
    generating = OnItsThread(data_dir, models_in_memory=1, lora_path=allowed.lora)

    def drawn(*loras: Lora) -> bytes:
        (stage,) = allowed.stages(params_for(model="noise-flux1", loras=loras))
        picture = generating.draw(stage.load_spec, stage.params)
        assert generating.generator.resident == (stage.load_spec.key,)
        return picture.tobytes()

    plain, full = drawn(), drawn(Lora("one"))
    assert full != plain
    assert drawn(Lora("one", 0.0)) == plain
    assert drawn(Lora("one", 0.5)) not in (plain, full)
    assert drawn(Lora("one"), Lora("two", 0.7)) not in (plain, full)
    assert drawn(Lora("one")) == full
    assert drawn() == plain
    generating.run(generating.generator.unload)


def test_a_failed_load_leaves_other_models_in_memory_and_the_thread_alive(
    on_thread: OnItsThread, tmp_path: Path
) -> None:
    tiny, flux2 = (
        LoadSpec(model, model.pipelines[0], None)
        for model in allow("noise-flux1", "noise-flux2").models
    )
    before = on_thread.draw(tiny, params_for())
    broken = LoadSpec(tiny.model, tiny.pipeline, None, (Lora("/no/such/file.safetensors"),))
    with pytest.raises(UnusableAdapter, match=r"file.safetensors.*No such file"):
        on_thread.load(broken)
    assert on_thread.draw(tiny, params_for()).tobytes() == before.tobytes()
    on_thread.draw(flux2, params_for())
    assert on_thread.generator.resident == ("noise-flux2", "noise-flux1")


# -- what goes into the file, and what goes wrong --------------------------------------------------


def test_metadata_contain_no_path_of_this_machine_and_are_reproducible(
    on_thread: OnItsThread, tmp_path: Path
) -> None:
    for name, more in PROMPTED.items():
        model = allow(name).default
        (stage,) = allow(name).stages(params_for(model=name, steps=2, **more))
        if stage.load_spec.key not in on_thread.generator.resident:
            on_thread.load(stage.load_spec)
        answer = [
            on_thread.run(
                on_thread.generator.generate, stage, on_thread.inputs, lambda *_: None
            ).metadata
            for _ in range(2)
        ]
        assert answer[0] == answer[1]
        assert answer[0] is not None
        assert str(on_thread.inputs) not in json.dumps(answer[0])
        assert "/" not in json.dumps({k: v for k, v in answer[0].items() if "path" in k})
        assert (answer[0]["model"], answer[0]["seed"], answer[0]["steps"]) == (model.name, 1, 2)
        assert answer[0]["scheduler"] == stage.load_spec.pipeline.rules.schedulers[0]


def test_a_file_names_the_scheduler_that_ran(on_thread: OnItsThread) -> None:
    model = allow("noise-flux1").default
    for scheduler in (None, *model.schedulers):
        (stage,) = allow("noise-flux1").stages(
            params_for(model="noise-flux1", steps=2, scheduler=scheduler)
        )
        if stage.load_spec.key not in on_thread.generator.resident:
            on_thread.load(stage.load_spec)
        drawn = on_thread.run(
            on_thread.generator.generate, stage, on_thread.inputs, lambda *_: None
        )
        assert drawn.metadata is not None
        assert drawn.metadata["scheduler"] == (scheduler or "linear")


def answered(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.GatedRepoError("x", response=answered(403)), ["only for those who log in", "licence"]),
        (hub.HfHubHTTPError("x", response=answered(401)), ["only for those who log in"]),
        (hub.RepositoryNotFoundError("x", response=answered(404)), ["There is no repository"]),
        (hub.HfHubHTTPError("x", response=answered(500)), ["cannot be downloaded", "connection"]),
        (hub.LocalEntryNotFoundError("x"), ["cannot be downloaded", "connection"]),
        (httpx.ConnectError("no route"), ["cannot be downloaded", "no route"]),
        (FileNotFoundError("nothing there"), ["cannot be read", "nothing there"]),
        (OSError(28, "No space left on device"), ["No space left"]),
        (ValueError("a\nb"), ["cannot be loaded", "ValueError: a)"]),
        (RuntimeError(), ["cannot be loaded", "RuntimeError"]),
    ],
)
def test_an_error_while_loading_is_one_sentence_with_a_remedy(
    error: Exception, words: list[str]
) -> None:
    message = explain(error, allow("dev").first_spec)
    assert "\n" not in message
    assert "dev" in message
    assert "--path" in message
    for word in words:
        assert word in message
