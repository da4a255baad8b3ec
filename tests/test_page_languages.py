"""The languages of the page: complete, chosen by the browser or by hand; no text elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, ServerProcess, needs_chromium, slow_except
from pages import Visit
from playwright.sync_api import expect

WEB = ROOT / "web"


def texts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The texts of a page by language."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


PAGE = texts_of(WEB / "languages")
OPERATOR = texts_of(WEB / "languages" / "operator")
TEXTS = {language: PAGE[language] | OPERATOR[language] for language in PAGE}
ENGLISH = TEXTS["en"]
SCRIPTS = sorted(WEB.glob("*.js"))
PLACEHOLDER = re.compile(r"\{(\w+)\}")
SAME_EVERYWHERE = {"mflux", "PNG", "JPEG", "WebP", "Enter", "Esc"}
NAME_OF_A_TEXT = re.compile(r"\b(?:app|form|operator|queue|slot|state|words)\.\w")
"""Shown where a text is missing."""
SHOWN = ("alt", "aria-label", "content", "placeholder", "title")
"""Attributes whose values people see or hear."""


def forms(text: Any) -> list[str]:
    """The plural forms of a text."""
    return list(text.values()) if isinstance(text, dict) else [text]


@pytest.mark.parametrize("language", TEXTS)
def test_each_language_has_all_texts_with_the_same_placeholders(language: str) -> None:
    texts = TEXTS[language]
    assert list(PAGE[language]) == sorted(PAGE["en"])
    assert list(OPERATOR[language]) == sorted(OPERATOR["en"])
    for name, text in texts.items():
        assert isinstance(text, dict) == isinstance(ENGLISH[name], dict), name
        wanted = {key for form in forms(ENGLISH[name]) for key in PLACEHOLDER.findall(form)}
        for form in forms(text):
            assert form.strip() == form != "", name
            assert set(PLACEHOLDER.findall(form)) == wanted, name
        if isinstance(text, dict):
            assert set(text) in ({"other"}, {"one", "other"}), name


def used_names() -> set[str]:
    """Names of texts in the code, also the start of those that are put together."""
    code = [path.read_text(encoding="utf-8") for path in (*WEB.glob("*.js"), *WEB.glob("*.html"))]
    return {
        name for text in code for name in re.findall(r"(?:[\"'`]|\{\{)([a-z_]+\.[a-z0-9_]*)", text)
    }


def test_each_text_is_used_and_each_used_one_exists() -> None:
    used = used_names()
    starts = tuple(name for name in used if name.endswith((".", "_")))
    assert [name for name in ENGLISH if name not in used and not name.startswith(starts)] == []
    groups = {name.partition(".")[0] for name in ENGLISH}
    named = {name for name in used - set(starts) if name.partition(".")[0] in groups}
    assert [name for name in named if name not in ENGLISH] == []


class Shown(HTMLParser):
    """What people see or hear of an HTML file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside.append(tag)
        shown = dict(attrs)
        if tag == "option" and "lang" in shown:
            self._inside[-1] = "language"
        if tag != "meta" or shown.get("name") == "description":
            self.found += [shown[name] or "" for name in SHOWN if name in shown]

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] not in ("language", "script"):
            self.found.append(data)


def test_files_of_texts_are_small_and_the_page_carries_none_of_the_operators() -> None:
    files = [*(WEB / "languages").glob("**/*.json")]
    assert len(files) == 2 * len(TEXTS)
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 400
    assert all(name.startswith("operator.") for name in OPERATOR["en"])
    assert not any(name.startswith("operator.") for name in PAGE["en"])


@pytest.mark.parametrize("name", ["index.html", "operator.html"])
def test_no_text_is_written_into_the_html(name: str) -> None:
    found = Shown((WEB / name).read_text(encoding="utf-8")).found
    left = [re.sub(r"\{\{[\w.]+\}\}", "", text).strip() for text in found]
    assert [
        text for text in left if re.search(r"[^\W\d_]", text) and text not in SAME_EVERYWHERE
    ] == []
    assert len(found) > 50


