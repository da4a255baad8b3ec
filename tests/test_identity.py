"""Who sends a request: by key, by cookie, by address."""

from base64 import b64encode
from pathlib import Path

import pytest
from flask import Flask, Response, jsonify
from flask.testing import FlaskClient

import errors
from api.identity import Identity, client, public
from api.sign_in_attempts import EVERY_S, MOST_AT_ONCE
from key_file import KeyFile

KEYS = {"alice": "alice-0123456789", "bob": "bob-0123456789-ö", "root": "root-0123456789abc"}


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    path = tmp_path / "keys.toml"
    tables = [
        f'[{name}]\nkey = "{key}"\noperator = {str(name == "root").lower()}\n'
        for name, key in KEYS.items()
    ]
    path.write_text("".join(tables))
    return KeyFile(path, clock=lambda: 0.0)


def app_of(identity: Identity) -> FlaskClient:
    """An application whose / answers who asks; /open needs no key; /sign-in gives a cookie."""
    app = Flask(__name__)
    identity.install(app)

    @app.get("/")
    def whoami() -> Response:
        return jsonify(client().model_dump())

    @app.get("/open")
    @public
    def unlocked() -> Response:
        return jsonify(client().name)

    @app.get("/sign-in/<name>")
    @public
    def sign_in(name: str) -> Response:
        answer = jsonify({})
        identity.sign_in(identity.client_of(KEYS.get(name, name)), answer)
        return answer

    @app.get("/sign-out")
    @public
    def sign_out() -> Response:
        answer = jsonify({})
        identity.sign_out(answer)
        return answer

    @app.errorhandler(errors.ServerError)
    def refused(error: errors.ServerError) -> tuple[str, int]:
        return error.code, error.http_status

    return app.test_client()


