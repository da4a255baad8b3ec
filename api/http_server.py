"""The HTTP server under the application: waitress, its connections, and what it refuses itself."""

import json
import resource
import socket
from collections.abc import Callable
from threading import Thread

from flask import Flask
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask

import errors
from api.answers import ErrorAnswer, ErrorBody

BACKLOG = 1024
MOST_CONNECTIONS = 5000
FILES_FOR_THE_REST = 100
THREADS_FOR_THE_REST = 32
"""Threads that nobody may hold for long."""
MOST_UNREAD_BYTES = 1_000_000
"""A client that leaves more of its answer unread while more comes counts as gone."""

ErrorForm = Callable[[str, errors.Problem], tuple[object, int, dict[str, str]] | None]
"""From a path and an error there to body, status and headers."""


class HttpServer:
    """Owns the port and the threads that answer; nobody is answered before start()."""

    def __init__(
        self,
        app: Flask,
        host: str,
        port: int,
        *,
        threads: int,
        connections: int,
        max_body_bytes: int,
        error_form: ErrorForm = lambda path, problem: None,
    ) -> None:
        """Binds the port.

        Args:
            error_form: how an error on this path is told; None: as JSON like the native API's.
            port: 0: any that is free.
            connections: most at a time, without those whose request waits for long.

        Raises:
            OSError: the port cannot be had.
        """
        self._waitress = create_server(
            app,
            sockets=[_listen(host, port)],
            threads=threads,
            connection_limit=connections,  # it does not count those that are parked
            outbuf_high_watermark=2**30,  # else a reader that stalls holds a thread
            backlog=BACKLOG,
            asyncore_use_poll=True,
            max_request_body_size=max_body_bytes,
            ident="mflux-server",
        )
        self._waitress.channel_class = _Channel
        self._waitress.error_form = error_form
        self._thread = Thread(target=self._waitress.run, name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._waitress.effective_port)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Close the port; what is being answered gets so many seconds."""
        self._waitress.task_dispatcher.shutdown(timeout=timeout_s)
        self._waitress.close()


def most_connections() -> int:
    """As many as the limit of open files allows, which is raised first: without files left, no
    server accepts or answers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + FILES_FOR_THE_REST
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(min(MOST_CONNECTIONS, soft - FILES_FOR_THE_REST), 20)


def most_waiting(threads: int, connections: int) -> int:
    """How many requests may hold a thread for long at a time."""
    return min(max(threads - THREADS_FOR_THE_REST, 1), connections // 2)


def _listen(host: str, port: int) -> socket.socket:
    """One socket, IPv4 where the host has both.

    Raises:
        OSError: the host has no address here, or the port is in use.
    """
    found = socket.getaddrinfo(
        None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress refuses before the application sees it, answered as JSON like the rest."""

    def execute(self) -> None:
        error = self.request.error
        code, message = error.reason.lower().replace(" ", "_"), error.body
        if error.code == errors.BodyTooLarge.http_status:
            code, message = errors.BodyTooLarge.code, errors.BodyTooLarge.default_message
        problem = errors.Problem(error.code, code, message)
        if told := self.channel.server.error_form(getattr(self.request, "path", ""), problem):
            body = json.dumps(told[0])
        else:
            body = ErrorAnswer(error=ErrorBody(code=code, message=message)).as_json()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.response_headers.append(("Connection", "close"))
        self.content_length = len(body)
        self.close_on_finish = True
        self.write(body.encode())


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection. Waitress's loop goes over all of them each time anything happens, so one whose
    request waits for long is taken out of it ("parked"): 200 listeners would halve /status."""

    error_task_class = _JsonErrorTask
    parked = False

    def check_client_disconnected(self) -> bool:
        """Whether nobody waits for the rest of an answer; asked by who holds a thread for long.

        Waitress itself looks only where it reads ahead, and would then leave a client without its
        answer that has closed its own half of the connection.
        """
        if not (self.parked or self.total_outbufs_len):
            self.parked = True
            self._map.pop(self._fileno, None)
        if not self.connected or self.total_outbufs_len > MOST_UNREAD_BYTES:
            return True
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def write_soon(self, data: bytes) -> int:
        written: int = super().write_soon(data)
        if self.total_outbufs_len or self.will_close:
            self._unpark()
        return written

    def service(self) -> None:
        super().service()
        self._unpark()

    def _unpark(self) -> None:
        fileno = self._fileno
        if self.parked and fileno is not None:
            self.parked = False
            self._map[fileno] = self
            self.server.pull_trigger()
