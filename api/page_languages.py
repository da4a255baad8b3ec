"""The languages of the page: which one a browser gets, and its texts in the HTML.

`{{name}}` in an HTML file stands for the text of this name in web/languages/*.json, or in
web/languages/PAGE/*.json, where a page has texts that no other one needs. `{{texts}}` stands for
all texts of the page as JSON, for its JavaScript; `{{version}}` for that of the files in web/.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from werkzeug.datastructures import LanguageAccept

DEFAULT = "en"
COOKIE = "language"
"""What a visitor has chosen on the page."""
_PLACEHOLDER = re.compile(r"\{\{([\w.]+)\}\}")


class Languages:
    """Args:
    folder: with a file of texts for each language, for example de.json.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._languages = sorted(path.stem for path in folder.glob("*.json"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._languages)

    def chosen(self, cookie: str | None, accepted: LanguageAccept) -> str:
        """Returns the language of a visitor: the chosen one, else the best one for the browser."""
        if cookie in self._languages:
            return str(cookie)
        for wanted, _ in accepted:
            if (language := wanted.lower().partition("-")[0]) in self._languages:
                return language
        return DEFAULT

    def filled(self, page: Path, language: str, version: str) -> str:
        """Returns an HTML file with the texts of a language.

        Args:
            version: what `{{version}}` stands for.

        Raises:
            KeyError: a text is missing.
        """
        texts = self._texts(language, page.stem)
        data = json.dumps(
            {"language": language, "texts": texts}, ensure_ascii=False, separators=(",", ":")
        )
        values = {
            "language": language,
            "texts": data.replace("<", "\\u003c"),
            "version": version,
        }

        def value(found: re.Match[str]) -> str:
            name = found[1]
            return values[name] if name in values else html.escape(texts[name])

        return _PLACEHOLDER.sub(value, page.read_text(encoding="utf-8"))

    def _texts(self, language: str, page: str) -> dict[str, Any]:
        folders = (self._folder, self._folder / page)
        files = [folder / f"{language}.json" for folder in folders if folder.exists()]
        return {
            name: text
            for file in files
            for name, text in json.loads(file.read_text(encoding="utf-8")).items()
        }
