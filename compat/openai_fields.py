"""Translates bodies of the OpenAI API to the fields of /generate."""

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from flask import request

import errors
from api.query_values import gone_check
from api.request_body import form_body, json_body
from api.submission import Prepared
from compat.bodies import MAX_ITEMS, read_body, used
from compat.openai_shapes import NULLS, Drawing, OpenAIEdit
from compat.pictures import EDIT, START, place_pictures
from compat.sync_calls import Call, SyncCalls
from decoding.protocol import Meaning
from fields import Takes
from images import decode_base64

NAMES = {
    "count": "n",
    "images": "image",
    "init_image": "image",
    "format": "output_format",
    "quality": "output_compression",
}
"""Fields of /generate that have another name in this API."""
MOST_USER_CHARS = 200
"""As of `user` in /generate."""
BACKGROUNDS = ("transparent", "opaque")
SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX*×]\s*([0-9]{1,5})\s*")  # noqa: RUF001
IMAGE_FIELD = re.compile(r"image(\[[0-9]{0,3}\])?")


def edit_of(calls: SyncCalls) -> tuple[OpenAIEdit, dict[str, Any]]:
    """The body of an edit, and the fields of /generate that it means."""
    body, pictures, mask = _sent()
    ways = (START, EDIT) if mask else (EDIT, START)
    return _from_pictures(calls, body, pictures, mask, ways)


def variation_of(calls: SyncCalls) -> tuple[OpenAIEdit, dict[str, Any]]:
    """The body of a variation, and the fields of /generate that it means. Drawing starts from the
    picture where a model can, without a prompt."""
    body, pictures, _ = _sent()
    return _from_pictures(calls, {**body, "prompt": None}, pictures, None, (START, EDIT))


def _from_pictures(
    calls: SyncCalls,
    body: Mapping[str, Any],
    pictures: list[bytes],
    mask: bytes | None,
    ways: tuple[Takes, Takes],
) -> tuple[OpenAIEdit, dict[str, Any]]:
    if not pictures:
        raise errors.InvalidInput(
            "image is required: a file of a form (multipart/form-data), or in JSON a data URL.",
            field="image",
        )
    asked = read_body(OpenAIEdit, body)
    placed = place_pictures(
        calls, calls.known_name(asked.model), pictures, mask, ways=ways, field="image"
    )
    return asked, fields_of(asked, asked.prompt, asked.n) | placed


def _sent() -> tuple[Mapping[str, Any], list[bytes], bytes | None]:
    """The fields of the body, its pictures and its mask: of a form, else of JSON."""
    if request.mimetype != "multipart/form-data":
        body = json_body()
        named = "images" if body.get("images") else "image"
        mask = body.get("mask")
        pictures = pictures_in(body.get(named), named)
        return body, pictures, picture_in(mask, "mask") if mask else None
    form = form_body()
    sent: dict[str, list[bytes]] = {}
    for name in {**form.files, **form.texts}:
        kind = "image" if IMAGE_FIELD.fullmatch(name) else name
        if kind in ("image", "mask"):
            texts = [text for text in form.texts.get(name, ()) if text not in ("", *NULLS)]
            found = [*form.files.get(name, ()), *(decode_base64(text, kind) for text in texts)]
            sent.setdefault(kind, []).extend(found)
    fields = {name: texts[0] for name, texts in form.texts.items()}
    return fields, sent.get("image", []), next(iter(sent.get("mask", [])), None)


def pictures_in(value: object, field: str) -> list[bytes]:
    """The pictures of a JSON field: one, or a list of them."""
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_ITEMS:
        raise errors.InvalidInput(f"{field} may have at most {MAX_ITEMS} items.", field=field)
    return [picture_in(one, field) for one in values]


def picture_in(value: object, field: str) -> bytes:
    """A picture of a JSON body: a data URL or base64, bare or in an object as `image_url`, `url` or
    `image_url.url`.

    Raises:
        InvalidInput: it is something else, for example a file_id.
    """
    if isinstance(value, dict) and value.get("file_id"):
        raise errors.InvalidInput(
            "{field}: this server keeps no files: send the picture itself, as a data URL, in place "
            "of file_id.",
            field=field,
        )
    for _ in range(2):
        if isinstance(value, dict):
            value = value.get("image_url") or value.get("url")
    if not isinstance(value, str):
        raise errors.InvalidInput("{field} must be a picture as a data URL.", field=field)
    return decode_base64(value, field)


def fields_of(drawing: Drawing, prompt: str, count: int | None = None) -> dict[str, Any]:
    """The fields of /generate, but for model and pictures."""
    compression = None
    if drawing.output_format != "png":
        compression = max(used(drawing.output_compression, "output_compression"), 1)
    return {
        "prompt": prompt,
        "count": count,
        "format": drawing.output_format,
        "quality": compression,
        "background": drawing.background if drawing.background in BACKGROUNDS else None,
        "seed": drawing.seed,
        "guidance": drawing.guidance,
        "negative_prompt": drawing.negative_prompt,
        **_sides(drawing.size),
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


def start(
    calls: SyncCalls,
    drawing: Drawing,
    fields: dict[str, Any],
    *,
    end_user: object,
    names: Mapping[str, str] = NAMES,
) -> Call:
    """Put the task into the queue.

    Args:
        fields: of /generate. They are removed, so that the pictures are freed while the caller
            waits.
        names: what errors call fields of /generate.
    """
    model = calls.allowed.model(fields["model"])
    fields["steps"] = calls.steps(model, drawing.steps)
    call = calls.start(
        _prepared(drawing, fields, calls, names),
        priority=int(drawing.priority),
        end_user=_name_of(end_user),
        client_key=_client_key(),
        hung_up=gone_check(),
    )
    fields.clear()
    return call


def _prepared(
    drawing: Drawing, fields: dict[str, Any], calls: SyncCalls, names: Mapping[str, str]
) -> Prepared:
    try:
        return calls.prepare(fields, names, mask_meaning=Meaning.MASK_CLEAR)
    except errors.ServerError as error:
        if error.field not in ("width", "height"):
            raise
        given = f"{{field}} {drawing.size}: " if drawing.size else ""
        raise type(error)(given + error.message, field="size") from None


def _name_of(end_user: object) -> str:
    """The user of a client, as each task stores it: a long name as its hash."""
    if not isinstance(end_user, str):
        return ""
    if len(end_user) <= MOST_USER_CHARS:
        return end_user
    return sha256(end_user.encode()).hexdigest()


def _client_key() -> str | None:
    """Returns an idempotency key that is separate from keys of other APIs."""
    key = request.headers.get("Idempotency-Key", "").strip()
    return f"openai:{sha256(key.encode()).hexdigest()}" if key else None
