"""Encoded images: formats, generation metadata (written and read), base64, zip.

Metadata are stored as mflux stores them: as JSON in the EXIF field UserComment. Images from clients
are decoded in decoding/; this module reads only their headers.
"""

import base64
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any, Literal

from PIL import Image, ImageOps, PngImagePlugin

from errors import InvalidInput

CONTENT_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
UPLOAD_FORMATS = "PNG, JPEG, WebP or GIF"
"""Formats that clients may send, for messages. TIFF, AVIF and BMP are not accepted: they are rare,
have many decoders, and Pillow decodes compressed BMP in Python, pixel by pixel."""
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model has made
(https://cv.iptc.org/newscodes/digitalsourcetype/)."""
SHORTENED = " [shortened]"
"""The end of a text that was cut to fit into the EXIF of a JPEG."""

_PNG_START, _EXIF_START, _COMMENT_START = b"\x89PNG\r\n\x1a\n", b"Exif\0\0", b"ASCII\0\0\0"
_ORIENTATION, _EXIF_DIRECTORY, _USER_COMMENT = 0x0112, 0x8769, 0x9286
_AFTER_HEADER = len(_PNG_START) + 25
"""Offset of the chunk after IHDR."""
_JPEG_EXIF_ROOM = 65533 - 54
"""Largest JSON in bytes: the size of a segment minus the bytes that `_exif` adds."""
_DATA_URL = re.compile(r"\s*data:.{0,1000}?;\s*base64\s*,", re.IGNORECASE | re.DOTALL)
"""Its parameters, such as the name of a file, may contain commas."""
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\v\f"
_XMP_KEYWORD = "XML:com.adobe.xmp"
_XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">\
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" \
Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>\
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
"""The property and its namespace are those of the IPTC Photo Metadata Standard."""


def encode_image(
    image: Image.Image,
    format: str,
    quality: int,
    metadata: Mapping[str, Any] | None = None,
    *,
    opaque: bool = False,
    generated: bool = False,
) -> bytes:
    """Encodes an image file. Equal pictures and metadata give equal bytes.

    Args:
        format: JPEG, PNG or WEBP. Transparent parts are white in JPEG.
        opaque: make them white in PNG and WebP, too.
        generated: add DIGITAL_SOURCE_TYPE as XMP.
        quality: 1 to 100, for JPEG and WEBP; PNG is lossless.
        metadata: as mflux writes them, with JSON values. A JPEG has room for 64 KB: if there is
            more, the longest texts are cut and end in `SHORTENED`.
    """
    options: dict[str, Any] = {} if format == "PNG" else {"quality": quality}
    if metadata is not None:
        options["exif"] = _exif(metadata, _JPEG_EXIF_ROOM if format == "JPEG" else None)
    if generated and format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(_XMP_KEYWORD, _XMP)
    elif generated:
        options["xmp"] = _XMP.encode()
    buffer = BytesIO()
    transparent = image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255)
    if transparent and format != "JPEG" and not opaque:
        image.save(buffer, format=format, **options)
    else:
        on_white(image).save(buffer, format=format, **options)
    return buffer.getvalue()


def is_marked_as_generated(data: bytes) -> bool:
    """Whether an image file has DIGITAL_SOURCE_TYPE as XMP."""
    with Image.open(BytesIO(data)) as image:
        xmp = image.info.get("xmp") or image.info.get(_XMP_KEYWORD) or b""
    return (DIGITAL_SOURCE_TYPE if isinstance(xmp, str) else DIGITAL_SOURCE_TYPE.encode()) in xmp


def has_alpha(data: bytes) -> bool:
    """Whether an image file has an alpha channel."""
    with Image.open(BytesIO(data)) as image:
        return image.has_transparency_data


