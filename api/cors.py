"""Lets pages of other origins use the server, as far as --cors-origins allows them.

No answer allows credentials: pages of other origins send a key in a header, and no cookies.
"""

from collections.abc import Iterable

from flask import Flask, Response, request

ALLOWED_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
EXPOSED_HEADERS = "Retry-After, Content-Disposition, Mcp-Session-Id"
"""Headers of answers that clients need, beside those that every page may read."""
MAX_AGE_S = 600


class Cors:
    """
    Args:
        origins: SCHEME://HOST[:PORT]; `*`: any; none: no page of another origin.
    """

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    def allows(self, origin: str | None) -> bool:
        return origin is not None and bool({"*", origin.lower()} & self._origins)

    def headers_for(self, origin: str | None) -> dict[str, str]:
        """Of an answer to a page of this origin; empty without --cors-origins."""
        if not self._origins:
            return {}
        if origin is None or not self.allows(origin):
            return {"Vary": "Origin"}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": EXPOSED_HEADERS,
        }

    def install(self, app: Flask) -> None:
        if not self._origins:
            return

        @app.before_request
        def answer_preflight() -> Response | None:
            if _is_preflight() and self.allows(_origin()):
                return Response(status=204)
            return None

        @app.after_request
        def add_headers(answer: Response) -> Response:
            headers = self.headers_for(_origin())
            answer.vary.add(headers.pop("Vary"))
            answer.headers.update(headers)
            if headers and _is_preflight():
                _add_preflight_headers(answer)
            return answer


def _add_preflight_headers(answer: Response) -> None:
    asked, headers = request.headers, answer.headers
    answer.vary.update(["Access-Control-Request-Method", "Access-Control-Request-Headers"])
    headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
    # By name: a wildcard would not cover Authorization.
    if names := asked.get("Access-Control-Request-Headers"):
        headers["Access-Control-Allow-Headers"] = names
    headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
    if asked.get("Access-Control-Request-Private-Network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"


def _is_preflight() -> bool:
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def _origin() -> str | None:
    return request.headers.get("Origin")
