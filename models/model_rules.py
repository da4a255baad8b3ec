"""What mflux's classes demand of params beyond which fields they take: as data, and the check.

mflux checks most of it only when the weights are loaded, and some of it never: then the picture is
ruined. tests/test_contract.py compares each rule with mflux's classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from fields import PRESETS, SCHEDULERS, Takes
from models.prompt_forms import WRITTEN, PromptForm, form_error

LINEAR, FLOW_MATCH, ER_SDE, EULER = SCHEDULERS
SIDE_STEP = 16
"""mflux draws in squares of 16 pixels: widths and heights are rounded down to multiples of it."""
MOST_SIDE = 8192
"""Pixels, also where the size comes from a picture."""
RESOLUTION = 1024
"""mflux's own output_resolution."""
VISION_ASPECT = 200
"""Longer side of a picture by its shorter one, at most, for the encoder that reads it."""


@dataclass(frozen=True)
class Rules:
    """Of one of mflux's classes, perhaps with one of its models."""

    schedulers: tuple[str, ...] = ()
    """Names that `scheduler` may have; its own one first. Empty: it always uses its own."""
    side_step: int = SIDE_STEP
    """Sides are rounded down to multiples of it."""
    sides: tuple[int, int] = (SIDE_STEP, MOST_SIDE)
    """Least and most pixels of a side."""
    least_steps: int = 1
    """With its own scheduler."""
    most_steps: int | None = None
    least_guidance: float = 0.0
    strong_guidance_needs: Takes | None = None
    """Field that a guidance above 1 may not be without."""
    guidance_idle_without: Takes | None = None
    """Field without which guidance changes nothing: it is then ignored."""
    most_images: int | None = None
    most_aspect: float | None = None
    """Of the pictures in `images`: longer side by shorter side."""
    scaled_areas: tuple[int, int] | None = None
    """Least and most pixels that a picture in `images` may have, scaled to `output_resolution`."""
    mask_fits: bool = False
    """Whether the mask must have the size of the one picture in `images`."""
    together: frozenset[Takes] = frozenset()
    """Fields that are given together or not at all."""
    prompt: PromptForm = PromptForm.TEXT
    presets: Mapping[str, int] = field(default_factory=dict)
    """Names that `preset` may have, and the steps that each draws."""
    refused_bits: tuple[int, ...] = ()
    """Of `quantize`."""
    control_strength: float | None = None
    """Where a request gives none; None: the class's own."""
    ignored: frozenset[Takes] = frozenset()
    """Fields that may be given and change nothing."""


class Size(Protocol):
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


