"""The pictures on the page: search, what has ended, the large view, and the notice of a new one."""

import re

import pytest
from conftest import needs_chromium
from pages import ENTER, PageServer, Visit, picture_file
from playwright.sync_api import expect

pytestmark = needs_chromium


def test_prompts_and_tags_are_searched_and_ended_tasks_are_cleared(visit: Visit) -> None:
    me = visit().open()
    expect(me["#tools"]).to_be_hidden()
    me["#tags"].fill("draft")
    me.draw("A red lighthouse")
    expect(me.shown("A red lighthouse")).to_have_count(1)
    me["#tags"].fill("")
    me.hold()
    me.draw("a cancelled boat")
    cancelled = me.card("a cancelled boat")
    cancelled.get_by_role("button", name="Cancel").click()
    expect(cancelled).to_contain_text("Cancelled.")
    expect(cancelled.locator("use")).to_have_attribute("href", "#i-stop")
    for words, found in (("LIGHT red", 1), ("draft", 1), ("a", 2), ("light boat", 0)):
        me["#search"].fill(words)
        expect(me[".card"]).to_have_count(found)
    expect(me["#yours-words"]).to_have_text("no prompt with these words")
    me["#search"].fill("")
    me["#clear-ended"].click()
    expect(me[".card"]).to_have_count(1)
    me.page.get_by_role("button", name="Undo").click()
    expect(me[".card"]).to_have_count(2)
    me["#clear-ended"].click()
    expect(me["#toasts"]).to_be_empty()
    me.page.reload()
    expect(me.shown("A red lighthouse")).to_have_count(1)
    expect(me[".card"]).to_have_count(1)
    expect(me["#clear-ended"]).to_be_hidden()


def test_back_closes_the_large_view_and_stays_on_the_page(visit: Visit) -> None:
    me = visit().open()
    me.draw("looked at")
    expect(me.shown("looked at")).to_have_count(1)
    me.card("looked at").locator(".open").click()
    expect(me["#viewer"]).to_be_visible()
    me.page.evaluate("history.back()")
    expect(me["#viewer"]).to_be_hidden()
    assert me.page.url == me.url
    me.card("looked at").locator(".open").click()
    me.page.keyboard.press("Escape")
    expect(me["#viewer"]).to_be_hidden()
    me.page.wait_for_function("!history.state?.viewer")
    assert me.page.url == me.url


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A lighthouse: fog/early?", r"A lighthouse fog early \d+\.jpg"),
        (
            "\u05de\u05d2\u05d3\u05dc\u05d5\u05e8 \u05d1\u05d9\u05dd",
            "\u05de\u05d2\u05d3\u05dc\u05d5\u05e8 \u05d1\u05d9\u05dd \\d+\\.jpg",
        ),
    ],
)
def test_a_download_is_named_after_the_prompt_in_any_script(
    visit: Visit, prompt: str, name: str
) -> None:
    me = visit().open()
    me.draw(prompt)
    card = me.shown(prompt)
    expect(card).to_have_count(1)
    direction = "rtl" if ord(prompt[0]) > 127 else "ltr"
    for words in (me["#prompt"], card.locator(".words")):
        expect(words).to_have_css("direction", direction)
    card.hover()
    with me.page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    assert re.fullmatch(name, download.value.suggested_filename)


def test_a_photo_that_the_browser_cannot_read_is_explained(visit: Visit) -> None:
    me = visit().open()
    file = picture_file(64, 64, "navy") | {"name": "IMG_1.HEIC", "mimeType": "image/heic"}
    me["#init_image"].set_input_files({**file, "buffer": b"\0\0\0\x18ftypheic"})
    expect(me["#init_image-error"]).to_contain_text("IMG_1.HEIC is a HEIC photo")


