"""Pictures in and out: what mflux reads of ours, what is refused of others', what it may cost."""

import base64
import io
import json
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import piexif  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mflux.utils.metadata_reader import MetadataReader
from PIL import Image, ImageOps, PngImagePlugin

import images
from errors import InvalidInput
from images import (
    decode_base64,
    encode_image,
    open_upload,
    read_metadata,
    thumbnail,
    to_png,
    zip_of,
)

ROOT = Path(__file__).parent.parent
FORMATS = ["PNG", "JPEG", "WEBP"]
LIMIT = 4_000_000
PICTURE = Image.linear_gradient("L").convert("RGB").resize((64, 48))
WITH_PALETTE = Image.new("P", (16, 16), 3)
WITH_PALETTE.putpalette(range(48))
METADATA: dict[str, Any] = {
    "mflux_version": "0.24.0",
    "model": "black-forest-labs/FLUX.1-schnell",
    "model_path": None,
    "base_model": None,
    "seed": 2**64 - 1,
    "steps": 4,
    "guidance": 3.5,
    "height": 48,
    "width": 64,
    "precision": "mlx.core.bfloat16",
    "quantize": 8,
    "generation_time_seconds": 12.34,
    "created_at": "2025-01-31T12:00:00",
    "lora_paths": ["/loras/ink.safetensors"],
    "lora_scales": [0.125],
    "image_path": None,
    "image_strength": 0.4,
    "prompt": "a lighthouse",
    "negative_prompt": None,
}
PROMPTS = {
    "emoji": "\U0001f600\U0001f469\u200d\U0001f680" * 2500,
    "chinese": "\u706f" * 10_000,
    "nothing but NUL": "\0" * 10_000,
    "lines and quotes": "one\ntwo\r\n\"three' \\ four\t\x7f\x1b",
    "XML": "</rdf:li>]]>&amp;<!-- <x:xmpmeta> & \ufffe\x0b",
    "half a surrogate pair": "\ud83d",
    "empty": "",
}


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


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        open_upload(data, "the_field", max_pixels=LIMIT, **options)
    assert caught.value.field == "the_field"
    assert caught.value.message.startswith("the_field")
    return caught.value.message


def opened(data: bytes, **options: Any) -> Image.Image:
    return open_upload(data, "image", max_pixels=LIMIT, **options)


def mflux_reads(data: bytes, format: str, folder: Path) -> dict[str, Any]:
    path = folder / f"picture.{images.EXTENSIONS[format]}"
    path.write_bytes(data)
    found: dict[str, Any] = MetadataReader.read_all_metadata(path)
    return found


# Encoding and metadata


@pytest.mark.parametrize("format", FORMATS)
def test_equal_pictures_and_metadata_give_equal_bytes(format: str) -> None:
    for metadata in (None, METADATA):
        first = encode_image(PICTURE, format, 90, metadata)
        assert first == encode_image(PICTURE.copy(), format, 90, metadata and dict(metadata))


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_do_not_touch_the_pixels(format: str) -> None:
    plain, told = (
        Image.open(io.BytesIO(encode_image(PICTURE, format, 90, m))) for m in (None, METADATA)
    )
    assert plain.tobytes() == told.tobytes()
    assert plain.format == told.format == format


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_mflux_and_the_server_read_back_what_was_written(
    format: str, prompt: str, tmp_path: Path
) -> None:
    metadata = METADATA | {"prompt": prompt}
    data = encode_image(PICTURE, format, 90, metadata)
    assert mflux_reads(data, format, tmp_path)["exif"] == metadata
    assert read_metadata(data) == metadata


@given(
    st.text(max_size=300),
    st.integers(0, 2**64 - 1),
    st.none() | st.floats(allow_nan=False),
    st.sampled_from(FORMATS),
)
@settings(max_examples=60, deadline=None)
def test_any_prompt_and_seed_survive(
    prompt: str, seed: int, guidance: float | None, format: str
) -> None:
    metadata = METADATA | {"prompt": prompt, "seed": seed, "guidance": guidance}
    assert read_metadata(encode_image(PICTURE, format, 90, metadata)) == metadata


