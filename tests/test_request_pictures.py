"""Pictures of a request: sizes, masks, references and what is drawn with them."""

import json
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, seen_by_all
from memory_stores import memory_store
from PIL import Image
from submission_desk import PICTURE, Desk, picture_of

from api.generate_request import Limits, parse_request
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from errors import DoesNotFit, InvalidInput
from generation.memory_guard import MemoryGuard
from generator import MfluxGenerator
from images import to_base64
from models import in_context
from scheduler.estimates import Estimates
from task import GenerationParams
from timing_model import TimingModel


def test_a_decompression_bomb_is_refused_by_the_size_in_its_header() -> None:
    small = picture_of()
    header = small[12:16] + (30_000).to_bytes(4, "big") * 2 + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    code, field, message = Desk("z-image").refusal(init_image=to_base64(bomb))
    assert (code, field) == ("invalid_input", "init_image")
    assert "30000 x 30000 = 900000000 pixels" in message or "too many pixels" in message


def test_a_picture_is_named_by_task_and_index_and_its_errors_by_the_field() -> None:
    desk = Desk("z-image")
    task_id = desk.submit(count=2)
    assert desk.refusal_of_task(task_id, 0) == (409, "not_ready", "init_image")
    desk.finish(task_id, picture_of(64, 64), picture_of(96, 64))
    for index, width in ((0, 64), (1, 96)):
        params = desk.params(init_image={"task_id": task_id, "index": index})
        assert params.init_image
        assert (params.init_image.width, params.width, params.height) == (width, width, 64)
    assert desk.refusal_of_task(task_id, 2) == (400, "invalid_input", "init_image")
    assert desk.refusal_of_task("never", 0) == (404, "unknown_task", "init_image")
    desk.queue.delete(task_id)
    assert desk.refusal_of_task(task_id, 0) == (410, "gone", "init_image")


def test_equal_pictures_are_kept_once_and_named_by_their_bytes() -> None:
    prepared = Desk("flux2-klein-4b").prepare(images=[PICTURE, PICTURE, to_base64(picture_of(80))])
    first, second, third = prepared.params.images
    assert first == second != third
    assert set(prepared.inputs) == {first.file, third.file}
    assert prepared.inputs[first.file] == picture_of()


def test_the_size_is_that_of_the_picture_where_none_is_asked_for() -> None:
    desk = Desk("z-image", "flux2-klein-4b")

    def size(source: tuple[int, int], **fields: Any) -> tuple[int, int]:
        params = desk.params(init_image=to_base64(picture_of(*source)), **fields)
        return params.width, params.height

    assert size((100, 70)) == (96, 64)
    assert size((4096, 1024)) == (2048, 512)
    assert size((3000, 16)) == (3008 - 16, 16)
    assert size((100, 70), width=64, height=80) == (64, 80)
    edit = desk.params(model="flux2-klein-4b", images=[to_base64(picture_of(200, 100)), PICTURE])
    assert (edit.width, edit.height) == (192, 96)


@pytest.mark.parametrize(
    ("source", "side", "expected"),
    [
        ((96, 64), {"width": 96}, (96, 64)),
        ((96, 64), {"height": 64}, (96, 64)),
        ((96, 64), {"width": 960}, (960, 640)),
        ((96, 64), {"height": 1024}, (1536, 1024)),
        ((100, 75), {"width": 100}, (96, 64)),
        ((100, 70), {"width": 64}, (64, 32)),
        ((1000, 16), {"width": 32}, (32, 16)),
    ],
)
def test_a_side_that_is_not_asked_for_follows_the_picture(
    source: tuple[int, int], side: dict[str, int], expected: tuple[int, int]
) -> None:
    desk = Desk("z-image", "flux2-klein-4b")
    picture = to_base64(picture_of(*source))
    for params in (
        desk.params(init_image=picture, **side),
        desk.params(model="flux2-klein-4b", images=[picture, PICTURE], **side),
    ):
        assert (params.width, params.height) == expected


def test_a_side_that_follows_the_picture_is_bounded_as_any_other() -> None:
    code, _, message = Desk("z-image").refusal(
        init_image=to_base64(picture_of(16, 256)), width=1024
    )
    assert (code, "1024 x 16384" in message) == ("invalid_input", True)


