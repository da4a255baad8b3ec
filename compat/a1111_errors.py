"""Errors in the form of AUTOMATIC1111's API."""

from typing import Any

from api.api_docs import ErrorShape
from compat.a1111_shapes import A1111Error
from errors import Problem

TAG = "AUTOMATIC1111"


def a1111_error_body(problem: Problem) -> dict[str, Any]:
    body = A1111Error(error=problem.code, detail=problem.message, errors=problem.message)
    return body.model_dump()


def a1111_error(problem: Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of an answer."""
    return a1111_error_body(problem), problem.http_status, problem.headers


A1111_ERRORS = ErrorShape("A1111Error", a1111_error_body, int)
