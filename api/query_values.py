"""Reads the query of a request, and checks whether its client is still connected."""

from collections.abc import Callable

from flask import request
from werkzeug.exceptions import RequestURITooLarge

import errors
from api.identity import revoked_check

MAX_QUERY_BYTES = 32_768
MAX_DIGITS = 20
MOST_WAIT_S = 300
MAX_ID = 2**63 - 1
"""Of an event."""


def check_query() -> None:
    """Parsing a query holds the interpreter, so its length is bounded.

    Raises:
        RequestURITooLarge
    """
    if len(request.query_string) > MAX_QUERY_BYTES:
        raise RequestURITooLarge


def text_value(name: str) -> str:
    """The text of this field of the query; empty if it is absent.

    Raises:
        InvalidInput: it comes several times, or is not text.
    """
    values = request.args.getlist(name)
    if len(values) > 1:
        raise errors.InvalidInput(f"{name} comes {len(values)} times: send it once.", field=name)
    text = values[0] if values else ""
    if "\0" in text:
        raise errors.InvalidInput(f"{name} must not contain the character NUL.", field=name)
    return text


def task_id_value() -> str:
    task_id = text_value("task_id").strip()
    if not 1 <= len(task_id) <= 64:
        raise errors.InvalidInput(
            "task_id is required in the query: the id that /generate gave, 1 to 64 characters.",
            field="task_id",
        )
    return task_id


def number_value(name: str, default: int, minimum: int, maximum: int) -> int:
    text = text_value(name)
    return default if text == "" else whole_number(text, name, minimum, maximum)


def whole_number(text: str, name: str, minimum: int, maximum: int) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
    if not (is_number and minimum <= int(text) <= maximum):
        raise errors.InvalidInput(
            f"{name} must be a whole number from {minimum} to {maximum}.", field=name
        )
    return int(text)


def flag_value(name: str, default: bool) -> bool:
    text = text_value(name).lower()
    if text == "":
        return default
    if text not in ("true", "1", "false", "0"):
        raise errors.InvalidInput(f"{name} must be true or false.", field=name)
    return text in ("true", "1")


def gone_check() -> Callable[[], bool]:
    """A function that says, also later and elsewhere, whether this request's client has gone, or
    has lost its key."""
    hung_up: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    revoked = revoked_check()
    return lambda: hung_up() or revoked()


def is_gone() -> bool:
    """As gone_check(), by now: for views that seldom ask."""
    return gone_check()()


def half_closed_check() -> Callable[[], bool]:
    """A function that says, also later, whether this request's client has closed the connection, at
    least for sending: only writing to it shows whether it has also stopped reading."""
    check: Callable[[], bool] = request.environ.get("mflux.client_half_closed", lambda: False)
    return check
