"""Answers of the OpenAI Images API."""

import base64
from io import BytesIO
from typing import Any

from openai.types import ImagesResponse
from PIL import Image

SIZE: Any = "64x64"


def picture_of(base64_text: str | None) -> Image.Image:
    assert base64_text
    picture = Image.open(BytesIO(base64.b64decode(base64_text)))
    picture.load()
    return picture


def images_of(answer: ImagesResponse) -> list[Any]:
    assert answer.data
    return answer.data
