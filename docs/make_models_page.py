"""Writes docs/models.md from the catalog: run it (make pages) after an update of mflux."""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT))

from fields import Takes  # noqa: E402
from models.helpers import HELPERS  # noqa: E402
from models.left_out import CLASSES, CONSTRUCTORS, OF_ONE_CLASS, PARAMETERS  # noqa: E402
from models.mflux_registry import read_catalog  # noqa: E402
from models.model_catalog import ALWAYS_TAKEN, Model  # noqa: E402

HEAD = """\
# Models

All models of the pinned mflux, and the built-in tiny ones. `GET /models` lists them too, and says
which are allowed, loaded and on disk. Upper and lower case make no difference; aliases are in small
print. "Takes" lists the fields of `/generate` that not every model can use; any other of them is
refused with 422 and its name. Required fields are bold. A model with two lists has two pipelines: a
request may use the fields of one or of the other.

| model | what it is | steps | guidance | takes | download |
|---|---|---|---|---|---|
"""


LEFT_OUT_HEAD = """
## What mflux can do and this server does not

| of mflux | why not |
|---|---|
"""


HELPERS_HEAD = """
## Helper models

They do a part of a task before another model draws it, if the operator allows them in `--models`.

| helper | what it does | download |
|---|---|---|
"""


def page() -> str:
    rows = "".join(_row(model) for model in read_catalog().models)
    helpers = "".join(
        f"| `{helper.name}` | {helper.title} | {helper.weights_gb:g} GB"
        f"{', gated' if helper.gated else ''} |\n"
        for helper in HELPERS.values()
    )
    return HEAD + rows + HELPERS_HEAD + helpers + LEFT_OUT_HEAD + "".join(_left_out())


def _left_out() -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, reason in {**CLASSES, **PARAMETERS, **CONSTRUCTORS}.items():
        names.setdefault(reason, []).append(f"`{name}`")
    for (owner, name), reason in OF_ONE_CLASS.items():
        names.setdefault(reason, []).append(f"`{name}` of {owner}")
    for reason, which in names.items():
        yield f"| {', '.join(which)} | {reason} |\n"


def _row(model: Model) -> str:
    aliases = ", ".join(f"`{alias}`" for alias in model.aliases)
    ways = [
        " ".join(
            f"**{name}**" if name in pipeline.needs else name
            for name in Takes
            if name in pipeline.takes - ALWAYS_TAKEN
        )
        for pipeline in model.pipelines
    ]
    size = f"{model.weights_gb:g} GB" if model.weights_gb else ""
    cells = (
        f"`{model.name}`" + (f"<br><sub>{aliases}</sub>" if aliases else ""),
        model.title,
        str(model.default_steps),
        "" if model.default_guidance is None else f"{model.default_guidance:g}",
        ", or<br>".join(ways),
        ", ".join(filter(None, (size, "gated" if model.gated else ""))),
    )
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