def name_of(http: FlaskClient, **headers: str) -> str | int:
    """Name of the client that these headers make; the status where they make none."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = http.get("/", headers=named)
    return str(answer.get_json()["name"]) if answer.status_code == 200 else answer.status_code


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("name", KEYS)
def test_a_key_comes_in_three_headers(keys: KeyFile, name: str) -> None:
    http = app_of(Identity(keys, trusted=True))
    on_the_wire = KEYS[name].encode().decode("latin-1")

    assert name_of(http, Authorization=f"Bearer {on_the_wire}") == name
    assert name_of(http, Authorization=f"bearer  {on_the_wire}") == name
    assert name_of(http, Authorization=basic("anybody", KEYS[name])) == name
    assert name_of(http, X_Api_Key=on_the_wire) == name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer alice"},
        {"Authorization": "Basic !"},
        {"Authorization": basic("alice-0123456789", "")},
        {"Authorization": "Digest alice-0123456789"},
        {"X_Api_Key": ""},
        {"X_Api_Key": "\xff"},
        {"X_Client_Id": "alice-0123456789"},
    ],
)
def test_without_a_right_key_there_is_no_answer(keys: KeyFile, headers: dict[str, str]) -> None:
    http = app_of(Identity(keys, trusted=True))

    assert name_of(http, **headers) == 401


def test_a_public_route_needs_no_key_and_refuses_a_wrong_one(keys: KeyFile) -> None:
    http = app_of(Identity(keys, trusted=True))

    assert http.get("/open").status_code == 200
    assert http.get("/open", headers={"X-Api-Key": "wrong"}).status_code == 401


def test_a_key_is_exchanged_for_a_cookie_without_it(keys: KeyFile) -> None:
    http = app_of(Identity(keys, trusted=True, secret=b"s"))
    answer = http.get("/sign-in/alice")

    cookie = answer.headers["Set-Cookie"]
    assert KEYS["alice"] not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert name_of(http) == "alice"
    http.get("/sign-out")
    assert name_of(http) == 401


def test_a_wrong_key_gets_no_cookie(keys: KeyFile) -> None:
    answer = app_of(Identity(keys, trusted=True, secret=b"s")).get("/sign-in/wrong")

    assert answer.status_code == 401
    assert "Set-Cookie" not in answer.headers


def test_a_cookie_of_another_name_key_or_server_is_worth_nothing(keys: KeyFile) -> None:
    identity = Identity(keys, trusted=True, secret=b"s")
    http = app_of(identity)
    http.get("/sign-in/alice")
    cookie = http.get_cookie(identity.session_cookie)
    assert cookie is not None

    def name_with(value: str, secret: bytes = b"s") -> str | int:
        other = Identity(keys, trusted=True, secret=secret)
        browser = app_of(other)
        browser.set_cookie(other.session_cookie, value)
        return name_of(browser)

    signature = cookie.value.partition(":")[2]
    assert name_with(cookie.value) == "alice"
    assert name_with(f"root:{signature}") == 401
    assert name_with("alice:") == 401
    assert name_with("alice") == 401
    assert name_with(cookie.value, secret=b"t") == 401
    keys.path.write_text('[alice]\nkey = "another-0123456789"\n')
    renewed = KeyFile(keys.path)
    browser = app_of(Identity(renewed, trusted=True, secret=b"s"))
    browser.set_cookie(identity.session_cookie, cookie.value)
    assert name_of(browser) == 401


def test_everybody_is_one_trusted_client_where_there_are_no_keys() -> None:
    http = app_of(Identity(None, trusted=True))

    everybody = http.get("/").get_json()
    assert everybody["name"] == ""
    assert everybody["operator"]
    assert everybody["may_prioritize"]
    assert name_of(http, X_Api_Key="whatever") == ""
    assert "Set-Cookie" not in http.get("/", headers={"Accept": "text/html"}).headers


def test_the_operator_key_makes_the_operator_everywhere(keys: KeyFile) -> None:
    for known, trusted in ((keys, True), (None, True), (None, False)):
        http = app_of(Identity(known, trusted=trusted, operator_key="the operator's"))
        with_key = http.get("/", headers={"Authorization": "Bearer the operator's"}).get_json()
        assert with_key["operator"]
        assert with_key["may_prioritize"]
    http = app_of(Identity(None, trusted=True, operator_key="the operator's"))
    assert not http.get("/").get_json()["operator"]


def test_anonymous_clients_are_identified_by_id_then_cookie_then_address() -> None:
    http = app_of(Identity(None, trusted=False))

    first = name_of(http, X_Client_Id="a" * 16)
    assert first == name_of(http, X_Client_Id="a" * 16)
    assert first != name_of(http, X_Client_Id="b" * 16)
    assert str(first).startswith("id:")
    assert "a" * 16 not in str(first)
    assert name_of(http) == "address:127.0.0.1"
    page = http.get("/", headers={"Accept": "text/html,*/*"})
    assert "HttpOnly" in page.headers["Set-Cookie"]
    by_cookie = name_of(http)
    assert str(by_cookie).startswith("id:")
    assert by_cookie == name_of(http)
    assert "Set-Cookie" not in http.get("/", headers={"Accept": "text/html"}).headers
    assert not http.get("/").get_json()["operator"]


@pytest.mark.parametrize("short_or_long", ["", "a" * 15, "a" * 129])
def test_an_id_that_can_be_guessed_is_refused(short_or_long: str) -> None:
    assert name_of(app_of(Identity(None, trusted=False)), X_Client_Id=short_or_long) == 400


def test_a_client_called_operator_is_not_the_one_with_the_operator_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[operator]\nkey = "0123456789abcdef"\n')
    http = app_of(Identity(KeyFile(path), trusted=True, operator_key="the operator's"))

    named = name_of(http, X_Api_Key="0123456789abcdef")
    assert named == "operator"
    assert name_of(http, X_Api_Key="the operator's") not in (named, "")


def test_a_refused_request_gets_no_id() -> None:
    http = app_of(Identity(None, trusted=False))

    answer = http.get("/nothing", headers={"Accept": "text/html"})
    assert answer.status_code == 404
    assert "Set-Cookie" not in answer.headers


def test_an_answer_that_gives_an_id_is_kept_by_no_cache() -> None:
    http = app_of(Identity(None, trusted=False))

    page = http.get("/", headers={"Accept": "text/html"})
    assert "Set-Cookie" in page.headers
    assert page.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("table", "revoked"),
    [
        ('[root]\nkey = "root-0123456789abc"\noperator = true\nweight = 3\n', False),
        ('[root]\nkey = "root-0123456789abc"\n', True),
        ('[root]\nkey = "another-0123456789"\noperator = true\n', True),
        ('[alice]\nkey = "root-0123456789abc"\noperator = true\n', True),
    ],
)
def test_who_loses_its_key_or_its_rights_is_noticed_later(
    tmp_path: Path, table: str, revoked: bool
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[root]\nkey = "root-0123456789abc"\noperator = true\n')
    at = 0.0
    keys = KeyFile(path, clock=lambda: at)
    identity, root = Identity(keys, trusted=True), keys.client("root-0123456789abc")
    assert root
    assert not identity.has_revoked(root)
    path.write_text(table)
    at = 10.0
    assert identity.has_revoked(root) == revoked


# -- guessing --------------------------------------------------------------------------------------


class Guessing:
    """An application, its clock, and requests with keys from any address."""

    def __init__(self, identity: Identity) -> None:
        self.at = 0.0
        identity.attempts._monotonic = lambda: self.at
        self.http = app_of(identity)

    def ask(self, key: str, address: str = "192.168.1.5") -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return self.http.get(
            "/", headers=headers, environ_base={"REMOTE_ADDR": address}
        ).status_code

    def guess(self, times: int, address: str = "192.168.1.5") -> list[int]:
        return [self.ask(f"guess {address} {self.at} {number}", address) for number in range(times)]


def test_an_address_may_try_so_many_wrong_keys_and_then_one_in_a_while(keys: KeyFile) -> None:
    guessing = Guessing(Identity(keys, trusted=False))
    assert guessing.guess(MOST_AT_ONCE + 2) == [401] * MOST_AT_ONCE + [429] * 2
    assert guessing.ask(KEYS["alice"]) == 429, "else the answer would say which guess is right"
    assert guessing.ask(KEYS["alice"], "192.168.1.6") == 200, "another address is not concerned"
    guessing.at += EVERY_S
    assert guessing.guess(2) == [401, 429]
    guessing.at += EVERY_S
    assert guessing.ask(KEYS["alice"]) == 200
    guessing.at += 1000 * EVERY_S
    assert guessing.guess(MOST_AT_ONCE + 1)[-2:] == [401, 429]


def test_who_guesses_does_not_shut_out_a_key_that_was_right_there(keys: KeyFile) -> None:
    guessing = Guessing(Identity(keys, trusted=False))
    assert guessing.ask(KEYS["bob"]) == 401, "its bytes are not UTF-8"
    assert guessing.ask(KEYS["alice"]) == 200
    guessing.guess(MOST_AT_ONCE)
    assert guessing.ask(KEYS["alice"]) == 200
    assert guessing.ask(KEYS["root"]) == 429


def test_a_program_with_a_wrong_key_takes_one_attempt(keys: KeyFile) -> None:
    guessing = Guessing(Identity(keys, trusted=False))
    assert {guessing.ask("the same wrong key") for _ in range(3 * MOST_AT_ONCE)} == {401}
    assert guessing.ask(KEYS["alice"]) == 200


def test_a_home_with_ipv6_is_one_address(keys: KeyFile) -> None:
    guessing = Guessing(Identity(keys, trusted=False))
    for number in range(MOST_AT_ONCE):
        guessing.ask(f"guess {number}", f"2001:db8::{number:x}")
    assert guessing.ask("one more", "2001:db8::ffff") == 429
    assert guessing.ask("one more", "2001:db8:0:1::1") == 401


def test_the_operator_key_cannot_be_guessed_either_and_nobody_is_refused_for_it() -> None:
    identity = Identity(None, trusted=False, operator_key="the operator's")
    guessing = Guessing(identity)
    assert set(guessing.guess(MOST_AT_ONCE + 5)) == {200}
    headers = {"Authorization": "Bearer the operator's"}
    from_there = guessing.http.get(
        "/", headers=headers, environ_base={"REMOTE_ADDR": "192.168.1.5"}
    )
    elsewhere = guessing.http.get("/", headers=headers)
    assert [from_there.get_json()["operator"], elsewhere.get_json()["operator"]] == [False, True]
