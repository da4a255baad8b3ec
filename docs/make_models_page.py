"""Writes docs/models.md from the catalog: run it (make pages) after an update of mflux."""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT))

from fields import Takes  # noqa: E402
from models.helpers import HELPERS  # noqa: E402
from models.left_out import CLASSES, CONSTRUCTORS, MASKS, OF_ONE_CLASS, PARAMETERS  # noqa: E402
from models.mflux_registry import read_catalog  # noqa: E402
from models.model_catalog import ALWAYS_TAKEN, Model, Pipeline  # noqa: E402
from models.model_rules import BOTH as USUAL_SCHEDULERS  # noqa: E402
from models.model_rules import MOST_SIDE, SIDE_STEP, Rules  # noqa: E402
from models.prompt_forms import PromptForm  # noqa: E402

HEAD = """\
# Models

All models of the pinned mflux, and the built-in tiny ones. `GET /models` lists them too, and says
which are allowed, loaded and on disk. Upper and lower case make no difference; aliases are in small
print. "Takes" lists the fields of `/generate` that not every model can use; any other of them is
refused with 422 and its name. Required fields are bold. A model with two lists has two pipelines: a
request may use the fields of one or of the other.

A `mask` needs the picture that it belongs to: `init_image`, or `images` in a list without it.
Models with `mask_feather` have no inpainting weights: after each step the server puts back the
latents of `init_image` outside the mask, and lays the finished picture over `init_image` with the
feathered mask. So the pixels outside it are exactly those of `init_image` (scaled to the size of
the result).

"Rules" are those of the model alone; a request that breaks one is refused with 422, the field and
the rule. Every rule is compared with mflux's own class, called without weights
([tests/test_contract.py](../tests/test_contract.py)). A model that takes `scheduler` has `linear`
and `flow_match_euler_discrete`, unless its rules name others.

"Tested": `drawn` means that tests draw pictures with this class and a tiny model, `contract` that
the class is only called as far as it comes without weights.

| model | what it is | steps | guidance | takes | rules | tested | download |
|---|---|---|---|---|---|---|---|
"""
FORMS = {
    PromptForm.JSON: "JSON",
    PromptForm.JSON_EDIT: "JSON with `edit_instruction`",
    PromptForm.JSON_EDIT_OR_NONE: "JSON with `edit_instruction`, or none",
    PromptForm.CAPTION: "text or a JSON caption",
    PromptForm.CAPTION_EDIT: "text or a JSON caption with `edit_instruction`",
}


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
    models = read_catalog().models
    drawn = {pipeline.name for model in models if model.tiny for pipeline in model.pipelines}
    rows = "".join(_row(model, drawn) for model in models)
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
    for owner, reason in MASKS.items():
        names.setdefault(reason, []).append(f"`mask` of {owner}")
    for reason, which in names.items():
        yield f"| {', '.join(which)} | {reason} |\n"


def _rules(rules: Rules) -> str:
    least, most = rules.sides
    schedulers = rules.schedulers if set(rules.schedulers) != set(USUAL_SCHEDULERS) else ()
    words = {
        f"sides are multiples of {rules.side_step}": rules.side_step != SIDE_STEP,
        f"sides of {least} to {most}": most != MOST_SIDE,
        f"at least {rules.least_steps} steps": rules.least_steps > 1,
        f"at most {rules.most_steps} steps": rules.most_steps,
        f"scheduler {' or '.join(schedulers)}": schedulers,
        f"preset {' or '.join(rules.presets)}": rules.presets,
        f"guidance from {rules.least_guidance:g}": rules.least_guidance,
        f"guidance above 1 needs {rules.strong_guidance_needs}": rules.strong_guidance_needs,
        f"guidance is ignored without {rules.guidance_idle_without}": rules.guidance_idle_without,
        f"ignores {' and '.join(sorted(rules.ignored))}": rules.ignored,
        f"images: at most {rules.most_images}": rules.most_images,
        "a mask of the size of its one picture": rules.mask_fits,
        f"{' and '.join(sorted(rules.together))} together": rules.together,
        f"not quantized to {', '.join(map(str, rules.refused_bits))} bits": rules.refused_bits,
        f"control_strength {rules.control_strength or 0:g} when absent": rules.control_strength,
        f"prompt is {FORMS.get(rules.prompt)}": rules.prompt in FORMS,
    }
    return "; ".join(word for word, holds in words.items() if holds)


def _row(model: Model, drawn: set[str]) -> str:
    aliases = ", ".join(f"`{alias}`" for alias in model.aliases)
    ways = [
        " ".join(
            f"**{name}**" if name in pipeline.needs else name
            for name in Takes
            if name in _taken(pipeline, model) - ALWAYS_TAKEN
        )
        for pipeline in model.pipelines
        if not pipeline.inpaints
    ]
    size = f"{model.weights_gb:g} GB" if model.weights_gb else ""
    cells = (
        f"`{model.name}`" + (f"<br><sub>{aliases}</sub>" if aliases else ""),
        model.title,
        str(model.default_steps),
        "" if model.default_guidance is None else f"{model.default_guidance:g}",
        ", or<br>".join(ways),
        "<br>".join(dict.fromkeys(filter(None, (_rules(p.rules) for p in model.pipelines)))),
        ", ".join(
            "drawn" if p.name in drawn else "contract" for p in model.pipelines if not p.inpaints
        ),
        ", ".join(filter(None, (size, "gated" if model.gated else ""))),
    )
    return "| " + " | ".join(cells) + " |\n"


def _taken(pipeline: Pipeline, model: Model) -> frozenset[Takes]:
    """The fields that a class takes, with those of inpainting."""
    same = (other.takes for other in model.pipelines if other.name == pipeline.name)
    return pipeline.takes.union(*same) if Takes.IMAGE_STRENGTH in pipeline.takes else pipeline.takes


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
