"""The options of the command."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

EPILOG = """\
exit codes:
  0    done
  1    the task failed or was cancelled, or the picture could not be written
  2    bad usage
  3    no mflux-server answers
  4    the server refused
  130  interrupted: Ctrl-C ends the task after the picture that is being drawn, a second one
       cancels it now; with --task the task goes on

environment:
  MFLUX_SERVER_URL  as --url
  MFLUX_SERVER_KEY  as --key
"""
FIRST_PATIENCE_S = 5.0
PATIENCE_S = 600.0
"""Seconds for which a server may be away: before it has accepted the task, and then."""


def _lora(text: str) -> str | dict[str, Any]:
    name, colon, scale = text.rpartition(":")
    try:
        return {"name": name, "scale": float(scale)} if colon and name else text
    except ValueError:
        return text


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("--model", {"metavar": "NAME", "help": "the model; --models lists them"}),
    "width": ("--width", {"type": int, "metavar": "PIXELS", "help": "of the picture"}),
    "height": ("--height", {"type": int, "metavar": "PIXELS", "help": "of the picture"}),
    "steps": ("--steps", {"type": int, "metavar": "N", "help": "of denoising"}),
    "seed": ("--seed", {"type": int, "metavar": "N", "help": "same seed, same picture"}),
    "count": ("--count", {"type": int, "metavar": "N", "help": "how many images"}),
    "guidance": ("--guidance", {"type": float, "metavar": "X", "help": "by the prompt"}),
    "negative_prompt": ("--negative-prompt", {"metavar": "TEXT", "help": "what not to show"}),
    "init_image": ("--init-image", {"metavar": "FILE", "help": "picture to start from"}),
    "image_strength": (
        "--strength",
        {"type": float, "metavar": "X", "help": "how much of --init-image is kept, 0 to 1"},
    ),
    "mask": ("--mask", {"metavar": "FILE", "help": "white where --init-image is repainted"}),
    "images": (
        "--image",
        {"action": "append", "metavar": "FILE", "help": "picture to edit or combine; repeatable"},
    ),
    "control_image": ("--control-image", {"metavar": "FILE", "help": "edges, depth or pose"}),
    "control_strength": (
        "--control-strength",
        {"type": float, "metavar": "X", "help": "how closely --control-image is followed"},
    ),
    "control_type": ("--control-type", {"metavar": "KIND", "help": "what --control-image shows"}),
    "loras": (
        "--lora",
        {
            "action": "append",
            "type": _lora,
            "metavar": "NAME[:SCALE]",
            "help": "adapter; repeatable",
        },
    ),
    "upscale": ("--upscale", {"type": float, "metavar": "X", "help": "upscale the result"}),
    "quantize": ("--quantize", {"type": int, "metavar": "BITS", "help": "of the weights"}),
    "scheduler": ("--scheduler", {"metavar": "NAME", "help": "how the noise falls"}),
    "preset": ("--preset", {"metavar": "NAME", "help": "steps and guidance together (Ideogram)"}),
    "quality": ("--quality", {"type": int, "metavar": "N", "help": "of JPEG and WebP, 1 to 100"}),
    "user": (
        "--user",
        {"metavar": "NAME", "help": "for which user of this client the picture is"},
    ),
    "priority": (
        "--priority",
        {"action": "store_const", "const": True, "help": "go ahead of normal tasks"},
    ),
}
"""Field of the request: its option."""


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *arguments: Any, **others: Any) -> Any:
        options = super().parse_args(*arguments, **others)
        actions = ("task", "status", "cancel", "queue", "models")
        named = [f"--{name}" for name in actions if getattr(options, name)]
        asked = [
            name for name in ("prompt", "field", *FIELDS) if getattr(options, name) is not None
        ]
        if len(named) > 1 or (named and asked):
            self.error(f"{named[0]} stands alone")
        if options.after_current and not options.cancel:
            self.error("--after-current belongs to --cancel")
        if not named and options.prompt is None and options.init_image is None:
            self.error("a prompt is needed: what the picture shows")
        return options


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python3 -m client",
        description="Asks an mflux-server for a picture, waits for it and writes it into a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="what the picture shows")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="its ending (.jpg, .png, .webp) says the format, .zip takes all images; several "
        "images get -0, -1, ...; - writes the bytes to stdout (default: the id of the task)",
    )
    drawing = parser.add_argument_group("the picture; absent: as the server chooses")
    for name, (flag, described) in FIELDS.items():
        drawing.add_argument(flag, dest=name, **described)
    drawing.add_argument(
        "--field",
        action="append",
        type=_field,
        metavar="NAME=VALUE",
        help="any other field of POST /generate; VALUE is JSON or a text; repeatable",
    )
    other = parser.add_argument_group("instead of a prompt")
    other.add_argument("--task", metavar="ID", help="wait for this task and fetch its picture")
    other.add_argument("--status", metavar="ID", help="tell how far this task is")
    other.add_argument("--cancel", metavar="ID", help="cancel this task, or remove it if it ended")
    other.add_argument("--queue", action="store_true", help="list the tasks that wait or run")
    other.add_argument("--models", action="store_true", help="list the models")
    other.add_argument(
        "--after-current",
        action="store_true",
        help="with --cancel: end after the picture that is being drawn, and keep it",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--url", help="of the server (default: http://localhost:4030)")
    how.add_argument(
        "--key",
        default=os.environ.get("MFLUX_SERVER_KEY"),
        help="sent as Authorization: Bearer KEY",
    )
    how.add_argument("--json", action="store_true", help="print the last status (or list) as JSON")
    how.add_argument("--no-show", action="store_true", help="show no picture in the terminal")
    how.add_argument(
        "--remove", action="store_true", help="remove the task from the server when it is saved"
    )
    how.add_argument(
        "--retry-s",
        type=float,
        metavar="SECONDS",
        help="how long the server may be away (default: "
        f"{FIRST_PATIENCE_S:g}, and {PATIENCE_S:g} once it has the task)",
    )
    return parser
