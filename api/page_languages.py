"""The languages of the page: which one a browser gets, and its texts in the HTML.

`{{name}}` in an HTML file stands for the text of this name in web/languages/*.json. `{{texts}}`
stands for all of them as JSON, for the JavaScript of the page.
"""

import html
import json
import re
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
        self._texts: dict[str, dict[str, Any]] = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob("*.json"))
        }

    def __iter__(self) -> Any:
        return iter(self._texts)

    def chosen(self, cookie: str | None, accepted: LanguageAccept) -> str:
        """Returns the language of a visitor: the chosen one, else the best one for the browser."""
        if cookie in self._texts:
            return str(cookie)
        for wanted, _ in accepted:
            if (language := wanted.lower().partition("-")[0]) in self._texts:
                return language
        return DEFAULT

    def filled(self, page: str, language: str) -> str:
        """Returns an HTML file with the texts of a language.

        Raises:
            KeyError: a text is missing.
        """
        texts = self._texts[language]
        data = json.dumps({"language": language, "texts": texts}, ensure_ascii=False)
        values = {"language": language, "texts": data.replace("<", "\\u003c")}

        def value(found: re.Match[str]) -> str:
            name = found[1]
            return values[name] if name in values else html.escape(texts[name])

        return _PLACEHOLDER.sub(value, page)
