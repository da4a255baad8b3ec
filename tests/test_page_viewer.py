"""The large view: zoom, swipe, comparing, copying, links."""

import re

from conftest import needs_chromium
from pages import Visit, Visitor, picture_file
from playwright.sync_api import expect

pytestmark = needs_chromium


def opened(me: Visitor, *prompts: str) -> None:
    """The last one is in the large view."""
    for prompt in prompts:
        me.draw(prompt)
        expect(me.shown(prompt)).to_have_count(1)
    me.card(prompts[-1]).locator(".open").click()
    expect(me["#viewer-picture"]).to_have_js_property("naturalWidth", 64)


SCALE = "new DOMMatrix(getComputedStyle(document.getElementById('viewer-picture')).transform).a"


def scale(me: Visitor) -> float:
    found: float = me.page.evaluate(SCALE)
    return found


def test_the_large_view_counts_the_pictures_and_turns_by_keys_and_buttons(visit: Visit) -> None:
    me = visit().open()
    opened(me, "first", "second", "third")
    expect(me["#viewer-counter"]).to_have_text("1 of 3")
    me.page.keyboard.press("ArrowRight")
    expect(me["#viewer-counter"]).to_have_text("2 of 3")
    me["#viewer-right"].click()
    expect(me["#viewer-words"]).to_have_text("first")
    expect(me["#viewer-right"]).to_be_disabled()


def test_a_picture_is_zoomed_by_wheel_keys_buttons_and_double_click_and_moved(
    visit: Visit,
) -> None:
    me = visit().open()
    opened(me, "looked at closely")
    fits = me.page.evaluate(
        "Math.min(document.getElementById('stage').clientWidth,"
        " document.getElementById('stage').clientHeight) / 64"
    )
    expect(me["#zoom-fit"]).to_have_text("1:1")
    me.page.keyboard.press("1")
    expect(me["#zoom-fit"]).to_have_text("100\u00a0%")
    assert abs(scale(me) * fits - 1) < 0.01  # a pixel of the picture is one of the screen
    me.page.keyboard.press("0")
    assert scale(me) == 1
    me["#zoom-in"].click()
    assert scale(me) == 1.5
    me["#viewer-picture"].hover()
    me.page.mouse.wheel(0, -400)
    me.page.wait_for_function(f"{SCALE} > 1.5")
    expect(me["#stage"]).to_have_class(re.compile("zoomed"))
    zoomed = scale(me)
    me.page.mouse.down()
    me.page.mouse.move(500, 300)
    me.page.mouse.up()
    assert scale(me) == zoomed
    me["#zoom-fit"].click()
    assert scale(me) == 1
    assert me.page.evaluate("document.getElementById('stage').scrollTop") == 0
    me["#viewer-picture"].dblclick()
    expect(me["#zoom-fit"]).to_have_text("100\u00a0%")


SWIPE = """(by) => {
  const image = document.getElementById("viewer-picture");
  image.setPointerCapture = () => {};
  const send = (kind, x) => image.dispatchEvent(new PointerEvent(kind, {
    pointerId: 9, pointerType: "touch", clientX: x, clientY: 200, bubbles: true}));
  send("pointerdown", 200);
  send("pointermove", 200 + by / 2);
  send("pointerup", 200 + by);
}"""


def test_a_swipe_turns_to_the_next_picture_and_back(visit: Visit) -> None:
    me = visit().open()
    opened(me, "older", "newer")
    me.page.evaluate(SWIPE, -120)
    expect(me["#viewer-words"]).to_have_text("older")
    me.page.evaluate(SWIPE, 120)
    expect(me["#viewer-words"]).to_have_text("newer")
    me.page.evaluate(SWIPE, -20)  # too short
    expect(me["#viewer-words"]).to_have_text("newer")


def test_two_selected_pictures_are_compared_with_a_slider(visit: Visit) -> None:
    me = visit().open()
    opened(me, "before it", "after it")
    me.page.keyboard.press("Escape")
    me["#select"].click()
    expect(me["#select-compare"]).to_be_disabled()
    for prompt in ("after it", "before it"):
        me.card(prompt).locator(".open").click()
    me["#select-compare"].click()
    expect(me["#viewer-words"]).to_have_text("after it")
    expect(me["#compare-picture"]).to_have_js_property("naturalWidth", 64)
    expect(me["#compare-picture"]).to_have_attribute("alt", "before it")
    expect(me["#compare-split"]).to_be_focused()
    me.page.keyboard.press("End")
    expect(me["#compare"]).to_have_attribute("style", re.compile("--split: 100%"))
    me.assert_accessible()
    me.page.keyboard.press("Escape")
    expect(me["#compare"]).to_be_hidden()


def test_an_edited_picture_is_compared_with_the_one_it_was_made_from(visit: Visit) -> None:
    me = visit().open()
    opened(me, "made from nothing")
    expect(me.page.get_by_role("button", name="Before and after")).to_have_count(0)
    me.page.keyboard.press("Escape")
    me["#init_image"].set_input_files(picture_file(64, 64, "navy"))
    opened(me, "made from a picture")
    me.page.get_by_role("button", name="Before and after").click()
    expect(me["#compare-picture"]).to_have_js_property("naturalWidth", 64)
    assert me["#compare-picture"].evaluate("image => image.src").startswith("blob:")


def test_prompt_parameters_and_a_link_are_copied(visit: Visit) -> None:
    me = visit(permissions=["clipboard-read", "clipboard-write"]).open()
    opened(me, "copied words")
    seed = me["#viewer-params"].inner_text().partition("Seed")[2].split()[0]

    def copied(button: str, words: str) -> str:
        me.page.get_by_role("button", name=button).click()
        expect(me["#viewer #toasts"]).to_contain_text(words)
        text: str = me.page.evaluate("navigator.clipboard.readText()")
        return text

    assert copied("Copy the prompt", "The prompt is copied.") == "copied words"
    assert copied("Copy the parameters", "The parameters are copied.") == (
        f"copied words\nSteps: 2, Seed: {seed}, Size: 64x64, Model: noise-flux1"
    )
    link = copied("Copy a link", "The link is copied.")
    assert me.page.request.get(link).headers["content-type"] == "image/jpeg"


SHARE = """
navigator.canShare = () => true;
navigator.share = async ({files}) => { document.body.dataset.shared = files[0].name; };
"""


def test_a_picture_is_given_to_the_systems_share_sheet_where_there_is_one(visit: Visit) -> None:
    me = visit()
    me.page.add_init_script(SHARE)
    me.open()
    opened(me, "shared")
    me.page.get_by_role("button", name="Share", exact=True).click()
    expect(me["body"]).to_have_attribute("data-shared", re.compile(r"^shared \d+\.jpg$"))
