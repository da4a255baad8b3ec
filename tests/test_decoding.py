"""Pictures from clients are decoded as they look: formats, transparency, depth, size."""

import io
import random
import struct
import zlib
from typing import Any

import pytest
from picture_files import (
    PICTURE,
    file_of,
    header,
    opened,
    png_of,
    refusal,
)
from PIL import Image, ImageOps

from decoding.protocol import Meaning
from images import to_png

FORMATS = ["PNG", "JPEG", "WEBP"]
WITH_PALETTE = Image.new("P", (16, 16), 3)
WITH_PALETTE.putpalette(range(48))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("meaning", [Meaning.PICTURE, Meaning.MASK])
def test_the_four_formats_are_read_in_the_mode_asked_for(format: str, meaning: Meaning) -> None:
    picture = opened(file_of(Image.new("RGB", (64, 48), "white"), format), meaning=meaning)
    assert type(picture) is Image.Image
    mode = "RGB" if meaning is Meaning.PICTURE else "L"
    assert (picture.mode, picture.size, picture.info) == (mode, (64, 48), {})
    assert picture.convert("L").getextrema() == (255, 255)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_pictures_keep_every_pixel(format: str) -> None:
    noise = Image.frombytes("RGB", (64, 48), random.Random(1).randbytes(64 * 48 * 3))
    assert opened(file_of(noise, format, lossless=True)).tobytes() == noise.tobytes()
    assert opened(to_png(noise)).tobytes() == noise.tobytes()


@pytest.mark.parametrize("format", ["TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF"])
def test_other_formats_are_refused_and_the_known_ones_named(format: str) -> None:
    assert "PNG, JPEG, WebP or GIF" in refusal(file_of(PICTURE, format))


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!doctype html><html></html>",
        b"%PDF-1.7",
        b"%!PS-Adobe",
        b"RIFF....WAVEfmt ",
        b"PK\x03\x04",
    ],
)
def test_a_file_that_is_not_an_image_is_refused(data: bytes) -> None:
    assert "is not a picture" in refusal(data)


def test_nothing_at_all_is_refused() -> None:
    assert "is empty" in refusal(b"")


@pytest.mark.parametrize("size", [(15, 16), (16, 15), (1, 1), (1, 4000)])
def test_pictures_smaller_than_what_mflux_draws_in_are_refused(size: tuple[int, int]) -> None:
    assert "at least 16" in refusal(file_of(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_their_exif_says(format: str, orientation: int) -> None:
    picture = Image.new("RGB", (64, 32))
    picture.paste("red", (0, 0, 32, 16))
    picture.paste("blue", (32, 0, 64, 16))
    for order in ("<", ">"):
        exif = Image.Exif()
        exif.endian = order
        exif[0x010F], exif[0x0112] = "Acme", orientation
        data = file_of(picture, format, exif=exif, quality=95)
        upright = Image.open(io.BytesIO(data))
        upright.load()
        expected = ImageOps.exif_transpose(upright)
        assert opened(data).tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("picture", "format", "options"),
    [
        (Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "PNG", {}),
        (Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "WEBP", {"lossless": True}),
        (Image.new("LA", (16, 16), (9, 0)), "PNG", {}),
        (Image.new("L", (16, 16), 9), "PNG", {"transparency": 9}),
        (Image.new("RGB", (16, 16), (9, 8, 7)), "PNG", {"transparency": (9, 8, 7)}),
        (Image.new("1", (16, 16), 0), "PNG", {"transparency": 0}),
        (WITH_PALETTE, "PNG", {"transparency": 3}),
        (WITH_PALETTE, "PNG", {"transparency": bytes([9, 9, 9, 0])}),
        (WITH_PALETTE, "GIF", {"transparency": 3}),
    ],
)
def test_transparent_parts_are_composited_on_white(
    picture: Image.Image, format: str, options: dict[str, Any]
) -> None:
    assert opened(file_of(picture, format, **options)).getcolors() == [(256, (255, 255, 255))]


def test_half_transparency_is_mixed_with_white() -> None:
    half = file_of(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "PNG")
    assert opened(half).getpixel((0, 0)) == (127, 127, 127)


def test_masks_look_through_transparency() -> None:
    for grey in (0, 255):
        mask = file_of(Image.new("RGBA", (16, 16), (grey, grey, grey, 0)), "PNG")
        assert opened(mask, meaning=Meaning.MASK).getextrema() == (grey, grey)
        palette = Image.new("RGBA", (16, 16), (grey, grey, grey, 255)).convert("P")
        data = file_of(palette, "PNG", transparency=bytes(256))
        assert opened(data, meaning=Meaning.MASK).getextrema() == (grey, grey)


@pytest.mark.parametrize("meaning", [Meaning.PICTURE, Meaning.MASK])
def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(meaning: Meaning) -> None:
    picture = Image.new("I;16", (16, 16), 40_000)
    for options in ({}, {"transparency": 40_000}):
        assert opened(file_of(picture, "PNG", **options), meaning=meaning).convert(
            "L"
        ).getextrema() == (
            156,
            156,
        )


@pytest.mark.parametrize("colours", [2, 4, 6])
def test_sixteen_bits_of_colour_are_read(colours: int) -> None:
    pixel = {2: 3, 4: 2, 6: 4}[colours]
    rows = zlib.compress((b"\0" + b"\x80\xff" * pixel * 16) * 16)
    picture = opened(png_of(header(16, 16, 16, colours), (b"IDAT", rows), (b"IEND", b"")))
    grey = 255 - (255 - 128) * 128 // 255 if colours != 2 else 128
    assert all(abs(value - grey) <= 1 for value in picture.getpixel((3, 3)))  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "colours"), [(1, 0), (2, 0), (4, 0), (16, 0), (16, 2)])
