"""mflux's classes on the tiny models: what they draw, share, load and write into files."""

import importlib
import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import allow, params_for, slow_except
from huggingface_hub import errors as hub
from on_its_thread import FILES, PROMPTED, OnItsThread
from PIL import Image, ImageDraw

from errors import ModelLoadError, UnusableAdapter
from generation import compiling, fetching, pipelines
from generation.load_errors import explain
from generation.pipelines import arguments
from images import to_png
from models import tiny_models
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Lora
from task import Stage


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

    monkeypatch.setattr(fetching, "build", build_and_evaluate)
    fetching.fetch(weights, data_dir)
    with pytest.raises(ModelLoadError):
        fetching.fetch(weights, data_dir)
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
