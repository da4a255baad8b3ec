"""Every model, called as the server would call it: mflux's own classes, without weights, say what
they take. What mflux refuses the server refuses first, and what the server refuses mflux refuses
or calls useless."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, seen_by_all, slow_except
from contract import bits_refused, call
from memory_stores import memory_store
from PIL import Image

from allowed import Allowed, given_fields
from api.generate_request import Limits, check_request
from api.submission import Prepared, Submission
from api.waiting_places import WaitingPlaces
from decoding.decoder import PictureDecoder, PictureReader
from errors import NotSupported, ServerError
from fields import PRESETS, SCHEDULERS, Takes
from images import to_png
from models.helpers import HELPERS
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec, Model, Pipeline
from models.prompt_forms import CAPTION as CAPTION_SPEC
from models.prompt_forms import PromptForm, form_error
from task import GenerationParams, InputImage, Stage
from timing_model import TimingModel

REAL = [model for model in read_catalog().models if not model.tiny]
PIPELINES = [(model, pipeline) for model in REAL for pipeline in model.pipelines]
NAMES = [f"{model.name}-{pipeline.name}" for model, pipeline in PIPELINES]
ONE_OF_EACH_CLASS = list(
    {pipeline.name: (model, pipeline) for model, pipeline in PIPELINES}.values()
)
ALLOWED = Allowed(
    REAL[0],
    tuple(REAL),
    helpers=tuple(HELPERS.values()),
    quantize_choices=(3, 4, 5, 6, 8),
    allow_lora_repos=True,
)
LIMITS = Limits(max_pixels=8192 * 8192, max_steps=1000, max_count=10)
CAPTION = json.dumps({"short_description": "a lighthouse", "edit_instruction": "add a boat"})
PROMPTS = (
    "a lighthouse",
    CAPTION,
    '{"short_description": "a lighthouse"}',
    '{"short_description": 3, "edit_instruction": "add a boat"}',
    '{"edit_instruction": 3}',
    '{"edit_instruction": ""}',
    '{"short_description"',
    "[1, 2]",
    "3",
    '"a lighthouse"',
)


@dataclass(frozen=True)
class Case:
    """What a request asks for beyond what a pipeline needs."""

    values: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """By field: width and height of each picture."""


def cases(model: Model, pipeline: Pipeline) -> Iterator[Case]:
    """Each field at its limits, its default and typical values, and what belongs together."""
    yield Case()
    for size in ((16, 16), (32, 32), (48, 80), (64, 256), (240, 512), (256, 256), (1024, 1024)):
        yield Case({"width": size[0], "height": size[1]})
    for size in ((2048, 2048), (2064, 512), (512, 2080), (8192, 32), (8192, 256)):
        yield Case({"width": size[0], "height": size[1]})
    for prompt in PROMPTS if pipeline.rules.prompt is not PromptForm.TEXT else PROMPTS[::3]:
        yield Case({"prompt": prompt})
    takes = pipeline.takes
    one = () if pipeline.inpaints else (1,)  # of one step, init_image leaves none to draw
    if Takes.STEPS in takes:
        yield from (Case({"steps": steps}) for steps in (*one, 2, 3, 8, 50, 218, 219, 1000))
    for preset in PRESETS if Takes.PRESET in takes else ():
        yield Case({"preset": preset})
        yield Case({"preset": preset, "steps": 8})
    yield from guidance_cases(takes)
    yield from option_cases(takes)
    if Takes.IMAGES in pipeline.needs:
        yield Case({"prompt": ""})
    if Takes.SCHEDULER in takes:
        for scheduler in SCHEDULERS:
            yield from (
                Case({"scheduler": scheduler, "steps": steps}) for steps in (*one, 2, 4, 20)
            )
    if Takes.IMAGE_STRENGTH in takes:
        for strength in (0.01, 0.4, 0.99):
            for steps in (2, 20):
                start = {"init_image": ((512, 512),)}
                yield Case({"image_strength": strength, "steps": steps}, start)
    yield from picture_cases(pipeline)


def option_cases(takes: frozenset[Takes]) -> Iterator[Case]:
    values: dict[Takes, tuple[Any, ...]] = {
        Takes.REFERENCE_STRENGTHS: ([0.0], [1.5], [10.0]),
        Takes.EDIT_STRENGTH: (0.01, 0.6, 1.0),
        Takes.AUTO_MASK: ("the red shirt",),
        Takes.VERIFY_RETRIES: (1, 3),
        Takes.OUTPUT_RESOLUTION: (32, 256, 512, 1024, 4096),
        Takes.STEP_CACHE: (0.01, 0.25, 0.99),
        Takes.CFG_END: (0.01, 0.6, 1.0),
        Takes.SKIP_LAYERS: ([], [0, 22], [41]),
        Takes.SOFTNESS: (0.0, 1.0),
        Takes.BACKGROUND: ("transparent",),
    }
    for name in values.keys() & takes:
        for value in values[name]:
            yield Case({name.value: value, "format": "PNG"})
            if name in (Takes.STEP_CACHE, Takes.CFG_END, Takes.EDIT_STRENGTH):
                yield Case({name.value: value, "format": "PNG", "steps": 20})


def guidance_cases(takes: frozenset[Takes]) -> Iterator[Case]:
    if Takes.GUIDANCE in takes:
        for guidance in (0.0, 0.5, 1.0, 1.5, 7.0, 100.0):
            yield Case({"guidance": guidance})
            yield Case({"guidance": guidance, "steps": 8})
    if Takes.NEGATIVE_PROMPT in takes:
        yield Case({"negative_prompt": "blurry"})
        if Takes.GUIDANCE in takes:
            for guidance in (0.5, 1.0, 4.0):
                yield Case({"negative_prompt": "blurry", "guidance": guidance})


def picture_cases(pipeline: Pipeline) -> Iterator[Case]:
    takes = pipeline.takes
    small = ((16, 16), (17, 1300), (1300, 900))
    for name in (Takes.INIT_IMAGE, Takes.IMAGES, Takes.CONTROL_IMAGE):
        if name in takes:
            yield from (Case({}, {name: (size,)}) for size in small)
            yield from (Case({"width": None, "height": None}, {name: (size,)}) for size in small)
    if Takes.IMAGES in takes and not pipeline.one_image:
        for count in (2, 5, 6, 8, 10):
            yield Case({}, {"images": ((512, 384),) * count})
    if Takes.MASK in takes:
        masked = Takes.IMAGES if Takes.IMAGES in takes else Takes.INIT_IMAGE
        for mask in ((512, 384), (256, 192), (512, 512)):
            yield Case({}, {masked: ((512, 384),), "mask": (mask,)})
            if not pipeline.one_image and masked is Takes.IMAGES:
                yield Case({}, {masked: ((512, 384),) * 2, "mask": (mask,)})
    if Takes.CONTROL_STRENGTH in takes:
        yield from (Case({"control_strength": strength}) for strength in (0.0, 0.4, 2.0))
    yield from (Case({"control_type": kind}) for kind in pipeline.control_types)
    if {Takes.INIT_IMAGE, Takes.CONTROL_IMAGE} <= takes:
        yield Case({}, {"init_image": ((512, 512),)})
        yield Case({}, {"init_image": ((512, 512),), "mask": ((512, 512),)})
        yield Case({}, {"mask": ((512, 512),)})


@pytest.fixture(scope="module")
def on_one_thread() -> Iterator[ThreadPoolExecutor]:
    """MLX keeps what each thread that used it has made."""
    prepare_mlx()
    with ThreadPoolExecutor(1) as thread:
        yield thread


class RememberingDecoder(PictureDecoder):
    """Decodes each picture once: the cases send few different ones, hundreds of times."""

    @contextmanager
    def reading(self) -> Iterator[PictureReader]:
        with super().reading() as reader:
            for name in ("size", "png"):
                setattr(reader, name, self._remembering(name, getattr(reader, name)))
            yield reader

    def _remembering(self, name: str, decode: Callable[..., Any]) -> Callable[..., Any]:
        def decoded(*given: Any, **options: Any) -> Any:
            key = (name, given, tuple(sorted(options.items())))
            if key not in self._known:
                self._known[key] = decode(*given, **options)
            return self._known[key]

        return decoded

    @cached_property
    def _known(self) -> dict[Any, Any]:
        return {}


@pytest.fixture(scope="module")
def submission() -> Iterator[Submission]:
    decoder = RememberingDecoder()
    queue = PlayedQueue(ALLOWED, TimingModel(), memory_store())
    yield Submission(
        seen_by_all(queue),
        ALLOWED,
        LIMITS,
        lambda stage: None,
        places=WaitingPlaces(4),
        decoder=decoder,
    )
    decoder.close()


def full(model: Model, pipeline: Pipeline, case: Case) -> Case:
    """With what the pipeline needs."""
    least = dict.fromkeys(("init_image", "images", "mask", "control_image"), ((512, 512),))
    needed = {name: size for name, size in least.items() if name in pipeline.needs}
    values = {"seed": 1, "width": 128, "height": 128, "prompt": CAPTION, **case.values}
    if Takes.UPSCALE in pipeline.needs:
        values = {
            "seed": 1,
            "upscale": 2,
            **{k: v for k, v in case.values.items() if k == "softness"},
        }
    return Case(values, {**needed, **case.pictures})


def asked(submission: Submission, model: Model, case: Case) -> Prepared:
    """What the server makes of a request."""
    fields: dict[str, Any] = {name: v for name, v in case.values.items() if v is not None}
    for name, sizes in case.pictures.items():
        pictures = [picture(size) for size in sizes]
        fields[name] = pictures if name == "images" else pictures[0]
    return submission.prepare(check_request({"model": model.name, **fields}, LIMITS))


def drawn(params: GenerationParams) -> Stage:
    """The stage that draws, with what a helper model has made for it."""
    *helping, stage = ALLOWED.stages(params)
    for helper in helping:
        writes = helper.load_spec.model.makes == "prompt"
        stage = stage.helped(helper, [CAPTION if writes else params.control_image])
    return stage


@cache
def picture(size: tuple[int, int]) -> bytes:
    return to_png(Image.new("RGB", size, (90, 120, 30)))


def without_rules(pipeline: Pipeline, case: Case, inputs: Path) -> GenerationParams | None:
    """The params of a request as they would be without the rules of its model; None: the request
    names fields that the pipeline does not take together."""
    given = {name: value for name, value in case.values.items() if value is not None}
    values = {"width": 512, "height": 512, "steps": 20, **given}
    kept: dict[str, Any] = {}
    for name, sizes in case.pictures.items():
        files = []
        for size in sizes:
            files.append(InputImage(f"raw-{size[0]}-{size[1]}", *size))
            (inputs / f"{files[-1].file}.png").write_bytes(picture(size))
        kept[name] = tuple(files) if name == "images" else files[0]
    params = GenerationParams(**{**values, **kept})
    return params if pipeline.suits(given_fields(params)) else None


NOT_CHOSEN = "to mflux it means that none was chosen"
OF_KREA = "in mflux's table of schedulers once Krea 2 is imported, and made for it"
ACCEPTED: Mapping[tuple[str, str, object], str] = {
    ("", "negative_prompt", "blurry"): "changes nothing at guidance 1 or below, as mflux says",
    ("", "scheduler", "er_sde"): OF_KREA,
    ("", "scheduler", "euler"): OF_KREA,
    ("Krea2", "scheduler", "linear"): NOT_CHOSEN,
    ("Krea2Controlnet", "scheduler", "linear"): NOT_CHOSEN,
    ("Anima", "scheduler", "linear"): NOT_CHOSEN,
    ("QwenImage21", "width", 16): "mflux's README: sides are multiples of 32",
    ("FIBOEdit", "mask", None): "seen after the prompt is encoded (a test below)",
}
"""By class (empty: all), field and value: why the server refuses what mflux accepts here."""


@pytest.mark.parametrize(
    ("model", "pipeline"), slow_except(ONE_OF_EACH_CLASS, PIPELINES), ids=NAMES
)
def test_what_the_server_accepts_mflux_takes_and_what_it_refuses_mflux_refuses(
    model: Model,
    pipeline: Pipeline,
    submission: Submission,
    on_one_thread: ThreadPoolExecutor,
    tmp_path: Path,
) -> None:
    wrong = []
    tried = 0
    for case in (full(model, pipeline, case) for case in cases(model, pipeline)):
        try:
            prepared = asked(submission, model, case)
        except ServerError as error:
            raw = without_rules(pipeline, case, tmp_path)
            if raw is None:
                continue
            tried += 1
            if not (
                isinstance(error, NotSupported) and error.field and model.name in error.message
            ):
                wrong.append((case, "refused in other words", repr(error)))
            stage = Stage(LoadSpec(model, pipeline, None), raw)
            called = on_one_thread.submit(call, stage, tmp_path).result()
            at_fault = error.field, case.values.get(error.field or "")
            known = {("", *at_fault), (pipeline.name, *at_fault)} & set(ACCEPTED)
            if called.refusal is None and not known:
                wrong.append((case, "refused by the server alone", error.message))
            continue
        tried += 1
        for file, data in prepared.inputs.items():
            (tmp_path / f"{file}.png").write_bytes(data)
        params = prepared.params
        stage = drawn(params)
        called = on_one_thread.submit(call, stage, tmp_path).result()
        if called.refusal is not None:
            wrong.append((case, "refused by mflux alone", called.refusal))
        elif called.steps is not None and not model.upscaler:
            width = params.width * (
                2 if stage.load_spec.pipeline.name == "Flux1InContextFill" else 1
            )
            asked_for = (params.steps, (width, params.height))
            if (called.steps, called.size) != asked_for:
                wrong.append((case, "drawn otherwise", f"{called} is not {asked_for}"))
            if params.guidance is not None and called.guidance != params.guidance:
                wrong.append((case, "guided otherwise", f"{called} is not {params.guidance}"))
    assert tried >= 3
    assert not wrong, "\n".join(
        f"{what}: {case.values} {case.pictures}: {why}" for case, what, why in wrong
    )


def test_the_mask_of_an_edit_of_fibo_has_the_size_of_the_picture(tmp_path: Path) -> None:
    from mflux.models.fibo.variants.edit.util import FiboEditUtil

    prepare_mlx()
    for name, size in (("first", (64, 48)), ("mask", (48, 64))):
        (tmp_path / f"{name}.png").write_bytes(picture(size))
    first, mask = tmp_path / "first.png", tmp_path / "mask.png"
    with pytest.raises(ValueError, match="same size"):
        FiboEditUtil.load_edit_image(first, 64, 48, mask)
    assert FiboEditUtil.load_edit_image(first, 64, 48, first).size == (64, 48)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_bits_that_a_class_refuses_are_refused_before_it_is_loaded(
    bits: int, on_one_thread: ThreadPoolExecutor
) -> None:
    assert PIPELINES
    for model, pipeline in PIPELINES:
        refused = on_one_thread.submit(bits_refused, model, pipeline, bits).result()
        assert refused is (bits in pipeline.rules.refused_bits), (model.name, pipeline.name)


def test_captions_are_judged_as_mflux_judges_them(on_one_thread: ThreadPoolExecutor) -> None:
    from mflux.models.fibo2.model.fibo2_text_encoder.fibo2_caption_check import Fibo2CaptionCheck

    def refused(prompt: str, edit: bool) -> bool:
        try:
            Fibo2CaptionCheck.check(prompt, edit=edit)
        except ValueError:
            return True
        return False

    captions = list(captions_of_all_kinds())
    assert len(captions) > 100
    for edit, form in ((False, PromptForm.CAPTION), (True, PromptForm.CAPTION_EDIT)):
        for prompt in captions:
            assert bool(form_error(form, prompt)) is refused(prompt, edit), (edit, prompt)


def captions_of_all_kinds() -> Iterator[str]:
    """Each field of a caption with each type of value, and the forms around it."""
    values: tuple[Any, ...] = ("x", "", 3, 2.5, 2.0, "2.0", True, None, [], {}, ["x"], [3], [{}])
    yield from PROMPTS
    for name, kind in {**CAPTION_SPEC, "nonsense": "", "aesthetic_score": ""}.items():
        inner = kind[0] if isinstance(kind, list) else kind
        for value in values:
            yield json.dumps({"edit_instruction": "x", name: value})
            yield json.dumps({"edit_instruction": "x", "structured_caption": {name: value}})
            for field_name in inner if isinstance(inner, Mapping) else ():
                part: Any = {field_name: value}
                part = [part] if isinstance(kind, list) else part
                yield json.dumps({"edit_instruction": "x", name: part})
    for value in values:
        yield json.dumps({"edit_instruction": value})
        yield json.dumps({"edit_instruction": "x", "structured_caption": value})
        yield json.dumps({"edit_instruction": "x", "structured_caption": value, "context": "x"})
        yield json.dumps({"short_description": value, "text_render": value})
