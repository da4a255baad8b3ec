"""Picture files as clients send them, and what the decoder makes of them."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from decoding.child import Refused, read_picture
from decoding.decoder import PictureDecoder

LIMIT = 4_000_000
PICTURE = Image.linear_gradient("L").convert("RGB").resize((64, 48))
METADATA: dict[str, Any] = {"model": "noise-flux1", "seed": 2**64 - 1, "prompt": "a lighthouse"}


def file_of(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def header(width: int, height: int, bits: int = 8, colours: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)


def opened(data: bytes, **options: Any) -> Image.Image:
    """As the decoder process reads it, in this process."""
    return read_picture(data, max_pixels=LIMIT, **options)


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        opened(data, **options)
    sentence = str(caught.value)
    assert sentence.startswith(" ")
    assert sentence.endswith(".")
    return sentence


@contextmanager
def decoder_of(**options: Any) -> Iterator[PictureDecoder]:
    made = PictureDecoder(LIMIT, **{"processes": 1, **options})
    try:
        yield made
    finally:
        made.close()
