"""The gallery: when pictures expire, favourites, selecting several, long lists."""

import json
import zipfile
from typing import Any

import pytest
from conftest import ServerProcess, needs_chromium
from pages import PageServer, Visit, Visitor
from playwright.sync_api import expect

pytestmark = needs_chromium


def draw_all(me: Visitor, *prompts: str) -> None:
    for prompt in prompts:
        me.draw(prompt)
        expect(me.shown(prompt)).to_have_count(1)


def draw_a_pair(me: Visitor) -> None:
    """One task with two pictures."""
    me["#n"].fill("2")
    me.draw("a pair")
    expect(me.shown("a pair")).to_have_count(2)


def expires_at(served: ServerProcess, task_id: str) -> float | None:
    found: float | None = served.get("/status", task_id=task_id).json().get("expires_at")
    return found


def test_a_card_says_when_its_picture_expires_and_a_favourite_does_not(
    visit: Visit, served: PageServer
) -> None:
    me = visit().open()
    draw_all(me, "to be kept")
    task_id = me.task_ids()[0]
    card = me.card("to be kept")
    expect(card.locator(".expiry")).to_have_text("24 h")
    assert expires_at(served, task_id)
    card.hover()
    card.get_by_role("button", name="Make it a favourite").click()
    expect(card.locator(".expiry")).to_have_text("kept")
    assert served.get("/status", task_id=task_id).json()["kept"] is True
    me.page.reload()
    star = me.card("to be kept").locator(".star")
    expect(star).to_have_attribute("aria-pressed", "true")
    star.click()
    expect(me.card("to be kept").locator(".expiry")).to_have_text("24 h")
    assert expires_at(served, task_id)


def test_favourites_are_shown_alone(visit: Visit) -> None:
    me = visit().open()
    draw_all(me, "plain", "loved")
    expect(me["#favourites"]).to_be_hidden()
    me.card("loved").locator(".open").click()
    me["#viewer-actions .star"].click()
    expect(me["#viewer-params"]).to_contain_text("favourite")
    me.page.keyboard.press("Escape")
    me["#favourites"].click()
    expect(me[".card"]).to_have_count(1)
    expect(me.card("loved")).to_have_count(1)
    me["#favourites"].click()
    expect(me[".card"]).to_have_count(2)


def test_the_servers_limit_of_kept_pictures_is_a_sentence(visit: Visit) -> None:
    me = visit().open()
    draw_all(me, "one too many")
    body = {"error": {"code": "keep_limit", "message": "2 pictures are kept for you."}}
    me.page.route("**/keep?*", lambda route: route.fulfill(status=409, json=body))
    me.expected_statuses.add(409)
    me.card("one too many").hover()
    me.card("one too many").locator(".star").click()
    expect(me["#toasts"]).to_contain_text("2 pictures are kept for you.")
    expect(me.card("one too many").locator(".star")).to_have_attribute("aria-pressed", "false")


def test_expired_pictures_are_counted_and_shown_only_on_request(visit: Visit) -> None:
    me = visit().open()
    draw_all(me, "still there", "long gone")
    me.page.evaluate(
        """() => {
          for (const name of Object.keys(localStorage)) {
            const task = JSON.parse(localStorage.getItem(name));
            if (task?.params?.prompt !== "long gone") continue;
            localStorage.setItem(name, JSON.stringify({...task, status: "gone"}));
          }
        }"""
    )
    me.page.reload()
    expect(me["#expired"]).to_have_text("1 expired")
    expect(me[".card"]).to_have_count(1)
    me["#expired"].click()
    expect(me.card("long gone")).to_contain_text("No longer on the server.")
    expect(me.card("long gone").locator(".frame use")).to_have_attribute("href", "#i-clock")
    me["#clear-ended"].click()
    expect(me[".card"]).to_have_count(1)
    expect(me["#expired"]).to_be_hidden()


def test_several_pictures_are_selected_downloaded_made_favourites_and_removed(
    visit: Visit, served: PageServer
) -> None:
    me = visit().open()
    draw_a_pair(me)
    me["#n"].fill("1")
    draw_all(me, "a single one")
    task_ids = me.task_ids()
    me["#select"].click()
    expect(me["#selection-words"]).to_have_text("0 selected")
    me.card("a single one").locator(".open").click()
    me.card("a pair").last.locator(".open").click(modifiers=["Shift"])
    expect(me["#selection-words"]).to_have_text("3 selected")
    me.card("a pair").first.locator(".open").click()
    expect(me["#selection-words"]).to_have_text("2 selected")
    me.assert_accessible()
    with me.page.expect_download() as download:
        me["#select-download"].click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = archive.namelist()
    assert [name.rsplit(" ", 1)[0] for name in names] == ["a single one", "a pair"]

    me["#select"].click()
    me["#select-all"].click()
    me["#select-star"].click()
    expect(me[".expiry.kept"]).to_have_count(3)
    expect(me["#toasts"]).to_contain_text("3 pictures are favourites now.")
    assert served.get("/status", task_id=task_ids[0]).json()["kept"] is True

    me["#select"].click()
    me["#select-all"].click()
    me["#select-remove"].click()
    expect(me[".card"]).to_have_count(0)
    me.page.get_by_role("button", name="Undo").click()
    expect(me[".card"]).to_have_count(3)
    me["#select"].click()
    me.page.keyboard.press("Escape")
    expect(me["#selection"]).to_be_hidden()


