"""Files that are broken, hostile or too large cost one picture at most."""

import struct
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
from conftest import GIVE_UP_S
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_files import (
    LIMIT,
    METADATA,
    PICTURE,
    decoder_of,
    file_of,
    header,
    opened,
    png_of,
    refusal,
)
from PIL import Image, PngImagePlugin

from decoding.child import Refused, read_picture
from decoding.decoder import PictureDecoder
from decoding.protocol import Meaning
from errors import InvalidInput
from images import encode_image, read_metadata, to_png


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


@pytest.fixture(scope="module")
def decoder() -> Iterator[PictureDecoder]:
    """One whose children have the usual limits."""
    made = PictureDecoder(LIMIT, processes=1)
    yield made
    made.close()


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
    with decoder_of(deadline_s=3.0) as decoder:
        with decoder.reading() as reader:
            started_at = time.monotonic()
            with pytest.raises(InvalidInput, match="mask takes more than 3 s") as caught:
                reader.png(endless_scans(), "mask")
            assert caught.value.field == "mask"
            assert time.monotonic() - started_at < GIVE_UP_S
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
