"""Bodies of requests: what is read, and what is refused with which sentence."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from conftest import ServerProcess
from served import served

from api.generate_request import Limits, parse_form, parse_request
from api.json_text import BOM, MAX_STRINGS, MAX_TEXT_BYTES, PICTURE_BYTES, parse_object
from api.request_body import MAX_PARTS, read_form, unpack
from errors import BodyTooLarge, InvalidInput
from images import decode_base64

TINY = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
BODY = json.dumps({**TINY, "size": "64x64"}).encode()
NATIVE = json.dumps(TINY).encode()
DIALECTS = ("/generate", "/estimate", "/v1/images/generations", "/sdapi/v1/txt2img")
GZIP = zlib.MAX_WBITS | 16


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(tmp_path_factory.mktemp("desk") / "data", "--model", "noise-flux1")


def refused(text: bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_object(text)
    return caught.value.message


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is empty"),
        (b" \r\n", "is empty"),
        (BOM, "is empty"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": 1} x', "trailing characters"),
        (b'{"a": 1, "a": 2}', 'duplicate key "a"'),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\0"}', "control character"),
        ('{"a": 1}'.encode("utf-16"), "must be in UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), "must be in UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "recursion limit"),
        (b'{"a":' * 40_000, "recursion limit"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_a_reason(text: bytes, sentence: str) -> None:
    assert sentence in refused(text)


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_object(BOM + b'{"a": "\\u00e9"}') == {"a": "é"}


MB = MAX_TEXT_BYTES
TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "unknown keys": lambda: b"{" + b",".join(b'"k%d":1' % key for key in range(1_000_000)) + b"}",
    "numbers": lambda: b'{"images":[' + b"1," * MB + b"1]}",
    "white space": lambda: b'{"prompt":"x"' + b" " * MB + b"}",
    "one number": lambda: b'{"seed":' + b"1" * MB + b"}",
    "short strings": lambda: b'{"loras":["' + b'","'.join([b"x" * 100] * MAX_STRINGS) + b'"]}',
    "middling strings": lambda: (
        b'{"loras":["' + b'","'.join([b"x" * PICTURE_BYTES] * 1001) + b'"]}'
    ),
}


@pytest.mark.parametrize("made", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_json_of_more_than_a_megabyte_beside_pictures_is_not_parsed(
    made: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jiter.from_json", None)
    assert "too large" in refused(made())


@pytest.mark.parametrize("item", [b"[]", b'{"a":0}'])
def test_the_number_of_lists_and_objects_is_bounded(
    item: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b'{"images":[' + (item + b",") * 50_000 + item + b"]}"
    monkeypatch.setattr("jiter.from_json", None)
    assert "more than 50000 opening brackets" in refused(text)


def test_pictures_do_not_count_whatever_is_escaped_in_them() -> None:
    picture = "iVBORw0KGgo\\/" * 200_000
    text = f'{{"init_image": "{picture}", "prompt": "\\"\\\\", "mask": "{picture}"}}'.encode()
    assert len(text) > 2 * MAX_TEXT_BYTES
    assert parse_object(text)["mask"] == picture.replace("\\/", "/")


def test_nothing_but_escapes_may_be_a_string() -> None:
    assert len(parse_object(b'{"prompt": "' + b'\\"' * MB + b'"}')["prompt"]) == MB
    assert len(parse_object(b'{"prompt": "' + b"\\\\" * MB + b'"}')["prompt"]) == MB


def test_an_unknown_field_is_refused_before_any_value_is_looked_at() -> None:
    body = b'{"prompt": 5, "init_image": "?", "k1": 1, "k2": 2}'
    with pytest.raises(InvalidInput, match="k1 is not a field") as caught:
        parse_request(body, Limits())
    assert caught.value.field == "k1"


@pytest.mark.parametrize(("name", "most"), [("images", 10), ("loras", 8)])
def test_the_items_of_a_long_list_are_counted_before_they_are_validated(
    name: str, most: int
) -> None:
    body = json.dumps({"prompt": "x", name: [{}] * (most + 1)}).encode()
    with pytest.raises(InvalidInput, match=f"a list of 1 to {most}") as caught:
        parse_request(body, Limits())
    assert caught.value.field == name


@pytest.mark.parametrize("name", ["init_image", "images", "loras"])
def test_many_unknown_names_within_a_field_make_one_short_refusal(name: str) -> None:
    inner = {"task_id": "x", "name": "x", **{f"k{number}": 1 for number in range(20_000)}}
    value: Any = inner if name == "init_image" else [inner] * 3
    with pytest.raises(InvalidInput) as caught:
        parse_request(json.dumps({"prompt": "x", name: value}).encode(), Limits())
    assert caught.value.field == name
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "value", [[[[["x" * 50_000]]]], [{}] * 40_000, {"a": [1] * 90_000}, 10**4000, "y" * 90_000]
)
def test_a_large_value_is_cut_in_the_refusal(value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request(json.dumps({"prompt": "x", "format": value}).encode(), Limits())
    assert caught.value.field == "format"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_by_the_name_of_their_field(number: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_request(b'{"prompt": "x", "guidance": %s}' % number.encode(), Limits())
    assert caught.value.field == "guidance"


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "client_task_id", "model"])
def test_nul_is_refused_in_every_text(name: str) -> None:
    body = json.dumps({"prompt": "x", name: "a\0b"}).encode()
    with pytest.raises(InvalidInput, match="NUL") as caught:
        parse_request(body, Limits())
    assert caught.value.field == name


def test_base64_may_be_wrapped_anywhere() -> None:
    assert decode_base64(" A\tA\r\nA\vA ==\n", "mask") == b"\0\0\0"


# -- forms -----------------------------------------------------------------------------------------


def part(disposition: str, content: bytes = b"x", *headers: str) -> bytes:
    lines = [f"Content-Disposition: form-data{disposition}", *headers, "", ""]
    return b"--b\r\n" + "\r\n".join(lines).encode() + content + b"\r\n"


def form_refused(body: bytes) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        read_form(body, b"b")
    return caught.value


def test_a_form_keeps_all_values_of_a_field_and_leaves_out_files_without_a_name() -> None:
    file = '; name="images"; filename="{}"'
    body = part('; name="loras"', b"a") + part('; name="loras"', b"b")
    body += part(file.format("a.png"), b"\x89PNG\r\n--c") + part(file.format(""), b"") + b"--b--"
    form = read_form(body, b"b")
    assert form.texts == {"loras": ["a", "b"]}
    assert form.files == {"images": [b"\x89PNG\r\n--c"]}


@pytest.mark.parametrize("disposition", ["", "; name", '; name=""', '; filename="a.png"'])
def test_a_part_without_a_name_is_refused(disposition: str) -> None:
    assert "no name" in form_refused(part(disposition) + b"--b--\r\n").message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"--b",
        part('; name="a"'),
        part('; name="a"')[:-8],
        b"--b\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nContent-Disposition: form-data; name=\xff\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n" + b"X: y\r\n" * 100_000,
        part('; name="a"', b"x", *["X: y"] * 30) + b"--b--\r\n",
    ],
)
def test_a_form_that_is_broken_or_cut_off_is_refused(body: bytes) -> None:
    assert "not valid multipart/form-data" in form_refused(body).message


def test_the_number_of_parts_is_bounded() -> None:
    parts = part('; name="loras"') * MAX_PARTS
    assert len(read_form(parts + b"--b--\r\n", b"b").texts["loras"]) == MAX_PARTS
    assert "too many parts" in form_refused(parts + parts + b"--b--\r\n").message


def test_text_of_a_form_is_utf_8_or_says_what_it_is() -> None:
    text = "Möwe".encode("cp1252")
    error = form_refused(part('; name="prompt"', text) + b"--b--\r\n")
    assert (error.field, error.message) == ("prompt", "prompt must be text in UTF-8.")
    declared = "Content-Type: text/plain; charset=windows-1252"
    body = part('; name="prompt"', text, declared) + b"--b--\r\n"
    assert read_form(body, b"b").texts == {"prompt": ["Möwe"]}


def test_json_within_a_form_keeps_to_the_same_limits() -> None:
    many = '{"task_id": "x"' + " " * MAX_TEXT_BYTES + "}"
    for text, sentence in (
        (many, "too large"),
        ("{", "not valid JSON"),
        ('{"a":' * 900, "recursion"),
    ):
        with pytest.raises(InvalidInput, match=sentence) as caught:
            parse_form({"prompt": ["x"], "images": [text]}, {}, Limits())
        assert caught.value.field == "images"


# -- compressed bodies -----------------------------------------------------------------------------


def test_a_compressed_body_unpacks_to_a_bounded_size() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(BodyTooLarge, match="more than 1000000 bytes"):
        unpack(bomb, GZIP, 1_000_000)
    assert unpack(gzip.compress(bytes(1_000_000)), GZIP, 1_000_000) == bytes(1_000_000)


@pytest.mark.parametrize(
    "body",
    [b"", b"x", gzip.compress(b"{}")[:-3], gzip.compress(b"{}") + b"x"],
    ids=["empty", "one byte", "cut off", "more behind its end"],
)
def test_a_broken_compressed_body_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"compressed|Content-Encoding"):
        unpack(body, GZIP, 1000)


# -- over HTTP, in every dialect -------------------------------------------------------------------


def post(server: ServerProcess, path: str, body: bytes, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named.setdefault("Content-Type", "application/json")
    return requests.post(server.url + path, data=body, headers=named, timeout=60)


def body_for(path: str) -> bytes:
    return BODY if path.startswith("/v1") else NATIVE


@pytest.mark.parametrize("path", DIALECTS)
def test_compressed_json_and_a_byte_order_mark_are_read(desk: ServerProcess, path: str) -> None:
    body = body_for(path)
    assert post(desk, path, BOM + body).status_code == 200
    for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        assert post(desk, path, packed, Content_Encoding=encoding).status_code == 200


@pytest.mark.parametrize("path", DIALECTS)
def test_a_decompression_bomb_and_an_unknown_compression_are_refused(
    desk: ServerProcess, path: str
) -> None:
    bomb = gzip.compress(b'{"prompt": "' + bytes(40_000_000))
    assert post(desk, path, bomb, Content_Encoding="gzip").status_code == 413
    unknown = post(desk, path, body_for(path), Content_Encoding="br")
    assert unknown.status_code == (400 if path.startswith("/v1") else 415)
    assert "'br'" in unknown.text


@pytest.mark.parametrize("path", DIALECTS)
def test_a_body_that_is_not_json_is_a_400_with_a_reason(desk: ServerProcess, path: str) -> None:
    for body, word in (
        (b"", "empty"),
        (b"{}x", "trailing"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "duplicate"),
        (b'{"prompt": "a\\u0000b"}', "NUL"),
        (TOO_LARGE["unknown keys"](), "too large"),
        (b'{"prompt":"x","images":[' + b'{"a":0},' * 1_000_000 + b"{}]}", "opening brackets"),
    ):
        answer = post(desk, path, body)
        assert answer.status_code == 400
        assert word in answer.text


@pytest.mark.parametrize("path", ["/generate", "/estimate", "/v1/images/edits"])
def test_forms_that_cannot_be_read_are_a_400_with_a_reason(desk: ServerProcess, path: str) -> None:
    form = "multipart/form-data"
    for body, kind, word in (
        (part('; name="prompt"') + b"--b--\r\n", form, "boundary"),
        (part("") + b"--b--\r\n", f"{form}; boundary=b", "no name"),
        (part('; name="prompt"'), f"{form}; boundary=b", "cut off"),
        (part('; name="prompt"', b"\xff") + b"--b--", f"{form}; boundary=b", "UTF-8"),
    ):
        answer = post(desk, path, body, Content_Type=kind)
        assert answer.status_code == 400
        assert word in answer.text


def test_a_form_may_be_compressed(desk: ServerProcess) -> None:
    body = b"".join(part(f'; name="{name}"', str(TINY[name]).encode()) for name in TINY) + b"--b--"
    kind = "multipart/form-data; boundary=b"
    answer = post(
        desk, "/generate", gzip.compress(body), Content_Type=kind, Content_Encoding="gzip"
    )
    assert answer.status_code == 200


# -- the query -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("task_id=a&task_id=b", "task_id"),
        ("task_id=%00", "task_id"),
        ("task_id=" + "a" * 65, "task_id"),
        ("task_id=a&wait=" + "9" * 5000, "wait"),
        ("task_id=a&wait=" + "0" * 5000 + "5", "wait"),
        ("task_id=a&wait=1e3", "wait"),
        ("task_id=a&wait=%d9%a3", "wait"),
        ("task_id=a&wait=NaN", "wait"),
    ],
)
def test_a_value_of_the_query_that_cannot_be_used_is_named(
    server: ServerProcess, query: str, field: str
) -> None:
    answer = server.get(f"/status?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


def test_a_query_that_is_too_large_is_refused(server: ServerProcess) -> None:
    answer = server.get("/status?" + "&a" * 20_000)
    assert answer.status_code == 414
    assert answer.json()["error"]["code"]
