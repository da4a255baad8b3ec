"""Pictures are decoded at the size that is used, and masks as their API means them."""

import io
from collections.abc import Iterator

import pytest
from picture_files import (
    LIMIT,
    METADATA,
    PICTURE,
    decoder_of,
    file_of,
    opened,
    png_of,
)
from PIL import Image, ImageChops, ImageOps

from decoding.child import fitted, picture_size, texts_of, thumbnail
from decoding.decoder import PictureDecoder
from decoding.protocol import Meaning
from errors import InvalidInput
from images import encode_image, to_png, with_png_text

FORMATS = ["PNG", "JPEG", "WEBP"]


@pytest.fixture(scope="module")
def decoder() -> Iterator[PictureDecoder]:
    """One whose children have the usual limits."""
    made = PictureDecoder(LIMIT, processes=1)
    yield made
    made.close()


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
