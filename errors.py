"""All errors that the server answers: code, HTTP status and message.

`code` is stable and meant for programs, the message for people. `field` is the name of the wrong
query parameter or body field, if there is one.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """The content of an error. Each API writes it in its own format."""

    http_status: int
    code: str
    message: str
    field: str | None = None
    retry_after_s: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """That an answer has in every format."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class ServerError(Exception):
    """Base class of all errors. The answer is `{"error": {"code", "message", "field"?}}`."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    default_message: ClassVar[str] = (
        "The server could not answer because of an error of its own. Its log has the details."
    )

    def __init__(self, message: str | None = None, *, field: str | None = None) -> None:
        """
        Args:
            message: `{field}` in it stands for the name of the field, which another API may call
                by another name.
        """
        super().__init__(message)
        self.field = field
        self._message = message or self.default_message

    @property
    def message(self) -> str:
        return self._message.replace("{field}", self.field or "the field", 1)

    @property
    def problem(self) -> Problem:
        return Problem(self.http_status, self.code, self.message, self.field)

    def __str__(self) -> str:
        return self.message


class InvalidInput(ServerError):
    code = "invalid_input"
    http_status = 400
    default_message = "A value of the request cannot be used: `field` names it."


class UnsupportedMediaType(ServerError):
    code = "unsupported_media_type"
    http_status = 415
    default_message = (
        "The body must be JSON: send it with the header Content-Type: application/json."
    )


class BodyTooLarge(ServerError):
    code = "body_too_large"
    http_status = 413
    default_message = "The body of the request is larger than this server accepts: send less."


class UnknownHost(ServerError):
    code = "unknown_host"
    http_status = 421
    default_message = (
        "This server does not answer under this host name. The operator can allow it with "
        "--allowed-hosts."
    )


class ForeignPage(ServerError):
    code = "foreign_page"
    http_status = 403
    default_message = (
        "A page of another origin cannot change anything on this server. The operator can allow "
        "its origin with --cors-origins. Behind a proxy that replaces the Host header (nginx does "
        "by default), either let the proxy pass it on (proxy_set_header Host $http_host) and add "
        "the name to --allowed-hosts, or name the page's origin in --cors-origins."
    )


class UnknownTask(ServerError):
    code = "unknown_task"
    http_status = 404
    default_message = "There is no task with this task_id."


class UnknownMachine(ServerError):
    code = "unknown_machine"
    http_status = 404
    default_message = "There is no machine of this name: GET /machines lists all."


class NotReady(ServerError):
    code = "not_ready"
    http_status = 409
    default_message = "The image is not finished yet: GET /status has the remaining time."


class WrongStatus(ServerError):
    code = "wrong_status"
    http_status = 409
    default_message = "The task does not have the status that this needs."


class Gone(ServerError):
    code = "gone"
    http_status = 410
    default_message = "The image existed and was removed."

    def __init__(self, message: str | None = None, *, owner: str = "") -> None:
        """Args:
        owner: of the task that was removed, which alone may know that it existed.
        """
        super().__init__(message)
        self.owner = owner


class TryLater(ServerError):
    """An error with the header Retry-After."""

    def __init__(self, message: str | None = None, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def problem(self) -> Problem:
        return replace(super().problem, retry_after_s=self.retry_after_s)


class TaskFailed(ServerError):
    code = "task_failed"
    http_status = 500
    default_message = "The image could not be drawn."


class NotFinite(ServerError):
    code = "not_finite"
    http_status = 500
    default_message = "The model computed values that are not numbers: there is no image."


class OutOfMemory(ServerError):
    code = "out_of_memory"
    http_status = 500
    default_message = "The machine does not have enough memory."


class QueueFull(TryLater):
    code = "queue_full"
    http_status = 429
    default_message = "The queue is full: try again later."


class ClientLimit(TryLater):
    code = "client_limit"
    http_status = 429
    default_message = (
        "You have as many tasks waiting as the operator allows: try again when some have started."
    )


class TooManyRequests(TryLater):
    code = "too_many_requests"
    http_status = 429
    default_message = "You send more requests than the operator allows: try again later."


class KeepLimit(ServerError):
    code = "keep_limit"
    http_status = 409
    default_message = (
        "You keep as many pictures as the operator allows (--max-kept-pictures): download some "
        "and release them first."
    )


class InputsFull(TryLater):
    code = "inputs_full"
    http_status = 429
    default_message = (
        "The input images of waiting tasks fill the space that the operator allows "
        "(--input-bytes): try again when some of these tasks have ended."
    )


class InputsTooLarge(ServerError):
    code = "inputs_too_large"
    http_status = 507
    default_message = (
        "The input images of this task need more space than the operator allows (--input-bytes): "
        "send smaller ones."
    )


class TooManyListeners(TryLater):
    code = "too_many_listeners"
    http_status = 503
    default_message = (
        "Too many clients listen or wait on this server: try again later, or poll GET /status."
    )


class TooManyWaiting(TryLater):
    code = "too_many_waiting"
    http_status = 429
    default_message = "Too many requests wait on this server: try again later."


class TooManyTransfers(TryLater):
    code = "too_many_transfers"
    http_status = 503
    default_message = (
        "Other clients send or receive as much data as this server can hold in memory: try again "
        "later."
    )


class RequestTooSlow(ServerError):
    code = "request_timeout"
    http_status = 408
    default_message = "The request was sent too slowly: send it again."


class DoesNotFit(ServerError):
    code = "does_not_fit"
    http_status = 422
    default_message = (
        "An image of this size does not fit into this machine's memory: ask for a smaller one."
    )


class ModelNotAllowed(ServerError):
    code = "model_not_allowed"
    http_status = 422
    default_message = "This server does not allow this model: GET /models lists the allowed ones."


class NotSupported(ServerError):
    code = "not_supported"
    http_status = 422
    default_message = "The model does not support {field}."


class UnusableAdapter(ServerError):
    code = "unusable_adapter"
    http_status = 422
    default_message = "A LoRA is damaged, or does not fit the model."

    def __init__(self, message: str | None = None, *, field: str | None = "loras") -> None:
        super().__init__(message, field=field)


class KeyReused(ServerError):
    code = "idempotency_key_reused"
    http_status = 422
    default_message = (
        "This key was used before with a different request: use a new key for a new request."
    )


class Unauthorized(ServerError):
    code = "unauthorized"
    http_status = 401
    default_message = (
        "This server needs a key: send the header Authorization: Bearer KEY. The operator gives "
        "keys with server.py --new-key NAME."
    )


class NotPermitted(ServerError):
    code = "not_permitted"
    http_status = 403
    default_message = "The operator has not given this right to your key."


class OperatorOnly(ServerError):
    code = "operator_only"
    http_status = 403
    default_message = (
        "Only the operator may do this: send the header Authorization: Bearer with the key of "
        "--operator-key, or with one that is an operator's in the file of --keys."
    )


class UnknownModel(ServerError):
    code = "unknown_model"
    http_status = 404
    default_message = "mflux has no model of this name: GET /models lists all."


class StorageUnavailable(ServerError):
    code = "storage_unavailable"
    http_status = 503
    default_message = (
        "The server cannot store anything now: try again later. Accepted tasks are kept."
    )


class NoWorker(ServerError):
    code = "no_worker"
    http_status = 503
    default_message = (
        "The server accepts no tasks now: it is stopping, or its model failed to load."
    )


class BadOption(Exception):
    """An option of the server is invalid. The message names it."""


class StoreError(Exception):
    """The data dir cannot be used. The message is the reason, as one sentence."""


class LoadStopped(BaseException):
    """A load that nobody needs any more ends here. No error: what handles errors lets it pass."""


class ModelLoadError(Exception):
    """The model cannot be loaded. The message says what the operator can do, in one sentence."""

    code: ClassVar[str] = "model_load_failed"


class WeightsTooLarge(ModelLoadError):
    """The weights do not fit into memory."""


class StoredOtherwise(ModelLoadError):
    """The weights are stored with other bits than the load spec says."""


def without_folders(text: str) -> str:
    """Removes the folders of this machine from a message for clients. The log keeps them."""
    return re.sub(r"(?<![\w:/])~?(?:/[\w.@+~ -]+)+/([\w.@+~-]+)", r"\1", text)
