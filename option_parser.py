"""Reads options from a file, the environment and the command line, as settings.py declares them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field
from typing import Any, NoReturn

from config_file import BadConfig, arguments_of, did_you_mean
from option_groups import grouped, metavar_of
from option_values import switch
from version import described

ENVIRONMENT_PREFIX = "MFLUX_SERVER_"
OTHER_VARIABLES = ("MFLUX_SERVER_EXPAND_KEY", "MFLUX_SERVER_URL", "MFLUX_SERVER_KEY")
"""Read elsewhere; the last two are of the client."""


def option(
    default: Any,
    help: str,  # the name that argparse uses
    *,
    parse: Callable[[str], Any] = str,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """Declares an option: the default of a field of Settings.

    Args:
        parse: from text to the value; raises argparse.ArgumentTypeError.
    """
    described = {"help": help, "type": parse, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=described)


def switch_option(default: bool, help: str) -> Any:
    """Declares an option that is on or off."""
    return option(default, help, parse=switch)


def values_of(
    options: Sequence[Field[Any]],
    argv: Sequence[str],
    environ: Mapping[str, str],
    program: str,
) -> dict[str, Any]:
    """Returns the values by name. The command line wins over the environment, and that over the
    file of --config.

    Raises:
        SystemExit: as in argparse: 0 for --help, 2 for a bad value (stderr names it).
    """
    parser = _parser_of(options, program)
    _refuse_unknown(parser, options, environ)
    from_environment: list[str] = []
    for option in options:
        variable = variable_of(option.name)
        if environ.get(variable):
            argument = f"{flag_of(option.name)}={environ[variable]}"
            parser.source = f"{variable}: "
            parser.parse_args([argument])
            from_environment.append(argument)
    parser.source = ""
    given = parser.parse_args([*from_environment, *argv])
    from_file: list[str] = []
    if file := getattr(given, "config", None):
        try:
            from_file = arguments_of(file, options)
        except BadConfig as error:
            parser.error(str(error))
        for argument in from_file:
            parser.source = f"{file}: "
            parser.parse_args([argument])
    parser.source = ""
    return vars(parser.parse_args([*from_file, *from_environment, *argv]))


def _refuse_unknown(
    parser: "_Parser", options: Sequence[Field[Any]], environ: Mapping[str, str]
) -> None:
    """A variable that is misspelt would be ignored otherwise."""
    known = [*(variable_of(option.name) for option in options), *OTHER_VARIABLES]
    for variable in environ:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            parser.error(f"there is no variable {variable}{did_you_mean(variable, known)}")


def _parser_of(options: Sequence[Field[Any]], program: str) -> "_Parser":
    parser = _Parser(
        prog=program,
        description="A REST server that queues image generation with mflux on one GPU and "
        "forecasts when each image is done.",
        epilog="Each option is also an environment variable, and can be in the file of --config. "
        "The command line wins over the environment, and that over the file.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mflux-server {described()}")
    for title, members in grouped(options).items():
        _add_group(parser.add_argument_group(title), members)
    return parser


def _add_group(parser: argparse._ArgumentGroup, options: Sequence[Field[Any]]) -> None:
    for option in options:
        flag, variable = flag_of(option.name), variable_of(option.name)
        described = dict(option.metadata) | {"metavar": metavar_of(option)}
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
