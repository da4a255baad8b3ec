"""Translates a body of the OpenAI Images API to the fields of /generate."""

import re
from typing import Any

from flask import request

import errors
from api.request_body import Form, form_body
from api.submission import Prepared
from compat.bodies import read_body, used
from compat.openai_shapes import NULLS, OpenAIEdit, OpenAIGeneration
from compat.pictures import EDIT, START, place_pictures
from compat.sync_calls import SyncCalls
from decoding.protocol import Meaning
from images import decode_base64

NAMES = {
    "count": "n",
    "images": "image",
    "init_image": "image",
    "format": "output_format",
    "quality": "output_compression",
}
"""Fields of /generate that have another name in this API."""
BACKGROUNDS = ("transparent", "opaque")
SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX*×]\s*([0-9]{1,5})\s*")  # noqa: RUF001
IMAGE_FIELD = re.compile(r"image(\[[0-9]{0,3}\])?")


def edit_of(calls: SyncCalls) -> tuple[OpenAIEdit, dict[str, Any]]:
    """The body of an edit, and the fields of /generate that it means."""
    form = form_body() if request.mimetype == "multipart/form-data" else Form()
    pictures = [
        picture
        for name in {**form.files, **form.texts}
        if IMAGE_FIELD.fullmatch(name)
        for picture in _pictures(form, name, "image")
    ]
    if not pictures:
        raise errors.InvalidInput(
            "image is required: a file of a form (multipart/form-data).", field="image"
        )
    asked = read_body(OpenAIEdit, {name: texts[0] for name, texts in form.texts.items()})
    mask = next(iter(_pictures(form, "mask", "mask")), None)
    placed = place_pictures(
        calls,
        calls.known_name(asked.model),
        pictures,
        mask,
        ways=(START, EDIT) if mask else (EDIT, START),
        field="image",
    )
    return asked, fields_of(asked, calls) | placed


def _pictures(form: Form, name: str, field: str) -> list[bytes]:
    """The files of a field, and its texts, which are base64 or data URLs."""
    texts = [text for text in form.texts.get(name, ()) if text not in ("", *NULLS)]
    return [*form.files.get(name, ()), *(decode_base64(text, field) for text in texts)]


def fields_of(asked: OpenAIGeneration, calls: SyncCalls) -> dict[str, Any]:
    """The fields of /generate."""
    compression = None
    if asked.output_format != "png":
        compression = max(used(asked.output_compression, "output_compression"), 1)
    return {
        "prompt": asked.prompt,
        "count": asked.n,
        "format": asked.output_format,
        "quality": compression,
        "background": asked.background if asked.background in BACKGROUNDS else None,
        "seed": asked.seed,
        "guidance": asked.guidance,
        "negative_prompt": asked.negative_prompt,
        **_sides(asked.size),
    }


def _sides(size: str | None) -> dict[str, int]:
    if size is None or size.strip().lower() == "auto":
        return {}
    found = SIZE.fullmatch(size)
    if found is None:
        raise errors.InvalidInput(
            f"size must be WIDTHxHEIGHT in pixels, like 1024x1024, or auto, not {size[:50]!r}.",
            field="size",
        )
    return {"width": int(found[1]), "height": int(found[2])}


def prepared_of(asked: OpenAIGeneration, fields: dict[str, Any], calls: SyncCalls) -> Prepared:
    try:
        return calls.prepare(fields, NAMES, mask_meaning=Meaning.MASK_CLEAR)
    except errors.ServerError as error:
        if error.field not in ("width", "height"):
            raise
        given = f"{{field}} {asked.size}: " if asked.size else ""
        raise type(error)(given + error.message, field="size") from None
