"""The page: the files of web/, which use the public API only. Nothing else knows of them."""

import gzip
import hashlib
from pathlib import Path

from flask import Blueprint, Response, abort, request

from api.identity import public

FOLDER = Path(__file__).parent.parent / "web"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/operator": "operator.html"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No inline code, no other hosts, no frames, and no text is parsed as HTML."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    # Requested again each time, which costs a few bytes: the files change with the server.
    "Cache-Control": "no-cache",
}


def page_routes() -> Blueprint:
    """PAGES, and each file of web/ by its name: read once, so that no path leads elsewhere."""
    routes = Blueprint("page", __name__)
    files = {
        path.name: path.read_bytes()
        for path in FOLDER.iterdir()
        if path.suffix in CONTENT_TYPES and path.is_file()
    }
    tags = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in files.items()}
    compressed = {name: gzip.compress(data, mtime=0) for name, data in files.items()}

    @routes.get("/", endpoint="home", defaults={"name": PAGES["/"]})
    @routes.get("/operator", endpoint="operator", defaults={"name": PAGES["/operator"]})
    @routes.get("/web/<name>", endpoint="file")
    @public
    def file(name: str) -> Response:
        if name not in files:
            abort(404)
        answer = Response(files[name], headers=HEADERS)
        if request.accept_encodings["gzip"]:
            answer.data = compressed[name]
            answer.headers["Content-Encoding"] = "gzip"
        answer.vary.add("Accept-Encoding")
        answer.content_type = CONTENT_TYPES[Path(name).suffix]
        answer.set_etag(f"{tags[name]}{answer.headers.get('Content-Encoding', '')}")
        answer.make_conditional(request.environ)
        return answer

    return routes
