"""Values of the fields of /generate that are more than a number or a text."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from api.json_text import unknown_field
from images import decode_base64
from task import MAX_SEED


def _digits_to_int(value: object) -> object:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    return value


Seed = Annotated[
    int,
    Field(ge=0, le=MAX_SEED),
    BeforeValidator(
        _digits_to_int,
        json_schema_input_type=Annotated[int, Field(ge=0, le=MAX_SEED)]
        | Annotated[str, Field(pattern="^[0-9]{1,20}$")],
    ),
]


class ImageOf(BaseModel):
    """An image that this server generated."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    task_id: str = Field(min_length=1, max_length=64, description="Id of a finished task.")
    index: int = Field(0, ge=0, le=999, description="Index of its image, from 0.")


class LoraChoice(BaseModel):
    """A LoRA and its scale."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field(
        min_length=1,
        max_length=200,
        description="Name of a LoRA in the operator's --lora-dir, as GET /models lists it.",
        examples=["watercolour"],
    )
    scale: float = Field(
        1.0, ge=-10, le=10, allow_inf_nan=False, description="Scale. 1: as trained; 0: no effect."
    )


def _decoded(value: object, info: ValidationInfo) -> object:
    _check_names(value, ImageOf)
    return decode_base64(value, info.field_name or "image") if isinstance(value, str) else value


def _named(value: object) -> object:
    _check_names(value, LoraChoice)
    return {"name": value} if isinstance(value, str) else value


def _check_names(value: object, model: type[BaseModel]) -> None:
    """Raises at the first unknown name: pydantic would build an error for each of many."""
    if isinstance(value, dict) and unknown_field(value, model.model_fields):
        raise ValueError("unknown field")


Image = Annotated[
    bytes | ImageOf,
    BeforeValidator(
        _decoded,
        json_schema_input_type=Annotated[
            str, Field(min_length=1, json_schema_extra={"format": "byte"})
        ]
        | ImageOf,
    ),
]
LoraInput = Annotated[
    LoraChoice,
    BeforeValidator(
        _named, json_schema_input_type=Annotated[str, Field(min_length=1)] | LoraChoice
    ),
]