def test_without_a_picture_the_other_side_is_the_default_or_what_the_limit_leaves() -> None:
    def size(**fields: Any) -> tuple[int, int]:
        params = Desk("schnell", limits=Limits(max_pixels=1024 * 1024)).params(**fields)
        return params.width, params.height

    assert size(width=512) == (512, 1024)
    assert size(height=500) == (1024, 496)
    assert size(width=2048) == (2048, 512)
    assert size(height=3000) == (352 - 16, 2992)


def test_an_empty_prompt_needs_a_picture() -> None:
    desk = Desk("z-image", "flux2-klein-4b", "schnell")
    for prompt in (None, "", " \t"):
        assert desk.params(prompt=prompt, init_image=PICTURE).prompt == ""
        edit = desk.params(prompt=prompt, model="flux2-klein-4b", images=[PICTURE])
        assert desk.allowed.stages(edit)[0].params.prompt == ""
        assert desk.refusal(prompt=prompt)[1] == "prompt"
    assert desk.params(prompt=" x ").prompt == " x "
    assert desk.params(negative_prompt=" ").negative_prompt is None


def test_the_mask_is_grey_and_the_others_are_in_colour() -> None:
    prepared = Desk("dev-fill").prepare(init_image=PICTURE, mask=PICTURE)
    assert prepared.params.init_image
    assert prepared.params.mask
    modes = [
        Image.open(BytesIO(prepared.inputs[image.file])).mode
        for image in (prepared.params.init_image, prepared.params.mask)
    ]
    assert modes == ["RGB", "L"]
    assert prepared.params.image_strength is None


def test_references_keep_their_alpha_channel_for_models_that_read_it() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    buffer = BytesIO()
    clear.save(buffer, "PNG")
    for model, mode in (("qwen-image-2.1", "RGBA"), ("flux2-klein-4b", "RGB")):
        prepared = Desk(model).prepare(images=[to_base64(buffer.getvalue())])
        (reference,) = prepared.params.images
        kept = Image.open(BytesIO(prepared.inputs[reference.file]))
        assert kept.mode == mode
        assert kept.getpixel((8, 8)) == ((255, 0, 0, 0) if mode == "RGBA" else (255, 255, 255))


def test_an_edit_in_context_needs_a_lora_of_hugging_face() -> None:
    code, field, message = Desk("dev-fill").refusal(images=[PICTURE])
    assert (code, field) == ("not_supported", "images")
    assert "--allow-lora-repos" in message
    desk = Desk("dev-fill", allow_lora_repos=True)
    params = desk.params(images=[to_base64(picture_of(1024, 768))])
    assert (params.width, params.height) == (512, 384)
    (stage,) = desk.allowed.stages(params)
    assert [lora.name for lora in stage.load_spec.loras] == [in_context.EDIT.name]
    assert desk.params(images=[PICTURE], width=256, height=128).width == 256
    painted = desk.params(init_image=PICTURE, mask=PICTURE)
    assert desk.allowed.stages(painted)[0].load_spec.key == "dev-fill"


def test_a_style_in_context_is_a_lora_of_hugging_face() -> None:
    asked = {"images": [PICTURE], "lora_style": "storyboard"}
    assert Desk("dev").refusal(**asked)[:2] == ("not_supported", "lora_style")
    desk = Desk("dev", allow_lora_repos=True)
    (stage,) = desk.allowed.stages(desk.params(**asked))
    assert stage.load_spec.pipeline.name == "Flux1InContextDev"
    assert stage.load_spec.loras == (
        ("ali-vilab/In-Context-LoRA:film-storyboard.safetensors", 1.0),
    )
    assert desk.refusal(lora_style="storyboard")[1] == "images"


def test_the_default_strength_of_an_init_image_holds_with_a_mask_and_with_upscale_too() -> None:
    desk = Desk("noise-flux1", "noise-seedvr2")
    for more in ({}, {"mask": PICTURE}, {"upscale": 2}, {"mask": PICTURE, "upscale": 2}):
        params = desk.params(init_image=PICTURE, steps=10, **more)
        assert (params.image_strength, params.steps_run) == (0.4, 6)
        assert params.mask_feather == (8 if "mask" in more else None)
        drawing, *enlarging = desk.allowed.stages(params)
        assert drawing.load_spec.key == "noise-flux1"
        assert drawing.load_spec.pipeline.inpaints == ("mask" in more)
        assert [stage.params.mask_feather for stage in enlarging] == [None] * ("upscale" in more)
    fill = Desk("noise-fill")
    assert fill.refusal(init_image=PICTURE, mask=PICTURE, mask_feather=4)[:2] == (
        "not_supported",
        "mask_feather",
    )


