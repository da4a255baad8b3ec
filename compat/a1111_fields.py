"""Translates a body of AUTOMATIC1111's API to the fields of /generate."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from api.generate_request import default_side
from api.image_size import MOST_OUTPUT_PIXELS_FACTOR
from compat.a1111_shapes import ImageToImage, TextToImage
from compat.bodies import used
from compat.pictures import EDIT, START, place_pictures
from compat.sync_calls import SyncCalls
from errors import InvalidInput
from fields import Takes
from images import decode_base64
from models.model_catalog import Model
from models.model_rules import SIDE_STEP

NAMES = {
    "count": "batch_size x n_iter",
    "images": "init_images",
    "init_image": "init_images",
    "image_strength": "1 - denoising_strength",
    "mask_feather": "mask_blur",
    "guidance": "cfg_scale",
    "upscale": "hr_scale",
    "control_image": "alwayson_scripts.controlnet.args",
    "control_type": "alwayson_scripts.controlnet.args",
    "control_types": "alwayson_scripts.controlnet.args",
    "control_images": "alwayson_scripts.controlnet.args",
}
"""Fields of /generate that have another name in this API."""
RANDOM_SEEDS = 2**32
"""AUTOMATIC1111's, which every client can hold."""
DEFAULT_SIDE = 512
"""Pixels, AUTOMATIC1111's own."""
TAG = re.compile(r"<(\w+):([^<>]*)>")
"""An extra network in a prompt: <lora:NAME:SCALE>, <hypernet:NAME:SCALE>, ..."""
MOST_LORAS = 8
MOST_UPSCALE = 4.0


@dataclass(frozen=True)
class Hires:
    """The hires fix of a request."""

    upscale: float | None
    """Factor of the upscaler; None: no upscaling."""
    size: tuple[int, int] | None
    """Of the finished images in pixels, where the request gives one."""


def hires_of(asked: TextToImage, drawn: tuple[int, int], calls: SyncCalls) -> Hires:
    """As AUTOMATIC1111 reads it: hr_resize_x and hr_resize_y go before hr_scale; where one of them
    is 0, the aspect ratio stays.

    Args:
        drawn: width and height before upscaling, in pixels.

    Raises:
        InvalidInput
    """
    if not calls.allowed.upscalers or not used(asked.enable_hr, "enable_hr"):
        return Hires(None, None)
    width, height, size = *drawn, None
    factor = used(asked.hr_scale, "hr_scale")
    if not isinstance(asked, ImageToImage):
        wide = used(asked.hr_resize_x, "hr_resize_x")
        high = used(asked.hr_resize_y, "hr_resize_y")
        if wide or high:
            size = (
                wide or max(round(high * width / height), 1),
                high or max(round(wide * height / width), 1),
            )
            factor = max(size[0] / width, size[1] / height)
            most = calls.limits.max_pixels * MOST_OUTPUT_PIXELS_FACTOR
            if size[0] * size[1] > most:
                raise InvalidInput(
                    f"hr_resize_x x hr_resize_y must be at most {most} pixels, not "
                    f"{size[0]} x {size[1]}.",
                    field="hr_resize_x",
                )
    return Hires(min(factor, MOST_UPSCALE) if factor > 1 else None, size)


def upscaler_of(asked: TextToImage, calls: SyncCalls) -> str | None:
    """The upscaler that the request names; None: the server chooses, as for AUTOMATIC1111's own."""
    names = [model.name for model in calls.allowed.upscalers]
    return asked.hr_upscaler if asked.hr_upscaler in names else None


