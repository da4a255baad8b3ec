"""The body of a request, read once: JSON or a form (multipart/form-data), perhaps compressed.

Every route of every API reads its body here.
"""

import ctypes
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from flask import request
from werkzeug.datastructures import Headers
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import (
    NEED_DATA,
    Data,
    Epilogue,
    Event,
    Field,
    File,
    MultipartDecoder,
    State,
)

from api.json_text import parse_object
from errors import BodyTooLarge, InvalidInput, UnsupportedMediaType

MAX_PARTS = 100
"""Of a form."""
MAX_PART_HEADERS = 20
MAX_PART_HEADER_BYTES = 65536
MAX_BOUNDARY_CHARS = 200
CHUNK_BYTES = 65536
FREE_UNPACKED_BYTES = 1_000_000
MAX_UNPACKED_RATIO = 4
"""A compressed body may unpack to so many times its size plus FREE_UNPACKED_BYTES. A picture as
base64 unpacks to 1.4 times its size."""
COMPRESSIONS = {
    "gzip": zlib.MAX_WBITS | 16,
    "x-gzip": zlib.MAX_WBITS | 16,
    "deflate": zlib.MAX_WBITS,
}
CHARSETS = {"utf-8", "us-ascii", "iso-8859-1", "windows-1252"}
"""That a part of a form may say its text is in; others are taken for UTF-8."""
NO_BOUNDARY = (
    "The form has no boundary: its header must be like Content-Type: multipart/form-data; "
    "boundary=... HTTP libraries write this header themselves if you do not."
)


@dataclass(frozen=True)
class Form:
    """Each field with its values in the order in which they came."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


def json_body() -> dict[str, Any]:
    """The members of the JSON object in the body, whatever its Content-Type says.

    Raises:
        InvalidInput, BodyTooLarge, UnsupportedMediaType: as `whole_body` and `parse_object` do.
    """
    return parse_object(whole_body())


def form_body() -> Form:
    """The form in the body. Files without a name are left out: browsers send them for nothing.

    Raises:
        InvalidInput: it is no form, or it has too many parts.
        BodyTooLarge, UnsupportedMediaType: as `whole_body` does.
    """
    boundary = request.mimetype_params.get("boundary", "")
    if not boundary.strip() or len(boundary) > MAX_BOUNDARY_CHARS:
        raise InvalidInput(NO_BOUNDARY)
    return read_form(whole_body(), boundary.encode("latin-1", "replace"))


def whole_body() -> bytes:
    """All bytes of the body, unpacked.

    Raises:
        InvalidInput: it cannot be unpacked.
        BodyTooLarge: it is larger than the server accepts, or unpacks to far more than it should.
        UnsupportedMediaType: its Content-Encoding is not known.
    """
    body = request.get_data(cache=False)
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    window = COMPRESSIONS.get(encoding)
    if window is None:
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding[:50]!r} is not known here: send gzip, deflate or none."
        )
    limit = FREE_UNPACKED_BYTES + MAX_UNPACKED_RATIO * len(body)
    return unpack(body, window, min(limit, request.max_content_length or limit))


def unpack(body: bytes, window: int, limit_bytes: int) -> bytes:
    """Decompress gzip or deflate.

    Args:
        window: wbits of zlib.decompressobj.

    Raises:
        InvalidInput: it is broken, cut off, or something follows it.
        BodyTooLarge: it unpacks to more than limit_bytes.
    """
    unpacker = zlib.decompressobj(window)
    try:
        unpacked = unpacker.decompress(body, limit_bytes + 1)
    except zlib.error:
        raise InvalidInput("The body is not what its Content-Encoding says.") from None
    if len(unpacked) > limit_bytes:
        raise BodyTooLarge(f"The body unpacks to more than {limit_bytes} bytes.")
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidInput("The compressed body is cut off, or something follows it.")
    return unpacked


def read_form(body: bytes, boundary: bytes) -> Form:
    """
    Raises:
        InvalidInput: see `form_body`.
    """
    form = Form()
    try:
        for part, content in _parts(body, boundary):
            _add(form, part, content)
    except RequestEntityTooLarge:
        raise InvalidInput(f"The form has too many parts: it may have {MAX_PARTS}.") from None
    except (ValueError, AttributeError):  # AttributeError: no line end behind the headers
        raise InvalidInput(
            "The form is not valid multipart/form-data with this boundary, or is cut off."
        ) from None
    return form


def _add(form: Form, part: Field | File, content: bytes) -> None:
    if not part.name:
        raise InvalidInput(
            "A part of the form has no name: each needs one "
            '(Content-Disposition: form-data; name="prompt").'
        )
    if isinstance(part, Field):
        form.texts.setdefault(part.name, []).append(_text(part, content))
    elif part.filename:
        form.files.setdefault(part.name, []).append(content)


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[Field | File, bytes]]:
    part: Field | File | None = None
    content: list[bytes] = []
    for event in _events(MultipartDecoder(boundary, max_parts=MAX_PARTS), body):
        if isinstance(event, Field | File):
            part, content = event, []
            _check_headers(event.headers)
        elif isinstance(event, Data) and part is not None:
            content.append(event.data)
            if not event.more_data:
                yield part, b"".join(content)


def _events(decoder: MultipartDecoder, body: bytes) -> Iterator[Event]:
    starts = range(0, len(body), CHUNK_BYTES)
    chunks = (body[start : start + CHUNK_BYTES] for start in starts)
    for chunk in chain(chunks, (None,)):
        decoder.receive_data(chunk)
        while (event := decoder.next_event()) is not NEED_DATA:
            yield event
            if isinstance(event, Epilogue):
                return
        if decoder.state is State.PART and len(decoder.buffer) > MAX_PART_HEADER_BYTES:
            raise ValueError("headers of a part are too long")


def _check_headers(headers: Headers) -> None:
    if len(headers) > MAX_PART_HEADERS:
        raise ValueError("a part has too many headers")


def _text(part: Field, content: bytes) -> str:
    charset = parse_options_header(part.headers.get("content-type", ""))[1].get("charset", "")
    charset = charset.lower() if charset.lower() in CHARSETS else "utf-8"
    try:
        return content.decode(charset)
    except UnicodeDecodeError:
        name = part.name[:100]
        raise InvalidInput(f"{name} must be text in UTF-8.", field=name) from None


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps the blocks of large bodies otherwise, some
    hundred MB after a hundred of them. Takes about a millisecond; no-op elsewhere."""
    if sys.platform == "linux" and (trim := getattr(_LIBC, "malloc_trim", None)):
        trim(0)


_LIBC = ctypes.CDLL(None)
