"""The options of the command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
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


def _format(text: str) -> str:
    return {"JPG": "JPEG"}.get(text.upper(), text.upper())


def _name_of(path: str) -> str:
    """Of a LoRA: the server has files of its own, so only the name of this one counts."""
    return Path(path).stem if path.endswith(".safetensors") else path


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


FIELDS: dict[str, tuple[str | tuple[str, ...], dict[str, Any]]] = {
    "model": (("-m", "--model"), {"metavar": "NAME", "help": "the model; --models lists them"}),
    "width": ("--width", {"type": int, "metavar": "PIXELS", "help": "of the picture"}),
    "height": ("--height", {"type": int, "metavar": "PIXELS", "help": "of the picture"}),
    "steps": ("--steps", {"type": int, "metavar": "N", "help": "of denoising"}),
    "seed": ("--seed", {"type": int, "metavar": "N", "help": "same seed, same picture"}),
    "count": ("--count", {"type": int, "metavar": "N", "help": "how many images"}),
    "guidance": ("--guidance", {"type": float, "metavar": "X", "help": "by the prompt"}),
    "negative_prompt": ("--negative-prompt", {"metavar": "TEXT", "help": "what not to show"}),
    "init_image": (
        ("--init-image", "--image-path"),
        {"metavar": "FILE", "help": "picture to start from"},
    ),
    "image_strength": (
        ("--strength", "--image-strength"),
        {"type": float, "metavar": "X", "help": "how much of --init-image is kept, 0 to 1"},
    ),
    "mask": (
        ("--mask", "--masked-image-path"),
        {"metavar": "FILE", "help": "white where --init-image is repainted"},
    ),
    "images": (
        "--image",
        {"action": "append", "metavar": "FILE", "help": "picture to edit or combine; repeatable"},
    ),
    "control_image": (
        ("--control-image", "--controlnet-image-path", "--depth-image-path"),
        {"metavar": "FILE", "help": "edges, depth or pose"},
    ),
    "control_strength": (
        ("--control-strength", "--controlnet-strength"),
        {"type": float, "metavar": "X", "help": "how closely --control-image is followed"},
    ),
    "control_type": ("--control-type", {"metavar": "KIND", "help": "what --control-image shows"}),
    "loras": (
        "--lora",
        {
            "action": "append",
            "type": _lora,
            "metavar": "NAME[:SCALE]",
            "help": "LoRA; repeatable",
        },
    ),
    "upscale": ("--upscale", {"type": float, "metavar": "X", "help": "upscale the result"}),
    "quantize": (("-q", "--quantize"), {"type": int, "metavar": "BITS", "help": "of the weights"}),
    "scheduler": ("--scheduler", {"metavar": "NAME", "help": "how the noise falls"}),
    "preset": ("--preset", {"metavar": "NAME", "help": "steps and guidance together (Ideogram)"}),
    "format": (
        "--format",
        {"type": _format, "metavar": "NAME", "help": "JPEG, PNG or WEBP; else as -o says"},
    ),
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
        self._join(options)
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
        if options.seeds and (options.count or options.seed is not None):
            self.error("--seeds stands in place of --seed and --count")
        return options

    def _join(self, options: argparse.Namespace) -> None:
        """Gives what can be said in several ways one place: the prompt, pictures, LoRAs."""
        prompts = [options.prompt, options.prompt_option, options.prompt_file]
        if sum(prompt is not None for prompt in prompts) > 1:
            self.error("name one prompt: as it is, with --prompt, or with --prompt-file")
        options.prompt = next((prompt for prompt in prompts[:2] if prompt is not None), None)
        if options.prompt_file or options.prompt == "-":
            source = options.prompt_file or Path("/dev/stdin")
            try:
                options.prompt = _text_of(source)
            except (OSError, ValueError) as error:
                self.error(f"the prompt cannot be read from {source}: {error}")
        options.images = [*(options.images or ()), *(options.image_paths or ())] or None
        scales = options.lora_scales or []
        names = [_name_of(path) for path in options.lora_paths or ()]
        if scales and len(scales) != len(names):
            self.error("--lora-scales needs as many numbers as --lora-paths has names")
        scaled = [{"name": name, "scale": scale} for name, scale in zip(names, scales)] or names
        options.loras = [*(options.loras or ()), *scaled] or None


def _text_of(source: Path) -> str:
    if str(source) in ("-", "/dev/stdin"):
        return sys.stdin.read().strip()
    return source.read_text(encoding="utf-8").strip()


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python3 -m client",
        description="Asks an mflux-server for a picture, waits for it and writes it into a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="what the picture shows; - reads it from stdin")
    parser.add_argument("--prompt", dest="prompt_option", metavar="TEXT", help="the same")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the prompt")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="its ending (.jpg, .png, .webp) says the format, .zip takes all images; several "
        "images get -0, -1, ...; - writes the bytes to stdout (default: the id of the task)",
    )
    drawing = parser.add_argument_group("the picture; absent: as the server chooses")
    for name, (flag, described) in FIELDS.items():
        flags = (flag,) if isinstance(flag, str) else flag
        drawing.add_argument(*flags, dest=name, **described)
    drawing.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="a task for each of these seeds"
    )
    drawing.add_argument(
        "--image-paths", nargs="+", metavar="FILE", help="as --image, several at once"
    )
    drawing.add_argument(
        "--lora-paths", nargs="+", metavar="NAME", help="as --lora, several at once"
    )
    drawing.add_argument(
        "--lora-scales", type=float, nargs="+", metavar="X", help="the scales of --lora-paths"
    )
    drawing.add_argument(
        "--field",
        action="append",
        type=_field,
        metavar="NAME=VALUE",
        help="any other field of POST /generate; VALUE is JSON or a text; repeatable",
    )
    _add_actions(parser.add_argument_group("instead of a prompt"))
    _add_manners(parser.add_argument_group("how"))
    return parser


def _add_actions(other: argparse._ArgumentGroup) -> None:
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


def _add_manners(how: argparse._ArgumentGroup) -> None:
    how.add_argument("--estimate", action="store_true", help="print the forecast, submit nothing")
    how.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file of this name; else it gets a number",
    )
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
