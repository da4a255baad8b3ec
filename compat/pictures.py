"""Chooses fields and model for the images of a foreign request."""

from collections.abc import Iterator, Sequence
from typing import Any

from compat.sync_calls import SyncCalls
from errors import InvalidInput
from fields import Takes
from models.model_catalog import Model, Pipeline

START, EDIT = Takes.INIT_IMAGE, Takes.IMAGES


def place_pictures(
    calls: SyncCalls,
    named: str | None,
    pictures: Sequence[object],
    mask: object | None,
    *,
    ways: Sequence[Takes],
    field: str,
) -> dict[str, Any]:
    """The fields `model`, `mask`, and `init_image` or `images` of a request.

    The model that was named (or the server's default) draws if it can in one of these ways, the
    first of them preferred; without a name another allowed model does where the default cannot.
    With a mask, models that have inpainting weights are preferred.

    Args:
        mask: white where to repaint.
        field: name of the pictures in the foreign request.

    Raises:
        InvalidInput: no model can, and which the operator may allow.
    """
    found = _found(calls, named, ways, len(pictures), mask is not None)
    if found is not None:
        way, model = found
        placed = pictures[0] if way is START else list(pictures)
        return {"model": model.name, "mask": mask, way.value: placed}
    if len(pictures) > 1 and _found(calls, named, ways, 1, mask is not None):
        raise InvalidInput("The model takes one picture at a time.", field=field)
    able = [
        model.name
        for model in calls.catalog.models
        if not model.tiny
        and any(_pipeline(model, way, len(pictures), mask is not None) for way in ways)
    ]
    what = "repaints what a mask shows" if mask is not None else "starts from pictures"
    who = named or "No model of this server"
    raise InvalidInput(
        f"{who} {'does not do this' if named else what}: the operator can allow a model that "
        f"{what} with --models: {', '.join(able)}.",
        field="mask" if mask is not None else field,
    )


def _found(
    calls: SyncCalls, named: str | None, ways: Sequence[Takes], pictures: int, masked: bool
) -> tuple[Takes, Model] | None:
    """Returns the way and the model that draw, one that knows masks itself before the others."""
    able = [
        (pipeline.inpaints, way, model)
        for way in ways
        for model in _candidates(calls, named)
        if (pipeline := _pipeline(model, way, pictures, masked))
    ]
    return min(able, key=lambda one: one[0])[1:] if able else None


def _candidates(calls: SyncCalls, named: str | None) -> Iterator[Model]:
    chosen = calls.allowed.model(named)
    yield chosen
    if named is None:
        yield from (model for model in calls.allowed.models if model is not chosen)


def _pipeline(model: Model, way: Takes, pictures: int, masked: bool) -> Pipeline | None:
    given = {Takes.PROMPT, way} | ({Takes.MASK} if masked else set())
    pipeline = model.pipeline_for(frozenset(given))
    if pipeline is None or (pictures > 1 and (way is START or pipeline.one_image)):
        return None
    return pipeline
