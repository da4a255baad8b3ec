"""The queue on the page: tasks that run, wait, fail and are cancelled, and those of others."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess, StartServer, needs_chromium
from holding import Hold
from pages import MODELS, NO_EVENTS, Visit, Visitor, picture_file
from playwright.sync_api import Route, expect
from stalling_hub import StallingHub

pytestmark = needs_chromium

SOMEONE = "Someone else"


def test_the_pictures_of_a_batch_appear_one_by_one_and_it_stops_after_the_current_one(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me.hold(after=1)
    me["#n"].fill("3")
    me.draw("a batch")
    card = me[".card.unfinished"]
    stop = card.get_by_role("button", name="Stop after this picture")
    expect(me.shown("a batch").first).to_be_visible()
    expect(card).to_have_count(1)
    stop.click()
    expect(card).to_contain_text("Stops after this picture.")
    expect(stop).to_be_hidden()
    me.picture("batch")
    me.go_on()
    expect(card).to_have_count(0)
    status = served.get("/status", task_id=me.task_ids()[0]).json()
    assert (status["status"], status["images_done"], status["last_image"]) == ("cancelled", 2, 1)
    expect(me.shown("a batch")).to_have_count(2)
    expect(me[".card.new"]).to_have_count(2)
    me.page.reload()
    expect(me.shown("a batch")).to_have_count(2)
    expect(me[".card.new"]).to_have_count(0)  # these are not animated: a long list stays smooth


def test_a_card_says_which_worker_draws_its_picture(visit: Visit) -> None:
    me = visit()
    me.page.add_init_script(NO_EVENTS)

    def on_a_worker(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "machine": "mac-mini"})

    me.page.route("**/status?*", on_a_worker)
    me.open()
    me.hold()
    me.draw("drawn elsewhere")
    expect(me.card("drawn elsewhere").locator(".status")).to_contain_text("mac-mini")
    me.go_on()
    expect(me.shown("drawn elsewhere")).to_have_count(1)


def test_two_people_see_each_others_tasks_but_not_each_others_prompts(visit: Visit) -> None:
    one, other = visit().open(), visit().open()
    one.hold()
    one.draw("the secret of the one")
    expect(one["#queue .row"]).to_have_count(1)
    other.draw("what the other wants")
    for person in (one, other):
        expect(person["#queue .row"]).to_have_count(2)
        expect(person["#queue .number"].first).to_have_text("now")
        expect(person["#queue .number"].last).to_have_text("1")
        expect(person["#state-words"]).to_have_text("2 tasks in the queue")
    expect(one["#queue .who"].first).to_have_text("the secret of the one")
    expect(one["#queue .who"].last).to_have_text(SOMEONE)
    expect(other["#queue .who"].first).to_have_text(SOMEONE)
    expect(other.card("what the other wants")).to_contain_text("next in the queue")
    assert "secret" not in other.page.content()
    expect(other["#forecast"]).to_contain_text("2 tasks in the queue")
    one.card("the secret of the one").get_by_role("button", name="Cancel").click()
    expect(other["#queue .row"]).to_have_count(1)
    expect(other["#queue .number"]).to_have_text("now")


@pytest.mark.parametrize("events", [True, False])
def test_the_page_shows_at_once_that_a_model_is_loaded(visit: Visit, events: bool) -> None:
    me = visit()
    if not events:
        me.page.add_init_script(NO_EVENTS)
    me.open()
    me.hold()
    for model in ("noise-z-image", "noise-flux1"):
        me["#model"].select_option(model)
        expect(me["#model-note"]).to_contain_text("Not loaded")
        me.draw(f"with {model}")
        card = me.running(f"with {model}")
        expect(card).to_be_visible()
        expect(me["#model-note"]).not_to_contain_text("Not loaded")
        card.get_by_role("button", name="Cancel").click()


def test_a_task_that_waits_for_a_download_shows_its_progress(
    visit: Visit, start_server: StartServer, stalling_hub: StallingHub
) -> None:
    server = start_server("--models", "noise-flux1,schnell", environment=stalling_hub.environment)
    me = visit(server).open()
    me["#model"].select_option("schnell")
    me.draw("a lighthouse")
    expect(me.card("a lighthouse")).to_contain_text("Downloading schnell: 0.0 of 34.0 GB")
    me["#model"].select_option("noise-flux1")
    me.draw("a boat")
    expect(me.shown("a boat")).to_have_count(1)
    me.picture("download")
    stalling_hub.go_on.set()
    expect(me.card("a lighthouse")).to_contain_text("There is no repository")


def test_cancel_ends_a_waiting_and_a_running_task(visit: Visit, served: ServerProcess) -> None:
    me = visit().open()
    me.hold()
    me.draw("first", steps=3)
    me.draw("second")
    second, first = me.task_ids()
    expect(me.card("first").locator(".bar[aria-valuenow]")).to_be_visible()
    for name in ("second", "first"):
        me.card(name).get_by_role("button", name="Cancel").click()
        expect(me.card(name)).to_contain_text("Cancelled.")
    assert [served.get("/status", task_id=one).json()["status"] for one in (first, second)] == [
        "cancelled",
        "cancelled",
    ]
    me.card("first").get_by_role("button", name="Again").click()
    expect(me["#prompt"]).to_have_value("first")
    expect(me["#steps"]).to_have_value("3")


def test_a_reload_loses_neither_tasks_nor_the_form(visit: Visit) -> None:
    me = visit().open()
    me["#theme"].click()
    me.hold()
    me.draw("drawn across a reload")
    me["#init_image"].set_input_files(picture_file(96, 64, "navy"))
    expect(me["[data-field=init_image] .picks img"]).to_be_visible()
    me["#prompt"].fill("not sent yet")
    me["#n"].fill("3")
    me.choose("seed_mode", "locked")
    me["#seed"].fill("42")
    theme = me["html"].get_attribute("data-theme")
    me.page.reload()
    expect(me["html"]).to_have_attribute("data-theme", theme or "")
    expect(me.card("drawn across a reload")).to_be_visible()
    expect(me["#prompt"]).to_have_value("not sent yet")
    expect(me["#n"]).to_have_value("3")
    expect(me["#seed"]).to_have_value("42")
    kept = me["[data-field=init_image] .picks img"]
    expect(kept).to_be_visible()
    expect(kept).to_have_js_property("naturalWidth", 96)
    me.go_on()
    expect(me.shown("drawn across a reload")).to_have_count(1)
    me.page.reload()
    expect(me.shown("drawn across a reload")).to_have_count(1)


def test_a_request_whose_answer_was_lost_is_not_submitted_twice(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    answered: list[str] = []

    def drop_the_answer(route: Any) -> None:
        answered.append(route.fetch().json()["task_id"])
        route.abort()

    me.unreachable_is_expected = True
    me.page.route("**/generate", drop_the_answer)
    me["#prompt"].fill("sent, and no answer")
    me["#generate"].click()
    expect(me["#pending .row"]).to_contain_text("sent, and no answer")
    me.page.unroute("**/generate")
    me.page.reload()
    expect(me.shown("sent, and no answer")).to_have_count(1)
    assert me.task_ids() == list(dict.fromkeys(answered))


def test_a_double_click_submits_one_task_and_two_different_requests_submit_two(
    visit: Visit,
) -> None:
    me = visit().open()
    me.choose("scale", "Small")
    me["#prompt"].fill("clicked twice")
    me["#generate"].dblclick()
    me["#prompt"].fill("right behind it")
    me.page.keyboard.press("Control+Enter")
    me["#prompt"].fill("and one more")
    me.page.keyboard.press("Control+Enter")
    expect(me.shown("and one more")).to_have_count(1)
    expect(me.shown("right behind it")).to_have_count(1)
    expect(me.shown("clicked twice")).to_have_count(1)
    assert len(me.task_ids()) == 3


def test_a_failed_task_shows_the_reason(visit: Visit) -> None:
    me = visit().open()
    me["#model"].select_option("dev")
    expect(me["#model-note"]).to_contain_text("Weights not downloaded yet")
    me.draw("a picture without weights")
    card = me.card("a picture without weights")
    expect(card).to_contain_text("Failed.")
    expect(card.locator(".frame .hint")).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    card.get_by_role("button", name="Remove").click()
    expect(card).to_have_count(0)


def test_the_page_recovers_when_the_server_restarts(
    visit: Visit, start_server: StartServer, hold: Hold
) -> None:
    hold.close()
    server = start_server("--models", MODELS, hold=hold)
    me = visit(server).open()
    me.unreachable_is_expected = True
    me.draw("interrupted")
    expect(me[".unfinished.running"]).to_have_count(1)
    server.stop(signal.SIGKILL)
    expect(me["#unreachable"]).to_contain_text("The server cannot be reached")
    expect(me["body"]).to_have_attribute("data-state", "unreachable")
    me["#prompt"].fill("while it is away")
    me["#generate"].click()
    expect(me["#pending .row"]).to_contain_text("It will be sent when the server can be reached.")
    me.picture("away")
    port = server.url.rsplit(":", 1)[1]
    again = start_server("--models", MODELS, "--port", port)
    assert again.url == server.url
    expect(me["#unreachable"]).to_be_hidden()
    expect(me.shown("interrupted")).to_have_count(1)
    expect(me.shown("while it is away")).to_have_count(1)


def test_a_picture_that_the_server_has_removed_can_be_generated_again(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me.draw("soon gone")
    expect(me.shown("soon gone")).to_have_count(1)
    requests.delete(served.url + "/delete", params={"task_id": me.task_ids()[0]}, timeout=60)
    me.expected_statuses.add(410)  # of the picture
    me.page.reload()
    me["#expired"].click()
    card = me.card("soon gone")
    expect(card).to_contain_text("No longer on the server.")
    card.get_by_role("button", name="Again").click()
    me["#generate"].click()
    expect(me.shown("soon gone")).to_have_count(1)


def sign_in(me: Visitor, key: str) -> None:
    me["#sign-in-key"].fill(key)
    me.page.keyboard.press("Enter")


def test_a_key_shows_the_page_the_favourites_of_its_client_and_no_prompts_of_others(
    visit: Visit, start_server: StartServer, hold: Hold, tmp_path: Path
) -> None:
    keys = {"alice": "alice-0123456789", "bob": "bob-0123456789ab"}
    file = tmp_path / "keys.toml"
    file.write_text("".join(f'[{name}]\nkey = "{key}"\n' for name, key in keys.items()))
    hold.close()
    server = start_server("--models", "noise-flux1", "--keys", str(file), hold=hold)
    body = {"prompt": "a secret of bob", "width": 64, "height": 64, "steps": 2}
    headers = {"Authorization": f"Bearer {keys['bob']}"}
    requests.post(f"{server.url}/generate", json=body, headers=headers, timeout=60)
    me = visit(server)
    me.expected_statuses.add(401)
    me.page.goto(me.url)
    expect(me["#sign-in"]).to_be_visible()
    me.page.keyboard.press("Escape")
    expect(me["#sign-in-key"]).to_be_focused()
    sign_in(me, "no key of anybody")
    expect(me["#key-error"]).to_have_text("This key is not known here.")
    me.expected_statuses.discard(401)
    sign_in(me, keys["alice"])
    expect(me["#sign-in"]).to_be_hidden()
    expect(me["#queue .who"]).to_have_text([SOMEONE])
    expect(me["body"]).not_to_contain_text("a secret of bob")
    me.open()  # the cookie stays
    expect(me["#sign-in"]).to_be_hidden()
    expect(me["#queue .who"]).to_have_text([SOMEONE])
    me.expected_statuses.add(401)
    me.context.clear_cookies()  # as when the operator removes the key: the page asks for one again
    expect(me["#sign-in"]).to_be_visible()
    sign_in(me, keys["alice"])
    expect(me["#sign-in"]).to_be_hidden()
    expect(me["#queue .who"]).to_have_text([SOMEONE])
    hold.open()
    me.draw("a favourite of alice")
    me.card("a favourite of alice").locator(".star").click()
    expect(me[".expiry.kept"]).to_have_count(1)
    for name, shown in (("bob", 0), ("alice", 1)):
        other = visit(server)
        other.expected_statuses.add(401)
        other.page.goto(other.url)
        sign_in(other, keys[name])
        expect(other["#forecast"]).not_to_be_empty()
        expect(other[".expiry.kept"]).to_have_count(shown)
    star = other.shown("a favourite of alice").locator(".star")
    expect(star).to_have_attribute("aria-pressed", "true")
    star.click()
    expect(other[".expiry.kept"]).to_have_count(0)
    me.open()
    expect(me.shown("a favourite of alice")).to_have_count(1)
    expect(me[".expiry.kept"]).to_have_count(0)


def test_the_button_and_the_queue_count_down_together_and_move_together(visit: Visit) -> None:
    """The wait of the button is that of the last row, plus the time of the picture itself."""
    me = visit(locale="en")  # a browser context of its own: its clock is stopped
    me.page.clock.install()
    params = {"model": "noise-flux1", "width": 64, "height": 64, "steps": 2, "count": 1}
    row = {"task_id": "a task", "mine": True, "status": "running", "pos": 0, "params": params}
    tasks = [{**row, "wait_remaining": 80, "created_at": 0.0}]
    times = {"expected_start_at": 80.0, "expected_end_at": 90.0, "expected_time_seconds": 90.0}
    silent: list[Route] = []
    streams: list[Route] = []

    def answer(route: Route, body: dict[str, Any]) -> None:
        if silent:
            silent.append(route)
        else:
            route.fulfill(json=body)

    def estimate(route: Route) -> None:
        answer(route, {**route.fetch().json(), **times, "task_length": 1})

    def seconds() -> list[int]:
        texts = me.page.evaluate(
            "['#queue .left', '#forecast'].map((one) => document.querySelector(one).textContent)"
        )
        return [int(re.findall(r"\d+", text)[0]) for text in texts]

    queue = {"length": 1, "paused": False, "tasks": tasks}
    me.page.route("**/queue?*", lambda route: answer(route, queue))
    me.page.route("**/estimate", estimate)
    me.page.route("**/events", lambda route: streams.append(route))  # noqa: PLW0108
    with me.page.expect_request("**/events"):
        me.page.goto(me.url)
    me.page.clock.run_for(1_000)
    expect(me["#forecast"]).to_contain_text("1 task in the queue")
    expect(me["#queue .left"]).not_to_be_empty()
    silent.append(streams[0])  # from now on there is no answer
    me.page.clock.pause_at(me.page.evaluate("Date.now()") / 1000 + 1)
    me.page.clock.run_for(1_000)
    row_s, button_s = seconds()
    assert row_s < 80
    assert abs(button_s - row_s - 10) <= 1
    step = json.dumps({"task_id": "a task", "status": "running", "wait_remaining": row_s - 30})
    with me.page.expect_request("**/events"):  # again: the step has arrived
        streams[0].fulfill(
            content_type="text/event-stream", body=f"retry: 1\nevent: step\ndata: {step}\n\n"
        )
    for passed_s in (0, 1, 11, 21):  # at once, not only when the clock ticks
        me.page.clock.run_for({0: 0, 1: 1_000}.get(passed_s, 10_000))
        later_s, button_s = seconds()
        assert abs(later_s - (row_s - 30 - passed_s)) <= 1
        assert abs(button_s - later_s - 10) <= 1
    me.page.unroute_all(behavior="ignoreErrors")
