"""Who sends a request: the client of its key, of its cookie, or of its address.

With --keys each request needs a key, except those to routes marked `public`. Without keys
everyone is trusted on a loopback address; on any other address clients are identified by an
unguessable id, so that they do not see or change each other's tasks.

A key comes as `Authorization: Bearer KEY`, as the password of `Authorization: Basic`, or as
`X-Api-Key`. A browser cannot send headers with a picture or an event stream: POST /session
exchanges the key for a cookie.
"""

import hashlib
import hmac
import secrets
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from flask import Flask, Response, current_app, g, request

import errors
from api.request_rate import RequestRates
from api.sign_in_attempts import SignInAttempts
from key_file import EVERYBODY, NOBODY, Client, KeyFile
from task import BY_ADDRESS, BY_ID

View = TypeVar("View", bound=Callable[..., Any])

COOKIE_S = 400 * 24 * 3600
"""Browsers keep no cookie longer."""
SHORTEST_ID = 16
"""Characters of an id that a client chooses."""
LONGEST_ID = 128
LIMITS = ("max_waiting", "max_wait_seconds", "max_requests_per_s")
OPERATOR = "operator key"
"""Name of the client with the key of --operator-key. No client of a file of keys has it."""


def public(view: View) -> View:
    """Mark a view that needs no key."""
    view.is_public = True  # type: ignore[attr-defined]
    return view


def client() -> Client:
    """Who sends the present request."""
    return cast(Client, g.client)


def revoked_check() -> Callable[[], bool]:
    """A function that says, also later, whether the client of the present request has lost its
    key, or its rights as operator."""
    return partial(cast(Identity, g.identity).has_revoked, client())


def check_operator() -> None:
    """Raises: OperatorOnly: the present request is not the operator's."""
    if not client().operator:
        raise errors.OperatorOnly


