"""ControlNet as the extension sd-webui-controlnet has it: the units of a request.

A unit of `alwayson_scripts` becomes control_image; its preprocessor ("module") control_type. Other
scripts are not here: they are ignored, and `info` says so.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

import errors
from compat.a1111_checkpoint import Checkpoint
from compat.a1111_shapes import ImageToImage, TextToImage
from compat.bodies import Body, read_body
from compat.sync_calls import SyncCalls
from fields import MOST_CONTROLS, Takes
from images import decode_base64
from models.model_catalog import Model, Pipeline

SCRIPT = "controlnet"
FIELD = "alwayson_scripts.controlnet.args"
UNITS_READ = 100
MOST_NAMES = 20
"""Scripts that a warning names."""
NAME_CHARS = 100
"""Of the name of a script that is ignored, as far as it is kept."""
KINDS = {
    "canny": "canny",
    "mlsd": "mlsd",
    "depth": "depth",
    "hed": "hed",
    "softedge": "hed",
    "openpose": "pose",
    "pose": "pose",
}
"""What the name of a preprocessor contains -> control_type."""
Asked = TypeVar("Asked", bound=TextToImage)
READY = "ready"
NO_MODULE = ("", "none")


class ControlUnit(Body):
    """A unit. Other fields are ignored."""

    pictures: ClassVar[frozenset[str]] = frozenset({"image", "input_image"})

    enabled: bool = True
    image: Any = None
    input_image: Any = None
    module: Any = None
    model: Any = None
    weight: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0


def ignored_scripts(asked: TextToImage) -> list[str]:
    """One sentence about the scripts of the request that are not here; none if there are none."""
    names = [name for name in _scripts(asked) if name.lower() != SCRIPT]
    if not names:
        return []
    shown = ", ".join(repr(name[:NAME_CHARS]) for name in names[:MOST_NAMES])
    return [f"alwayson_scripts: {shown} is not available here and was ignored."]


def with_names_only(asked: Asked) -> Asked:
    """The request without its pictures; of its scripts the names remain."""
    scripts = asked.alwayson_scripts
    names = [name[:NAME_CHARS] for name in scripts] if isinstance(scripts, dict) else []
    changes: dict[str, Any] = {"alwayson_scripts": dict.fromkeys(names)}
    if isinstance(asked, ImageToImage):
        changes |= {"init_images": [], "mask": None}
    return asked.model_copy(update=changes)


def controls_of(
    asked: TextToImage,
    named: str | None,
    given: frozenset[Takes],
    calls: SyncCalls,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """The fields `model`, `control_image` and others that the units of a request mean; none
    without an enabled unit.

    Args:
        named: the model that the request names.
        given: fields with pictures that the request has besides.

    Raises:
        InvalidInput: names the unit at fault.
    """
    units = list(_units(asked))
    if not units:
        return {}
    if len(units) > MOST_CONTROLS + 1:
        raise errors.InvalidInput(
            f"{FIELD} may have at most {MOST_CONTROLS + 1} enabled units.", field=FIELD
        )
    needed = {Takes.PROMPT, Takes.CONTROL_IMAGE} | given
    needed |= {Takes.CONTROL_IMAGES} if len(units) > 1 else set()
    model, pipeline = _chosen(units[0][1], named, frozenset(needed), calls, checkpoint)
    images = [_image(asked, unit, where) for where, unit in units]
    types = [_type(unit, where, pipeline) for where, unit in units]
    fields: dict[str, Any] = {"model": model.name, "control_image": images[0]}
    if Takes.CONTROL_TYPE in pipeline.takes:
        fields["control_type"] = types[0]
    if Takes.CONTROL_STRENGTH in pipeline.takes:
        fields["control_strength"] = units[0][1].weight
    if len(units) > 1:
        fields["control_images"] = images[1:]
        fields["control_types"] = types[1:]
        fields["control_strengths"] = [unit.weight for _, unit in units[1:]]
    return fields


def _scripts(asked: TextToImage) -> Mapping[str, Any]:
    return asked.alwayson_scripts if isinstance(asked.alwayson_scripts, dict) else {}


def _units(asked: TextToImage) -> Iterator[tuple[str, ControlUnit]]:
    """The enabled units and what errors call them."""
    scripts = _scripts(asked)
    script = next((scripts[name] for name in scripts if name.lower() == SCRIPT), None)
    args = script.get("args") if isinstance(script, dict) else None
    for at, unit in enumerate(args[:UNITS_READ] if isinstance(args, list) else ()):
        if isinstance(unit, dict):
            where = f"{FIELD}[{at}]"
            try:
                read = read_body(ControlUnit, unit)
            except errors.InvalidInput as error:
                error.field = f"{where}.{error.field}"
                raise
            if read.enabled:
                yield where, read


def _chosen(
    unit: ControlUnit,
    named: str | None,
    needed: frozenset[Takes],
    calls: SyncCalls,
    checkpoint: Checkpoint,
) -> tuple[Model, Pipeline]:
    """The model that draws: that of the unit, else that of the request, else the first that can."""
    own = checkpoint.named(unit.model) if isinstance(unit.model, str) else None
    if own or named:
        candidates: tuple[Model, ...] = (calls.allowed.model(own or named),)
    else:
        candidates = (checkpoint.model, *calls.allowed.models)
    for model in candidates:
        if pipeline := model.pipeline_for(needed):
            return model, pipeline
    able = ", ".join(model.name for model in controlled(calls)) or "none"
    who = f"{own or named} cannot" if own or named else "no model of this server can"
    raise errors.InvalidInput(
        f"{FIELD}: {who} draw this with a control. Models that follow a control: {able}.",
        field=f"{FIELD}[0].model",
    )


def controlled(calls: SyncCalls) -> list[Model]:
    """The allowed models that follow a control."""
    return [model for model in calls.allowed.models if Takes.CONTROL_IMAGE in model.takes]


def _image(asked: TextToImage, unit: ControlUnit, where: str) -> bytes:
    """The picture of a unit; in img2img it may be that of the request."""
    image = unit.image if unit.image is not None else unit.input_image
    if isinstance(image, dict):
        image = image.get("image")
    if image is None:
        image = next(iter(getattr(asked, "init_images", ())), None)
    if not isinstance(image, str):
        raise errors.InvalidInput(
            f"{where}.image must be a picture as base64.", field=f"{where}.image"
        )
    return decode_base64(image, f"{where}.image")


def _type(unit: ControlUnit, where: str, pipeline: Pipeline) -> str | None:
    """The control_type; None: the model has only one."""
    if not pipeline.control_types:
        return None
    module = str(unit.module or "").strip().lower()
    found = READY if module in NO_MODULE else None
    for part, kind in KINDS.items():
        found = found or (kind if part in module else None)
    if found not in pipeline.control_types:
        known = ", ".join(pipeline.control_types)
        raise errors.InvalidInput(
            f"{where}.module: {module[:50]!r} cannot be used here. The model takes {known} (ready: "
            "none).",
            field=f"{where}.module",
        )
    return found
