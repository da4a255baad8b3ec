"""Pictures as bytes: encoding, content types, base64."""

import base64
from io import BytesIO

from PIL import Image

CONTENT_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def encode_image(image: Image.Image, format: str, quality: int) -> bytes:
    """The bytes of an image file: equal pictures give equal bytes.

    Args:
        format: JPEG, PNG or WEBP.
        quality: 1 to 100, for JPEG and WEBP; PNG is lossless.
    """
    buffer = BytesIO()
    options = {} if format == "PNG" else {"quality": quality}
    image.convert("RGB").save(buffer, format=format, **options)
    return buffer.getvalue()


def to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
