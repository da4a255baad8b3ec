"""Links that sign a browser in without its user typing a key: --lan shows one as a QR code.

A link holds no key. It is signed with the secret of the data dir, works for an hour, in as many
browsers as open it, and no longer than the key of its client is valid.
"""

import hmac
import time
from collections.abc import Callable
from urllib.parse import urlencode

from flask import Blueprint, Response, request

import errors
from api.identity import Identity, public
from api.query_values import text_value
from key_file import Client

LINK_S = 3600
PATH = "/pair"


def link_to(identity: Identity, base_url: str, client: Client, now: float) -> str:
    """A link that signs a browser in as this client.

    Args:
        base_url: under which the browser reaches this server.
        now: unix seconds.
    """
    expires = int(now) + LINK_S
    query = {
        "name": client.name,
        "expires": expires,
        "signature": _proof(identity, client, expires),
    }
    return f"{base_url.rstrip('/')}{PATH}?{urlencode(query)}"


def pairing_routes(identity: Identity, now: Callable[[], float] = time.time) -> Blueprint:
    routes = Blueprint("pairing", __name__)

    @routes.get(PATH)
    @public
    def pair() -> Response:
        answer = Response(status=303, headers={"Location": f"{request.script_root}/"})
        identity.sign_in(_client_of_link(identity, now()), answer)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return routes


def _client_of_link(identity: Identity, now: float) -> Client:
    """Raises: Unauthorized: the link of the present request is not valid."""
    name, expires = text_value("name"), text_value("expires")
    client = identity.named(name)
    if client and len(expires) <= 20 and expires.isascii() and expires.isdigit():
        proof = _proof(identity, client, int(expires)).encode()
        given = text_value("signature").encode("utf-8", "surrogatepass")
        if hmac.compare_digest(proof, given) and now < int(expires):
            return client
    raise errors.Unauthorized(
        "This link is not valid, or not any more: get a new one with --pair NAME, or restart the "
        "server."
    )


def _proof(identity: Identity, client: Client, expires: int) -> str:
    return identity.sign(f"pair\0{client.name}\0{client.key_hash}\0{expires}")