@pytest.mark.parametrize("meaning", [Meaning.PICTURE, Meaning.MASK])
def test_transparency_in_other_depths_than_eight_bits_is_survived(
    bits: int, colours: int, meaning: Meaning
) -> None:
    samples = 3 if colours == 2 else 1
    rows = zlib.compress((b"\0" + b"\xff" * (bits * samples * 16 // 8)) * 16)
    clear = struct.pack(">H", 2**bits - 1) * samples
    chunks = [header(16, 16, bits, colours), (b"tRNS", clear), (b"IDAT", rows), (b"IEND", b"")]
    assert opened(png_of(*chunks), meaning=meaning).convert("L").getextrema() == (255, 255)


def test_cmyk_and_grey_jpegs_are_read() -> None:
    red = Image.new("RGB", (16, 16), "red")
    pixel = opened(file_of(red.convert("CMYK"), "JPEG", quality=95)).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 245
    assert max(pixel[1:]) < 10
    assert opened(file_of(Image.new("L", (16, 16), 77), "JPEG")).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(format: str) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    options = {"lossless": True} if format == "WEBP" else {"disposal": 2} if format == "GIF" else {}
    data = file_of(first, format, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert opened(data).getcolors() == [(256, (255, 0, 0))]


def test_pictures_behind_the_first_one_of_a_file_are_ignored() -> None:
    two = file_of(PICTURE, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])
    film = file_of(PICTURE, "JPEG") + b"\xff\xda" * 1000
    for data in (two, film):
        assert opened(data).tobytes() == opened(file_of(PICTURE, "JPEG")).tobytes()


def test_colour_profiles_and_texts_are_not_kept() -> None:
    for format in FORMATS:
        data = file_of(PICTURE, format, icc_profile=b"p" * 5000, exif=b"Exif\0\0MM\0*", xmp=b"<x/>")
        picture = opened(data)
        assert picture.info == {}
        assert b"iCCP" not in to_png(picture)


def test_padding_and_junk_between_the_segments_of_a_jpeg_are_tolerated() -> None:
    plain = file_of(PICTURE, "JPEG")
    for junk in (b"\xff\xff\xff", b"junk", b"\xff\x00"):
        assert opened(plain[:20] + junk + plain[20:]).tobytes() == opened(plain).tobytes()
