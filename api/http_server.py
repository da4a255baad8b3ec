"""The HTTP server under the application: waitress, with a limited number of connections."""

import logging
import resource
import socket
import time
from collections.abc import Callable
from functools import partial

from flask import Flask
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher

import errors
from api.cors import Cors
from api.http_channel import Channel
from api.http_loop import HttpLoop
from api.transfer_budget import TransferBudget, budget_for
from supervision import SupervisedThread

log = logging.getLogger(__name__)

BACKLOG = 1024
MOST_ACCEPTED = 64
"""Connections in one turn of the loop."""
MOST_CONNECTIONS = 5000
FILES_FOR_THE_REST = 100
THREADS_FOR_THE_REST = 32
"""Threads that no request may hold for long; half of all threads if there are less than 64."""
RECV_BYTES = 65_536
MOST_HEADER_BYTES = 65_536
NO_LIMIT = 2**62

ErrorForm = Callable[[str, errors.Problem], tuple[object, int, dict[str, str]] | None]
"""From a path and an error there to body, status and headers."""


class HttpServer:
    """Owns the port and the threads that answer; requests are answered after start()."""

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
        cors: Cors | None = None,
        budget: TransferBudget | None = None,
    ) -> None:
        """Binds the port.

        Args:
            error_form: how an error on this path is answered; None: as JSON like the native API's.
            cors: headers for pages of other origins, also of what is refused before the
                application sees it.
            port: 0: any that is free.
            connections: most at a time.
            budget: for bodies and answers in memory; None: several bodies of the largest size.

        Raises:
            OSError: the port cannot be had.
        """
        listening = _listen(host, port)
        self._dispatcher = _Dispatcher(threads)
        adjustments = Adjustments(
            sockets=[listening],
            inbuf_overflow=NO_LIMIT,  # the budget limits what is in memory
            outbuf_high_watermark=NO_LIMIT,
            recv_bytes=RECV_BYTES,
            backlog=BACKLOG,
            max_request_header_size=MOST_HEADER_BYTES,
            max_request_body_size=max_body_bytes,
            ident="mflux-server",
        )
        self._server = _Server(
            app,
            listening,
            self._dispatcher,
            adjustments,
            connections=connections,
            budget=budget or budget_for(max_body_bytes),
            error_form=error_form,
            cors=cors or Cors(),
        )
        self._thread = SupervisedThread("http", self._server.loop.run)

    @property
    def port(self) -> int:
        return int(self._server.effective_port)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Close the port; what is being answered gets so many seconds."""
        self._thread.let_end()
        self._dispatcher.shutdown(timeout=timeout_s)
        self._server.loop.end()
        if self._thread.is_alive():
            self._thread.join(timeout_s)


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
    return min(max(threads - THREADS_FOR_THE_REST, threads // 2), connections // 2)


def _listen(host: str, port: int) -> socket.socket:
    """One socket. No host, `*` and `::` mean every address of this machine, IPv4 and IPv6; a name
    that has both means its IPv4 address.

    Raises:
        OSError: the host has no address here, or the port is in use.
    """
    if host in ("", "*", "::"):
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
            )
        host = "::" if host == "::" else "0.0.0.0"
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


class _Dispatcher(ThreadedTaskDispatcher):  # type: ignore[misc]
    """waitress' threads that answer requests, supervised. A thread is started when a request finds
    all others busy: hundreds that never have work take a fifth of a second at each start.

    Args:
        most: threads at a time.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def add_task(self, task: object) -> None:
        with self.lock:
            self.queue.append(task)
            idle = len(self.threads) - self.stop_count - self.active_count
            if len(self.queue) > idle:
                self._start_another()
            self.queue_cv.notify()

    def _start_another(self) -> None:
        """Call it under the lock."""
        number = len(self.threads)  # none ends before the server does
        if number >= self._most:
            return
        try:
            self.start_new_thread(self.handler_thread, number)
        except RuntimeError as error:  # the system has no more: the request waits for a thread
            if not number:
                raise
            log.warning("no further thread can be started: %s", error)
            return
        self.threads.add(number)
        self.active_count += 1

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5.0) -> bool:
        with self.lock:
            self._most = 0
        return bool(super().shutdown(cancel_pending, timeout))

    def start_new_thread(self, target: Callable[[int], None], thread_no: int) -> None:
        SupervisedThread(f"waitress-{thread_no}", partial(target, thread_no)).start()


class _Server(TcpWSGIServer):  # type: ignore[misc]
    """The listening socket. Its connections find here what they share."""

    def __init__(
        self,
        app: Flask,
        listening: socket.socket,
        dispatcher: ThreadedTaskDispatcher,
        adjustments: Adjustments,
        *,
        connections: int,
        budget: TransferBudget,
        error_form: ErrorForm,
        cors: Cors,
    ) -> None:
        self.loop = HttpLoop(self.maintenance)
        self.budget = budget
        self.error_form = error_form
        self.cors = cors
        self._connections = connections
        self._paused = False
        """Until the next check, because there was no room for a connection."""
        super().__init__(
            app,
            map=self.loop.sockets,
            _sock=listening,
            dispatcher=dispatcher,
            adj=adjustments,
            sockinfo=(listening.family, listening.type, listening.proto, listening.getsockname()),
            bind_socket=False,
        )

    def readable(self) -> bool:
        return bool(self.accepting) and not self._paused

    def handle_accept(self) -> None:
        """All connections that have come, some at a time: one for each turn of a busy loop would
        let new clients wait for seconds."""
        for number in range(MOST_ACCEPTED):
            if not self._accept(surely_waits=number == 0):
                break

    def _accept(self, surely_waits: bool) -> bool:
        """A new connection; where there are too many, the one that has been without a request for
        longest makes room. Where all of them are busy, it waits until the next check.

        Returns:
            Whether there may be more.
        """
        if len(self.active_channels) >= self._connections:
            if not surely_waits:
                return False
            if not self._make_room():
                self._paused = True
                return False
        connection = None
        try:
            connection, address = self.socket.accept()
            self.set_socket_options(connection)
            Channel(self, connection, self.fix_addr(address), self.adj, map=self._map)
        except BlockingIOError:
            return False
        except ConnectionAbortedError:
            pass
        except OSError as error:
            if connection is not None:  # its client has closed it already
                connection.close()
                return True
            # Without free files the system says this even when no connection waits.
            if surely_waits and not self._make_room():
                log.warning("no connections are accepted for the moment: %s", error)
                self._paused = True
            return False
        return True

    def _make_room(self) -> bool:
        """Whether a connection was found that could be closed."""
        waiting = [
            (channel.waits_since, number)
            for number, channel in self.active_channels.items()
            if channel.waits_since is not None
        ]
        if waiting:
            self.active_channels[min(waiting)[1]].handle_close()
        return bool(waiting)

    def handle_error(self) -> None:
        log.exception("a connection could not be accepted")

    def pull_trigger(self) -> None:
        """waitress' connections wake the loop by this; ours tell it which of them changed."""

    def fix_addr(self, addr: tuple[str, int]) -> tuple[str, int]:
        """IPv4 clients of a socket that takes both have IPv4 addresses."""
        return addr[0].removeprefix("::ffff:"), addr[1]

    def maintenance(self, now: float = 0.0) -> None:
        for channel in list(self.active_channels.values()):
            channel.check(time.monotonic())
        self._paused = False
        self.loop.changed(self)