def test_the_strength_of_a_control_that_is_merged_is_part_of_what_is_loaded() -> None:
    desk = Desk("krea-2-controlnet-depth")
    for asked, key in (({}, ""), ({"control_strength": 0.5}, "/control0.5")):
        params = desk.params(control_image=PICTURE, **asked)
        (stage,) = desk.allowed.stages(params)
        assert stage.load_spec.key == f"krea-2-controlnet-depth{key}"


def test_a_transparent_background_is_drawn_by_the_class_that_can() -> None:
    desk = Desk("qwen-image-2.1", "seedvr2-3b")
    params = desk.params(background="transparent", format="PNG")
    (stage,) = desk.allowed.stages(params)
    assert stage.load_spec.pipeline.name == "QwenImage21Edit"
    assert desk.allowed.stages(desk.params(background="opaque"))[0].load_spec.pipeline.name == (
        "QwenImage21"
    )
    for fields in ({"format": "JPEG"}, {"format": "PNG", "upscale": 2}):
        assert desk.refusal(background="transparent", **fields)[1] == "background"
    assert Desk("z-image").refusal(background="transparent", format="PNG")[:2] == (
        "not_supported",
        "background",
    )
    assert Desk("fibo-edit-rmbg").params(
        prompt="", images=[PICTURE], background="transparent", format="WEBP"
    )


def test_the_size_of_an_upscaled_image_is_bounded() -> None:
    desk = Desk("seedvr2-3b", limits=Limits(max_pixels=256 * 256))

    def enlarged(side: int, factor: float) -> GenerationParams:
        source = to_base64(picture_of(side, side))
        return desk.params(prompt=None, init_image=source, upscale=factor)

    assert enlarged(128, 4).final_size == (512, 512)
    assert enlarged(300, 1.5).final_size == (450, 450)
    with pytest.raises(InvalidInput, match="at most 262144 are allowed") as caught:
        enlarged(200, 4)
    assert caught.value.field == "upscale"


def test_a_task_of_another_model_is_upscaled_without_fields_that_the_upscaler_does_not_take() -> (
    None
):
    desk = Desk("flux2-klein-4b", "seedvr2-3b", quantize_choices=(4,))
    params = desk.params(images=[PICTURE], upscale=2, quantize=4, count=3, width=64, height=96)
    draw, enlarge = desk.allowed.stages(params)
    assert [stage.load_spec.key for stage in (draw, enlarge)] == ["flux2-klein-4b/q4", "seedvr2-3b"]
    assert (draw.params.upscale, draw.params.count, enlarge.params.count) == (None, 3, 3)
    assert enlarge.params.final_size == params.final_size == (128, 192)
    assert draw.params.final_size == (64, 96)
    assert enlarge.params.inputs == ()
    assert enlarge.params.steps == 1


def test_an_upscaler_on_disk_is_chosen_before_one_that_must_be_downloaded() -> None:
    desk = Desk("z-image", "seedvr2-3b", "seedvr2-7b")
    desk.present = {"seedvr2-7b"}
    assert desk.params(upscale=2).upscaler == "seedvr2-7b"
    desk.present = set()
    assert desk.params(upscale=2).upscaler == "seedvr2-3b"
    assert desk.params(upscale=2, upscaler="SEEDVR2-7B").upscaler == "seedvr2-7b"
    params = desk.params(upscale=2, upscaler="seedvr2-7b", softness=0.5)
    draw, enlarge = desk.allowed.stages(params)
    assert enlarge.load_spec.model.name == "seedvr2-7b"
    assert (draw.params.softness, enlarge.params.softness) == (None, 0.5)


@pytest.mark.parametrize(
    ("model", "fields", "field", "words"),
    [
        ("z-image", {"upscaler": "seedvr2-3b"}, "upscale", "need upscale"),
        ("z-image", {"softness": 0.5}, "upscale", "need upscale"),
        ("z-image", {"upscale": 2, "upscaler": "nope"}, "upscaler", "Upscalers: seedvr2-3b"),
        ("z-image", {"step_cache": 0.2}, "step_cache", "no step_cache"),
        ("z-image", {"cfg_end": 0.2}, "cfg_end", "no cfg_end"),
        ("moss-image-sft", {"skip_layers": [42]}, "skip_layers", "from 0 to 41"),
        ("qwen-image-2.1", {"auto_mask": "hat"}, "images", "needs images"),
        (
            "qwen-image-2.1",
            {"images": [PICTURE], "auto_mask": "hat", "mask": PICTURE},
            "auto_mask",
            "in place of mask",
        ),
        (
            "dev-redux",
            {"images": [PICTURE], "reference_strengths": [1, 1]},
            "reference_strengths",
            "more values",
        ),
        (
            "qwen-image-2.1",
            {"images": [PICTURE], "output_resolution": 1000},
            "output_resolution",
            "a multiple of 32",
        ),
    ],
)
def test_a_special_field_is_refused_where_it_means_nothing(
    model: str, fields: dict[str, Any], field: str, words: str
) -> None:
    _, named, message = Desk(model, "seedvr2-3b").refusal(**fields)
    assert named == field
    assert words in message