def test_the_exif_is_what_mflux_would_write_byte_for_byte() -> None:
    comment = b"ASCII\0\0\0" + json.dumps(METADATA).encode()
    exif = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})
    assert Image.open(io.BytesIO(encode_image(PICTURE, "JPEG", 90, METADATA))).info["exif"] == exif


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_png_and_webp_hold_metadata_of_any_size(format: str, tmp_path: Path) -> None:
    metadata = METADATA | {"prompt": PROMPTS["emoji"], "negative_prompt": PROMPTS["emoji"]}
    data = encode_image(PICTURE, format, 90, metadata)
    assert mflux_reads(data, format, tmp_path)["exif"] == metadata


def test_a_jpeg_cuts_its_longest_text_and_says_so(tmp_path: Path) -> None:
    metadata = METADATA | {"prompt": "\U0001f600" * 9_000, "negative_prompt": "\0" * 9_000}
    data = encode_image(PICTURE, "JPEG", 90, metadata)
    found = read_metadata(data)
    assert found is not None
    assert found == mflux_reads(data, "JPEG", tmp_path)["exif"]
    cut = [name for name in metadata if found[name] != metadata[name]]
    assert cut == ["negative_prompt"]  # its escapes take most room
    assert found["negative_prompt"] == "\0" * 4_500 + images.SHORTENED


def test_a_jpeg_drops_what_is_too_long_and_no_text() -> None:
    metadata = METADATA | {"lora_paths": ["/loras/ink.safetensors"] * 5_000}
    found = read_metadata(encode_image(PICTURE, "JPEG", 90, metadata))
    assert found == METADATA | {"lora_paths": None}
    absurd = {"k" * 70_000: 1}
    assert read_metadata(encode_image(PICTURE, "JPEG", 90, absurd)) == {}


@pytest.mark.parametrize("length", range(65_470, 65_482))
def test_a_jpeg_takes_texts_up_to_the_last_byte_of_a_segment(length: int) -> None:
    metadata = {"prompt": "x" * (length - len('{"prompt": ""}'))}
    found = read_metadata(encode_image(PICTURE, "JPEG", 90, metadata))
    assert (found == metadata) is (length <= 65_479)


@pytest.mark.parametrize("format", FORMATS)
def test_mflux_info_prints_the_metadata(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{images.EXTENSIONS[format]}"
    path.write_bytes(encode_image(PICTURE, format, 90, METADATA))
    command = [str(Path(sys.executable).parent / "mflux-info"), str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Prompt: a lighthouse" in shown
    assert f"Seed: {2**64 - 1}" in shown
    assert "Model: black-forest-labs/FLUX.1-schnell" in shown


@pytest.mark.parametrize("format", FORMATS)
def test_no_metadata_are_read_where_there_are_none(format: str) -> None:
    assert read_metadata(encode_image(PICTURE, format, 90)) is None
    photo = file_of(PICTURE, format, exif=piexif.dump({"0th": {piexif.ImageIFD.Make: b"Acme"}}))
    assert read_metadata(photo) is None


def test_metadata_of_little_endian_files_are_read_too() -> None:
    comment = b"ASCII\0\0\0" + b'{"seed": 1}'
    exif = struct.pack("<2sHI HHHIII HHHII", b"II", 42, 8, 1, 0x8769, 4, 1, 26, 0, 1, 0x9286, 7,
                       len(comment), 40)  # fmt: skip
    assert read_metadata(jpeg_with(b"Exif\0\0" + exif + comment)) == {"seed": 1}


@pytest.mark.parametrize("text", [b"[1]", b"null", b"{", b"\xff", b"[" * 60_000, b'{"a":'])
def test_a_comment_that_is_no_json_object_is_no_metadata(text: bytes) -> None:
    exif = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: b"ASCII\0\0\0" + text}})
    assert read_metadata(file_of(PICTURE, "JPEG", exif=exif)) is None


# Base64


