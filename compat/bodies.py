"""Bodies of foreign requests: null and empty count as absent, the unknown is ignored."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from errors import InvalidInput


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None and value != ""}


Asked = TypeVar("Asked", bound=Body)


def read_body(shape: type[Asked], body: bytes | dict[str, str]) -> Asked:
    """JSON, whatever its Content-Type says, or the texts of a form.

    Raises:
        InvalidInput: names the first field at fault.
    """
    try:
        if isinstance(body, bytes):
            return shape.model_validate_json(body)
        return shape.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        raise InvalidInput(f"The body is not valid JSON: {first['ctx']['error']}.")
    if not first["loc"]:
        raise InvalidInput("The body must be a JSON object.")
    name = str(first["loc"][0])[:100]
    if first["type"] == "missing":
        raise InvalidInput(f"{name} is required.", field=name)
    raise InvalidInput(f"{name}: {first['msg']}.", field=name)
