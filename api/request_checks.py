"""Checks of the fields of a request: what the model takes, what the operator allows."""

import errors
from allowed import not_supported
from api.generate_request import PICTURES, GenerateRequest, Limits, refusal
from fields import Takes
from models.model_catalog import Model, Pipeline


def check_fields(request: GenerateRequest, model: Model, empty_prompt: bool) -> Pipeline:
    """Refuse fields that the model cannot use, but for guidance, which clients send to every model.

    Args:
        empty_prompt: whether the prompt may be empty without a picture.

    Returns:
        What draws the request.

    Raises:
        InvalidInput, NotSupported
    """
    given = set(request.given() - model.ignored)
    if not all(text.strip() for text in request.prompts) and not model.upscaler:
        if not (has_pictures(request) or empty_prompt):
            raise errors.InvalidInput(
                "{field} is required: it may be empty only with a picture.", field="prompt"
            )
        given.add(Takes.PROMPT)
    if Takes.GUIDANCE not in model.takes:
        given.discard(Takes.GUIDANCE)
    if not model.upscaler:
        if request.upscale is None and (request.upscaler or request.softness is not None):
            raise errors.InvalidInput("upscaler and softness need upscale.", field="upscale")
        given -= {Takes.UPSCALE, Takes.SOFTNESS}
    if not given <= model.takes:
        raise not_supported(model, frozenset(given))
    _check_together(request, given)
    pipeline = model.pipeline_for(frozenset(given))
    if pipeline is None:
        raise not_supported(model, frozenset(given))
    for side in ("width", "height"):
        if model.upscaler and side in request.model_fields_set:
            raise errors.NotSupported(f"{model.name} takes upscale, not {{field}}.", field=side)
    return pipeline


def check_limits(request: GenerateRequest, model: Model, limits: Limits) -> None:
    """Refuse values above what the operator allows.

    Raises:
        InvalidInput, NotSupported
    """
    for name, text in (
        ("negative_prompt", request.negative_prompt),
        *(("prompt", prompt) for prompt in request.prompts),
    ):
        if text is not None and len(text) > limits.max_prompt_chars:
            raise refusal(name, text, limits)
    if len(request.prompts) > limits.max_count:
        raise refusal("prompt", request.prompt, limits)
    if request.steps is not None and request.steps > limits.max_steps:
        raise refusal("steps", request.steps, limits)
    for name in ("count", "n"):
        number = getattr(request, name)
        if number is not None and number > limits.max_count:
            raise refusal(name, number, limits)
    if None not in (request.count, request.n) and request.count != request.n:
        raise errors.InvalidInput("n and count mean the same: send one of them.", field="n")
    count = request.count or request.n
    if len(request.prompts) > 1 and count not in (None, len(request.prompts)):
        raise errors.InvalidInput(
            "{field} must be the number of prompts, or absent: there is one image of each.",
            field="n" if request.count is None else "count",
        )
    guidance = model.default_guidance if request.guidance is None else request.guidance
    negative = request.negative_prompt is not None
    if Takes.NEGATIVE_PROMPT in model.ignored:
        negative = False
    if negative and guidance is not None and guidance <= 1:
        raise errors.NotSupported(
            f"{model.name} does not use {{field}} at guidance {guidance:g}: send a guidance "
            "above 1.",
            field="negative_prompt",
        )


def has_pictures(request: GenerateRequest) -> bool:
    return any(getattr(request, name) is not None for name in PICTURES)


def _check_together(request: GenerateRequest, given: set[Takes]) -> None:
    """Fields that mean nothing without another one, or that exclude each other.

    Raises:
        InvalidInput
    """
    if request.image_strength is not None and request.init_image is None:
        raise errors.InvalidInput("{field} needs init_image.", field="image_strength")
    if request.control_image is None and {Takes.CONTROL_STRENGTH, Takes.CONTROL_TYPE} & given:
        raise errors.InvalidInput(
            "control_strength and control_type need control_image.", field="control_image"
        )
    more = request.control_images or ()
    if more and request.control_image is None:
        raise errors.InvalidInput("{field} needs control_image.", field="control_images")
    for name in ("control_types", "control_strengths"):
        if len(getattr(request, name) or ()) > len(more):
            raise errors.InvalidInput(
                "{field} has more values than control_images has pictures.", field=name
            )
    if len(request.reference_strengths or ()) > len(request.images or ()):
        raise errors.InvalidInput(
            "{field} has more values than images has pictures.",
            field="reference_strengths",
        )
    if request.background == "transparent":
        if request.format == "JPEG":
            raise errors.InvalidInput(
                "background transparent needs the format PNG or WEBP.", field="background"
            )
        if request.upscale is not None:
            raise errors.InvalidInput(
                "background transparent and upscale exclude each other: upscalers draw opaque "
                "images.",
                field="background",
            )
    if request.auto_mask is not None and request.mask is not None:
        raise errors.InvalidInput(
            "{field} is sent in place of mask: send one of them.", field="auto_mask"
        )
