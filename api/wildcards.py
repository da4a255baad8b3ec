"""Wildcards in prompts: `{a|b|c}` becomes one of the alternatives, `__name__` a line of a file.

The syntax is that of the Dynamic Prompts extension of AUTOMATIC1111. A name is looked up among the
files of the operator's folder; what a client sends never becomes a path.
"""

import re
from pathlib import Path
from random import Random

from errors import InvalidInput, NotSupported

MOST_FILE_BYTES = 1_000_000
MOST_DEPTH = 10
"""Levels of braces and wildcards inside each other."""
MOST_CHOICES = 1_000
"""In one prompt: the lines of wildcards may contain wildcards."""
MOST_LISTED = 20
"""Names in an error."""
NAME = r"[A-Za-z0-9-]+(?:_[A-Za-z0-9-]+)*"
_FILE = re.compile(NAME)
_WILDCARD = re.compile(rf"__({NAME})__")
_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)::")
_SPECIAL = re.compile(r"[\\{_]")
_OF_BRACES = re.compile(r"\\.|[{}|]", re.DOTALL)


class Wildcards:
    """Args:
    folder: with a text file NAME.txt for each wildcard, one value on each line; blank lines and
        lines that start with # are left out. It is read for each prompt. None: there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        return sorted(self._files())

    def expanded(self, text: str, seed: int, most_chars: int) -> str:
        """Returns the text with choices made. The same seed, text and files give the same result.

        Raises:
            NotSupported: an unknown name, or a file that cannot be used.
            InvalidInput: an open brace, too many or too deep choices, or more than most_chars
                characters.
        """
        return _Expansion(self, Random(seed), most_chars).of(text, 0)

    def values(self, name: str) -> list[str]:
        """Returns the values of a wildcard.

        Raises:
            NotSupported
        """
        path = self._files().get(name)
        if path is None:
            known = ", ".join(self.names()[:MOST_LISTED]) or "none"
            raise _not_supported(f"there is no wildcard {name[:100]!r}. Wildcards: {known}.")
        try:
            with path.open("rb") as file:
                data = file.read(MOST_FILE_BYTES + 1)
        except OSError as error:
            raise _not_supported(f"the wildcard {name} cannot be read.") from error
        if len(data) > MOST_FILE_BYTES:
            raise _not_supported(f"the wildcard {name} has more than {MOST_FILE_BYTES} bytes.")
        lines = data.decode("utf-8-sig", "replace").replace("\0", "").splitlines()
        values = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
        if not values:
            raise _not_supported(f"the wildcard {name} has no values.")
        return values

    def _files(self) -> dict[str, Path]:
        if self._folder is None:
            return {}
        try:
            paths = list(self._folder.glob("*.txt"))
        except OSError:
            return {}
        return {path.stem: path for path in paths if _FILE.fullmatch(path.stem) and path.is_file()}


class _Expansion:
    """Of one prompt."""

    def __init__(self, wildcards: Wildcards, random: Random, most_chars: int) -> None:
        self._wildcards = wildcards
        self._random = random
        self._most_chars = most_chars
        self._choices = 0
        self._values: dict[str, list[str]] = {}

    def of(self, text: str, depth: int) -> str:
        if depth > MOST_DEPTH:
            raise _invalid(f"choices are inside each other more than {MOST_DEPTH} times.")
        pieces, at, chars = [], 0, 0
        while at < len(text):
            piece, at = self._next(text, at, depth)
            chars += len(piece)
            if chars > self._most_chars:
                raise _invalid(f"the result has more than {self._most_chars} characters.")
            pieces.append(piece)
        return "".join(pieces)

    def _next(self, text: str, at: int, depth: int) -> tuple[str, int]:
        """Returns the next piece of the result, and where the text goes on."""
        if text[at] == "\\" and text[at + 1 : at + 2] in ("{", "}", "|", "_"):
            return text[at + 1], at + 2
        if text[at] == "{":
            alternatives, end = _alternatives(text, at)
            return self.of(self._chosen(alternatives), depth + 1), end
        if found := _WILDCARD.match(text, at):
            return self.of(self._line(found[1]), depth + 1), found.end()
        special = _SPECIAL.search(text, at + 1)
        end = special.start() if special else len(text)
        return text[at:end], end

    def _line(self, name: str) -> str:
        """One of the values, each as often. There may be hundred thousands of them."""
        if name not in self._values:
            self._values[name] = self._wildcards.values(name)
        values = self._values[name]
        return values[int(self._share() * len(values))]

    def _chosen(self, alternatives: list[str]) -> str:
        weighted = []
        for text in alternatives:
            found = _WEIGHT.match(text)
            weighted.append((text[found.end() :], float(found[1])) if found else (text, 1.0))
        return self._pick(weighted)

    def _share(self) -> float:
        """The random number of the next choice, 0 to below 1. Raises: InvalidInput."""
        self._choices += 1
        if self._choices > MOST_CHOICES:
            raise _invalid(f"there are more than {MOST_CHOICES} choices.")
        return self._random.random()

    def _pick(self, weighted: list[tuple[str, float]]) -> str:
        left = self._share() * sum(weight for _, weight in weighted)
        for text, weight in weighted:
            left -= weight
            if left < 0:
                return text
        return weighted[-1][0]


def _alternatives(text: str, start: int) -> tuple[list[str], int]:
    """Returns the alternatives of the braces that open here, and where the text goes on."""
    depth, parts, begin = 0, [], start + 1
    for found in _OF_BRACES.finditer(text, start):
        mark = found[0]
        if mark == "{":
            depth += 1
        elif mark == "}":
            depth -= 1
        if depth == 0 or (depth == 1 and mark == "|"):
            parts.append(text[begin : found.start()])
            begin = found.end()
        if depth == 0:
            return parts, begin
    raise _invalid("a { has no }. Write \\{ for a brace.")


def _invalid(sentence: str) -> InvalidInput:
    return InvalidInput("{field}: " + sentence, field="prompt")


def _not_supported(sentence: str) -> NotSupported:
    return NotSupported("{field}: " + sentence, field="prompt")
