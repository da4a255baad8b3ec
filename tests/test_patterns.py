"""Regular expressions that read what clients send take time in proportion to its length."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*ROOT.glob("api/*.py"), *ROOT.glob("compat/*.py"), ROOT / "images.py"]
    if "re.compile(" in path.read_text(encoding="utf-8")
)
REPEATED_FIRST = re.compile(r"\(*(\?:)?(\\\w|\.|\[[^\]]+\])[*+]")
"""Of a pattern: it begins with as many characters of a kind as there are."""
SEARCHES = "sub|subn|search|findall|finditer|split"


def patterns() -> dict[str, str]:
    """The patterns of a name that is known in its module, by module and name."""
    return {
        f"{module}.{name}": value.pattern
        for module in MODULES
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, re.Pattern) and isinstance(value.pattern, str)
    }


@pytest.mark.parametrize("name", patterns())
def test_nothing_is_searched_for_that_may_begin_at_each_of_many_characters(name: str) -> None:
    """A search tries each beginning: with a row of n blanks, blanks that something follows would be
    looked for n times in up to n blanks. A match begins once."""
    module, _, short = name.rpartition(".")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    searches = re.search(rf"\b{short}\.({SEARCHES})\(", source)
    assert not (searches and REPEATED_FIRST.match(patterns()[name])), patterns()[name]


def test_the_patterns_are_found_with_what_they_begin_with() -> None:
    begun = {name for name, pattern in patterns().items() if REPEATED_FIRST.match(pattern)}
    assert {"compat.openai_fields.SIZE", "images._DATA_URL"} <= begun
    assert "compat.a1111_checkpoint.HASH" in patterns()
