"""Reads a conversation of the OpenAI API: the prompt and the pictures of its latest request.

No language model reads it. The prompt is the text of the user's last message; the pictures are
those of this message, else the latest ones before it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.request_values import ImageOf
from compat.openai_fields import picture_in
from errors import InvalidInput

CALL_ID = re.compile(r"ig_([0-9a-zA-Z_-]{1,64})")
RESPONSE_ID = re.compile(r"resp_([0-9a-zA-Z_-]{1,64})")
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image_url", "input_image")
MOST_PICTURES = 20
Picture = bytes | ImageOf
"""A picture, or that of an earlier task."""


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    prompt: str
    pictures: list[Picture]


def request_in(items: object, field: str) -> Request:
    """
    Args:
        items: the messages, or the text of one.
        field: what they are called in the body.

    Raises:
        InvalidInput: names the item at fault.
    """
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise InvalidInput(f"{field} must be a list of messages.", field=field)
    last = next((at for at in reversed(range(len(items))) if _role(items[at]) == "user"), None)
    if last is None:
        raise InvalidInput(f"{field} must have a message with the role user.", field=field)
    prompt, pictures = _message(items[last], f"{field}[{last}]")
    for at in reversed(range(last)):
        pictures = pictures or _pictures_of(items[at], f"{field}[{at}]")
    if not prompt and not pictures:
        where = f"{field}[{last}].content"
        raise InvalidInput(f"{where} must have a text: the prompt.", field=where)
    return Request(prompt, pictures)


def earlier(response_id: object) -> Picture:
    """The picture of an earlier response.

    Raises:
        InvalidInput
    """
    found = RESPONSE_ID.fullmatch(response_id) if isinstance(response_id, str) else None
    if found is None:
        raise InvalidInput(
            "{field} must be the id of an earlier response of this server.",
            field="previous_response_id",
        )
    return ImageOf(task_id=found[1], index=0)


def _role(item: object) -> object:
    return item.get("role") if isinstance(item, dict) else None


def _pictures_of(item: object, field: str) -> list[Picture]:
    """The pictures of an earlier message or call of the tool."""
    if not isinstance(item, dict):
        return []
    if item.get("type") in ("image_generation_call", "item_reference"):
        return _result(item, field)
    return _message(item, field)[1]


def _result(call: Mapping[str, Any], field: str) -> list[Picture]:
    """The picture of a call of the tool: as the client sent it, else as this server keeps it."""
    if call.get("result"):
        return [picture_in(call["result"], f"{field}.result")]
    found = CALL_ID.fullmatch(str(call.get("id")))
    return [ImageOf(task_id=found[1], index=0)] if found else []


def _message(item: Mapping[str, Any], field: str) -> tuple[str, list[Picture]]:
    """The text and the pictures of a message."""
    content, where = item.get("content"), f"{field}.content"
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list):
        raise InvalidInput(f"{where} must be a text or a list of parts.", field=where)
    texts, pictures = [], []
    for at, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in IMAGES:
            pictures.append(part)
        elif _role(item) == "user":
            raise InvalidInput(
                f"{where}[{at}] must be a text or a picture: nothing else is read here.",
                field=f"{where}[{at}]",
            )
    pictures += _attached(item)
    if len(pictures) > MOST_PICTURES:
        raise InvalidInput(f"{where} may have at most {MOST_PICTURES} pictures.", field=where)
    return "\n".join(texts).strip(), [picture_in(part, where) for part in pictures]


def _attached(item: Mapping[str, Any]) -> Sequence[Any]:
    """The pictures beside the content of an answer of this API, which clients send back."""
    images = item.get("images")
    return images if isinstance(images, list) and _role(item) == "assistant" else []
