"""The file of --config: options by name, in TOML."""

import tomllib
from collections.abc import Sequence
from dataclasses import Field
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class BadConfig(Exception):
    """The file cannot be used; the message says why."""


def arguments_of(path: Path, options: Sequence[Field[Any]]) -> list[str]:
    """The contents of the file as arguments, --NAME=VALUE each.

    Raises:
        BadConfig.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"--config {path} cannot be read: {error}") from error
    names = [option.name for option in options if option.name != "config"]
    arguments = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise BadConfig(f"{path}: there is no option {key!r}{did_you_mean(name, names)}")
        arguments.append(f"--{name.replace('_', '-')}={_text(path, key, value)}")
    return arguments


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message: the known name that is most like this one, if there is one."""
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _text(path: Path, key: str, value: object) -> str:
    """As on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, str | int) for one in value):
        return ",".join(map(str, value))
    raise BadConfig(f"{path}: {key} must be text, a whole number, true, false, or a list of these")
