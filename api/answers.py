"""What all JSON answers share: their writing, and the shape of errors.

task_answers.py, model_answers.py and server_answers.py have the shape of every answer: what the
routes fill in and what the API documentation shows. A field that does not apply is left out of the
answer, never null.
"""

from typing import Annotated

from flask import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from errors import Problem

Seconds = Annotated[float, AfterValidator(lambda seconds: round(seconds, 6))]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def as_json(self) -> str:
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


class ErrorBody(Answer):
    code: str = Field(
        description="Stable, for programs: invalid_input, unknown_task, not_ready, ...",
        examples=["invalid_input"],
    )
    message: str = Field(
        description="For people.", examples=["steps must be a whole number from 1 to 100, not 0."]
    )
    field: str | None = Field(
        None, description="The query parameter or body field at fault.", examples=["steps"]
    )


class ErrorAnswer(Answer):
    error: ErrorBody = Field(description="What went wrong.")


def json_response(answer: Answer, status: int = 200) -> Response:
    return Response(answer.as_json(), status, mimetype="application/json")


def error_response(problem: Problem) -> Response:
    body = ErrorBody(code=problem.code, message=problem.message, field=problem.field)
    answer = json_response(ErrorAnswer(error=body), problem.http_status)
    answer.headers.update(problem.headers)
    return answer


def jpeg_response(picture: bytes) -> Response:
    answer = Response(picture, mimetype="image/jpeg")
    answer.headers["Cache-Control"] = "no-store"
    return answer
