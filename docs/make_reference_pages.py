"""Writes docs/options.md from settings.py and docs/fields.md from GenerateRequest: run it
(make pages) after a change of either."""

import re
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OPTIONS_PAGE = ROOT / "docs" / "options.md"
FIELDS_PAGE = ROOT / "docs" / "fields.md"
sys.path.insert(0, str(ROOT))

from api.generate_request import Limits, request_schema  # noqa: E402
from api.schema_words import in_words  # noqa: E402
from fields import Takes  # noqa: E402
from models.model_catalog import ALWAYS_TAKEN  # noqa: E402
from option_groups import grouped  # noqa: E402
from settings import DEFAULT_DATA_DIR, Settings, flag_of, variable_of  # noqa: E402

OPTIONS_HEAD = """\
# Options

`make serve ARGS="--port 4031"` or `python3 server.py --port 4031`; `--help` prints the same list.
Each option is also an environment variable; the command line wins over the environment. An option
that is `on` or `off` can be switched off by its name: `--no-previews` is `--previews off`.

`--config FILE` names a TOML file with options by name; the environment wins over it:

    models = ["schnell", "z-image-turbo"]
    quantize = 8
    max_queue = 200
    previews = false
"""
OPTIONS_TABLE = """\
| option | variable | default | meaning |
|---|---|---|---|
"""
FIELDS_HEAD = """\
# Fields of a request

The fields of `POST /generate` and `POST /estimate`, as JSON or as a form (`multipart/form-data`),
in UTF-8. The limits are the defaults; `/swagger` shows those of a running server. Besides
images, JSON may have 1 MB; a form may have 100 parts. A body may be compressed
(`Content-Encoding: gzip` or `deflate`).

An unknown field is refused with 400. A field that the model cannot use is refused with 422 and its
name ("z-image-turbo has no negative_prompt."), with one exception: `guidance` is ignored by models
without it, and `ignored_fields` of the answer lists it. Fields marked with * depend on the model:
[models.md](models.md) lists which model takes which.

| field | value | default | meaning |
|---|---|---|---|
"""
FIELDS_END = """
## Images in a request

An image is base64, a data URL, a file of a form, or an earlier result of this server:
`{"task_id": "...", "index": 0}` (fetch it with `delete=false` to keep it). Images are turned
upright and scaled down to the size that the task needs. Transparent parts become
white, except for models that read the alpha channel of `images` (qwen-image-2.1). In a mask,
white is repainted; its transparency is ignored. Without `width` and `height`, the result has the
size of the input image; with one of them, the other follows the aspect ratio.

In a form, a list is a repeated field; `{task_id, index}` and `{name, scale}` are
JSON.
"""
STATED_DEFAULT = re.compile(r" ?\(default: (.*?)\)|; default: ([^)]*)(?=\))")
"""A default that the help of an option describes in words."""


def options_page() -> str:
    sections = (
        f"\n## {title.capitalize()}\n\n{OPTIONS_TABLE}" + "".join(map(_option, options))
        for title, options in grouped(fields(Settings)).items()
    )
    return OPTIONS_HEAD + "".join(sections)


def fields_page() -> str:
    properties = request_schema(Limits())["properties"]
    rows = (_field(name, schema) for name, schema in properties.items())
    return FIELDS_HEAD + "".join(rows) + FIELDS_END


def _option(option: "Field[Any]") -> str:
    help_text, default = option.metadata["help"], option.default
    shown = "" if default in (None, (), "") else f"`{_plain(default)}`"
    if default == DEFAULT_DATA_DIR:
        shown = "the user's data folder"
    if stated := STATED_DEFAULT.search(help_text):
        shown = stated[1] or stated[2]
        help_text = STATED_DEFAULT.sub("", help_text)
    choices = option.metadata["choices"]
    if choices and not {*choices} <= {"on", "off"}:
        help_text += ": " + ", ".join(f"`{choice}`" for choice in choices)
    return _row(f"`{flag_of(option.name)}`", f"`{variable_of(option.name)}`", shown, help_text)


def _plain(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def _field(name: str, schema: dict[str, Any]) -> str:
    default = schema.get("default")
    shown = "" if default is None else f"`{str(default).lower() if default is False else default}`"
    mark = " *" if name in {*Takes} - ALWAYS_TAKEN else ""
    return _row(f"`{name}`{mark}", in_words(schema), shown, schema["description"])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    OPTIONS_PAGE.write_text(options_page(), encoding="utf-8")
    FIELDS_PAGE.write_text(fields_page(), encoding="utf-8")
