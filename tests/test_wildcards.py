"""`{a|b}` and `__name__` in prompts."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from conftest import StartServer
from hypothesis import given, settings
from hypothesis import strategies as st
from submission_desk import Desk

from api import wildcards
from api.generate_request import Limits
from api.wildcards import MOST_DEPTH, Wildcards
from errors import InvalidInput, NotSupported, ServerError
from images import read_metadata


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "wildcards"
    folder.mkdir()
    (folder / "colour.txt").write_text("# of things\n\nred\n  green  \n", encoding="utf-8")
    (folder / "thing_of-2.txt").write_text("a __colour__ {cup|plate}\n", encoding="utf-8")
    (folder / "not a name.txt").write_text("x", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    return folder


def results(text: str, folder: Path | None = None, seeds: int = 200) -> Counter[str]:
    known = Wildcards(folder)
    return Counter(known.expanded(text, seed, 10_000) for seed in range(seeds))


def refusal(text: str, folder: Path | None = None, most_chars: int = 10_000) -> ServerError:
    with pytest.raises((InvalidInput, NotSupported)) as caught:
        Wildcards(folder).expanded(text, 1, most_chars)
    assert isinstance(caught.value, ServerError)
    assert caught.value.field == "prompt"
    return caught.value


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a {red|green} cup", {"a red cup", "a green cup"}),
        ("{a|{b|c} {d|e}}", {"a", "b d", "b e", "c d", "c e"}),
        ("{|very }old", {"old", "very old"}),
        ("{0::a|b}", {"b"}),
        ("plain | text } with 5::3", {"plain | text } with 5::3"}),
        (r"\{a\|b\}", {"{a|b}"}),
        (r"{a\|b|\}}", {"a|b", "}"}),
        (r"snake\__case__ \n", {r"snake__case__ \n"}),
        ("snake_case _ __", {"snake_case _ __"}),
        ("", {""}),
    ],
)
def test_the_alternatives_are_those_of_the_braces(text: str, possible: set[str]) -> None:
    assert set(results(text)) == possible


def test_weights_say_how_often_an_alternative_is_chosen() -> None:
    found = results("{3::a|1::b}", seeds=2000)
    assert 0.7 < found["a"] / 2000 < 0.8
    assert 0.45 < results("{a|b}", seeds=2000)["a"] / 2000 < 0.55


def test_a_name_becomes_a_line_of_its_file_in_which_choices_are_made_too(folder: Path) -> None:
    assert Wildcards(folder).names() == ["colour", "thing_of-2"]
    assert set(results("__colour__", folder)) == {"red", "green"}
    assert set(results("{__thing_of-2__|no}", folder)) == {
        *("a red cup", "a red plate", "a green cup", "a green plate", "no")
    }


@given(st.text(alphabet=r"ab{}|\_:2 ", max_size=60), st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_the_same_seed_gives_the_same_prompt_or_the_same_refusal(text: str, seed: int) -> None:
    def outcome() -> str:
        try:
            return Wildcards().expanded(text, seed, 100)
        except (InvalidInput, NotSupported) as error:
            return f"refused: {error.message}"

    assert outcome() == outcome()


def test_the_choices_of_a_seed_stay_what_they_are() -> None:
    text = "{a|b|c|d} {1|2|3|4|5|6|7|8|9}"
    chosen = [Wildcards().expanded(text, seed, 100) for seed in (1, 2, 2**64 - 1)]
    assert chosen == ["a 8", "d 9", "a 4"]


class Values(list[str]):
    """Of a large file."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a thousand choices would look at each value a thousand times")


def test_a_choice_looks_at_the_value_that_it_takes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = Values([f"value {number}" for number in range(1000)])
    monkeypatch.setattr(Wildcards, "values", lambda known, name: values)
    found = {Wildcards().expanded("__a__", seed, 100) for seed in range(50)}
    assert len(found) > 40
    assert not found.difference([f"value {number}" for number in range(1000)])


@pytest.mark.parametrize("name", ["secret", "none", "Colour"])
def test_an_unknown_name_is_refused_with_the_known_ones(folder: Path, name: str) -> None:
    error = refusal(f"a __{name}__ cup", folder)
    assert error.http_status == 422
    assert f"'{name}'" in error.message
    assert "Wildcards: colour, thing_of-2." in error.message
    assert "Wildcards: none." in refusal(f"__{name}__").message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "~", "%2e%2e", "a\\b"])
