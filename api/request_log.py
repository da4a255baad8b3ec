"""What is noted about each request: its seconds, for Prometheus, and a line of the log at the level
debug."""

import logging
import time

from flask import Flask, Response, g, request
from prometheus_client import Counter, Histogram

log = logging.getLogger("mflux-server.requests")

BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)
"""Seconds."""
NO_ROUTE = ("other", "other")
"""Of requests that no route answers: paths and methods that clients may choose."""


class RequestLog:
    """The labels are the methods and paths of routes, without values, and not those of requests."""

    def __init__(self) -> None:
        self.seconds = Histogram(
            "mflux_http_request_seconds",
            "Seconds until the headers of the answer were ready. Streams go on after them.",
            ("method", "route"),
            buckets=BUCKETS,
            registry=None,
        )
        self.answers = Counter(
            "mflux_http_answers",
            "Answers by the class of their status.",
            ("method", "route", "status"),
            registry=None,
        )

    def install(self, app: Flask) -> None:
        @app.before_request
        def begin() -> None:
            g.began_at = time.perf_counter()

        @app.after_request
        def note(answer: Response) -> Response:
            seconds = time.perf_counter() - g.get("began_at", time.perf_counter())
            method, route = _route()
            self.seconds.labels(method, route).observe(seconds)
            self.answers.labels(method, route, f"{answer.status_code // 100}xx").inc()
            if log.isEnabledFor(logging.DEBUG):
                _log_line(answer, seconds)
            return answer


def _route() -> tuple[str, str]:
    """Method and path of the route. A route under /api is the same as the one without it."""
    rule = request.url_rule
    if rule is None:
        return NO_ROUTE
    return request.method, rule.rule.removeprefix("/api") or "/"


def _log_line(answer: Response, seconds: float) -> None:
    """Without the query, which may contain a prompt or the secret of a link."""
    client = g.get("client")
    log.debug(
        "%s %s %d %.4f s",
        request.method,
        request.path,
        answer.status_code,
        seconds,
        extra={
            "method": request.method,
            "path": request.path,
            "status": answer.status_code,
            "seconds": round(seconds, 4),
            "client": client.name if client else "",
            "address": request.remote_addr,
        },
    )