def test_a_task_whose_favourite_is_removed_is_kept_no_longer(
    visit: Visit, served: PageServer
) -> None:
    me = visit().open()
    draw_a_pair(me)
    task_id = me.task_ids()[0]
    me.card("a pair").first.hover()
    me.card("a pair").first.locator(".star").click()
    expect(me[".expiry.kept"]).to_have_count(2)
    me.card("a pair").first.get_by_role("button", name="Remove").click()
    expect(me.card("a pair")).to_have_count(1)
    assert served.get("/status", task_id=task_id).json()["kept"] is True, "it can be undone"
    me["#toasts .toast"].last.dispatch_event("go")
    expect(me[".expiry.kept"]).to_have_count(0)
    assert "kept" not in served.get("/status", task_id=task_id).json()


MANY = """(count) => {
  const names = Object.keys(localStorage);
  const name = names.find((one) => one.includes("task:"));
  const task = JSON.parse(localStorage.getItem(name));
  for (let number = 0; number < count; number++) {
    const id = `${task.id.slice(0, 12)}${String(number).padStart(4, "0")}`;
    const copy = {...task, id, created: task.created - number - 1};
    copy.params = {...task.params, prompt: `picture ${number}`};
    localStorage.setItem(name.replace(task.id, id), JSON.stringify(copy));
  }
}"""
"""So many more finished tasks in this browser."""


@pytest.fixture
def many(visit: Visit) -> Visitor:
    """The page of a person with 500 more pictures; all show the same file."""
    me = visit().open()
    draw_all(me, "the first one")
    task_id = me.task_ids()[0]
    me.page.evaluate(MANY, 500)

    def same(route: Any) -> None:
        route.continue_(url=f"{me.url}thumbnail?task_id={task_id}&index=0&size=512")

    me.page.route("**/thumbnail?*", same)
    me.page.reload()
    expect(me.shown("picture 3")).to_have_count(1)
    return me


@pytest.mark.slow
def test_500_pictures_come_as_the_page_is_scrolled_and_only_those_in_view_are_laid_out(
    many: Visitor,
) -> None:
    assert many[".card"].count() < 100
    for _ in range(1_000):
        if many.card("picture 499").count():
            break
        many[".card"].last.scroll_into_view_if_needed()
    expect(many["#yours-words"]).to_have_text("501 finished")
    many.card("picture 499").scroll_into_view_if_needed()
    expect(many.shown("picture 499")).to_have_count(1)
    laid_out = many.page.evaluate(
        """[...document.querySelectorAll(".card")].filter((card) =>
          card.querySelector(".open").checkVisibility({contentVisibilityAuto: true})).length"""
    )
    assert 0 < laid_out < 100
    many["#search"].fill("picture 250")
    expect(many[".card"]).to_have_count(1)


def test_a_queue_of_1000_tasks_is_shown_as_its_beginning_and_a_number(visit: Visit) -> None:
    me = visit()
    params = {"model": "noise-flux1", "width": 64, "height": 64, "steps": 2, "count": 1}

    def answer(route: Any) -> None:
        tasks = [
            {
                "mine": False,
                "status": "waiting",
                "pos": place,
                "wait_remaining": place + 1,
                "created_at": 0.0,
                "params": params,
            }
            for place in range(100)
        ]
        route.fulfill(body=json.dumps({"length": 1000, "paused": False, "tasks": tasks}))

    me.page.route("**/queue?*", answer)
    me.open()
    expect(me["#queue-words"]).to_have_text("1000 tasks")
    expect(me["#queue .row"]).to_have_count(12)
    expect(me["#queue"]).to_have_attribute("data-more", "and 988 more")
    expect(me["#queue .who"].first).to_have_text("Someone else")
    me.page.set_viewport_size({"width": 1440, "height": 900})
    cut = "rows => rows.filter((one) => one.scrollWidth > one.clientWidth).length"
    assert me["#queue .who"].evaluate_all(cut) == 0
