"""The decoder process: decodes pictures with Pillow, one after the other.

Pictures are not trusted: a file of a few megabytes can keep Pillow busy for minutes or make it
allocate gigabytes. So this process has a memory limit, and decoder.py ends it at a deadline. It
imports neither mlx nor flask, so it starts in a tenth of a second.

decoder.py starts it, with one end of a socket pair as its standard input (protocol.py).
"""

import os
import resource
import select
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

from PIL import Image, ImageChops, PngImagePlugin

from decoding.protocol import Meaning, receive, send
from images import (
    UPLOAD_FORMATS,
    format_of,
    on_white,
    orientation_of,
    read_metadata,
    read_png_texts,
    to_png,
)

MIN_SIDE = 16
"""Pixels. Smaller pictures are refused: mflux works in squares of 16 pixels."""
PICTURES = (Meaning.PICTURE, Meaning.PICTURE_ALPHA)
MOST_PIXELS_FACTOR = 4
"""A picture of an extreme shape keeps at most so many times the pixels that are used."""
LANCZOS_GAP = 3.0
"""Larger reductions average pixels first, which is faster and looks the same."""
MOST_TEXTS = 1_000
MOST_TEXT_CHARS = 1_000_000
"""Limits of the reported texts of a file: their number and total length."""
MOST_S = 300
"""Idle seconds after which a decoder ends by itself, in case the server has died."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class Refused(Exception):
    """Why a picture is refused: the end of a sentence that starts with the name of its field."""


def picture_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Returns width and height of the upright picture, from its header.

    Raises:
        Refused: see `read_picture`.
    """
    with _opened(data, max_pixels) as image:
        return _upright(image.size, orientation_of(data))


def read_picture(
    data: bytes,
    *,
    max_pixels: int,
    meaning: Meaning = Meaning.PICTURE,
    invert: bool = False,
    cover: tuple[int, int] | None = None,
    min_pixels: int = 0,
) -> Image.Image:
    """Decodes the first frame of a picture: upright, without metadata, scaled down to what is used.

    Args:
        max_pixels: limit of width times height.
        meaning: RGB for a picture, L for masks.
        invert: exchange black and white at the end.
        cover, min_pixels: see `fitted`; without cover the picture keeps its size.

    Raises:
        Refused: not one of `UPLOAD_FORMATS`, broken, cut off, too small or too large. The size is
            checked before any pixel is decoded.
    """
    with _opened(data, max_pixels) as image:
        turn = orientation_of(data)
        size = image.size
        if cover is not None:
            size = _upright(fitted(_upright(size, turn), cover, min_pixels), turn)
        if size != image.size:
            image.draft(None, (2 * size[0], 2 * size[1]))  # for JPEG: decodes at a lower resolution
        picture = _flat(image, meaning)
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=LANCZOS_GAP)
        if turn in _TURNS:
            picture = picture.transpose(_TURNS[turn])
        return ImageChops.invert(picture) if invert else picture


def fitted(size: tuple[int, int], cover: tuple[int, int], min_pixels: int) -> tuple[int, int]:
    """Returns the smallest size with the same aspect ratio that covers an area and has min_pixels,
    never larger than the picture.

    Args:
        cover: width and height of the area.
    """
    width, height = size
    pixels = width * height
    wanted = max(cover[0] / width, cover[1] / height, (min_pixels / pixels) ** 0.5)
    most = (MOST_PIXELS_FACTOR * max(cover[0] * cover[1], min_pixels) / pixels) ** 0.5
    scale = min(wanted, most)
    if scale >= 1:
        return size
    return max(int(width * scale + 1e-6), MIN_SIDE), max(int(height * scale + 1e-6), MIN_SIDE)


def thumbnail(data: bytes, max_side: int, max_pixels: int) -> bytes:
    """Encodes a JPEG with no side longer than max_side pixels, never larger than the picture."""
    buffer = BytesIO()
    with _opened(data, max_pixels, min_side=1) as image:
        image.thumbnail((max_side, max_side))  # a JPEG is decoded at a fraction of its size
        on_white(image).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def texts_of(data: bytes) -> dict[str, Any]:
    """Returns the `texts` and `metadata` of a file, within limits."""
    texts, chars = {}, 0
    for name, text in list(read_png_texts(data).items())[:MOST_TEXTS]:
        chars += len(name) + len(text)
        if chars <= MOST_TEXT_CHARS:
            texts[name] = text
    metadata = read_metadata(data) or {}
    if len(str(metadata)) > MOST_TEXT_CHARS:
        metadata = {}
    return {"texts": texts, "metadata": metadata}


