"""Errors: their messages name the field under the name that the API uses."""

import pytest

import errors
from errors import InvalidInput, Problem, QueueFull, ServerError


def test_a_message_follows_the_name_of_its_field_and_keeps_what_the_client_sent() -> None:
    error = InvalidInput('{field} must be a whole number, not "count {field}".', field="count")
    assert str(error) == 'count must be a whole number, not "count {field}".'
    error.field = "n"
    assert error.message == str(error) == 'n must be a whole number, not "count {field}".'
    assert error.problem == Problem(400, "invalid_input", error.message, "n")


def test_an_error_that_asks_to_try_later_says_when() -> None:
    assert QueueFull(retry_after_s=7).problem.retry_after_s == 7


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ServerError) and kind is not errors.TryLater
    ],
)
def test_each_error_has_a_code_and_a_sentence(kind: type[ServerError]) -> None:
    assert kind is ServerError or kind.code != ServerError.code
    assert kind.default_message.endswith(".")
    assert 400 <= kind.http_status < 600
