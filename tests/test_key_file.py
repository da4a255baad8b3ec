"""The file of keys: reading, changing, refusing."""

import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import BadOption
from key_file import REREAD_S, KeyFile, add_key

KEY = "0123456789abcdef"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_new_key_is_written_as_its_hash_and_finds_its_client(path: Path) -> None:
    key = add_key(path, "alice")

    assert key not in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    client = KeyFile(path).client(key)
    assert client is not None
    assert client.name == "alice"
    assert not client.operator
    assert not client.may_prioritize
    assert client.weight == 1


def test_several_keys_are_distinguished(path: Path) -> None:
    keys = {name: add_key(path, name) for name in ("alice", "bob", "carol.of-home_1")}
    file = KeyFile(path)

    for name, key in keys.items():
        client = file.client(key)
        assert client is not None
        assert client.name == name
    assert list(tomllib.loads(path.read_text())) == list(keys)


@pytest.mark.parametrize("wrong", ["", "mflux_", KEY + "x", KEY[:-1], "\ud800", "ä" * 500])
def test_a_wrong_key_finds_nobody(path: Path, wrong: str) -> None:
    path.write_text(f'[alice]\nkey = "{KEY}"\n')

    assert KeyFile(path).client(wrong) is None


def test_rights_and_limits_are_read(path: Path) -> None:
    path.write_text(
        f'[alice]\nkey = "{KEY}"\nweight = 2\nmax_waiting = 3\nmax_wait_seconds = 90\n'
        "max_requests_per_s = 0.5\nmay_prioritize = true\noperator = true\n"
    )
    client = KeyFile(path).client(KEY)

    assert client is not None
    assert client.model_dump() == {
        "name": "alice",
        "weight": 2.0,
        "max_waiting": 3,
        "max_wait_seconds": 90.0,
        "max_requests_per_s": 0.5,
        "may_prioritize": True,
        "operator": True,
        "key_hash": hashlib.sha256(KEY.encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[alice", "TOML"),
        ('alice = "x"', "alice"),
        ("[alice]\nweight = 1", "alice: key"),
        ('[alice]\nkey = "short"', "alice: key"),
        (f'[alice]\nkey = "{KEY}"\nweight = 0', "alice: weight"),
        (f'[alice]\nkey = "{KEY}"\nweight = nan', "alice: weight"),
        (f'[alice]\nkey = "{KEY}"\nweight = true', "alice: weight"),
        (f'[alice]\nkey = "{KEY}"\noperator = "yes"', "alice: operator"),
        (f'[alice]\nkey = "{KEY}"\nmax_waiting = 1.5', "alice: max_waiting"),
        (f'[alice]\nkey = "{KEY}"\nfriend = true', "alice: friend"),
        (f'["a b"]\nkey = "{KEY}"', "'a b' is not a name"),
        ('[alice]\nkey = "sha256:12"', "alice: key"),
        (f'[alice]\nkey = "{KEY}"\n[bob]\nkey = "{KEY}"', "the same key"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_without_the_key(
    path: Path, text: str, named: str
) -> None:
    path.write_text(text)

    with pytest.raises(BadOption, match=named) as raised:
        KeyFile(path)
    assert KEY not in str(raised.value)
    assert "short" not in str(raised.value)


def test_a_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(BadOption, match="cannot be read"):
        KeyFile(path)


def test_the_file_is_read_again_when_it_has_changed(path: Path) -> None:
    path.write_text(f'[alice]\nkey = "{KEY}"\n')
    clock = Clock()
    file = KeyFile(path, clock)
    path.write_text(f'[bob]\nkey = "{KEY}"\n\n')

    client = file.client(KEY)
    assert client is not None
    assert client.name == "alice"
    clock.now += REREAD_S
    client = file.client(KEY)
    assert client is not None
    assert client.name == "bob"
    assert file.named("alice") is None


def test_a_file_that_became_invalid_or_vanished_leaves_the_keys_from_before(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(f'[alice]\nkey = "{KEY}"\n')
    clock = Clock()
    file = KeyFile(path, clock)

    changes: list[Callable[[], object]] = [lambda: path.write_text("[alice"), path.unlink]
    for change in changes:
        change()
        clock.now += REREAD_S
        assert file.client(KEY) is not None
    assert "stay valid" in caplog.text


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, 'x"]', "ä", "a\n"])
def test_a_new_key_needs_a_usable_name(path: Path, name: str) -> None:
    with pytest.raises(BadOption, match="--new-key"):
        add_key(path, name)
    assert not path.exists()


def test_a_name_gets_one_key(path: Path) -> None:
    add_key(path, "alice")

    with pytest.raises(BadOption, match="already"):
        add_key(path, "alice")
    assert len(tomllib.loads(path.read_text())) == 1
