"""Pictures as bytes: what mflux reads of ours, base64, archives."""

import base64
import io
import json
import struct
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import piexif  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mflux.utils.metadata_reader import MetadataReader
from PIL import Image

import images
from errors import InvalidInput
from images import decode_base64, encode_image, read_metadata, zip_of

FORMATS = ["PNG", "JPEG", "WEBP"]
PICTURE = Image.linear_gradient("L").convert("RGB").resize((64, 48))
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


def jpeg_with(segment: bytes, marker: int = 0xE1, picture: Image.Image = PICTURE) -> bytes:
    data = file_of(picture, "JPEG")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + data[2:]


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


def half_clear() -> Image.Image:
    """Red, and transparent on the left."""
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 16, 32))
    return picture


@pytest.mark.parametrize("format", FORMATS)
def test_transparent_parts_stay_so_where_the_format_can_and_are_white_in_jpeg(format: str) -> None:
    stored = Image.open(io.BytesIO(encode_image(half_clear(), format, 100, METADATA)))
    assert stored.has_transparency_data == (format != "JPEG")
    assert images.has_alpha(encode_image(half_clear(), format, 90)) == (format != "JPEG")
    if format == "JPEG":
        assert min(stored.getpixel((4, 16))) > 250  # type: ignore[arg-type]
    else:
        assert stored.convert("RGBA").getpixel((4, 16))[3] == 0  # type: ignore[index]
        assert stored.convert("RGBA").getpixel((28, 16))[3] == 255  # type: ignore[index]


@pytest.mark.parametrize("format", FORMATS)
def test_an_opaque_image_is_composited_on_white(format: str) -> None:
    data = encode_image(half_clear(), format, 100, opaque=True)
    assert not images.has_alpha(data)
    assert min(Image.open(io.BytesIO(data)).getpixel((4, 16))) > 250  # type: ignore[arg-type]


def test_an_alpha_channel_that_hides_nothing_is_not_stored() -> None:
    data = encode_image(PICTURE.convert("RGBA"), "PNG", 100)
    assert data == encode_image(PICTURE, "PNG", 100)


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_do_not_touch_the_pixels(format: str) -> None:
    plain, answer = (
        Image.open(io.BytesIO(encode_image(PICTURE, format, 90, m))) for m in (None, METADATA)
    )
    assert plain.tobytes() == answer.tobytes()
    assert plain.format == answer.format == format


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
def test_mflux_info_prints_the_metadata_also_beside_the_xmp(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{images.EXTENSIONS[format]}"
    path.write_bytes(encode_image(PICTURE, format, 90, METADATA, generated=True))
    command = [str(Path(sys.executable).parent / "mflux-info"), str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Prompt: a lighthouse" in shown
    assert f"Seed: {2**64 - 1}" in shown
    assert "Model: black-forest-labs/FLUX.1-schnell" in shown


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("metadata", [None, METADATA], ids=["plain", "with metadata"])
def test_a_file_is_marked_as_generated_in_xmp_for_few_bytes(
    format: str, metadata: dict[str, Any] | None
) -> None:
    plain = encode_image(PICTURE, format, 90, metadata)
    marked = encode_image(PICTURE, format, 90, metadata, generated=True)
    assert not images.is_marked_as_generated(plain)
    assert images.is_marked_as_generated(marked)
    assert 0 < len(marked) - len(plain) < 600
    assert Image.open(io.BytesIO(marked)).tobytes() == Image.open(io.BytesIO(plain)).tobytes()
    assert read_metadata(marked) == metadata


@pytest.mark.parametrize("format", FORMATS)
def test_readers_of_xmp_find_the_term_of_the_iptc(format: str) -> None:
    picture = Image.open(io.BytesIO(encode_image(PICTURE, format, 90, generated=True)))
    packet = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"]
    tree = ElementTree.fromstring(packet)
    (description,) = tree.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert description.get(name) == images.DIGITAL_SOURCE_TYPE


def test_a_scaled_copy_is_marked_as_its_source() -> None:
    for generated in (False, True):
        source = encode_image(PICTURE, "PNG", 90, METADATA, generated=generated)
        copy = images.png_of_size(source, 16, 16)
        assert images.is_marked_as_generated(copy) is generated
        assert read_metadata(copy) == METADATA


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
        f"data:;base64,{PLAIN}",
        f"data:application/octet-stream;base64,{PLAIN}",
        f"data:text/html;base64,{PLAIN}",
        f'data:image/png;name="a, b.png";base64,{PLAIN}',
        f"data:image/png;name=a,b.png;charset=utf-8;base64,{PLAIN}",
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
        f"data:image/png;base64,{PLAIN},{PLAIN}",
    ],
)
def test_invalid_base64_is_refused_with_its_field(text: str) -> None:
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


# Archives


def test_an_archive_has_its_files_unchanged_and_no_time() -> None:
    files = [
        ("1.png", file_of(PICTURE, "PNG")),
        ("b/\u706f.jpg", file_of(PICTURE, "JPEG")),
        ("empty", b""),
    ]
    data = zip_of(files)
    assert data == zip_of(list(files))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert [(entry.filename, archive.read(entry)) for entry in archive.infolist()] == files
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert zipfile.ZipFile(io.BytesIO(zip_of([]))).namelist() == []
