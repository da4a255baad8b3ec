"""Helper models: FIBO-VLM for plain prompts, Depth Pro, HED and OpenPose for controls."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import allow, forecast_of, params_for
from on_its_thread import OnItsThread
from PIL import Image
from studio import MAKING, StudioOf
from submission_desk import PICTURE, Desk

from allowed import Allowed
from api.models_api import control_types
from declared import read_allowed
from errors import BadOption, NotSupported
from fields import CONTROL_TYPES
from generation import helpers
from generation.helpers import Helper, PromptWriter
from generation.pipelines import arguments
from images import to_png
from models import hub_cache
from models.helpers import DEPTH_PRO, FIBO_VLM, HED, HELPERS, OF_CONTROL, OPENPOSE
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec
from task import InputImage, Phase, Stage, TaskStatus

JSON_PROMPT = '{"short_description": "a lighthouse"}'


def allowed_by(*names: str, default: str | None = None) -> Allowed:
    """What a server allows that was started with --models and these names."""
    return read_allowed(
        read_catalog(),
        default=default,
        allowed=names,
        path=None,
        fallback="noise-flux1",
        quantize=None,
        quantize_choices=(),
        lora_dir=None,
        allow_lora_repos=False,
    )


# -- what is allowed -------------------------------------------------------------------------------


def test_helpers_are_allowed_by_name_and_are_no_models_of_tasks() -> None:
    allowed = allowed_by("noise-flux1", "FIBO-VLM", "hed")
    assert [model.name for model in allowed.models] == ["noise-flux1"]
    assert allowed.helpers == (FIBO_VLM, HED)
    assert allowed_by("all").helpers == MAKING
    assert allowed_by("noise-flux1").helpers == ()
    assert not set(HELPERS) & {model.name for model in read_catalog().models}
    with pytest.raises(BadOption):
        allowed_by(default="fibo-vlm")


def test_fibo_draws_json_alone_unless_the_operator_allows_its_helper() -> None:
    desk = Desk("fibo")
    code, field, message = desk.refusal(prompt="a lighthouse")
    assert (code, field) == ("not_supported", "prompt")
    assert "draws from JSON" in message
    assert "fibo-vlm" in message
    assert len(desk.allowed.stages(desk.params(prompt=JSON_PROMPT))) == 1
    helped = Desk("fibo", helpers=(FIBO_VLM,))
    writes, draws = helped.allowed.stages(helped.params(prompt="a lighthouse", count=3))
    assert writes.load_spec.model is FIBO_VLM
    assert (writes.params.count, draws.params.count) == (1, 3)


def test_an_edit_of_fibo_needs_json_with_an_instruction() -> None:
    desk = Desk("fibo-edit", helpers=(FIBO_VLM,))
    for prompt, stages in (
        ("make it night", 2),
        (JSON_PROMPT, 2),
        ('{"edit_instruction": "make it night"}', 1),
    ):
        params = desk.params(prompt=prompt, images=[PICTURE])
        assert len(desk.allowed.stages(params)) == stages
    assert (
        len(
            Desk("fibo-edit-rmbg").allowed.stages(
                params_for("", model="fibo-edit-rmbg", images=(InputImage("a", 64, 64),))
            )
        )
        == 1
    )


@pytest.mark.parametrize("kind", OF_CONTROL)
def test_a_control_that_needs_a_helper_is_refused_where_it_is_not_allowed(kind: str) -> None:
    model, helper = "z-image-turbo-controlnet-union-2.1", OF_CONTROL[kind]
    code, field, message = Desk(model).refusal(control_image=PICTURE, control_type=kind)
    assert (code, field) == ("not_supported", "control_type")
    assert helper.name in message
    desk = Desk(model, helpers=(helper,))
    makes, draws = desk.allowed.stages(desk.params(control_image=PICTURE, control_type=kind))
    assert makes.load_spec.model is helper
    assert draws.load_spec.model.name == model


def test_each_model_says_which_kinds_of_control_it_takes() -> None:
    none, every = allowed_by("all"), allowed_by("dev-depth", "depth-pro")
    (depth, union) = (
        model
        for model in none.models
        if model.name in ("dev-depth", "z-image-turbo-controlnet-union-2.1")
    )
    assert control_types(union, none) == list(CONTROL_TYPES)
    assert control_types(union, every) == ["canny", "mlsd", "depth", "ready"]
    assert control_types(depth, every) == ["depth"]
    assert control_types(allow("noise-flux1").default, none) == []
    code, field, message = Desk("dev-depth").refusal(control_image=PICTURE, control_type="canny")
    assert (code, field) == ("not_supported", "control_type")
    assert "one of depth" in message
    assert (
        len(Desk("dev-depth").allowed.stages(Desk("dev-depth").params(control_image=PICTURE))) == 1
    )


# -- stages ----------------------------------------------------------------------------------------


def test_a_plain_prompt_is_written_once_and_then_drawn(
    studio_of: StudioOf,
) -> None:
    studio = studio_of("fibo")
    task = studio.submit("fibo", "a lighthouse", count=3)
    studio.run_all()
    assert studio.gpu.prepared == [("fibo-vlm", "a lighthouse")]
    written = '{"short_description": "written"}'
    assert studio.gpu.drawn == [("fibo", written, seed) for seed in (1, 2, 3)]
    assert studio.gpu.loads == ["fibo", "fibo-vlm", "fibo"]
    ended = studio.status(task.task_id)
    assert (ended.status, ended.images_done) == (TaskStatus.DONE, 3)
    assert ended.params.prompt == "a lighthouse"
    assert len(ended.measured) == 4


def test_the_forecast_knows_the_stage_of_a_helper(studio_of: StudioOf) -> None:
    studio = studio_of("fibo")
    for number in range(6):
        studio.submit("fibo", f"{number} foxes", steps=2)
    studio.run_all()
    plain = forecast_of(studio.submit("fibo", JSON_PROMPT, steps=2)).end_s
    studio.run_all()
    began = studio.clock.at
    helped = forecast_of(studio.submit("fibo", "another", steps=2)).end_s
    studio.run_all()
    took_s = studio.clock.at - began
    assert helped == pytest.approx(took_s, rel=0.05)
    assert helped - plain == pytest.approx(20 + 2 * 7, rel=0.1)


def test_a_task_is_cancelled_while_its_helper_works(studio_of: StudioOf) -> None:
    studio = studio_of("fibo")
    task = studio.submit("fibo", "a lighthouse")
    prepare = studio.gpu.prepare

    def cancelled(stage: Stage, inputs: Path, report: Any) -> Any:
        studio.queue.delete(task.task_id)
        return prepare(stage, inputs, report)

    studio.gpu.prepare = cancelled  # type: ignore[method-assign]
    studio.run_all()
    assert studio.gpu.drawn == []
    assert studio.status(task.task_id).status is TaskStatus.CANCELLED


def test_the_map_of_a_helper_becomes_the_control_image(
    studio_of: StudioOf,
) -> None:
    name = "z-image-turbo-controlnet-union-2.1"
    studio = studio_of(name)
    seen: list[tuple[str | None, bool]] = []

    def look(stage: Stage, step: int) -> None:
        call = arguments(stage, Path("/inputs"))
        (control,) = call["controls"]
        seen.append((control.type, Path(control.image_path).is_file()))

    studio.gpu.on_step = look
    photo = InputImage("photo", 64, 64)
    studio.submit(name, "a lighthouse", steps=1, control_image=photo, control_type="depth")
    studio.run_all()
    assert studio.gpu.prepared == [("depth-pro", "a lighthouse")]
    assert seen == [("ready", True)]


def test_several_controls_are_made_by_their_helpers_and_drawn_together(
    studio_of: StudioOf,
) -> None:
    name = "z-image-turbo-controlnet-union-2.1"
    studio = studio_of(name)
    seen: list[tuple[Any, bool, float]] = []

    def look(stage: Stage, step: int) -> None:
        for control in arguments(stage, Path("/inputs"))["controls"]:
            made = Path(control.image_path).is_file()
            seen.append((control.type, made, control.strength))

    studio.gpu.on_step = look
    studio.submit(
        name,
        "a lighthouse",
        steps=1,
        control_image=InputImage("photo", 64, 64),
        control_type="pose",
        control_images=(InputImage("lines", 64, 64), InputImage("room", 64, 64)),
        control_types=["mlsd", "depth"],
        control_strengths=[0.5],
    )
    studio.run_all()
    assert [helper for helper, _ in studio.gpu.prepared] == ["openpose", "depth-pro"]
    assert seen == [("ready", True, 1.0), ("mlsd", False, 0.5), ("ready", True, 1.0)]


def test_further_controls_belong_to_a_first_one() -> None:
    desk = Desk("z-image-turbo-controlnet-union-2.1", helpers=MAKING)
    params = desk.params(control_image=PICTURE, control_images=[PICTURE], control_types=["hed"])
    assert [stage.load_spec.model.name for stage in desk.allowed.stages(params)] == [
        "hed",
        "z-image-turbo-controlnet-union-2.1",
    ]
    for fields, field in (
        ({"control_images": [PICTURE]}, "control_image"),
        ({"control_image": PICTURE, "control_types": ["hed"]}, "control_types"),
        (
            {
                "control_image": PICTURE,
                "control_images": [PICTURE],
                "control_strengths": [1, 1],
            },
            "control_strengths",
        ),
    ):
        assert desk.refusal(**fields)[1] in (field, "control_images")
    assert Desk("krea-2-controlnet-depth").refusal(control_image=PICTURE, control_images=[PICTURE])[
        :2
    ] == ("not_supported", "control_images")


# -- mflux -----------------------------------------------------------------------------------------


def test_mflux_does_not_touch_a_map_that_is_ready() -> None:
    from mflux.models.z_image.variants.controlnet.controlnet_util import ZImageControlnetUtil

    image = Image.new("RGB", (32, 32), "teal")
    assert ZImageControlnetUtil._preprocess(image, "ready") is image


def test_helpers_are_called_as_mflux_declares_them() -> None:
    from mflux.models.common.resolution.model_revisions import ModelRevisions
    from mflux.models.depth_pro.model.depth_pro import DepthPro
    from mflux.models.depth_pro.weights.depth_pro_weight_definition import DepthProWeightDefinition
    from mflux.models.fibo_vlm.model.fibo_vlm import FiboVLM
    from mflux.models.hed import HED as Edges
    from mflux.models.hed import hed
    from mflux.models.openpose import OpenPoseBody, openpose

    inspect.signature(FiboVLM.__init__).bind(None, quantize=8, model_path=None)
    inspect.signature(FiboVLM.generate).bind(None, prompt="x", seed=1)
    inspect.signature(FiboVLM.edit).bind(None, image=1, edit_instruction="", use_mask=True, seed=1)
    inspect.signature(DepthPro.__init__).bind(None, quantize=8)
    inspect.signature(DepthPro.create_depth_map).bind(None, "path")
    inspect.signature(Edges.edge_map).bind(None, Image.new("RGB", (16, 16)))
    inspect.signature(OpenPoseBody.pose_map).bind(None, Image.new("RGB", (16, 16)))
    assert HED.repositories == (hed._HF_REPO,)
    assert HED.files == {hed._HF_REPO: (hed._HF_FILE,)}
    assert OPENPOSE.files == {openpose._HF_REPO: (openpose._HF_FILE,)}
    assert FIBO_VLM.repositories[0] in ModelRevisions.PINNED
    (component,) = DepthProWeightDefinition.get_components()
    assert (component.download_url, component.name) == (DEPTH_PRO.url, DEPTH_PRO.family)


class Written:
    """In place of FIBO-VLM."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.decoder: Any = lambda: None
        self.seen: dict[str, Any] = {}

    def generate(self, **asked: Any) -> str:
        self.seen = asked
        self.decoder()
        return self.answer

    edit = generate


