"""Signing in with a browser: a key is exchanged for a cookie."""

from typing import Annotated

from flask import Response, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import errors
from api.answers import Answer, json_response
from api.api_docs import SCHEMAS, ForeignSchemas, documented, json_answer
from api.identity import Identity, public
from api.json_text import parse_object
from api.request_body import whole_body
from api.routes import route
from key_file import Client

MAX_BODY_BYTES = 4096
"""Everybody may send this body, so it is small."""


class SessionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(max_length=512, description="The key that the operator gave.")]


class SessionAnswer(Answer):
    """Who asks, and what it may do."""

    needs_key: bool = Field(description="Whether requests need a key, and this one has none.")
    name: str = Field(
        description="Of the client; empty where everybody is one client.", examples=["alice"]
    )
    operator: bool = Field(description="Whether it sees and manages all tasks.")
    may_prioritize: bool = Field(description="Whether it may send urgent tasks.")


SESSION_SCHEMAS: ForeignSchemas = (
    (SessionRequest, "validation"),
    (SessionAnswer, "serialization"),
)


class SessionRoutes:
    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    @public
    @route("GET", "/session")
    @documented(
        "The client of this request",
        tag="server",
        answers={200: json_answer(SessionAnswer, "The client of this request.")},
        errors=(errors.Unauthorized,),
    )
    def session(self) -> Response:
        return _answer(self._identity.identify())

    @public
    @route("POST", "/session")
    @documented(
        "Sign in with a browser",
        tag="server",
        description="Exchanges a key for a cookie, which pictures and event streams need, because "
        "a browser sends no headers with them. Programs send the key with each request instead.",
        content={"application/json": {"schema": {"$ref": f"{SCHEMAS}SessionRequest"}}},
        answers={200: json_answer(SessionAnswer, "The client of the key; with the cookie.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.Unauthorized,
            errors.TooManyRequests,
        ),
    )
    def sign_in(self) -> Response:
        if not request.is_json:
            raise errors.UnsupportedMediaType
        if (request.content_length or 0) > MAX_BODY_BYTES:
            raise errors.BodyTooLarge
        try:
            asked = SessionRequest.model_validate(parse_object(whole_body()))
        except ValidationError as error:
            field = str(error.errors(include_input=False)[0]["loc"][0])[:100]
            raise errors.InvalidInput(
                "key must be the only field, a text of at most 512 characters.", field=field
            ) from None
        found = self._identity.client_of(asked.key)
        answer = _answer(found)
        self._identity.sign_in(found, answer)
        return answer

    @public
    @route("DELETE", "/session")
    @documented(
        "Sign out",
        tag="server",
        answers={200: json_answer(SessionAnswer, "Nobody is signed in.")},
        errors=(),
    )
    def sign_out(self) -> Response:
        answer = _answer(None)
        self._identity.sign_out(answer)
        return answer


def _answer(client: Client | None) -> Response:
    return json_response(
        SessionAnswer(
            needs_key=client is None,
            name=client.name if client else "",
            operator=client is not None and client.operator,
            may_prioritize=client is not None and client.may_prioritize,
        )
    )