def test_a_fixed_seed_is_seen_at_the_button_and_made_random_there(visit: Visit) -> None:
    me = visit().open()
    expect(me["#fixed-seed"]).to_be_hidden()
    me.draw("once")
    expect(me.shown("once")).to_have_count(1)
    me.card("once").hover()
    me.card("once").get_by_role("button", name="Again").click()
    expect(me["#fixed-seed"]).to_be_in_viewport()
    me["#random-seed"].click()
    expect(me["#fixed-seed"]).to_be_hidden()
    expect(me["input[name=seed_mode][value=random]"]).to_be_checked()


NOTIFICATION = """
window.shown = [];
window.Notification = class extends EventTarget {
  static permission = "granted";
  static requestPermission = async () => "granted";
  constructor(title, { body }) { super(); window.shown.push(`${title}: ${body}`); }
};
document.hasFocus = () => window.looks ?? true;
"""
"""The browser's notifications, which need a desktop, and a page that can lose the focus."""


def test_a_finished_picture_is_announced_in_the_tab_and_by_a_notification(
    visit: Visit, served: PageServer
) -> None:
    me = visit()
    me.page.add_init_script(NOTIFICATION)
    me.open()
    title = me.page.title()
    me["#notify"].click()
    expect(me["#toasts"]).to_contain_text("notification")
    expect(me["#notify"]).to_have_attribute("aria-pressed", "true")
    me.hold()
    me.draw("announced")
    expect(me.page).to_have_title(re.compile(rf"\d+ s|min|soon · {title}"))
    me.page.evaluate("window.looks = false")
    me.go_on()
    expect(me.page).to_have_title(f"(1 ready) {title}")
    expect(me["link[rel=icon]"]).to_have_attribute("href", "web/ready.svg")
    assert me.page.evaluate("window.shown") == ["Your picture is ready: announced"]
    me.page.evaluate("window.looks = true; window.dispatchEvent(new Event('focus'))")
    expect(me.page).to_have_title(title)
    expect(me["link[rel=icon]"]).to_have_attribute("href", "web/icon.svg")
    me.page.reload()
    expect(me["#notify"]).to_have_attribute("aria-pressed", "true")


def test_the_size_of_an_upscaled_picture_is_that_of_its_file(visit: Visit) -> None:
    """The answer of the server is changed: no upscaler is small enough for a test of the page."""
    me = visit().open()
    me.draw("upscaled", size=80)
    expect(me.shown("upscaled")).to_have_count(1)
    key = me.page.evaluate("Object.keys(localStorage).find((name) => name.includes('task:'))")
    me.page.evaluate(
        """(key) => {
          const task = JSON.parse(localStorage.getItem(key));
          task.params.upscale = 1.5;
          localStorage.setItem(key, JSON.stringify(task));
        }""",
        key,
    )
    me.page.reload()
    expect(me.card("upscaled").locator(".facts")).to_contain_text("120 \u00d7 120")


def test_a_tall_picture_is_shown_whole(visit: Visit) -> None:
    me = visit().open()
    me["#prompt"].fill("tall")
    me.choose("shape", "custom")
    me.page.evaluate(ENTER, {"width": 64, "height": 128, "steps": 2})
    me["#generate"].click()
    expect(me.shown("tall")).to_have_count(1)
    shown, whole = me.shown("tall").evaluate(
        "card => ['.open', '.open img'].map((name) => card.querySelector(name).offsetHeight)"
    )
    assert shown == whole


def test_a_failure_names_the_loras_of_the_task(visit: Visit) -> None:
    me = visit().open()
    words = me.page.evaluate(
        """async () => (await import("./web/words.js")).failure({
          error: {message: "The control_image is broken."},
          params: {loras: [{name: "wild"}, {name: "calm"}]},
        })"""
    )
    assert words == "The control image is broken. LoRAs of the task: wild, calm."


def test_long_waits_have_no_decimals_and_become_days(visit: Visit) -> None:
    me = visit().open()
    words = me.page.evaluate(
        """async () => [75, 200, 9_000, 40_000, 400_000]
          .map((await import("./web/words.js")).duration)"""
    )
    assert words == ["75 s", "3 min", "2.5 h", "11 h", "5 days"]