@contextmanager
def _opened(data: bytes, max_pixels: int, min_side: int = MIN_SIDE) -> Iterator[Image.Image]:
    if not data:
        raise Refused(" is empty: it must hold a picture.")
    format = format_of(data)
    if format is None:
        raise Refused(f" is not a picture that is read here: it must be {UPLOAD_FORMATS}.")
    try:
        with Image.open(BytesIO(data), formats=[format]) as image:
            _check_size(image.size, max_pixels, min_side)
            yield image
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(f" has too many pixels: {max_pixels} are allowed.") from error
    except MemoryError as error:
        raise Refused(" takes too much memory to decode.") from error
    except Exception as error:  # decoders raise all kinds of errors
        raise Refused(f" is a broken or incomplete {format} file.") from error


def _check_size(size: tuple[int, int], max_pixels: int, min_side: int) -> None:
    width, height = size
    size_text = f" has {width} x {height} = {width * height} pixels: "
    if width * height > max_pixels:
        raise Refused(f"{size_text}{max_pixels} are allowed.")
    if min(size) < min_side:
        raise Refused(f"{size_text}each side must have at least {min_side}.")


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in _SIDEWAYS else size


def _flat(image: Image.Image, meaning: Meaning) -> Image.Image:
    """Converts the picture to RGB or L, according to its meaning."""
    if image.mode == "I;16":
        image.info.pop("transparency", None)
        image = image.point(lambda grey: grey * (1 / 256)).convert("L")  # Pillow alone would clip
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if meaning is Meaning.PICTURE_ALPHA:
            image.info.clear()
            return image
        if meaning is Meaning.PICTURE:
            image = on_white(image)
        elif meaning is not Meaning.MASK:
            alpha = image.getchannel("A")
            if alpha.getextrema() != (255, 255):
                return _mask_of(alpha, meaning)
    flat = image.convert("RGB" if meaning in PICTURES else "L")
    flat.info.clear()
    return flat


def _mask_of(alpha: Image.Image, meaning: Meaning) -> Image.Image:
    if meaning is Meaning.MASK_CLEAR:
        return ImageChops.invert(alpha)
    return alpha.point(lambda value: 255 if value > 128 else 0)  # as AUTOMATIC1111 does


def answer(asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns header and payload of the answer to a frame of decoder.py."""
    try:
        max_pixels = Image.MAX_IMAGE_PIXELS = asked["max_pixels"]
        if asked["do"] == "size":
            return {"size": picture_size(data, max_pixels)}, b""
        if asked["do"] == "thumbnail":
            return {}, thumbnail(data, asked["max_side"], max_pixels)
        if asked["do"] == "texts":
            return texts_of(data), b""
        picture = read_picture(
            data,
            max_pixels=max_pixels,
            meaning=Meaning(asked["meaning"]),
            invert=asked["invert"],
            cover=asked["cover"] and tuple(asked["cover"]),
            min_pixels=asked["min_pixels"],
        )
        return {"size": picture.size}, to_png(picture)
    except Refused as refusal:
        return {"refused": str(refusal)}, b""
    except MemoryError:
        return {"refused": " takes too much memory to decode."}, b""


def main(memory_bytes: int, idle_s: float) -> None:
    """Answers until the server closes its end or sends nothing for idle_s seconds."""
    os.nice(10)  # the server has priority
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the server handles Ctrl-C
    with suppress(ValueError, OSError):  # macOS accepts the limit, but does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    warnings.simplefilter("ignore")
    # Pillow refuses pictures with large texts, such as workflows.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    channel = socket.socket(fileno=0)
    with suppress(EOFError, OSError):
        while select.select([channel], [], [], idle_s)[0]:
            signal.alarm(MOST_S)
            send(channel, *answer(*receive(channel)))
            signal.alarm(0)
