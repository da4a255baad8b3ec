"""The text of the repository is plain English: no archaic or literary words."""

import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

WORDS = "whom|anew|thus|shall|tells|told|bears|trifle|wish|wishes|hence|upon|lest|albeit|whence"
BANNED = re.compile(rf"(?<![A-Za-z])({WORDS})(?![A-Za-z])", re.IGNORECASE)
SUFFIXES = {".py", ".md", ".js", ".html", ".css", ".sql", ".toml"}
EXCEPT = ("tests/data/", "tests/test_words.py")
"""Texts of others and stored schemas; this list of words."""


def texts() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.suffix in SUFFIXES and not hidden and not name.startswith(EXCEPT):
            yield name, path


def test_archaic_and_literary_words_are_not_used() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if BANNED.search(line)
    ]
    assert found == []


def test_the_banned_words_are_found_as_words_and_in_names_but_not_inside_others() -> None:
    assert all(BANNED.search(text) for text in ("told", "told_by", "Told.", "is_told"))
    assert not BANNED.search("thusly marshall toldo retold")
    assert len(list(texts())) > 200