DATA = bytes(range(256)) + b"x"
PLAIN = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.encodebytes(DATA).decode(),
        f"  \r\n{PLAIN}\t\n",
        f"data:image/png;base64,{PLAIN}",
        f"\n DATA:image/jpeg;name=a.jpg;BASE64,\n{PLAIN}",
    ],
)
def test_base64_is_read_in_all_its_spellings(text: str) -> None:
    assert decode_base64(text, "image") == DATA


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "====",
        "A",
        "AAAA=AAA",
        "not base64!",
        "\u706f",
        "\ud83d",
        "/home/me/picture.png",
        "data:",
        "data:image/png;base64",
        "data:image/png;base64,",
        f"data:image/png,{PLAIN}",
        f"data:text/html;base64,{PLAIN}",
        f"data:image/png;base64,{PLAIN},{PLAIN}",
    ],
)
def test_what_is_not_base64_is_refused_in_the_name_of_its_field(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_base64(text, "mask")
    assert caught.value.field == "mask"
    assert caught.value.message.startswith("mask ")


@pytest.mark.parametrize(
    "text", ["http://host/a.png", " HTTPS://host/a.png", "file:///etc/passwd", "file:a.png"]
)
def test_addresses_are_refused_with_a_sentence_of_their_own(text: str) -> None:
    with pytest.raises(InvalidInput, match="URLs are not fetched"):
        decode_base64(text, "image")


@given(st.binary(min_size=1))
def test_base64_comes_back_as_it_went(data: bytes) -> None:
    assert decode_base64(images.to_base64(data), "image") == data


@given(st.text())
def test_no_text_breaks_the_base64_reader(text: str) -> None:
    with suppress(InvalidInput):
        assert decode_base64(text, "image")


# Uploads: what they look like


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_four_formats_are_read_in_the_mode_asked_for(format: str, mode: str) -> None:
    picture = opened(file_of(Image.new("RGB", (64, 48), "white"), format), mode=mode)
    assert type(picture) is Image.Image
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
def test_what_is_no_picture_is_refused(data: bytes) -> None:
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
def test_what_is_transparent_is_put_on_white(
    picture: Image.Image, format: str, options: dict[str, Any]
) -> None:
    assert opened(file_of(picture, format, **options)).getcolors() == [(256, (255, 255, 255))]


def test_half_transparency_is_mixed_with_white() -> None:
    half = file_of(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "PNG")
    assert opened(half).getpixel((0, 0)) == (127, 127, 127)


def test_masks_look_through_transparency() -> None:
    for grey in (0, 255):
        mask = file_of(Image.new("RGBA", (16, 16), (grey, grey, grey, 0)), "PNG")
        assert opened(mask, mode="L").getextrema() == (grey, grey)
        palette = Image.new("RGBA", (16, 16), (grey, grey, grey, 255)).convert("P")
        data = file_of(palette, "PNG", transparency=bytes(256))
        assert opened(data, mode="L").getextrema() == (grey, grey)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(mode: str) -> None:
    picture = Image.new("I;16", (16, 16), 40_000)
    for options in ({}, {"transparency": 40_000}):
        assert opened(file_of(picture, "PNG", **options), mode=mode).convert("L").getextrema() == (
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
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparency_in_other_depths_than_eight_bits_is_survived(
    bits: int, colours: int, mode: str
) -> None:
    samples = 3 if colours == 2 else 1
    rows = zlib.compress((b"\0" + b"\xff" * (bits * samples * 16 // 8)) * 16)
    clear = struct.pack(">H", 2**bits - 1) * samples
    chunks = [header(16, 16, bits, colours), (b"tRNS", clear), (b"IDAT", rows), (b"IEND", b"")]
    assert opened(png_of(*chunks), mode=mode).convert("L").getextrema() == (255, 255)


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
    for junk in (b"\xff\xff\xff", b"junk", b"\xff\x00", b"\xff\x01"):
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


def test_the_limit_is_exact_and_both_numbers_are_told() -> None:
    exact = file_of(Image.new("1", (2000, 2000)), "PNG")
    assert opened(exact).size == (2000, 2000)
    message = refusal(file_of(Image.new("1", (2001, 2000)), "PNG"))
    assert "2001 x 2000 = 4002000" in message


def test_a_large_picture_that_packs_well_is_refused_and_read_where_allowed() -> None:
    data = file_of(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(data) < 50_000
    assert "10000 x 10000" in refusal(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of more than 89 million pixels
        assert open_upload(data, "image", max_pixels=10**8, mode="L").size == (10_000, 10_000)


def test_limits_and_filters_of_the_process_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    for bomb in BOMBS.values():
        refusal(bomb())
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_no_warning_leaks() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for bomb in BOMBS.values():
            refusal(bomb())
        opened(file_of(Image.new("P", (16, 16)), "PNG", transparency=bytes(9)), mode="L")
        opened(jpeg_with(b"MPF\0" + b"MM\0*" + bytes(9), 0xE2))
        opened(jpeg_with(b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 99))
        opened(jpeg_with(b"Exif\0\0" + exif_that_points(4_000, 60_000)))
    assert caught == []


@pytest.mark.parametrize("name", [b"iCCP", b"zTXt", b"iTXt"])
def test_chunks_that_unpack_to_gigabytes_are_never_unpacked(
    name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = zlib.compress(bytes(100_000_000), 9)
    content = b"x\0\1\0\0\0" + bomb if name == b"iTXt" else b"x\0\0" + bomb
    pixels = png_of(header(16, 16), *[(name, content)] * 20)
    pixels += file_of(Image.new("RGB", (16, 16), "red"), "PNG")[33:]
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(pixels))
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda _: pytest.fail("unpacked"))
    assert opened(pixels).getcolors() == [(256, (255, 0, 0))]


def test_pixels_beyond_the_picture_are_not_unpacked() -> None:
    rows = zlib.compress(bytes(49 * 16) + bytes(200_000_000), 9)
    picture = opened(png_of(header(16, 16), (b"IDAT", rows), (b"IEND", b"")))
    assert picture.size == (16, 16)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = file_of(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    assert opened(data[:-2] + scan * 20 + data[-2:]).size == (1000, 1000)
    assert "broken" in refusal(data[:-2] + scan * 10_000 + data[-2:])


def hostile_files() -> Iterator[bytes]:
    yield from (bomb() for bomb in BOMBS.values())
    yield jpeg_with(b"Exif\0\0" + exif_that_points(4_000, 60_000))
    chunks = [(b"eXIf", exif_that_points(600, 1_000_000)), (b"IDAT", b"")]
    yield png_of(header(16, 16), *chunks)
    webp = file_of(PICTURE, "WEBP", exif=exif_that_points(600, 1_000_000))
    yield webp
    yield png_of(header(16, 16), (b"zTXt", b"x\0\0" + zlib.compress(bytes(100_000_000), 9)))


def test_hostile_files_cost_no_memory(tmp_path: Path) -> None:
    for number, data in enumerate(hostile_files()):
        (tmp_path / str(number)).write_bytes(data)
    script = """
import resource, sys
from pathlib import Path
from PIL import Image
from errors import InvalidInput
from images import open_upload, read_metadata
unit = 1 if sys.platform == "darwin" else 1024
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
for path in Path(sys.argv[1]).iterdir():
    data = path.read_bytes()
    assert read_metadata(data) is None
    try:
        open_upload(data, "image", max_pixels=4_000_000)
    except InvalidInput:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    grown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 50_000_000


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
    """Only InvalidInput may come of it, and of the readers nothing."""
    found = read_metadata(data)
    assert found is None or isinstance(found, dict)
    try:
        picture = opened(data)
    except InvalidInput:
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
    "error", [RecursionError, MemoryError, SyntaxError, struct.error, KeyError]
)
def test_whatever_a_decoder_raises_becomes_a_sentence(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    assert "broken" in refusal(VALID["PNG"])


def test_an_interrupt_is_no_broken_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    with pytest.raises(KeyboardInterrupt):
        opened(VALID["PNG"])
    monkeypatch.undo()
    assert opened(VALID["PNG"]).size == (64, 48)  # the lock is free again


# Thumbnails and archives


@pytest.mark.parametrize("format", FORMATS)
def test_a_thumbnail_is_a_jpeg_of_the_size_asked_for(format: str) -> None:
    large = Image.new("RGB", (1024, 512), "red")
    small = Image.open(io.BytesIO(thumbnail(encode_image(large, format, 90, METADATA), 128)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (128, 64))
    assert "exif" not in small.info


def test_a_thumbnail_is_never_larger_than_its_picture() -> None:
    assert Image.open(io.BytesIO(thumbnail(to_png(PICTURE), 500))).size == (64, 48)
    assert Image.open(io.BytesIO(thumbnail(to_png(PICTURE.convert("L")), 32))).size == (32, 24)


def test_an_archive_holds_its_files_as_they_are_and_tells_no_time() -> None:
    files = [("1.png", VALID["PNG"]), ("b/\u706f.jpg", VALID["JPEG"]), ("empty", b"")]
    data = zip_of(files)
    assert data == zip_of(list(files))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert [(entry.filename, archive.read(entry)) for entry in archive.infolist()] == files
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert zipfile.ZipFile(io.BytesIO(zip_of([]))).namelist() == []
