"""What a request says beside its body: values of its query, and whether its client still waits."""

from collections.abc import Callable

from flask import request

import errors

MOST_WAIT_S = 300
MAX_ID = 2**63 - 1
"""Of an event."""


def task_id_value() -> str:
    task_id = request.args.get("task_id", "").strip()
    if not 1 <= len(task_id) <= 64:
        raise errors.InvalidInput(
            "task_id is required in the query: the id that /generate gave, 1 to 64 characters.",
            field="task_id",
        )
    return task_id


def number_value(name: str, default: int, minimum: int, maximum: int) -> int:
    text = request.args.get(name, "")
    return default if text == "" else whole_number(text, name, minimum, maximum)


def whole_number(text: str, name: str, minimum: int, maximum: int) -> int:
    if not (text.isascii() and text.isdigit() and minimum <= int(text[:20]) <= maximum):
        raise errors.InvalidInput(
            f"{name} must be a whole number from {minimum} to {maximum}.", field=name
        )
    return int(text[:20])


def flag_value(name: str, default: bool) -> bool:
    text = request.args.get(name, "").lower()
    if text == "":
        return default
    if text not in ("true", "1", "false", "0"):
        raise errors.InvalidInput(f"{name} must be true or false.", field=name)
    return text in ("true", "1")


def gone_check() -> Callable[[], bool]:
    """What tells, also later and elsewhere, whether the client of this request has hung up."""
    check: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return check


def half_closed_check() -> Callable[[], bool]:
    """What tells, also later, whether the client of this request has closed the connection at least
    for sending: if more than that, only writing to it shows."""
    check: Callable[[], bool] = request.environ.get("mflux.client_half_closed", lambda: False)
    return check
