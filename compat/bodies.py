"""Bodies of foreign requests: null and empty count as absent, unknown fields are ignored.

A field that is never used takes any value (`Any`). A field that only some models use is marked
IF_USED: a value that cannot be used is an error only in a request that uses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from api.json_text import MAX_TEXT_BYTES
from errors import InvalidInput


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    of_any_length: ClassVar[frozenset[str]] = frozenset()
    """Lists that may have more than MAX_ITEMS, because their items are not validated."""
    pictures: ClassVar[frozenset[str]] = frozenset()
    """Fields that may hold pictures. The callers of `read_body` drop them before they wait. All
    other fields together may have MAX_TEXT_BYTES characters."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None and value != ""}

    def echoed(self, *pictures: str) -> dict[str, Any]:
        """The fields that can be used, without the pictures."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value
            for name, value in fields.items()
            if name not in pictures and not isinstance(value, Unusable)
        }


@dataclass(frozen=True)
class Unusable:
    """Stands for the value of an IF_USED field that cannot be used."""

    reason: str


def _unusable_kept(value: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        return Unusable(str(error.errors(include_url=False)[0]["msg"]))


IF_USED = WrapValidator(_unusable_kept)
Value = TypeVar("Value")


def used(value: Value, name: str) -> Value:
    """The value of an IF_USED field.

    Raises:
        InvalidInput: it cannot be used.
    """
    checked: object = value
    if isinstance(checked, Unusable):
        raise InvalidInput(f"{name}: {checked.reason}.", field=name)
    return value


Asked = TypeVar("Asked", bound=Body)
MAX_ITEMS = 100
"""Largest number of items of a list."""


def read_body(shape: type[Asked], body: Mapping[str, Any]) -> Asked:
    """The fields of a JSON object or of a form that this shape knows.

    Raises:
        InvalidInput: names the first field at fault.
    """
    fields = {name: body.get(name) for name in shape.model_fields}
    for name, value in fields.items():  # pydantic would validate each item before it counts them
        if isinstance(value, list) and len(value) > MAX_ITEMS and name not in shape.of_any_length:
            raise InvalidInput(f"{name} may have at most {MAX_ITEMS} items.", field=name)
    _check_size({name: fields[name] for name in fields if name not in shape.pictures})
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        raise InvalidInput(f"{name} is required.", field=name)
    raise InvalidInput(f"{name}: {first['msg']}.", field=name)


def _check_size(fields: Mapping[str, Any]) -> None:
    """Raises: InvalidInput: they have more text than a caller may leave here while it waits."""
    sizes = {name: _characters(value) for name, value in fields.items()}
    if sum(sizes.values()) > MAX_TEXT_BYTES:
        name = max(sizes, key=lambda one: sizes[one])
        raise InvalidInput(
            f"{{field}} is too large: all but pictures may have {MAX_TEXT_BYTES} characters.",
            field=name,
        )


def _characters(value: object) -> int:
    """Of the texts in a value of JSON, which is nested as deep as `parse_object` allows."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(name) + _characters(one) for name, one in value.items())
    return sum(map(_characters, value)) if isinstance(value, list) else 0