CODE = re.compile(
    r"""\bclass(?:Name)?:\s*(?:"[^"]*"|`[^`]*`)          # lists of classes
    |querySelector(?:All)?\((?:"[^"]*"|`[^`]*`)\)        # selectors
    |(?:import|from)\s*\(?"[^"]*"
    |^\s*(?://|/?\*).*$|//\ .*$                          # comments
    |console\.\w+\(.*""",
    re.VERBOSE | re.MULTILINE,
)
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\]|\\.)*)`')
INSIDE = re.compile(r"\$\{(?:[^{}]|\{[^{}]*\})*\}|\$\{.*", re.DOTALL)
"""Code in a template; one with a template inside ends early."""
NOT_SHOWN = re.compile(
    r"\w+[-.]\w+\S*|[A-Z]\w*Error|Arrow\w+|Enter|Escape|Return|Home|End|Delete|Tab|Space|Backspace|Page(?:Up|Down)"
    r"|Files|Mac|UNICODE|Exif.*|Small|Medium|Large|GET|POST|PUT|DELETE|PNG|JPEG|WEBP|[A-Z]"
    r"|Bearer.*|Negative prompt:.*"
    r"|\(prefers.*|toast bad|not described yet|Steps|CFG scale|Seed|Size|Model"
    r"|Denoising strength|Hires upscale"
)
"""Names of keys, errors, methods, values."""


def sentences(code: str) -> list[str]:
    """The literals of JavaScript code that look like text for people."""
    found = []
    for literal in LITERAL.finditer(CODE.sub("", code)):
        text = INSIDE.sub(" ", literal[1] or literal[2] or "").strip()
        words = re.findall(r"[^\W\d_]{2,}", text)
        shown = len(words) > 1 and re.search(r"[^\W\d_]{2,}[,.:]? [^\W\d_]{2,}", text)
        if (shown or re.match(r"[A-Z][a-z]+", text)) and not NOT_SHOWN.fullmatch(text):
            found.append(text)
    return found


def test_no_text_is_written_into_the_code() -> None:
    assert SCRIPTS
    texts = {path.name: sentences(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    assert {name: found for name, found in texts.items() if found} == {}


def test_texts_in_code_are_found() -> None:
    assert sentences('toast("Removed.")') == ["Removed."]
    assert sentences("words = `${some} tasks in the queue`") == ["tasks in the queue"]
    assert sentences('el("p", { class: "quiet icon" }, t("form.prompt")) // A comment.') == []


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("fr-CA,fr;q=0.9", "fr"),
        ("nl, de;q=0.5, en;q=0.1", "de"),
        ("zh-Hant-TW", "zh"),
        ("nl", "en"),
    ],
)
def test_the_browser_chooses_the_language(
    served: ServerProcess, accepted: str, language: str
) -> None:
    answer = requests.get(served.url, headers={"Accept-Language": accepted}, timeout=60)
    assert answer.headers["Content-Language"] == language
    assert f'<html lang="{language}">' in answer.text
    assert TEXTS[language]["form.generate"] in answer.text
    assert {"Cookie", "Accept-Language"} <= set(answer.headers["Vary"].split(", "))
    assert "{{" not in answer.text


@needs_chromium
@pytest.mark.parametrize("language", slow_except(["de"], TEXTS))
def test_the_page_works_in_each_language(visit: Visit, language: str) -> None:
    me, texts = visit(locale=language), TEXTS[language]
    me.page.goto(me.url + "operator")
    expect(me["#queue-words"]).to_have_text(texts["operator.queue_empty"])
    expect(me["#pause"]).to_have_text(texts["operator.pause"])
    expect(me["#machines tr"]).to_contain_text(texts["operator.drain"])
    expect(me["#status"]).to_contain_text(texts["operator.is_ready"])
    assert not NAME_OF_A_TEXT.search(me["body"].inner_text())
    me.open()
    expect(me["html"]).to_have_attribute("lang", language)
    expect(me["#generate > span"].first).to_have_text(texts["form.generate"])
    me["#generate"].click()
    expect(me["#prompt-error"]).to_have_text(texts["form.enter_prompt"])
    me.draw("ein Bild")
    expect(me.shown("ein Bild")).to_have_count(1)
    me.assert_accessible()
    assert not NAME_OF_A_TEXT.search(me["body"].inner_text())


@needs_chromium
def test_a_chosen_language_stays_and_the_form_keeps_its_words(visit: Visit) -> None:
    me = visit().open()
    me["#prompt"].fill("a lighthouse")
    me["#language"].select_option("de")
    expect(me["html"]).to_have_attribute("lang", "de")
    expect(me["#prompt"]).to_have_value("a lighthouse")
    expect(me["#state-words"]).to_have_text(TEXTS["de"]["state.ready"])
    me.page.reload()
    expect(me["#language"]).to_have_value("de")
    me.page.goto(me.url + "operator")
    assert {"name": "language", "value": "de"}.items() <= me.context.cookies()[0].items()
    expect(me["h1"]).to_have_text(TEXTS["de"]["page.operator"])
    me["#language"].select_option("fr")
    expect(me["h1"]).to_have_text(TEXTS["fr"]["page.operator"])