def test_adapters_are_named_by_their_path_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "style").mkdir()
    for name in ("one.safetensors", "style/two.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    desk = Desk("z-image", lora_dir=tmp_path)
    assert list(desk.allowed.loras()) == ["one", "style/two"]
    params = desk.params(loras=["one", {"name": "style/two", "scale": 0.5}])
    assert params.loras == (("one", 1.0), ("style/two", 0.5))
    for name in (
        "two",
        "one.safetensors",
        "../one",
        "style/../one",
        "notes",
        str(tmp_path / "one"),
    ):
        code, field, message = desk.refusal(loras=[name])
        assert (code, field) == ("not_supported", "loras")
        assert "LoRAs: one, style/two." in message
        assert str(tmp_path) not in message.replace(repr(name), "")


def test_adapters_of_hugging_face_are_taken_where_the_operator_allows_them() -> None:
    desk = Desk("z-image", allow_lora_repos=True)
    for name in ("org/name", "org/name:file.safetensors", "org/name:a/b.safetensors"):
        assert desk.params(loras=[name]).loras == ((name, 1.0),)
        assert desk.allowed.lora(name) == name
    for name in (
        "name",
        "../name",
        "./name",
        "/org/name",
        "a/b/c",
        "org/..",
        "org/name:file.bin",
        "org/name:../file.safetensors",
        "tests/conftest.py",
    ):
        assert desk.refusal(loras=[name])[:2] == ("not_supported", "loras")


def test_count_and_n_are_the_same_and_bits_are_those_that_are_allowed() -> None:
    desk = Desk("z-image", quantize=8, quantize_choices=(4,))
    for fields in ({"count": 3}, {"n": 3}, {"count": 3, "n": 3}):
        assert desk.params(**fields).count == 3
    assert desk.params().count == 1
    assert [desk.params(quantize=bits).quantize for bits in (None, 8, 4)] == [8, 8, 4]
    assert "Allowed: 4, 8." in desk.refusal(quantize=6)[2]


def test_a_model_that_is_not_allowed_is_refused_with_those_that_are() -> None:
    code, field, message = Desk("z-image", "dev").refusal(model="schnell")
    assert (code, field) == ("model_not_allowed", "model")
    assert message.endswith("Allowed: z-image, dev.")
    assert Desk("z-image", "dev").params(model="DEV").model == "dev"
    assert Desk("flux2-klein-4b").params(model="klein-4b").model == "flux2-klein-4b"


def test_a_pair_of_images_takes_the_time_of_twice_the_pixels() -> None:
    desk = Desk("dev")
    estimates = Estimates(TimingModel())
    (plain,) = desk.allowed.stages(desk.params(width=512, height=512))
    (pair,) = desk.allowed.stages(desk.params(width=512, height=512, images=[PICTURE]))
    assert estimates.work(pair).tokens == 2 * estimates.work(plain).tokens


def test_an_upscaling_that_does_not_fit_into_memory_is_refused_with_its_field(
    tmp_path: Path,
) -> None:
    guard = MemoryGuard(7 * 10**9, gpu=True)
    allowed = allow("noise-flux1", "seedvr2-3b")
    submission = Submission(
        seen_by_all(PlayedQueue(allowed, TimingModel(), memory_store())),
        allowed,
        Limits(),
        MfluxGenerator(tmp_path, guard=guard).refusal,
        places=WaitingPlaces(1),
    )
    body = {"prompt": "x", "width": 512, "height": 512}
    assert submission.prepare(parse_request(json.dumps(body).encode(), Limits())).params
    with pytest.raises(DoesNotFit, match=r"seedvr2-3b.*this machine has 7\.0 GB") as caught:
        submission.prepare(parse_request(json.dumps({**body, "upscale": 2}).encode(), Limits()))
    assert caught.value.field == "upscale"
