"""Reads options from the environment and the command line: from their declarations (settings.py) to
their values."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, NoReturn

from option_values import switch

ENVIRONMENT_PREFIX = "MFLUX_SERVER_"


def values_of(
    options: Sequence[Field[Any]],
    argv: Sequence[str],
    environ: Mapping[str, str],
    program: str,
) -> dict[str, Any]:
    """Returns the values by name; the command line wins.

    Raises:
        SystemExit: as in argparse: 0 for --help, 2 for a bad value (stderr names it).
    """
    parser = _Parser(
        prog=program,
        description="A REST server that queues image generation with mflux on one GPU and "
        "forecasts when each image is done.",
        epilog="Each option is also an environment variable; the command line wins.",
        allow_abbrev=False,
    )
    from_environment: dict[str, str] = {}
    for option in options:
        flag, variable = flag_of(option.name), variable_of(option.name)
        described = dict(option.metadata)
        default = f" (default: {_shown(option.default)})"
        if option.default in (None, (), ""):  # the help describes this case
            default = ""
        described["help"] = f"{described['help']}{default} [{variable}]"
        if is_switch(option):
            described |= {"nargs": "?", "const": True, "metavar": "on|off"}
        parser.add_argument(flag, dest=option.name, default=option.default, **described)
        if is_switch(option):
            parser.add_argument(
                negative_flag_of(option.name),
                dest=option.name,
                action="store_const",
                const=False,
                default=argparse.SUPPRESS,
                help=f"the same as {flag} off",
            )
        if environ.get(variable):
            from_environment[variable] = f"{flag}={environ[variable]}"
    for variable, argument in from_environment.items():
        parser.source = f"{variable}: "
        parser.parse_args([argument])
    parser.source = ""
    return vars(parser.parse_args([*from_environment.values(), *argv]))


def is_switch(option: Field[Any]) -> bool:
    """Whether an option is a switch (on or off)."""
    return option.metadata["type"] is switch


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def negative_flag_of(name: str) -> str:
    """Returns the flag that switches an option off: --no-NAME."""
    return "--no-" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _shown(default: object) -> object:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else default


class _Parser(argparse.ArgumentParser):
    source = ""
    """The source of a bad value, if it is not the command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {self.source}{message} (--help lists every option)\n")