class Asked(Protocol):
    """The params that rules are about."""

    @property
    def prompt(self) -> str: ...
    @property
    def prompts(self) -> Sequence[str]: ...
    @property
    def steps(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def negative_prompt(self) -> str | None: ...
    @property
    def scheduler(self) -> str | None: ...
    @property
    def preset(self) -> str | None: ...
    @property
    def quantize(self) -> int | None: ...
    @property
    def images(self) -> Sequence[Size]: ...
    @property
    def mask(self) -> Size | None: ...
    @property
    def output_resolution(self) -> int | None: ...


class Broken(NamedTuple):
    """A rule that params break."""

    field: str
    sentence: str
    """`{field}` in it stands for the name of the field."""


def broken_rule(name: str, rules: Rules, asked: Asked) -> Broken | None:
    """The first rule that params break; None: they break none.

    Args:
        name: of the model, for the sentence.
    """
    return next(_broken(name, rules, asked), None)


def _broken(name: str, rules: Rules, asked: Asked) -> Iterator[Broken]:
    yield from _broken_choices(name, rules, asked)
    yield from _broken_numbers(name, rules, asked)
    yield from _broken_pictures(name, rules, asked)
    for prompt in asked.prompts or (asked.prompt,):
        if rules.prompt not in WRITTEN and (error := form_error(rules.prompt, prompt)):
            yield Broken("prompt", f"{name}: {{field}} {error}")
    given = {one for one in rules.together if getattr(asked, one)}
    if given and given != rules.together:
        one, other = sorted(given)[0], sorted(rules.together - given)[0]
        yield Broken(one, f"{name} takes {{field}} only with {other}.")


def _broken_choices(name: str, rules: Rules, asked: Asked) -> Iterator[Broken]:
    if asked.scheduler and asked.scheduler not in rules.schedulers:
        known = ", ".join(rules.schedulers) or "its own alone"
        yield Broken("scheduler", f"{name} has no {{field}} {asked.scheduler}. It has: {known}.")
    if asked.preset and asked.preset not in rules.presets:
        yield Broken("preset", f"{name} has no {{field}} {asked.preset}.")
    if asked.quantize in rules.refused_bits:
        yield Broken(
            "quantize", f"{name} cannot be quantized to {asked.quantize} bits: it draws noise."
        )


def _broken_numbers(name: str, rules: Rules, asked: Asked) -> Iterator[Broken]:
    least, most = rules.sides
    for side in ("width", "height"):
        pixels = getattr(asked, side)
        if not least <= pixels <= most:
            yield Broken(side, f"{name} takes a {{field}} of {least} to {most}, not {pixels}.")
    own = not rules.schedulers or asked.scheduler in (None, rules.schedulers[0])
    if own and asked.steps < rules.least_steps:
        yield Broken("steps", f"{{field}} must be at least {rules.least_steps} with {name}.")
    if rules.most_steps and asked.steps > rules.most_steps:
        yield Broken("steps", f"{{field}} must be at most {rules.most_steps} with {name}.")
    guidance = asked.guidance
    if guidance is None:
        return
    if guidance < rules.least_guidance:
        yield Broken(
            "guidance", f"{{field}} must be at least {rules.least_guidance:g} with {name}."
        )
    needed = rules.strong_guidance_needs
    if needed and guidance > 1 and not getattr(asked, needed):
        yield Broken(needed, f"{name} needs {{field}} for a guidance above 1.")


def _broken_pictures(name: str, rules: Rules, asked: Asked) -> Iterator[Broken]:
    images, mask = asked.images, asked.mask
    if rules.most_images and len(images) > rules.most_images:
        most = "one picture" if rules.most_images == 1 else f"up to {rules.most_images} pictures"
        yield Broken("images", f"{name} takes {most} in {{field}}.")
    for image in images:
        longer, shorter = max(image.width, image.height), min(image.width, image.height)
        if rules.most_aspect and longer > rules.most_aspect * shorter:
            yield Broken(
                "images",
                f"{name} takes pictures whose sides differ at most by a factor of "
                f"{rules.most_aspect:g}, not {image.width} x {image.height}.",
            )
        if rules.scaled_areas and (error := _scaled_error(rules.scaled_areas, asked, image)):
            yield Broken("output_resolution", f"{name}: {error}")
    if rules.mask_fits and mask and images:
        if len(images) > 1:
            yield Broken("mask", f"{name} takes {{field}} with one picture in images, not more.")
        elif (mask.width, mask.height) != (images[0].width, images[0].height):
            yield Broken("mask", f"{name} needs {{field}} of the size of the picture in images.")


def _scaled_error(areas: tuple[int, int], asked: Asked, image: Size) -> str | None:
    """Why a picture cannot be read when it is scaled as mflux does it: QwenImage21LatentCreator."""
    resolution, ratio = asked.output_resolution or RESOLUTION, image.width / image.height
    exact = math.sqrt(resolution * resolution * ratio)
    width, height = (max(32, round(side / 32) * 32) for side in (exact, exact / ratio))
    least, most = areas
    if least <= width * height <= most:
        return None
    return (
        f"{{field}} {resolution} makes {width} x {height} pixels of a picture of {image.width} x "
        f"{image.height}; it reads {least} to {most} pixels."
    )


BOTH = (LINEAR, FLOW_MATCH)
FLUX = Rules(schedulers=BOTH)
# With linear, mflux passes the steps 0, 1, 2, 3 to the transformers of FLUX.2 and FIBO instead of
# 1000, 956, 876, 700: they draw noise.
FLOW_MATCH_ALONE = Rules(schedulers=(FLOW_MATCH,))
# One step of the linear scheduler has no number as its end (mflux divides by 0).
QWEN = Rules(schedulers=BOTH, least_steps=2)
STOCHASTIC = Rules(schedulers=(ER_SDE, EULER))
CONTROL_STRENGTH = 0.4
"""The default of mflux's command for FLUX.1; its class has 1.0."""

RULES: Mapping[str, Rules] = {
    "Flux1": FLUX,
    "Flux1Kontext": Rules(schedulers=BOTH, most_images=1),
    "Flux1Fill": FLUX,
    "Flux1Depth": FLUX,
    "Flux1Redux": FLUX,
    "Flux1InContextDev": Rules(schedulers=BOTH, most_images=1),
    "Flux1InContextFill": Rules(schedulers=BOTH, most_images=1),
    "Flux1Controlnet": Rules(schedulers=BOTH, control_strength=CONTROL_STRENGTH),
    "Flux2Klein": FLOW_MATCH_ALONE,
    "Flux2KleinEdit": FLOW_MATCH_ALONE,
    "Flux3KleinEdit": Rules(most_images=10),
    "QwenImage": QWEN,
    "QwenImageEdit": Rules(schedulers=BOTH, least_steps=2, most_aspect=VISION_ASPECT),
    "QwenImage21": Rules(
        side_step=32,
        sides=(32, MOST_SIDE),
        least_steps=2,
        guidance_idle_without=Takes.NEGATIVE_PROMPT,
    ),
    "QwenImage21Edit": Rules(
        side_step=32,
        sides=(32, MOST_SIDE),
        least_steps=2,
        least_guidance=1,
        strong_guidance_needs=Takes.NEGATIVE_PROMPT,
        most_images=10,
        scaled_areas=(256 * 256, 4096 * 4096),  # preprocessor_config.json of Qwen3-VL
    ),
    "QwenImage21Controlnet": Rules(
        side_step=32,
        sides=(32, MOST_SIDE),
        least_steps=2,
        least_guidance=1,
        strong_guidance_needs=Takes.NEGATIVE_PROMPT,
        together=frozenset({Takes.INIT_IMAGE, Takes.MASK}),
    ),
    "Krea2": STOCHASTIC,
    "Krea2Controlnet": STOCHASTIC,
    "Anima": Rules(schedulers=(ER_SDE, EULER), refused_bits=(3,)),
    "ErnieImage": FLUX,
    "ZImage": FLUX,
    # The model card's strength; mflux's command draws with it too, its class with 0.8.
    "ZImageTurboControlnet": Rules(schedulers=BOTH, control_strength=1.0),
    "FIBO": Rules(schedulers=(FLOW_MATCH,), prompt=PromptForm.JSON),
    "FIBOEdit": Rules(
        schedulers=(FLOW_MATCH,), prompt=PromptForm.JSON_EDIT, most_images=1, mask_fits=True
    ),
    "Fibo2": Rules(prompt=PromptForm.CAPTION),
    "Fibo2Edit": Rules(prompt=PromptForm.CAPTION_EDIT, most_images=5, mask_fits=True),
    # Without steps, its preset decides both the steps and the guidance of each.
    "Ideogram4": Rules(
        sides=(256, 2048),
        guidance_idle_without=Takes.STEPS,
        presets=dict(zip(PRESETS, (48, 20, 12), strict=True)),
    ),
    # More steps than its training had noise levels would repeat some.
    "MOSSImage": Rules(most_steps=218),
}
"""By the name of mflux's class."""
EXCEPT: Mapping[tuple[str, str], Rules] = {
    # Its schedule has an end at every number of steps.
    ("qwen-image-2.1-turbo", "QwenImage21"): Rules(side_step=32, sides=(32, MOST_SIDE)),
    ("z-image", "ZImage"): Rules(schedulers=(FLOW_MATCH, LINEAR)),
    ("fibo-edit-rmbg", "FIBOEdit"): replace(RULES["FIBOEdit"], prompt=PromptForm.JSON_EDIT_OR_NONE),
    # It has no CFG: mflux draws with guidance 1, and without the negative prompt, whatever is sent.
    ("fibo-lite", "FIBO"): Rules(
        schedulers=(FLOW_MATCH,),
        prompt=PromptForm.JSON,
        ignored=frozenset({Takes.GUIDANCE, Takes.NEGATIVE_PROMPT}),
    ),
}
"""By model and class, where a model differs from the others of its class."""


def rules_of(model: str, pipeline: str) -> Rules:
    """Of one of mflux's classes with a model."""
    return EXCEPT.get((model, pipeline)) or RULES.get(pipeline) or Rules()