def test_what_looks_like_a_path_is_no_name(folder: Path, name: str) -> None:
    text = f"__{name}__"
    assert Wildcards(folder).expanded(text, 1, 100) == text


def test_a_file_is_bounded_and_needs_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "none.txt").write_text("\n# nothing\n", encoding="utf-8")
    assert "has no values" in refusal("__none__", folder).message
    (folder / "binary.txt").write_bytes(b"\xff\0\n")
    assert set(results("__binary__", folder)) == {"\N{REPLACEMENT CHARACTER}"}
    monkeypatch.setattr(wildcards, "MOST_FILE_BYTES", 5)
    assert "more than 5 bytes" in refusal("__colour__", folder).message


def test_depth_number_and_length_of_choices_are_bounded(folder: Path) -> None:
    assert "more than 10 times" in refusal("{" * 11 + "}" * 11).message
    assert set(results("{" * MOST_DEPTH + "a" + "}" * MOST_DEPTH, seeds=1)) == {"a"}
    (folder / "loop.txt").write_text("__loop__ __loop__", encoding="utf-8")
    assert "more than 10 times" in refusal("__loop__", folder).message
    assert "more than 1000 choices" in refusal("{a}" * 1001).message
    assert "more than 5 characters" in refusal("{abc|abc}{abc|abc}", most_chars=5).message
    assert "a { has no }" in refusal("{a|b").message


# -- in a request ----------------------------------------------------------------------------------


def test_wildcards_are_off_unless_a_request_asks_for_them(folder: Path) -> None:
    desk = Desk("schnell", wildcards=folder)
    text = "a {red|green} __colour__ __unknown__ cup"
    assert desk.params(prompt=text).prompt == text
    assert desk.params(prompt=text, expand_wildcards=False).prompt == text
    code, field, _ = desk.refusal(prompt=text, expand_wildcards=True)
    assert (code, field) == ("not_supported", "prompt")


def test_each_image_has_the_prompt_of_its_own_seed(folder: Path) -> None:
    desk = Desk("schnell", wildcards=folder)
    text = "{1|2|3|4|5|6|7|8} __colour__"
    several = desk.params(prompt=text, expand_wildcards=True, seed=7, count=4)
    single = [desk.params(prompt=text, expand_wildcards=True, seed=7 + index) for index in range(4)]
    assert [several.prompt_of(index) for index in range(4)] == [one.prompt for one in single]
    assert len(set(several.prompts)) > 1
    alike = desk.params(prompt="{a|a}", expand_wildcards=True, count=4)
    assert (alike.prompt, alike.prompts) == ("a", ())


def test_the_result_is_no_longer_than_a_prompt_may_be() -> None:
    desk = Desk("schnell", limits=Limits(max_prompt_chars=20))
    assert desk.params(prompt="{aaaaa|bbbbb}", expand_wildcards=True).prompt in ("aaaaa", "bbbbb")
    assert desk.refusal(prompt="{a|b}" * 5, expand_wildcards=True)[1] == "prompt"


def test_the_prompt_that_was_used_is_answered_stored_and_in_the_file(
    start_server: StartServer, folder: Path
) -> None:
    server = start_server("--model", "noise-flux1", "--wildcards-dir", str(folder))
    assert server.get("/wildcards").json() == {"wildcards": ["colour", "thing_of-2"]}
    fields = {"seed": 3, "format": "PNG", "expand_wildcards": True, "count": 2}
    accepted = server.submit("__colour__ {1|2|3|4|5|6|7|8|9} cups", **fields)
    task_id, prompts = accepted["task_id"], accepted["params"]["prompts"]
    assert accepted["params"]["prompt"] == prompts[0]
    assert len(set(prompts)) == 2
    ended = server.wait_until_ended(task_id)
    assert (ended["status"], ended["params"]["prompts"]) == ("done", prompts)
    for index, prompt in enumerate(prompts):
        image = server.get("/image", task_id=task_id, index=index, delete="false").content
        metadata = read_metadata(image)
        assert metadata is not None
        assert (metadata["prompt"], metadata["seed"]) == (prompt, 3 + index)
    estimate = requests.post(
        server.url + "/estimate",
        json={"prompt": "__colour__ {1|2|3|4|5|6|7|8|9} cups", **fields},
        timeout=60,
    )
    assert estimate.json()["params"]["prompts"] == prompts