def writer_of(answer: str) -> PromptWriter:
    writer = PromptWriter.__new__(PromptWriter)
    writer._vlm = Written(answer)
    return writer


def stage_of(**changes: Any) -> Stage:
    return Stage(LoadSpec(FIBO_VLM, FIBO_VLM.pipelines[0], None), params_for(**changes))


def test_the_prompt_writer_calls_back_at_each_token_and_gives_json(tmp_path: Path) -> None:
    calls: list[int] = []
    writer = writer_of(f"\n{JSON_PROMPT}\n")
    assert writer.run(stage_of(), tmp_path, lambda: calls.append(1)) == JSON_PROMPT
    assert calls == [1]
    (tmp_path / "a.png").write_bytes(to_png(Image.new("RGB", (64, 64), "red")))
    (tmp_path / "m.png").write_bytes(to_png(Image.new("L", (64, 64), 255)))
    images = (InputImage("a", 64, 64),)
    writer.run(stage_of(images=images, mask=InputImage("m", 64, 64)), tmp_path, lambda: None)
    assert writer._vlm.seen["use_mask"] is True
    assert writer._vlm.seen["image"].getpixel((8, 8)) == helpers.GREY


@pytest.mark.parametrize("answer", ["a lighthouse", "[1]", ""])
def test_an_answer_that_is_no_json_fails_the_task_with_a_sentence(
    answer: str, tmp_path: Path
) -> None:
    with pytest.raises(NotSupported, match="could not write a JSON prompt"):
        writer_of(answer).run(stage_of(), tmp_path, lambda: None)


