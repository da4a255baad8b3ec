"""Prompts that are JSON: the forms that FIBO and FIBO 2 read, checked as mflux checks them.

mflux does so when 24 GB are loaded (FIBO 2: Fibo2CaptionCheck, FIBO Edit: FiboEditUtil).
tests/test_contract.py compares both.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Any

STRING, INTEGER = "a string", "an integer"
INTEGER_TEXT = re.compile(r"\s*[+-]?\d[\d_]*(\.0*)?\s*")
Spec = Mapping[str, Any]
"""Of an object's fields: STRING, INTEGER, another Spec, or a list of one Spec."""
EDIT_INSTRUCTION = "edit_instruction"


class PromptForm(StrEnum):
    """What a class reads as a prompt."""

    TEXT = "text"
    JSON = "json"
    JSON_EDIT = "json_edit"
    """An object with an edit_instruction."""
    JSON_EDIT_OR_NONE = "json_edit_or_none"
    """The same, or nothing at all."""
    CAPTION = "caption"
    """Text, or an object that describes a picture."""
    CAPTION_EDIT = "caption_edit"
    """The same, with an edit_instruction in the object."""


WRITTEN = frozenset({PromptForm.JSON, PromptForm.JSON_EDIT, PromptForm.JSON_EDIT_OR_NONE})
"""Forms that a helper model writes from plain text (models/helpers.py)."""


def compact_caption(prompt: str) -> str:
    """What Ideogram 4 reads of a prompt: a JSON object is written without spaces."""
    stripped = prompt.strip()
    if not stripped.startswith("{"):
        return prompt
    with suppress(ValueError, RecursionError):  # also of lone surrogates, which no tokenizer reads
        value = json.loads(stripped)
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return compact.encode().decode() if isinstance(value, dict) else prompt
    return prompt


def strings(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, STRING)


CAPTION: Spec = {
    **strings("short_description", "background_setting", "style_medium", "context"),
    **strings("artistic_style"),
    "objects": [
        {
            **strings("description", "location", "relationship", "relative_size", "texture"),
            **strings("shape_and_color", "appearance_details", "pose", "expression", "clothing"),
            **strings("action", "gender", "skin_tone_and_texture", "orientation"),
            "number_of_objects": INTEGER,
        }
    ],
    "lighting": strings("conditions", "direction", "shadows"),
    "aesthetics": strings("composition", "color_scheme", "mood_atmosphere"),
    "photographic_characteristics": strings(
        "depth_of_field", "focus", "camera_angle", "lens_focal_length"
    ),
    "text_render": [strings("text", "location", "size", "color", "font", "appearance_details")],
}
SCORES = ("aesthetic_score", "preference_score")
"""Of FIBO 1's captions: left out."""


def form_error(form: PromptForm, prompt: str) -> str | None:
    """Why a prompt is not of a form, as the end of a sentence about it; None: it is."""
    if form is PromptForm.TEXT:
        return None
    if form is PromptForm.JSON_EDIT_OR_NONE:
        return form_error(PromptForm.JSON_EDIT, prompt) if prompt else None
    try:
        value = json.loads(prompt)
    except (ValueError, RecursionError) as error:
        if form in (PromptForm.JSON, PromptForm.JSON_EDIT):
            return f"must be JSON, as FIBO was trained with ({error})."
        if prompt.strip().startswith("{"):
            return f"starts like JSON and is not valid JSON ({error})."
        return None
    if form is PromptForm.JSON_EDIT:
        if not isinstance(value, dict) or not value.get(EDIT_INSTRUCTION):
            return f"must be a JSON object with {EDIT_INSTRUCTION!r}."
        return None
    if form is PromptForm.JSON or not isinstance(value, dict):
        return None
    return _caption_error(value, form is PromptForm.CAPTION_EDIT)


def _caption_error(value: dict[str, Any], edit: bool) -> str | None:
    if edit and not isinstance(value.get(EDIT_INSTRUCTION), str):
        return f"must have {EDIT_INSTRUCTION!r}, a string, if it is a JSON object."
    caption = {name: part for name, part in value.items() if name != EDIT_INSTRUCTION}
    if "structured_caption" in caption:
        inner = caption["structured_caption"]
        if edit and (not isinstance(inner, dict | str) or len(caption) > 1):
            return "must have its whole caption in structured_caption."
        caption = inner if isinstance(inner, dict) else {}
    error = next(_errors(_cleaned(caption), CAPTION, "caption"), None)
    return f"has another form than FIBO 2 reads: {error}" if error else None


def _cleaned(caption: dict[str, Any]) -> dict[str, Any]:
    full = {name: part for name, part in _without_empty(caption).items() if name not in SCORES}
    return {
        name: {key: one for key, one in part.items() if key not in SCORES}
        if isinstance(part, dict)
        else part
        for name, part in full.items()
    }


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: _without_empty(part) for name, part in value.items()}
        return {name: part for name, part in kept.items() if not _is_empty(part)}
    if isinstance(value, list):
        return [part for part in map(_without_empty, value) if not _is_empty(part)]
    return value


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | dict | list) and not value)


def _errors(value: Any, expected: Any, path: str) -> Iterator[str]:
    """A sentence for each part that is of another type than FIBO 2 reads. Unknown fields pass."""
    if isinstance(expected, list):
        yield from _errors_of_list(value, expected[0], path)
    elif isinstance(expected, Mapping):
        yield from _errors_of_object(value, expected, path)
    elif not (isinstance(value, str) if expected == STRING else _is_integer(value)):
        yield f"{path} must be {expected}."


def _errors_of_list(value: Any, expected: Any, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{path} must be a list of objects."
        return
    for index, one in enumerate(value):
        yield from _errors(one, expected, f"{path}[{index}]")


def _errors_of_object(value: Any, expected: Spec, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path} must be a JSON object."
        return
    for name in value.keys() & expected.keys():
        yield from _errors(value[name], expected[name], f"{path}.{name}")


def _is_integer(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and value.is_integer()
    if isinstance(value, str):
        return INTEGER_TEXT.fullmatch(value) is not None
    return isinstance(value, int)
