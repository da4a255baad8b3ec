"""The page: the files of web/, which use the public API only. Nothing else knows of them."""

import gzip
import hashlib
from functools import cache
from pathlib import Path

from flask import Blueprint, Response, abort, request

from api.identity import public
from api.page_languages import COOKIE, Languages

FOLDER = Path(__file__).parent.parent / "web"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
TAG_LENGTH = 16
PAGES = {"/": "index.html", "/operator": "operator.html"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No inline code, no other hosts, no frames, and no text is parsed as HTML."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    # Requested again each time, which costs a few bytes: the files change with the server.
    "Cache-Control": "no-cache",
}
NEVER_CHANGES = "public, max-age=31536000, immutable"
"""Of a file below the path of its version: a browser that has it does not request it again."""


def page_routes() -> Blueprint:
    """PAGES in each language, and each file of web/ by its name: read once, so that no path leads
    elsewhere."""
    routes = Blueprint("page", __name__)
    languages = Languages(FOLDER / "languages")
    files, pages, version = read_files()

    @routes.get("/", endpoint="home", defaults={"name": PAGES["/"]})
    @routes.get("/operator", endpoint="operator", defaults={"name": PAGES["/operator"]})
    @public
    def page(name: str) -> Response:
        chosen = languages.chosen(request.cookies.get(COOKIE), request.accept_languages)
        answer = pages[name, chosen].answer()
        answer.content_language.add(chosen)
        answer.vary.update(["Cookie", "Accept-Language"])
        return answer

    @routes.get("/web/<name>", endpoint="file")
    @public
    def file(name: str) -> Response:
        if name not in files:
            abort(404)
        return files[name].answer()

    @routes.get("/web/<wanted>/<name>", endpoint="file_of_version")
    @public
    def file_of_version(wanted: str, name: str) -> Response:
        """A page that was opened before an update of the server names the version before."""
        answer = file(name)
        if wanted == version:
            answer.headers["Cache-Control"] = NEVER_CHANGES
        return answer

    return routes


@cache
def read_files() -> tuple[dict[str, "_File"], dict[tuple[str, str], "_File"], str]:
    """Returns the files of web/ by name, the pages by name and language, and the version of the
    files: another one if any of them has changed."""
    files = {
        path.name: _File(path.read_bytes(), path.suffix)
        for path in FOLDER.iterdir()
        if path.suffix in CONTENT_TYPES and path.suffix != ".html" and path.is_file()
    }
    tags = "".join(name + files[name].tag for name in sorted(files))
    version = hashlib.sha256(tags.encode()).hexdigest()[:TAG_LENGTH]
    languages = Languages(FOLDER / "languages")
    pages = {
        (name, language): _File(
            languages.filled(FOLDER / name, language, version).encode(), ".html"
        )
        for name in PAGES.values()
        for language in languages
    }
    return files, pages, version


class _File:
    def __init__(self, data: bytes, suffix: str) -> None:
        self._data, self._type = data, CONTENT_TYPES[suffix]
        self._compressed = gzip.compress(data, mtime=0)
        self.tag = hashlib.sha256(data).hexdigest()[:TAG_LENGTH]

    def answer(self) -> Response:
        """Returns the answer to the present request."""
        answer = Response(self._data, headers=HEADERS)
        if request.accept_encodings["gzip"]:
            answer.data = self._compressed
            answer.headers["Content-Encoding"] = "gzip"
        answer.vary.add("Accept-Encoding")
        answer.content_type = self._type
        answer.set_etag(f"{self.tag}{answer.headers.get('Content-Encoding', '')}")
        answer.make_conditional(request.environ)
        return answer
