"""Upscaling of a picture: POST /sdapi/v1/extra-single-image."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from api.answers import Answer
from compat.a1111_shapes import Side, Whole
from compat.bodies import Body
from compat.sync_calls import SyncCalls
from errors import InvalidInput
from images import decode_base64, png_of_size
from models.hub_cache import is_present

NAMES = {"init_image": "image", "upscale": "upscaling_resize", "model": "upscaler_1"}
"""Fields of /generate that have another name in this call."""
MOST_FACTOR = 4.0
BY_FACTOR = 0
"""Value of resize_mode."""


class ExtraSingleImage(Body):
    """The body of POST /sdapi/v1/extra-single-image. Other fields are ignored, and so is what is
    null or empty."""

    pictures: ClassVar[frozenset[str]] = frozenset({"image"})

    image: str = Field(description="The picture as base64 or a data URL.")
    resize_mode: Whole = Field(
        BY_FACTOR, ge=0, le=1, description="0: by upscaling_resize; 1: to a size."
    )
    upscaling_resize: Annotated[float, Field(allow_inf_nan=False)] = Field(
        2.0, description="The factor, above 1 and at most 4."
    )
    upscaling_resize_w: Side = Field(None, description="Width in pixels, with resize_mode 1.")
    upscaling_resize_h: Side = Field(None, description="Height in pixels, with resize_mode 1.")
    upscaling_crop: bool = Field(
        True, description="Whether to crop to the size where the aspect ratio differs."
    )
    upscaler_1: Any = Field(
        None, description="One of GET upscalers; another name means the server's own choice."
    )


class ExtraImage(Answer):
    html_info: str = Field("", description="Always empty.")
    image: str = Field(description="The picture: PNG as base64.")


def extra_fields(
    asked: ExtraSingleImage, calls: SyncCalls
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """The fields of /generate, and the size to which the result is cropped.

    Raises:
        InvalidInput
        NotSupported: the operator allows no upscaler.
    """
    names = [model.name for model in calls.allowed.upscalers]
    named = asked.upscaler_1 if asked.upscaler_1 in names else None
    upscaler = calls.allowed.upscaler(named, is_present)
    picture, size, factor = decode_base64(asked.image, "image"), None, asked.upscaling_resize
    field = "upscaling_resize"
    if asked.resize_mode != BY_FACTOR:
        width, height, field = asked.upscaling_resize_w, asked.upscaling_resize_h, field + "_w"
        if width is None or height is None:
            raise InvalidInput("{field} and upscaling_resize_h are required here.", field=field)
        with calls.decoder.reading() as reader:
            source = reader.size(picture, "image")
        factor = max(width / source[0], height / source[1])
        size = (width, height) if asked.upscaling_crop else None
    if not 1 < factor <= MOST_FACTOR:
        raise InvalidInput(
            f"{{field}} must make the picture larger, at most {MOST_FACTOR:g} times, not "
            f"{factor:g} times.",
            field=field,
        )
    fields = {"model": upscaler.name, "init_image": picture, "upscale": factor, "format": "PNG"}
    return {**fields, "prompt": ""}, size


def cropped(image: bytes, size: tuple[int, int] | None) -> bytes:
    """
    Args:
        image: a PNG of this server.
    """
    return png_of_size(image, *size) if size else image