def on_white(image: Image.Image) -> Image.Image:
    """Returns a picture in RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_png(image: Image.Image) -> bytes:
    """Encodes a PNG fast rather than small, for files that stay on this machine."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def jpeg_of(pixels: bytes, width: int, height: int) -> bytes:
    """Encodes RGB pixels (three bytes each) as a JPEG without colour subsampling, for previews."""
    buffer = BytesIO()
    image = Image.frombytes("RGB", (width, height), pixels)
    image.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def zip_of(files: Sequence[tuple[str, bytes]]) -> bytes:
    """Builds a zip of (name, content). Equal files give equal bytes.

    Files are not compressed, because images already are, and no time is stored.
    """
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files:
            archive.writestr(zip_entry(name), content)
    return buffer.getvalue()


def zip_entry(name: str) -> zipfile.ZipInfo:
    """A file of a zip: not compressed, and without a time."""
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3  # Unix, on every system
    entry.external_attr = 0o644 << 16
    return entry


def to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")


def decode_base64(text: str, field: str) -> bytes:
    """Decodes plain base64 or a data URL of any type.

    White space, the URL-safe alphabet and missing padding are tolerated.

    Raises:
        InvalidInput: for anything else, for example http URLs.
    """
    start = text[:200].lstrip().lower()
    if start.startswith(("http://", "https://", "file:")):
        raise _refusal(
            field, ": URLs are not fetched: send the picture itself, as base64 or as a file."
        )
    if start.startswith("data:"):
        head = _DATA_URL.match(text)
        if head is None:
            raise _refusal(
                field, " is a data URL, but does not start like data:image/png;base64,iVBOR..."
            )
        text = text[head.end() :]
    try:
        digits = text.encode("ascii").translate(_PLAIN_ALPHABET, _WHITE_SPACE).rstrip(b"=")
        data = base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except ValueError as error:
        raise _refusal(
            field,
            " must be a picture as base64, plain or in a data URL (data:image/png;base64,...).",
        ) from error
    if not data:
        raise _refusal(field, " is empty: it must hold a picture.")
    return data


def png_of_size(data: bytes, width: int, height: int) -> bytes:
    """Scales a PNG of `encode_image` to cover this size in pixels and crops its edges. Metadata and
    XMP are kept."""
    with Image.open(BytesIO(data)) as picture:
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    marked = is_marked_as_generated(data)
    return encode_image(fitted, "PNG", 100, read_metadata(data), generated=marked)


def with_png_text(data: bytes, keyword: str, text: str) -> bytes:
    """Adds a text to a PNG, in the chunk where AUTOMATIC1111 stores its parameters."""
    payload = keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", "backslashreplace")
    chunk = struct.pack(">I", len(payload)) + b"iTXt" + payload
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    return data[:_AFTER_HEADER] + chunk + data[_AFTER_HEADER:]


def read_png_texts(data: bytes) -> dict[str, str]:
    """Returns the uncompressed texts of a PNG by keyword."""
    texts: dict[str, str] = {}
    if format_of(data) == "PNG":
        for name, payload in _chunks(data, "PNG"):
            keyword, _, rest = bytes(payload).partition(b"\0")
            if name == b"tEXt":
                texts[keyword.decode("latin-1")] = rest.decode("latin-1")
            elif name == b"iTXt" and rest[:1] == b"\0":
                text = rest[2:].split(b"\0", 2)[-1]
                texts[keyword.decode("latin-1")] = text.decode("utf-8", "replace")
    return texts


