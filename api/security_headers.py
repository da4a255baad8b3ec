"""Headers of every answer that tell browsers what they may do with it."""

from flask import Flask, Response

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""What the documentation page needs. It reads specifications of this server alone, whatever a link
asks it to show. The page at / sets a stricter policy."""


def install_security_headers(app: Flask) -> None:
    @app.after_request
    def add_headers(answer: Response) -> Response:
        headers = answer.headers
        if "Content-Security-Policy" not in headers:  # adding is faster than setdefault()
            headers.add("Content-Security-Policy", POLICY)
        if "Cache-Control" not in headers:
            headers.add("Cache-Control", "no-store")  # who asks decides about the answer
        headers.add("X-Content-Type-Options", "nosniff")
        headers.add("Referrer-Policy", "no-referrer")  # addresses hold ids of tasks
        # Chat clients show pictures by their address, on pages of other origins. Nothing else is
        # of use there: what is fetched with CORS is not affected by this header.
        is_picture = (answer.mimetype or "").startswith("image/")
        headers.add("Cross-Origin-Resource-Policy", "cross-origin" if is_picture else "same-origin")
        return answer
