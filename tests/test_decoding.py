"""Pictures of clients: what is read of them, what is refused, and what a hostile one may cost."""

import io
import os
import random
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps, PngImagePlugin

from decoding.child import Refused, fitted, picture_size, read_picture, texts_of, thumbnail
from decoding.decoder import PictureDecoder, PictureReader
from decoding.protocol import Meaning
from errors import InvalidInput, TooManyWaiting
from images import encode_image, read_metadata, to_png, with_png_text

FORMATS = ["PNG", "JPEG", "WEBP"]
LIMIT = 4_000_000
PICTURE = Image.linear_gradient("L").convert("RGB").resize((64, 48))
METADATA: dict[str, Any] = {"model": "tiny", "seed": 2**64 - 1, "prompt": "a lighthouse"}
WITH_PALETTE = Image.new("P", (16, 16), 3)
WITH_PALETTE.putpalette(range(48))


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


def gif_of(
    width: int, height: int, control: bytes = b"", frame: tuple[int, int] = (16, 16)
) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\xff\0\0\0\xff\0"
    return screen + control + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def webp_of(width: int, height: int) -> bytes:
    """An animation whose one frame is small and whose canvas is as asked for."""
    pixels = file_of(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    side, size = (15).to_bytes(3, "little"), bytes(6)
    frame = size + side * 2 + side + b"\0" + pixels
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<II", 10, 2) + canvas + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    chunks += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def jpeg_with(segment: bytes, marker: int = 0xE1, picture: Image.Image = PICTURE) -> bytes:
    data = file_of(picture, "JPEG")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + data[2:]


def exif_that_points(entries: int, length: int) -> bytes:
    """Many entries that claim the same bytes: some readers copy them all, some warn for each."""
    table = b"".join(struct.pack(">HHII", 0x2000 + n, 7, length, 8) for n in range(entries))
    directory = struct.pack(">H", entries) + table
    return b"MM\0*" + struct.pack(">I", 8) + directory + bytes(max(length - len(directory), 4))


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


@pytest.fixture(scope="module")
def decoder() -> Iterator[PictureDecoder]:
    """One whose children have the usual limits."""
    made = PictureDecoder(LIMIT, processes=1)
    yield made
    made.close()


@contextmanager
def decoder_of(**options: Any) -> Iterator[PictureDecoder]:
    made = PictureDecoder(LIMIT, **{"processes": 1, **options})
    try:
        yield made
    finally:
        made.close()


# Uploads: what they look like


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


# Uploads: what they may cost


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png_of(header(50_000, 50_000), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")),
    "PNG below Pillow's limit": lambda: png_of(header(13_000, 13_000), (b"IDAT", b"")),
    "PNG above every limit": lambda: png_of(header(2**31 - 1, 2**31 - 1), (b"IDAT", b"")),
    "GIF": lambda: gif_of(50_000, 50_000),
    "GIF with a large frame": lambda: gif_of(16, 16, frame=(13_000, 13_000)),
    "GIF that disposes of a large frame": lambda: gif_of(
        16, 16, b"!\xf9\x04\x08\0\0\0\0", frame=(13_000, 13_000)
    ),
    "WebP": lambda: webp_of(50_000, 50_000),
    "WebP below Pillow's limit": lambda: webp_of(13_000, 13_000),
    "JPEG": lambda: file_of(PICTURE, "JPEG").replace(b"\0\x30\0\x40", b"\xff\xff\xff\xff", 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_with_too_many_pixels_is_refused(name: str) -> None:
    assert f"{LIMIT} are allowed" in refusal(BOMBS[name]())


def test_the_limit_is_exact_and_the_error_has_both_numbers() -> None:
    exact = file_of(Image.new("1", (2000, 2000)), "PNG")
    assert opened(exact).size == (2000, 2000)
    message = refusal(file_of(Image.new("1", (2001, 2000)), "PNG"))
    assert "2001 x 2000 = 4002000" in message


def test_a_large_picture_that_packs_well_is_refused_and_read_where_allowed() -> None:
    data = file_of(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(data) < 50_000
    assert "10000 x 10000" in refusal(data)
    with pytest.warns(Image.DecompressionBombWarning):
        read = read_picture(data, max_pixels=10**8, meaning=Meaning.MASK)
    assert read.size == (10_000, 10_000)


def endless_scans() -> bytes:
    """A JPEG that is walked over hundreds of thousands of times."""
    data = file_of(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * 100_000 + data[-2:]


def test_a_picture_that_takes_too_long_is_refused_and_its_process_replaced() -> None:
    with decoder_of(deadline_s=1.0) as decoder:
        with decoder.reading() as reader:
            started_at = time.monotonic()
            with pytest.raises(InvalidInput, match="mask takes more than 1 s") as caught:
                reader.png(endless_scans(), "mask")
            assert caught.value.field == "mask"
            assert time.monotonic() - started_at < 60
        with decoder.reading() as reader:
            assert reader.png(to_png(PICTURE), "image").width == 64


def hostile_files() -> Iterator[bytes]:
    yield from (bomb() for bomb in BOMBS.values())
    yield jpeg_with(b"Exif\0\0" + exif_that_points(4_000, 60_000))
    chunks = [(b"eXIf", exif_that_points(600, 1_000_000)), (b"IDAT", b"")]
    yield png_of(header(16, 16), *chunks)
    yield file_of(PICTURE, "WEBP", exif=exif_that_points(600, 1_000_000))
    bomb = zlib.compress(bytes(100_000_000), 9)
    for name, content in ((b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")):
        yield png_of(header(16, 16), *[(name, content + bomb)] * 20, (b"IDAT", b""))
    rows = zlib.compress(bytes(49 * 16) + bytes(200_000_000), 9)
    yield png_of(header(16, 16), (b"IDAT", rows), (b"IEND", b""))


def test_hostile_files_are_read_or_refused_within_the_limits_of_one_process(
    decoder: PictureDecoder,
) -> None:
    refused = 0
    for data in hostile_files():
        with decoder.reading() as reader:
            try:
                assert reader.png(data, "image").width <= 64
            except InvalidInput:
                refused += 1
            assert reader.texts(data, "image")[1] == {}
            assert reader.png(to_png(PICTURE), "image").width == 64  # the next one is read
    assert refused > len(BOMBS)


def test_a_large_text_is_no_reason_to_refuse_a_picture(decoder: PictureDecoder) -> None:
    text = b"workflow\0\1\0\0\0" + zlib.compress(bytes(range(32, 127)) * 50_000)
    data = png_of(*[(b"IHDR", header(16, 16)[1]), (b"iTXt", text)])
    data += file_of(Image.new("RGB", (16, 16), "red"), "PNG")[33:]
    with decoder.reading() as reader:
        assert reader.png(data, "image").width == 16


# Uploads: what may be broken


VALID = {
    "PNG": encode_image(PICTURE, "PNG", 90, METADATA),
    "palette PNG": file_of(PICTURE.convert("P"), "PNG", transparency=bytes(100)),
    "JPEG": encode_image(PICTURE, "JPEG", 90, METADATA),
    "progressive JPEG": file_of(PICTURE, "JPEG", progressive=True),
    "WebP": encode_image(PICTURE, "WEBP", 90, METADATA),
    "lossless WebP": file_of(PICTURE.convert("RGBA"), "WEBP", lossless=True),
    "GIF": file_of(PICTURE, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))]),
}


def survives(data: bytes) -> None:
    """Only Refused may come of it, and of the readers nothing."""
    found = read_metadata(data)
    assert found is None or isinstance(found, dict)
    try:
        picture = opened(data)
    except Refused:
        pass
    else:
        assert picture.width * picture.height <= LIMIT


@pytest.mark.parametrize("name", VALID)
def test_a_picture_cut_in_the_middle_is_called_broken(name: str) -> None:
    data = VALID[name]
    assert opened(data).size == (64, 48)
    half = data[: len(data) // 2] if name != "GIF" else data[:300]
    assert "broken or incomplete" in refusal(half)


@pytest.mark.parametrize("name", VALID)
def test_a_picture_may_be_cut_anywhere(name: str) -> None:
    data = VALID[name]
    for length in {*range(80), *range(80, len(data), 7), *range(max(0, len(data) - 40), len(data))}:
        survives(data[:length])


@given(st.binary())
def test_random_bytes_break_nothing(data: bytes) -> None:
    survives(data)
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a"):
        survives(start + data)


@given(
    st.sampled_from(sorted(VALID)),
    st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=8)), max_size=5),
    st.booleans(),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pictures_with_bytes_changed_break_nothing(
    name: str, changes: list[tuple[int, bytes]], near_start: bool
) -> None:
    data = bytearray(VALID[name])
    for place, content in changes:
        at = place % min(len(data), 64 if near_start else len(data))
        data[at : at + len(content)] = content
    survives(bytes(data))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RecursionError, "broken"),
        (MemoryError, "too much memory"),
        (SyntaxError, "broken"),
        (struct.error, "broken"),
        (KeyError, "broken"),
    ],
)
def test_every_error_of_a_decoder_becomes_a_sentence(
    error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    assert words in refusal(VALID["PNG"])


# Thumbnails


def opened_jpeg(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("format", FORMATS)
def test_a_thumbnail_is_a_jpeg_of_the_size_asked_for(format: str) -> None:
    large = Image.new("RGB", (1024, 512), "red")
    small = opened_jpeg(thumbnail(encode_image(large, format, 90, METADATA), 128, LIMIT))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (128, 64))
    assert "exif" not in small.info


def test_a_thumbnail_is_never_larger_than_its_picture() -> None:
    assert opened_jpeg(thumbnail(to_png(PICTURE), 500, LIMIT)).size == (64, 48)
    assert opened_jpeg(thumbnail(to_png(PICTURE.convert("L")), 32, LIMIT)).size == (32, 24)


def test_a_finished_image_may_be_larger_than_what_clients_may_send() -> None:
    large = file_of(Image.new("1", (2100, 2100)), "PNG")
    with decoder_of(own_pixels=5_000_000) as decoder, decoder.reading() as reader:
        assert opened_jpeg(reader.thumbnail(large, 128)).size == (128, 128)
        with pytest.raises(InvalidInput, match="are allowed"):
            reader.png(large, "image")


# Scaling, masks, texts


@pytest.mark.parametrize(
    ("size", "cover", "min_pixels", "expected"),
    [
        ((64, 48), (1024, 1024), 1024 * 1024, (64, 48)),  # never enlarged
        ((4000, 3000), (1024, 768), 0, (1024, 768)),
        ((4000, 3000), (768, 1024), 0, (1365, 1024)),
        ((4000, 4000), (512, 512), 1024 * 1024, (1024, 1024)),
        ((1200, 800), (64, 64), 1024 * 1024, (1200, 800)),
        ((100_000, 400), (1024, 1024), 0, (32_381, 129)),  # bounded for an extreme shape
        ((3_000_000, 16), (64, 64), 0, (55_425, 16)),
    ],
)
def test_a_picture_is_scaled_to_what_is_used_and_keeps_its_shape(
    size: tuple[int, int], cover: tuple[int, int], min_pixels: int, expected: tuple[int, int]
) -> None:
    assert fitted(size, cover, min_pixels) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_scaled_as_it_is_seen(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(PICTURE.resize((640, 320)), "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture_size(data, LIMIT) == upright.size
    small = opened(data, cover=(upright.width // 4, upright.height // 4))
    assert small.size == (upright.width // 4, upright.height // 4)
    by_pillow = upright.resize(small.size, Image.Resampling.LANCZOS)
    difference = ImageChops.difference(small, by_pillow).convert("L")
    assert max(difference.tobytes()) <= 16


def mask_of(alpha: int, grey: int, right_alpha: int = 255, right_grey: int = 0) -> bytes:
    """Its left and its right half as asked for."""
    mask = Image.new("RGBA", (32, 16), (grey, grey, grey, alpha))
    mask.paste((right_grey, right_grey, right_grey, right_alpha), (16, 0, 32, 16))
    return file_of(mask, "PNG")


@pytest.mark.parametrize(
    ("meaning", "data", "halves"),
    [
        (Meaning.MASK, mask_of(0, 255), (255, 0)),
        (Meaning.MASK, mask_of(0, 0, 255, 255), (0, 255)),
        (Meaning.MASK_CLEAR, mask_of(0, 0), (255, 0)),
        (Meaning.MASK_CLEAR, mask_of(255, 255), (255, 0)),
        (Meaning.MASK_OPAQUE, mask_of(255, 0, 0, 0), (255, 0)),
        (Meaning.MASK_OPAQUE, mask_of(129, 0, 128, 255), (255, 0)),
        (Meaning.MASK_OPAQUE, mask_of(255, 255), (255, 0)),
    ],
)
def test_a_mask_is_read_as_its_api_means_it(
    meaning: Meaning, data: bytes, halves: tuple[int, int]
) -> None:
    left, right = (2, 2), (30, 2)
    mask = opened(data, meaning=meaning)
    assert [mask.getpixel(at) for at in (left, right)] == list(halves)
    inverted = opened(data, meaning=meaning, invert=True)
    assert [inverted.getpixel(at) for at in (right, left)] == list(halves)


def test_the_texts_of_a_file_are_returned_within_limits() -> None:
    made = encode_image(PICTURE, "PNG", 90, METADATA)
    answer = texts_of(with_png_text(made, "parameters", "a lighthouse"))
    assert answer == {"texts": {"parameters": "a lighthouse"}, "metadata": METADATA}
    many = png_of(*[(b"tEXt", b"%d\0x" % number) for number in range(5_000)])
    assert len(texts_of(many)["texts"]) == 1_000
    long = texts_of(with_png_text(made, "parameters", "x" * 2_000_000))
    assert long["texts"] == {}
    assert texts_of(b"no picture") == {"texts": {}, "metadata": {}}


# The decoder processes


def test_one_process_reads_picture_after_picture_and_is_replaced_in_time() -> None:
    with decoder_of(pictures_each=2) as decoder:
        seen = []
        for _ in range(3):
            with decoder.reading() as reader:
                assert reader.png(to_png(PICTURE), "image").data == to_png(PICTURE)
                seen.append(process_of(reader))
        assert seen[0] == seen[1] != seen[2]


def process_of(reader: PictureReader) -> int:
    assert reader._child
    return reader._child._process.pid


def test_an_idle_process_ends_and_the_next_picture_gets_another_one() -> None:
    with decoder_of(idle_s=0.05) as decoder:
        with decoder.reading() as reader:
            reader.png(to_png(PICTURE), "image")
            assert reader._child
            first = reader._child._process
        first.wait(60)
        with decoder.reading() as reader:
            assert reader.png(to_png(PICTURE), "image").width == 64
            assert process_of(reader) != first.pid


def test_a_process_that_is_killed_between_two_pictures_affects_no_request() -> None:
    with decoder_of() as decoder, decoder.reading() as reader:
        reader.size(to_png(PICTURE), "image")
        before = process_of(reader)
        os.kill(before, 9)
        assert reader.png(to_png(PICTURE), "image").width == 64  # tried again with a fresh one
        assert process_of(reader) != before


def test_a_process_that_dies_of_a_picture_is_an_error_of_its_field() -> None:
    with decoder_of() as decoder:
        killed = decoder.take()
        os.kill(killed._process.pid, 9)
        decoder.give_back(killed)
        with decoder.reading() as reader:
            with pytest.raises(InvalidInput, match="images cannot be decoded") as caught:
                reader.png(to_png(PICTURE), "images")
            assert caught.value.field == "images"
            assert reader.png(to_png(PICTURE), "images").width == 64


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce memory limits")
def test_a_picture_that_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoding.decoder.BASE_BYTES", 150_000_000)
    monkeypatch.setattr("decoding.decoder.BYTES_PER_PIXEL", 0)
    with decoder_of() as decoder:
        decoder.max_pixels = 50_000_000
        large = file_of(Image.new("1", (7000, 7000)), "PNG")
        with decoder.reading() as reader:
            with pytest.raises(InvalidInput, match="memory"):
                reader.png(large, "image")
            assert reader.png(to_png(PICTURE), "image").width == 64


def test_a_full_decoder_queue_is_a_429_and_the_others_are_decoded() -> None:
    with decoder_of(line=1) as decoder:
        waits, pause, answers = threading.Event(), threading.Event(), []

        def read() -> None:
            waits.set()
            with decoder.reading() as reader:
                answers.append(reader.png(to_png(PICTURE), "image").width)

        with decoder.reading() as reader:
            waiter = threading.Thread(target=read)
            waiter.start()
            assert waits.wait(60)
            while decoder._line._value > 0:  # until it waits
                pause.wait(0.001)
            with pytest.raises(TooManyWaiting) as caught, decoder.reading():
                pass
            assert caught.value.retry_after_s > 0
            assert reader.png(to_png(PICTURE), "image").width == 64
        waiter.join(60)
        assert answers == [64]


def test_no_process_runs_before_the_first_picture_or_after_the_end() -> None:
    decoder = PictureDecoder(LIMIT)
    assert decoder._free == []
    with decoder.reading() as reader:
        reader.size(to_png(PICTURE), "image")
        assert reader._child
        process = reader._child._process
    decoder.close()
    assert process.wait(60) is not None
