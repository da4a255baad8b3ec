"""JSON schemas and values in words, for messages of refusals."""

import json
from typing import Any

MOST_SHOWN = 80
"""Characters of a refused value that are shown."""
NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "string": "a string",
}
OBJECTS_IN_WORDS = {
    "ImageOf": "{task_id, index} of an earlier result",
    "LoraChoice": "{name, scale}",
}
_SHOWN = json.JSONEncoder(ensure_ascii=False, default=lambda other: type(other).__name__)


def in_words(schema: dict[str, Any]) -> str:
    """Returns what a JSON schema allows as text: "a whole number from 1 to 100"."""
    if "anyOf" in schema:
        choices = [in_words(choice) for choice in schema["anyOf"]]
        return " or ".join(choice for choice in choices if choice != "null")
    if "$ref" in schema:
        return OBJECTS_IN_WORDS[schema["$ref"].rpartition("/")[2]]
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "array":
        items = in_words(schema["items"])
        least = f"{schema['minItems']} to" if "minItems" in schema else "up to"
        return f"a list of {least} {schema['maxItems']}, each {items}"
    if schema.get("format") == "byte":
        return "a picture as base64"
    words = "a string of digits" if "[0-9]" in schema.get("pattern", "") else NOUNS[schema["type"]]
    if "minimum" in schema:
        words += (
            f" from {schema['minimum']:.15g}"
            if schema["type"] == "number"
            else f" from {schema['minimum']}"
        )
        words += f" to {schema['maximum']}"
    elif "exclusiveMinimum" in schema:
        words += f" above {schema['exclusiveMinimum']:g} and "
        words += (
            f"up to {schema['maximum']:g}"
            if "maximum" in schema
            else f"below {schema['exclusiveMaximum']:g}"
        )
    if "multipleOf" in schema:
        words += f", a multiple of {schema['multipleOf']}"
    if "maxLength" in schema:
        least = f"{schema['minLength']} to" if "minLength" in schema else "up to"
        words += f" of {least} {schema['maxLength']} characters"
    return words


def shown(value: Any) -> str:
    """A value that was refused, as JSON, of up to MOST_SHOWN characters."""
    if isinstance(value, bytes):
        return "a file"
    if isinstance(value, str):
        value = value[:MOST_SHOWN]
    text = ""
    piece: str
    for piece in _SHOWN.iterencode(value):
        text += piece[:MOST_SHOWN]
        if len(text) > MOST_SHOWN:
            return text[: MOST_SHOWN - 3] + "..."
    return text
