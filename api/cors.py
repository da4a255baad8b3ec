"""Pages of other origins that the operator lets in (--cors-origins), as browsers ask for it."""

from collections.abc import Iterable

from flask import Flask, Response, request

ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
"""By name: a wildcard would not cover Authorization."""
ALLOWED_METHODS = "GET, POST, DELETE, OPTIONS"
TOLD_HEADERS = "Retry-After, Content-Disposition"
REMEMBER_S = 600


class Cors:
    """Args:
    origins: SCHEME://HOST[:PORT]; `*`: any.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    def allows(self, origin: str | None) -> bool:
        return origin is not None and bool({"*", origin.lower()} & self._origins)

    def install(self, app: Flask) -> None:
        if not self._origins:
            return

        @app.before_request
        def answer_preflight() -> Response | None:
            asked = request.headers.get("Access-Control-Request-Method")
            if request.method == "OPTIONS" and asked and self.allows(_origin()):
                return Response(status=204)
            return None

        @app.after_request
        def let_in(answer: Response) -> Response:
            answer.vary.add("Origin")
            origin = _origin()
            if not self.allows(origin):
                return answer
            headers = answer.headers
            headers["Access-Control-Allow-Origin"] = origin or ""
            headers["Access-Control-Expose-Headers"] = TOLD_HEADERS
            if request.method == "OPTIONS":
                headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
                headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
                headers["Access-Control-Max-Age"] = str(REMEMBER_S)
                if request.headers.get("Access-Control-Request-Private-Network") == "true":
                    headers["Access-Control-Allow-Private-Network"] = "true"
            return answer


def _origin() -> str | None:
    return request.headers.get("Origin")
