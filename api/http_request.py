"""Requests as they come in, and their answers: what waitress leaves unbounded or gets wrong."""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import BadRequest, Error

import errors
from api.answers import ErrorAnswer, ErrorBody
from api.transfer_budget import Pace, TransferBudget

FREE_BYTES = 16_384
"""So much of each body and answer is not counted, so that small requests always pass."""
MOST_CHUNK_LINE_BYTES = 1_024
MOST_TRAILER_BYTES = 8_192
CHUNKED_READ_BYTES = 4_096
"""waitress copies what is left of its input for every chunk, so it gets no more at a time."""
FREE_FRAMING_BYTES = 100_000
MOST_FRAMING_RATIO = 8
"""What is between the chunks of a body may be one part in so many of it, plus
FREE_FRAMING_BYTES: a million chunks of one byte would take the loop seconds."""
TLS_RECORD = b"\x16\x03"
RETRY_AFTER_S = 5
ORIGIN = re.compile(rb"^Origin:[ \t]*(\S+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


class Refused(Error):  # type: ignore[misc]
    """Ends a request that has not come in completely."""

    def __init__(self, error: errors.ServerError) -> None:
        super().__init__(error.message)
        self.code = error.http_status
        self.reason = error.code.replace("_", " ").capitalize()
        self.problem = error.problem


class Request(HTTPRequestParser):  # type: ignore[misc]
    """One request. It is filled on the loop's thread, read and closed on an HTTP thread."""

    error: Error | None
    body_rcv: FixedStreamReceiver | ChunkedReceiver | None
    completed: bool
    header_plus: bytes
    """What has come of the head, until it is complete."""

    def __init__(self, budget: TransferBudget, adj: Adjustments) -> None:
        super().__init__(adj)
        self.pace = Pace()
        self._budget = budget
        self._held = 0

    @property
    def origin(self) -> str | None:
        """The page that sends it, also while its head is incomplete, or if it is too long."""
        if "ORIGIN" in self.headers:
            return str(self.headers["ORIGIN"])
        found = ORIGIN.search(self.header_plus)
        return found[1].decode("latin-1") if found else None

    @property
    def received_bytes(self) -> int:
        return int(self.header_bytes_received + self.body_bytes_received)

    @property
    def held_bytes(self) -> int:
        """Bytes of the body that count against the budget."""
        return self._held

    def received(self, data: bytes) -> int:
        if isinstance(self.body_rcv, ChunkedReceiver):
            data = data[:CHUNKED_READ_BYTES]
        elif not self.header_plus and self.body_rcv is None and data.startswith(TLS_RECORD):
            self.error = BadRequest("This server speaks http, and not https.")
            self.completed = True
            return len(data)
        head_so_far = self.header_plus
        consumed: int = super().received(data)
        if self.completed and not self.headers_finished:  # the head is too long
            self.header_plus = head_so_far + data
        if self.error is None and self.body_rcv is not None:
            self._check_body(self.body_rcv)
        if self.completed:
            self.expect_continue = False  # there is nothing that the client should go on with
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # such as an address with half a bracket
            raise ParsingError("The request line or a header is malformed.") from error
        # Two lengths for one body: which one counts is where request smuggling begins.
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Transfer-Encoding and Content-Length exclude each other.")
        if "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("Transfer-Encoding needs HTTP/1.1.")

    def get_body_stream(self) -> "BodyReader":
        return BodyReader(self, super().get_body_stream())

    def close(self) -> None:
        super().close()
        self._budget.give_back(self._held)
        self._held = 0

    def refuse(self, error: errors.ServerError) -> None:
        self.error = Refused(error)
        self.completed = True
        self.close()

    def _check_body(self, receiver: FixedStreamReceiver | ChunkedReceiver) -> None:
        if isinstance(receiver, ChunkedReceiver) and (
            len(receiver.control_line) > MOST_CHUNK_LINE_BYTES
            or len(receiver.trailer) > MOST_TRAILER_BYTES
        ):
            self.error, self.completed = BadRequest("A line between two chunks is too long."), True
            return
        framing_bytes = self.body_bytes_received - len(receiver)
        if framing_bytes > FREE_FRAMING_BYTES + len(receiver) // MOST_FRAMING_RATIO:
            self.error, self.completed = BadRequest("The chunks of the body are too small."), True
            return
        more = len(receiver) - FREE_BYTES - self._held
        if more > 0 and self._budget.take_for_body(more):
            self._held += more
        elif more > 0:
            self.refuse(errors.TooManyTransfers(retry_after_s=RETRY_AFTER_S))


class BodyReader:
    """`wsgi.input`: gives the memory of a body back once it was read, however long its answer
    takes."""

    def __init__(self, request: Request, file: IO[bytes]) -> None:
        self._request, self._file = request, file
        self._left = len(request.body_rcv) if request.body_rcv is not None else 0

    def read(self, size: int = -1) -> bytes:
        return self._took(self._file.read(size)) if self._left else b""

    def readline(self, size: int = -1) -> bytes:
        return self._took(self._file.readline(size)) if self._left else b""

    def readlines(self, hint: int = -1) -> list[bytes]:
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _took(self, data: bytes) -> bytes:
        self._left -= len(data)
        if not self._left:
            self._request.close()
        return data


class NoRoomForAnswer(Exception):
    """More answers wait in memory for clients to read them than the server holds."""


class AnswerTask(WSGITask):  # type: ignore[misc]
    """An answer of the application."""

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["mflux.client_half_closed"] = lambda: self.channel.half_closed
        return environ

    def write(self, data: bytes) -> None:
        if self.wrote_header or not data:
            super().write(data)
            return
        if not self.channel.reserve(self.content_length or 0):
            raise NoRoomForAnswer
        if len(data) > FREE_BYTES:  # it would be copied
            super().write(data)
            return
        with self.channel.together():
            super().write(data)

    def execute(self) -> None:
        try:
            super().execute()
        except NoRoomForAnswer:
            error = errors.TooManyTransfers(retry_after_s=RETRY_AFTER_S)
            self.request.error = Refused(error)
            ErrorAnswerTask(self.channel, self.request).service()
            self.wrote_header = self.close_on_finish = True


class ErrorAnswerTask(ErrorTask):  # type: ignore[misc]
    """What is refused before the application sees it, answered as JSON like the rest."""

    def execute(self) -> None:
        problem = self._problem()
        origin = getattr(self.request, "origin", None)
        self.response_headers += self.channel.server.cors.headers_for(origin).items()
        if foreign := self.channel.server.error_form(getattr(self.request, "path", ""), problem):
            body = json.dumps(foreign[0])
        else:
            body = ErrorAnswer(
                error=ErrorBody(code=problem.code, message=problem.message)
            ).as_json()
        self.status = f"{problem.http_status} {self.request.error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.response_headers.append(("Connection", "close"))
        if problem.retry_after_s is not None:
            self.response_headers.append(("Retry-After", str(problem.retry_after_s)))
        self.content_length = len(body)
        self.close_on_finish = True
        self.channel.lingers = True
        self.write(body.encode())

    def _problem(self) -> errors.Problem:
        error: Any = self.request.error
        if isinstance(error, Refused):
            return error.problem
        if error.code == errors.BodyTooLarge.http_status:
            return errors.BodyTooLarge().problem
        return errors.Problem(error.code, error.reason.lower().replace(" ", "_"), error.body)
