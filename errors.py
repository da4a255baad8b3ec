"""All errors that the server answers: code, HTTP status and message.

`code` is stable and meant for programs, the message for people. `field` is the name of the wrong
query parameter or body field, if there is one.
"""

import re
from dataclasses import dataclass
from typing import ClassVar


class ServerError(Exception):
    """Base class of all errors. The answer is `{"error": {"code", "message", "field"?}}`."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    default_message: ClassVar[str] = "The server failed to answer; its log says why."

    def __init__(self, message: str | None = None, *, field: str | None = None) -> None:
        self.message = message or self.default_message
        self.field = field
        super().__init__(self.message)


@dataclass(frozen=True)
class Problem:
    """The content of an error. Each API writes it in its own format."""

    http_status: int
    code: str
    message: str
    field: str | None = None
    retry_after_s: int | None = None


class InvalidInput(ServerError):
    code = "invalid_input"
    http_status = 400
    default_message = "The request holds a value that cannot be used; the field is named."


class UnsupportedMediaType(ServerError):
    code = "unsupported_media_type"
    http_status = 415
    default_message = (
        "The body must be JSON: send it with the header Content-Type: application/json."
    )


class BodyTooLarge(ServerError):
    code = "body_too_large"
    http_status = 413
    default_message = "The request body is larger than this server accepts."


class UnknownHost(ServerError):
    code = "unknown_host"
    http_status = 421
    default_message = "This server does not answer under this host name."


class ForeignPage(ServerError):
    code = "foreign_page"
    http_status = 403
    default_message = (
        "A page of another origin may not change anything here. The operator can allow its origin "
        "with --cors-origins."
    )


class UnknownTask(ServerError):
    code = "unknown_task"
    http_status = 404
    default_message = "No task with this task_id was ever known here."


class NotReady(ServerError):
    code = "not_ready"
    http_status = 409
    default_message = "The image is not made yet: ask /status for the time that remains."


class Gone(ServerError):
    code = "gone"
    http_status = 410
    default_message = "The image was there once and is no more."


class TryLater(ServerError):
    """An error with the header Retry-After."""

    def __init__(self, message: str | None = None, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TaskFailed(ServerError):
    code = "task_failed"
    http_status = 500
    default_message = "The image could not be made; the message says why."


class NotFinite(ServerError):
    code = "not_finite"
    http_status = 500
    default_message = "The model computed values that are not numbers, so there is no picture."


class OutOfMemory(ServerError):
    code = "out_of_memory"
    http_status = 500
    default_message = "The machine's memory did not suffice."


class QueueFull(TryLater):
    code = "queue_full"
    http_status = 429
    default_message = "The queue is full: try again later."


class InputsFull(TryLater):
    code = "inputs_full"
    http_status = 429
    default_message = (
        "The pictures of waiting tasks take the space that the operator allows (--input-bytes): "
        "try again when some of these tasks have ended."
    )


class InputsTooLarge(ServerError):
    code = "inputs_too_large"
    http_status = 507
    default_message = (
        "The pictures of this task take more space than the operator allows (--input-bytes)."
    )


class TooManyListeners(TryLater):
    code = "too_many_listeners"
    http_status = 503
    default_message = (
        "As many clients wait or listen as this server has places for: try again later, or ask "
        "/status now and then."
    )


class TooManyWaiting(TryLater):
    code = "too_many_waiting"
    http_status = 429
    default_message = "As many requests wait as this server has places for: try again later."


class TooManyTransfers(TryLater):
    code = "too_many_transfers"
    http_status = 503
    default_message = (
        "Other clients are sending or reading as much as this server can hold: try again later."
    )


class RequestTooSlow(ServerError):
    code = "request_timeout"
    http_status = 408
    default_message = "The request came too slowly."


class DoesNotFit(ServerError):
    code = "does_not_fit"
    http_status = 422
    default_message = "A picture of this size does not fit into this machine's memory."


class ModelNotAllowed(ServerError):
    code = "model_not_allowed"
    http_status = 422
    default_message = "This server does not draw with this model; GET /models lists those it does."


class NotSupported(ServerError):
    code = "not_supported"
    http_status = 422
    default_message = "The model cannot do what the field asks for."


class UnusableAdapter(ServerError):
    code = "unusable_adapter"
    http_status = 422
    default_message = "An adapter (LoRA) is broken, or does not fit the model."

    def __init__(self, message: str | None = None, *, field: str | None = "loras") -> None:
        super().__init__(message, field=field)


class KeyReused(ServerError):
    code = "idempotency_key_reused"
    http_status = 422
    default_message = (
        "This key came before with a request that asked for something else: send a new key with a "
        "new request."
    )


class OperatorOnly(ServerError):
    code = "operator_only"
    http_status = 403
    default_message = (
        "Only the operator may do this: send the header Authorization: Bearer with the value of "
        "--operator-key."
    )


class UnknownModel(ServerError):
    code = "unknown_model"
    http_status = 404
    default_message = "mflux has no model of this name."


class StorageUnavailable(ServerError):
    code = "storage_unavailable"
    http_status = 503
    default_message = "The server cannot store anything now; what it has accepted stays."


class NoWorker(ServerError):
    code = "no_worker"
    http_status = 503
    default_message = "The server takes no tasks now: it is stopping, or its model failed to load."


class BadOption(Exception):
    """An option of the server is invalid. The message names it."""


class StoreError(Exception):
    """The data dir cannot be used. The message is the reason, as one sentence."""


class ModelLoadError(Exception):
    """The model cannot be loaded. The message says what the operator can do, in one sentence."""

    code: ClassVar[str] = "model_load_failed"


def without_folders(text: str) -> str:
    """Removes the folders of this machine from a message for clients. The log keeps them."""
    return re.sub(r"(?<![\w:/])~?(?:/[\w.@+~ -]+)+/([\w.@+~-]+)", r"\1", text)
