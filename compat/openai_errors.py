"""Errors in the form of the OpenAI API."""

from typing import Any

from api.api_docs import ErrorShape
from compat.openai_shapes import OpenAIError, OpenAIErrorBody
from errors import Problem

FOLLOWED_RETRY_S = 60
"""SDKs respect Retry-After up to so many seconds; above, they try again at once."""


def openai_status(http_status: int) -> int:
    return 400 if http_status in (409, 415, 422) else http_status


def openai_error_body(problem: Problem) -> dict[str, Any]:
    status = openai_status(problem.http_status)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = OpenAIErrorBody(
        message=problem.message,
        type="rate_limit_error" if status == 429 else kind,
        param=problem.field,
        code="invalid_api_key" if status == 401 else problem.code,
    )
    return OpenAIError(error=body).model_dump()


def openai_error(problem: Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of an answer."""
    headers = problem.headers
    pointless = problem.http_status in (409, 410, 500, 507) or (
        (problem.retry_after_s or 0) > FOLLOWED_RETRY_S
    )
    if pointless:
        headers["x-should-retry"] = "false"  # else SDKs submit the same again, twice
    return openai_error_body(problem), openai_status(problem.http_status), headers


OPENAI_ERRORS = ErrorShape("OpenAIError", openai_error_body, openai_status)