class Identity:
    """Args:
    keys: of --keys; None: there are no keys.
    trusted: whether everyone is trusted where there are no keys.
    operator_key: of --operator-key: also makes a client the operator; empty: none does.
    secret: random bytes of this data dir, which sign cookies.
    port: part of the names of cookies, which servers on one host share otherwise.
    limits: of each client that has none of its own and is neither an operator nor everybody.
    """

    def __init__(
        self,
        keys: KeyFile | None,
        *,
        trusted: bool,
        operator_key: str = "",
        secret: bytes = b"",
        port: int = 0,
        limits: Client = NOBODY,
    ) -> None:
        self._public_endpoints: set[str] = set()
        self._keys = keys
        self._trusted = trusted
        self._operator_key = operator_key.encode()
        self._secret = secret
        self._everybody = EVERYBODY.model_copy(update={"operator": not operator_key})
        self._limits = {name: limit for name in LIMITS if (limit := getattr(limits, name))}
        self.requests = RequestRates()
        self.attempts = SignInAttempts()
        self.session_cookie = f"mflux_session_{port}"
        self.id_cookie = f"mflux_client_{port}"

    def install(self, app: Flask) -> None:
        """Identify each request before its view is called."""

        @app.before_request
        def identify() -> None:
            if request.endpoint is None or request.method == "OPTIONS":
                return
            view = current_app.view_functions[request.endpoint]
            found = self.identify()
            needs_key = not (
                getattr(view, "is_public", False) or request.endpoint in self._public_endpoints
            )
            if found is None and needs_key:
                raise errors.Unauthorized
            g.identity, g.client = self, self._limited(found) if found else NOBODY
            if needs_key:
                self.requests.note(client())

        @app.after_request
        def give_id(answer: Response) -> Response:
            if answer.status_code < 400 and self._gives_id():
                answer.headers["Cache-Control"] = "no-store"
                self._set_cookie(answer, self.id_cookie, secrets.token_urlsafe(24))
            return answer

    def publish(self, app: Flask, *prefixes: str) -> None:
        """Let anybody call the views of a library, by the beginning of their endpoints."""
        self._public_endpoints = {name for name in app.view_functions if name.startswith(prefixes)}

    def identify(self) -> Client | None:
        """The client of the present request; None: it has no valid key, and needs one.

        Raises:
            Unauthorized: a key was sent and is wrong.
            TooManyRequests: this address has sent too many wrong ones.
        """
        if self._trusted and self._keys is None and not self._operator_key:
            return self._everybody
        key = _sent_key()
        if key and self._is_operator(key):
            name = "" if self._trusted and self._keys is None else OPERATOR
            return Client(name=name, may_prioritize=True, operator=True)
        if self._keys is not None:
            return self._of_key(self._keys, key)
        if self._trusted:
            return self._everybody
        return Client(name=self._anonymous_name())

    @property
    def trusts_everyone(self) -> bool:
        return self._trusted and self._keys is None

    @property
    def known_clients(self) -> list[Client]:
        """Those of the file of --keys."""
        return self._keys.clients if self._keys else []

    def client_of(self, key: str) -> Client:
        """The client with a key that the present request has sent.

        Raises:
            Unauthorized: the key is wrong.
            TooManyRequests: this address has sent too many wrong ones.
        """
        self.attempts.check(request.remote_addr, key)
        found = self._keys.client(key) if self._keys else None
        self.attempts.note(request.remote_addr, key, right=found is not None)
        if found is None:
            raise errors.Unauthorized
        return found

    def named(self, name: str) -> Client | None:
        """The client of this name in the file of --keys."""
        return self._keys.named(name) if self._keys else None

    def has_revoked(self, client: Client) -> bool:
        """Whether this client of an earlier request has lost its key, or its rights as operator."""
        if self._keys is None or not client.key_hash:
            return False
        now = self._keys.named(client.name)
        return now is None or now.key_hash != client.key_hash or client.operator > now.operator

    def sign_in(self, client: Client, answer: Response) -> None:
        """Give the browser a cookie that stands for the key of this client."""
        self._set_cookie(answer, self.session_cookie, f"{client.name}:{self._signature(client)}")

    def sign(self, text: str) -> str:
        """What only this data dir can make of a text, hexadecimal. The text begins with its kind,
        so that a signature of one kind is none of another."""
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def sign_out(self, answer: Response) -> None:
        answer.delete_cookie(self.session_cookie)

    # -- inside -----------------------------------------------------------------------------------

    def _limited(self, client: Client) -> Client:
        """With the usual limits in place of those that it has not."""
        if client.operator or not client.name or not self._limits:
            return client
        absent = {name: usual for name, usual in self._limits.items() if not getattr(client, name)}
        return client.model_copy(update=absent)

    def _is_operator(self, key: str) -> bool:
        """Where there is no file of keys, clients may send any key: none is refused, but after too
        many wrong ones this key is none, either."""
        address = request.remote_addr
        if not self._operator_key or self.attempts.wait_s(address, key):
            return False
        right = hmac.compare_digest(_raw(key), self._operator_key)
        if right or self._keys is None:
            self.attempts.note(address, key, right=right)
        return right

    def _of_key(self, keys: KeyFile, key: str | None) -> Client | None:
        if key is not None:
            return self.client_of(key)
        name, _, signature = request.cookies.get(self.session_cookie, "").partition(":")
        found = keys.named(name) if name else None
        if found and hmac.compare_digest(_raw(signature), self._signature(found).encode()):
            return found
        return None

    def _signature(self, client: Client) -> str:
        """Of a session: changes with the key of the client, so that a new key ends it."""
        return self.sign(f"session\0{client.name}\0{client.key_hash}")

    def _anonymous_name(self) -> str:
        """Not the id itself, which is a secret of its client."""
        sent = request.headers.get("X-Client-Id")
        if sent is not None and not SHORTEST_ID <= len(sent) <= LONGEST_ID:
            raise errors.InvalidInput(
                f"X-Client-Id must have {SHORTEST_ID} to {LONGEST_ID} characters that nobody can "
                "guess.",
                field="X-Client-Id",
            )
        own_id = sent or request.cookies.get(self.id_cookie)
        if own_id and SHORTEST_ID <= len(own_id) <= LONGEST_ID:
            return BY_ID + hashlib.sha256(_raw(own_id)).hexdigest()[:16]
        return f"{BY_ADDRESS}{request.remote_addr}"

    def _gives_id(self) -> bool:
        """A browser that opens a page gets an id; programs send X-Client-Id or get none."""
        return (
            self._keys is None
            and not self._trusted
            and request.method == "GET"
            and "text/html" in request.headers.get("Accept", "")
            and "X-Client-Id" not in request.headers
            and len(request.cookies.get(self.id_cookie, "")) < SHORTEST_ID
        )

    def _set_cookie(self, answer: Response, name: str, value: str) -> None:
        answer.set_cookie(
            name,
            value,
            max_age=COOKIE_S,
            httponly=True,
            samesite="Lax",
            secure=request.is_secure,
        )


def _sent_key() -> str | None:
    """The key in the headers of the present request."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return _decoded(value.strip())
    if scheme.lower() == "basic":
        try:
            return b64decode(value).decode("utf-8", "replace").partition(":")[2]
        except ValueError:
            return ""
    sent = request.headers.get("X-Api-Key")
    return None if sent is None else _decoded(sent)


def _decoded(header: str) -> str:
    """WSGI hands on the bytes of a header as Latin-1."""
    return header.encode("latin-1").decode("utf-8", "replace")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
