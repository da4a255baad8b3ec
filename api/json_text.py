"""JSON that clients send: bounded before it is parsed, because a parser holds the interpreter.

All JSON of all APIs is parsed here. The parser (jiter) refuses more than 200 levels, integers of
more than 4300 digits, keys that come twice, lone surrogates and bytes that are not UTF-8. NaN and
Infinity are left to the fields, whose refusals name them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jiter

from errors import InvalidInput

MAX_TEXT_BYTES = 1_000_000
"""Of JSON, without pictures. Parsing that much takes up to 70 ms."""
MAX_BRACKETS = 50_000
"""Opening ones. A list or an object costs more than a number: the garbage collector visits it."""
MAX_STRINGS = 10_000
"""In JSON of more than MAX_TEXT_BYTES."""
PICTURE_BYTES = 1000
"""A longer string counts as a picture."""
BOM = b"\xef\xbb\xbf"
UTF16_OR_32 = (b"\xfe\xff", b"\xff\xfe", b"\0")


def parse_object(text: bytes, what: str = "The body", field: str | None = None) -> dict[str, Any]:
    """The members of a JSON object.

    Args:
        text: UTF-8, perhaps with a byte order mark.
        what: the text, as errors call it.
        field: name of the field that holds the text; None: it is the whole body.

    Raises:
        InvalidInput: it is not JSON, not an object, or too large.
    """
    text = text.removeprefix(BOM)
    if not text.strip():
        raise InvalidInput(f"{what} is empty: it must be a JSON object.", field=field)
    if text.startswith(UTF16_OR_32):
        raise InvalidInput(f"{what} is not valid JSON: it must be in UTF-8.", field=field)
    if text.count(b"[") + text.count(b"{") > MAX_BRACKETS:
        raise InvalidInput(f"{what} has more than {MAX_BRACKETS} opening brackets.", field=field)
    if len(text) > MAX_TEXT_BYTES and not _is_mostly_pictures(text):
        raise InvalidInput(
            f"{what} is too large: JSON may have {MAX_TEXT_BYTES} bytes and {MAX_STRINGS} strings "
            "beside its pictures.",
            field=field,
        )
    try:
        value = jiter.from_json(text, allow_inf_nan=True, catch_duplicate_keys=True)
    except ValueError as error:
        raise InvalidInput(f"{what} is not valid JSON: {str(error)[:200]}.", field=field) from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{what} must be a JSON object.", field=field)
    return value


def refuse_nul(fields: Iterable[tuple[str, object]]) -> None:
    """Refuse the character NUL in the texts of fields, and of lists of texts.

    Raises:
        InvalidInput: names the field.
    """
    for name, value in fields:
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, str) and "\0" in text:
                raise InvalidInput(f"{name} must not contain the character NUL.", field=name)


def unknown_field(fields: Mapping[str, object], known: Iterable[str]) -> str | None:
    """The first name that is not known; None if all are."""
    names = set(known)
    return next((name for name in fields if name not in names), None)


def _is_mostly_pictures(text: bytes) -> bool:
    """Whether all but the long strings keeps to the limits. Takes about 1 ms per MB."""
    quotes_only = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    pieces = quotes_only.split(b'"', 2 * MAX_STRINGS + 1)  # every second one is a string
    if len(pieces) > 2 * MAX_STRINGS + 1:
        return False
    outside = sum(len(piece) for piece in pieces[::2])
    short = sum(len(piece) for piece in pieces[1::2] if len(piece) <= PICTURE_BYTES)
    return outside + short <= MAX_TEXT_BYTES