def test_the_generator_loads_and_runs_a_helper(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Maps(Helper):
        def run(self, stage: Stage, inputs: Path, going_on: Callable[[], None]) -> Image.Image:
            going_on()
            return Image.new("RGB", (16, 16), "white")

    monkeypatch.setitem(helpers.CLASSES, "hed", lambda quantize, path: Maps())
    generating = OnItsThread(data_dir)
    weights = LoadSpec(HED, HED.pipelines[0], None)
    assert generating.load(weights) is None
    assert generating.generator.resident == ("hed",)
    reports: list[tuple[Phase, int, int]] = []
    made = generating.run(
        generating.generator.prepare,
        Stage(weights, params_for()),
        data_dir,
        lambda *report: reports.append(report),
    )
    assert isinstance(made, Image.Image)
    assert reports[0] == reports[1] == (Phase.DENOISING, 0, 1)
    assert reports[2:] == [(Phase.DENOISING, 1, 1), (Phase.DECODING, 1, 1)]
    generating.run(generating.generator.unload)


# -- weights ---------------------------------------------------------------------------------------


def test_a_helper_is_present_when_its_own_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from mflux.cli.defaults import defaults
    from mflux.models.common.resolution.model_revisions import ModelRevisions

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(defaults, "MFLUX_CACHE_DIR", tmp_path / "mflux")
    pinned = str(ModelRevisions.get("lllyasviel/Annotators"))
    folder = tmp_path / "hub" / "models--lllyasviel--Annotators" / "snapshots" / pinned
    folder.mkdir(parents=True)
    (folder / "ControlNetHED.pth").write_bytes(b"x")
    assert hub_cache.is_present(HED)
    assert not hub_cache.is_present(OPENPOSE)
    assert hub_cache.needs_download(tmp_path, DEPTH_PRO)
    file = tmp_path / "mflux" / "depth_pro" / "depth_pro.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1234")
    assert (hub_cache.is_present(DEPTH_PRO), hub_cache.bytes_on_disk(DEPTH_PRO)) == (True, 4)
    with pytest.raises(OSError, match="broke"), hub_cache.marked_as_incomplete(tmp_path, DEPTH_PRO):
        raise OSError("the connection broke")
    with hub_cache.marked_as_incomplete(tmp_path, DEPTH_PRO):
        assert not file.exists(), "mflux would take the part for the whole"