def read_metadata(data: bytes) -> dict[str, Any] | None:
    """Returns the metadata that `encode_image` or mflux wrote; None if missing or damaged."""
    format = format_of(data)
    if format is None:
        return None
    exif = _exif_of(data, format)
    try:
        directory = _value_of(exif, _find(exif, _value_of(exif, 4), _EXIF_DIRECTORY) + 8)
        comment = _find(exif, directory, _USER_COMMENT)
        length, start = _value_of(exif, comment + 4), _value_of(exif, comment + 8)
        found = json.loads(exif[start : start + length].removeprefix(_COMMENT_START))
    except (KeyError, ValueError, struct.error, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def format_of(data: bytes) -> str | None:
    """Detects PNG, JPEG, WEBP or GIF by the first bytes of a file; None: another format."""
    if data.startswith(_PNG_START):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return "GIF" if data.startswith((b"GIF87a", b"GIF89a")) else None


def orientation_of(data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if there is none."""
    exif = _exif_of(data, format_of(data) or "")
    with suppress(KeyError, struct.error):
        return _value_of(exif, _find(exif, _value_of(exif, 4), _ORIENTATION) + 8, "H")
    return 1


def _exif(metadata: Mapping[str, Any], room: int | None) -> bytes:
    """Builds the same EXIF bytes as mflux. room: largest size of the JSON text in bytes."""
    comment = _COMMENT_START + _json(metadata, room)
    main = struct.pack(">HHHIII", 1, _EXIF_DIRECTORY, 4, 1, 26, 0)  # one entry, no next one
    inner = struct.pack(">HHHII", 1, _USER_COMMENT, 7, len(comment), 40)
    return _EXIF_START + b"MM\0*" + struct.pack(">I", 8) + main + inner + comment


def _json(metadata: Mapping[str, Any], room: int | None) -> bytes:
    text = json.dumps(dict(metadata)).encode()  # like mflux: only ASCII, the rest escaped
    if room is None or len(text) <= room:
        return text
    values = dict(metadata)
    while len(text := _terse(values)) > room:
        longest = max(values, key=lambda name: len(_terse(values[name])))
        value = values[longest]
        if value is None:
            return b"{}"
        kept = value.removesuffix(SHORTENED) if isinstance(value, str) else ""
        values[longest] = kept[: len(kept) // 2] + SHORTENED if len(kept) > 100 else None
    return text


def _terse(value: object) -> bytes:
    """Encodes JSON as UTF-8, which mflux can read. Unpaired surrogates are escaped."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _refusal(field: str, sentence: str) -> InvalidInput:
    return InvalidInput("{field}" + sentence, field=field)


def _chunks(data: bytes, format: str) -> Iterator[tuple[bytes, memoryview]]:
    """Yields (name, payload) of the complete chunks of a PNG or WebP."""
    view, at = memoryview(data), 8 if format == "PNG" else 12
    while at + 8 <= len(data):
        if format == "PNG":
            length, name = struct.unpack_from(">I4s", data, at)
            tail = 4  # the checksum
        else:
            name, length = struct.unpack_from("<4sI", data, at)
            tail = length % 2
        end = at + 8 + length
        if end > len(data):
            return
        yield name, view[at + 8 : end]
        at = end + tail


def _segments(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yields (marker, payload) of the segments of a JPEG before the first scan."""
    view, at = memoryview(data), 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        name, length = struct.unpack_from(">xBH", data, at)
        if name == 0xDA:
            return
        if name == 0xFF:  # padding
            at += 1
        elif name <= 0x01 or 0xD0 <= name <= 0xD9:  # without a payload
            at += 2
        else:
            end = at + 2 + length
            if length < 2 or end > len(data):
                return
            yield name, view[at + 4 : end]
            at = end


def _exif_of(data: bytes, format: str) -> bytes:
    """Returns the EXIF data without the prefix "Exif"; empty if there is none."""
    if format == "JPEG":
        for name, payload in _segments(data):
            if name == 0xE1 and payload[:6] == _EXIF_START:
                return bytes(payload[6:])
    elif format in ("PNG", "WEBP"):
        for chunk, payload in _chunks(data, format):
            if chunk in (b"eXIf", b"EXIF"):
                return bytes(payload).removeprefix(_EXIF_START)
    return b""


def _find(exif: bytes, directory: int, tag: int) -> int:
    """Returns the offset of the entry of this tag. Raises KeyError or struct.error without one."""
    for entry in range(_value_of(exif, directory, "H")):
        at = directory + 2 + 12 * entry
        if _value_of(exif, at, "H") == tag:
            return at
    raise KeyError(tag)


def _value_of(exif: bytes, at: int, kind: Literal["H", "I"] = "I") -> int:
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    value: int = struct.unpack_from(order + kind, exif, at)[0]
    return value
