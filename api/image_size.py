"""The width and height of an image: from the request, or from an input image, within limits."""

import errors
from api.generate_request import GenerateRequest, Limits, default_side
from models.model_catalog import Pipeline
from models.model_rules import MOST_SIDE, Rules
from task import GenerationParams

SIDES = frozenset({"width", "height"})
MOST_WEBP_SIDE = 16383
MOST_OUTPUT_PIXELS_FACTOR = 4
"""An upscaled image may have so many times --max-pixels."""


def sized(
    request: GenerateRequest,
    pipeline: Pipeline,
    params: GenerationParams,
    source: tuple[int, int] | None,
    limits: Limits,
) -> GenerationParams:
    """Returns the params with a width and a height.

    Args:
        source: width and height of the input image that decides the size; None: none does.

    Raises:
        InvalidInput: they are larger than this server or the file format allows.
    """
    width, height = _size(request, pipeline, source, limits)
    most = limits.max_pixels
    if width * height > most and not pipeline.upscales:
        raise errors.InvalidInput(
            f"width x height must be at most {most} pixels on this server, "
            f"not {width} x {height} = {width * height}.",
            field="width",
        )
    if max(width, height) > MOST_SIDE:
        raise errors.InvalidInput(
            f"width and height must be at most {MOST_SIDE} pixels, not {width} x {height}.",
            field="width",
        )
    if (params.width, params.height) != (width, height):
        params = params.model_copy(update={"width": width, "height": height})
    final_width, final_height = params.final_size
    if max(final_width, final_height) > MOST_WEBP_SIDE and params.format == "WEBP":
        raise errors.InvalidInput(
            f"{{field}} WEBP holds up to {MOST_WEBP_SIDE} pixels a side, not {final_width} x "
            f"{final_height}: choose another format.",
            field="format",
        )
    if params.upscale and final_width * final_height > most * MOST_OUTPUT_PIXELS_FACTOR:
        raise errors.InvalidInput(
            f"{{field}} {params.upscale:g} makes {final_width} x {final_height} pixels of "
            f"{width} x {height}: at most {most * MOST_OUTPUT_PIXELS_FACTOR} are allowed.",
            field="upscale",
        )
    return params


def _size(
    request: GenerateRequest,
    pipeline: Pipeline,
    source: tuple[int, int] | None,
    limits: Limits,
) -> tuple[int, int]:
    """Returns width and height before upscaling. Absent sides follow the input image; without one
    they are the default, or what --max-pixels leaves of it."""
    if pipeline.upscales and source:
        return source
    default, most = default_side(limits), limits.max_pixels
    asked = request.model_fields_set & SIDES
    width, height = float(request.width), float(request.height)
    if source and not asked:
        width, height = _size_like(source, pipeline, default)
    elif not asked:
        width = height = default
    elif "height" not in asked:
        height = width * source[1] / source[0] if source else min(default, most / width)
    elif "width" not in asked:
        width = height * source[0] / source[1] if source else min(default, most / height)
    return _rounded(request, pipeline.rules, width, height)


def _size_like(source: tuple[int, int], pipeline: Pipeline, default: int) -> tuple[float, float]:
    """Returns width and height with the aspect ratio of the input image: those of the image itself,
    or smaller, with as many pixels as a square of the default side; or the pipeline's own width."""
    width, height = source
    if pipeline.default_width:
        return float(pipeline.default_width), pipeline.default_width * height / width
    shrink = min(1.0, (default * default / (width * height)) ** 0.5)
    return width * shrink, height * shrink


def _rounded(
    request: GenerateRequest, rules: Rules, width: float, height: float
) -> tuple[int, int]:
    """Down to a multiple of what the model draws. A side that the request leaves open is at least
    what the model draws; if both are open, also at most that. Others are refused later."""
    step, (least, most) = rules.side_step, rules.sides
    asked = request.model_fields_set & SIDES
    sides = {}
    for name, side in (("width", width), ("height", height)):
        pixels = round(side) // step * step
        pixels = pixels or round(side) if name in asked else max(pixels, least)
        sides[name] = pixels if asked else min(pixels, most)
    return sides["width"], sides["height"]
