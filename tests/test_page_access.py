"""The page for everyone: keyboard, phone, themes, and the accessibility rules of axe."""

import re

import pytest
from conftest import needs_chromium
from pages import Scheme, Visit
from playwright.sync_api import expect

pytestmark = needs_chromium


SCHEMES: tuple[Scheme, ...] = ("light", "dark")
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def test_everything_fits_on_a_phone_and_is_large_enough_to_touch(visit: Visit) -> None:
    me = visit(**PHONE).open()
    me.draw("a very long word: " + "w" * 300)
    expect(me[".card.loaded"]).to_have_count(1)

    def check(name: str) -> None:
        me.picture(name)
        wide, seen = me.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= seen == 360
        small = me.page.evaluate(
            """() => [...document.querySelectorAll("button, a, select, textarea, input, .zone")]
              .filter((node) => node.checkVisibility() && !node.matches(".unseen, .skip"))
              .map((node) => [node, node.getBoundingClientRect()])
              .filter(([node, box]) => box.height < 43.9 || box.width < 43.9)
              .map(([node, box]) => `${node.outerHTML.slice(0, 90)} ${box.width}x${box.height}`)"""
        )
        assert small == []

    check("phone")
    me[".card .open"].first.tap()
    expect(me["#viewer"]).to_be_visible()
    check("phone-large-view")


def test_the_page_can_be_used_with_the_keyboard_only(visit: Visit) -> None:
    me = visit().open()
    keys = me.page.keyboard

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(60):
            keys.press(key)
            if me.page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached with the keyboard")

    keys.press("Tab")
    expect(me[".skip"]).to_be_focused()
    tab_to("#prompt")
    keys.type("by keyboard")
    tab_to("[name=shape]")
    for _ in range(3):
        keys.press("ArrowRight")
    expect(me["input[value='16:9']"]).to_be_checked()
    tab_to("[name=scale]")
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    tab_to("#steps")
    keys.press("ArrowDown")
    expect(me["#steps"]).to_have_value("3")
    keys.press("Control+Enter")
    expect(me.shown("by keyboard")).to_have_count(1)
    tab_to(".open")
    assert me.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    expect(me["#viewer"]).to_be_visible()
    expect(me["#viewer-close"]).to_be_focused()
    keys.press("Escape")
    expect(me[".card .open"]).to_be_focused()
    tab_to("[aria-label^=Vary]")
    keys.press("Enter")
    expect(me.shown("by keyboard")).to_have_count(2)


@pytest.mark.parametrize(
    ("platform", "keys"),
    [("Linux x86_64", "Ctrl Enter"), ("MacIntel", "\N{PLACE OF INTEREST SIGN} Return")],
)
def test_keys_have_the_names_of_the_users_platform(visit: Visit, platform: str, keys: str) -> None:
    me = visit()
    me.page.add_init_script(
        f"Object.defineProperty(Navigator.prototype, 'platform', {{get: () => '{platform}'}})"
    )
    expect(me.open()[".keys"]).to_have_text(f"Generate with {keys}")
    me["#prompt"].fill("by the Mac's own keys")
    me.choose("scale", "Small")
    me.page.keyboard.press("Meta+Enter" if platform == "MacIntel" else "Control+Enter")
    expect(me.card("by the Mac's own keys")).to_have_count(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_theme_follows_the_system_until_the_user_chooses_one(
    visit: Visit, scheme: Scheme
) -> None:
    other: Scheme = "light" if scheme == "dark" else "dark"
    me = visit(color_scheme=scheme).open()

    def brightness() -> float:
        colour = me.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert (brightness() > 128) == (scheme == "light")
    me.page.emulate_media(color_scheme=other)
    expect(me["html"]).to_have_attribute("data-theme", other)
    me.page.emulate_media(color_scheme=scheme)
    expect(me["html"]).to_have_attribute("data-theme", scheme)
    me["#theme"].click()
    expect(me["html"]).to_have_attribute("data-theme", other)
    assert (brightness() > 128) == (other == "light")
    me.page.reload()
    expect(me["html"]).to_have_attribute("data-theme", other)


def test_in_forced_colours_the_button_has_a_border(visit: Visit) -> None:
    me = visit(forced_colors="active").open()
    expect(me["#generate"]).to_have_css("border-top-style", "solid")


def test_on_a_phone_pictures_are_in_two_columns_and_beside_the_form_when_it_is_turned(
    visit: Visit,
) -> None:
    me = visit(**PHONE).open()
    for prompt in ("one", "two"):
        me.draw(prompt)
        expect(me.shown(prompt)).to_have_count(1)
    tops = me.page.eval_on_selector_all(".card", "nodes => nodes.map((one) => one.offsetTop)")
    assert len(set(tops)) == 1
    me.page.set_viewport_size({"width": 740, "height": 360})
    form, results = me[".compose"].bounding_box(), me[".results"].bounding_box()
    assert form
    assert results
    assert form["x"] + form["width"] <= results["x"]


def test_axe_finds_no_serious_accessibility_problem_by_day_and_by_night(visit: Visit) -> None:
    me = visit().open()
    me["#model"].select_option("noise-z-image")

    def check(name: str) -> None:
        me.page.emulate_media(color_scheme="dark")
        me.picture(f"{name}-dark")
        me.assert_accessible("color-contrast")  # all else is the same by day and by night
        me.page.emulate_media(color_scheme="light")
        me.picture(f"{name}-light")
        me.assert_accessible()

    check("empty")
    for prompt in ("a harbour at night", "quinces and a blue jug", "a fox under birch trees"):
        me.draw(prompt, size=160)
        expect(me.shown(prompt)).to_have_count(1)
    me["#model"].select_option("dev")
    me.draw("a picture that fails")
    expect(me.card("a picture that fails")).to_contain_text("Failed.")
    expect(me["#toasts"]).to_be_empty()
    me["#model"].select_option("noise-z-image")
    me.hold()
    me.draw("a picture that runs")
    me.draw("a picture that waits")
    expect(me[".unfinished.running"]).to_have_count(1)
    expect(me["#queue .row"]).to_have_count(2)
    expect(me["#toasts"]).to_be_empty()
    me["#prompt"].fill(" ")
    me["#generate"].click()
    expect(me["#prompt-error"]).not_to_be_empty()
    check("busy")
    me.card("quinces and a blue jug").locator(".open").click()
    expect(me["#viewer-picture"]).to_have_js_property("naturalWidth", 160)
    check("large-view")
    me.page.keyboard.press("Escape")