def fields_of(asked: TextToImage, model: Model, calls: SyncCalls) -> dict[str, Any]:
    """The fields of /generate, but for the pictures.

    Raises:
        InvalidInput
    """
    prompt, loras = _without_tags(asked.prompt, calls, model)
    guidance = _guidance(asked, model, calls)
    width, height = _sides(asked, calls)
    scheduler = asked.scheduler if asked.scheduler in model.schedulers else None
    drawn = tuple(max((side or 0) // SIDE_STEP, 1) * SIDE_STEP for side in (width, height))
    upscale = hires_of(asked, (drawn[0], drawn[1]), calls).upscale
    return {
        "prompt": prompt,
        "negative_prompt": _negative_prompt(asked, model, guidance),
        "seed": secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed,
        "width": width,
        "height": height,
        "steps": calls.steps(model, asked.steps),
        "guidance": guidance,
        "count": asked.batch_size * asked.n_iter,
        "format": "PNG",
        "loras": loras or None,
        "upscale": upscale,
        "upscaler": upscaler_of(asked, calls) if upscale else None,
        "scheduler": scheduler,
    }


def _sides(asked: TextToImage, calls: SyncCalls) -> tuple[int | None, int | None]:
    """With a picture, what is absent follows it (api/submission.py)."""
    if isinstance(asked, ImageToImage):
        return asked.width, asked.height
    most = calls.limits.max_pixels
    default = min(DEFAULT_SIDE, default_side(calls.limits))
    width, height = asked.width, asked.height
    if width is None:
        width = default if height is None else min(default, max(most // height, SIDE_STEP))
    return width, min(default, max(most // width, SIDE_STEP)) if height is None else height


def placed_pictures(asked: ImageToImage, named: str | None, calls: SyncCalls) -> dict[str, Any]:
    """The fields of /generate that the pictures of a request go to, and the model.

    Args:
        named: the model that the request names.

    Raises:
        InvalidInput
    """
    pictures = [decode_base64(text, "init_images") for text in asked.init_images]
    mask = decode_base64(asked.mask, "mask") if asked.mask else None
    placed = place_pictures(calls, named, pictures, mask, ways=(START, EDIT), field="init_images")
    model = calls.allowed.model(placed["model"])
    given = {Takes.PROMPT, Takes.INIT_IMAGE} | ({Takes.MASK} if mask else set())
    pipeline = model.pipeline_for(frozenset(given))
    if START in placed and pipeline and Takes.IMAGE_STRENGTH in pipeline.takes:
        changed = used(asked.denoising_strength, "denoising_strength")
        placed["image_strength"] = min(max(1 - changed, 0.01), 0.99)
    if START in placed and pipeline and pipeline.inpaints:
        placed["mask_feather"] = used(asked.mask_blur, "mask_blur")
    return placed


def is_inverted(asked: TextToImage) -> bool:
    """Whether the mask of the request is black where to repaint."""
    if not isinstance(asked, ImageToImage) or asked.mask is None:
        return False
    return used(asked.inpainting_mask_invert, "inpainting_mask_invert")


def _guidance(asked: TextToImage, model: Model, calls: SyncCalls) -> float | None:
    """Maps CFG to guidance. FLUX has another kind of guidance, for which 7 is far too high."""
    if Takes.GUIDANCE not in model.takes:
        return None
    if model.family.startswith("flux"):
        return used(asked.distilled_cfg_scale, "distilled_cfg_scale")
    cfg = used(asked.cfg_scale, "cfg_scale")
    needs_negative = any(
        pipeline.rules.strong_guidance_needs is Takes.NEGATIVE_PROMPT
        for pipeline in model.pipelines
    )
    if needs_negative and not used(asked.negative_prompt, "negative_prompt").strip():
        return None
    if cfg is not None and calls.clamp and model.default_guidance is not None:
        return min(cfg, model.default_guidance)
    return cfg


def _negative_prompt(asked: TextToImage, model: Model, guidance: float | None) -> str | None:
    guided = model.default_guidance if guidance is None else guidance
    if Takes.NEGATIVE_PROMPT not in model.takes or (guided is not None and guided <= 1):
        return None
    return TAG.sub("", used(asked.negative_prompt, "negative_prompt")).strip() or None


def _without_tags(prompt: str, calls: SyncCalls, model: Model) -> tuple[str, list[dict[str, Any]]]:
    """The prompt without its tags, and the LoRAs that they name. Names that are not the operator's
    are ignored, as all other tags are."""
    tags = [(kind, text.split(":")) for kind, text in TAG.findall(prompt)]
    named = [values for kind, values in tags if kind == "lora"]
    known = calls.allowed.loras() if named and Takes.LORAS in model.takes else {}
    loras = [
        {"name": values[0].strip(), "scale": _scale(values[1:])}
        for values in named
        if values[0].strip() in known
    ]
    return TAG.sub("", prompt), loras[:MOST_LORAS]


def _scale(values: Sequence[str]) -> float:
    """Returns the first value after the name of a LoRA; 1 if it is missing or not a number."""
    try:
        scale = float(values[0]) if values else 1.0
    except ValueError:
        return 1.0
    return 1.0 if isnan(scale) else min(max(scale, -10.0), 10.0)
