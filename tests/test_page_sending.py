"""How the page sends requests: uploads, requests without an answer, refusals of proxies."""

import os
import re
from collections.abc import Iterator
from io import BytesIO

import pytest
from conftest import ServerProcess, needs_chromium
from gate import EVERYTHING, Gate
from pages import PageServer, Visit, Visitor, picture_file
from PIL import Image
from playwright.sync_api import FilePayload, Request, Route, expect

pytestmark = needs_chromium

NOT_SENT = "Not sent yet. It will be sent when the server can be reached."
STALL_MS = 30_000
"""The page gives up a request of which nothing has moved for this long."""


@pytest.fixture
def gate(served: PageServer) -> Iterator[Gate]:
    with Gate(served.url) as gate:
        yield gate


def large_file(side: int = 1800) -> FilePayload:
    """A picture of random pixels: about 3 bytes a pixel."""
    data = BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(data, "PNG")
    return {"name": "large.png", "mimeType": "image/png", "buffer": data.getvalue()}


def through(visit: Visit, gate: Gate) -> Visitor:
    me = visit()
    me.url = gate.url + "/"
    return me


def test_a_request_that_was_given_up_is_never_drawn(visit: Visit) -> None:
    me = visit().open()
    me.unreachable_is_expected = True
    me.page.route("**/*", lambda route: route.abort())
    for prompt in ("wrong", "right"):
        me["#prompt"].fill(prompt)
        me["#generate"].click()
        row = me["#pending .row"].filter(has=me.page.get_by_text(prompt, exact=True))
        expect(row).to_contain_text(NOT_SENT)
    me.picture("pending")
    me["#pending .row"].first.get_by_role("button", name="Cancel").click()
    expect(me["#pending .row"]).to_have_count(1)
    expect(me["#unreachable"]).to_be_visible()
    me.page.unroute("**/*")
    expect(me.shown("right")).to_have_count(1)
    expect(me["#pending .row"]).to_have_count(0)
    me.page.reload()
    expect(me.shown("right")).to_have_count(1)
    expect(me[".card"]).to_have_count(1)


STORED = """async (wanted) => {
  const opened = (request) =>
    new Promise((done) => (request.onsuccess = () => done(request.result)));
  const database = await opened(indexedDB.open("mflux:/:pictures"));
  const pictures = () => database.transaction("pictures").objectStore("pictures");
  for (let tries = 0; tries < 6000; tries++) {
    if ((await opened(pictures().count())) === wanted) break;
    await new Promise((done) => setTimeout(done, 10));
  }
  const count = await opened(pictures().count());
  database.close();
  return count;
}"""
"""How many input pictures the browser stores, once there are as many as wanted."""


def test_a_request_that_waits_for_the_server_keeps_its_picture_when_the_page_is_opened_again(
    visit: Visit,
) -> None:
    me = visit().open()
    me.unreachable_is_expected = True
    for count, colour in enumerate(("teal", "orange"), 1):  # nothing uses the first one then
        me["#init_image"].set_input_files(picture_file(64, 64, colour))
        expect(me["[data-field=init_image] .picks img"]).to_be_visible()
        assert me.page.evaluate(STORED, count) == count
    expect(me["[data-field=init_image] .picks img"]).to_have_count(1)
    me.page.route("**/generate", lambda route: route.abort())
    me["#prompt"].fill("from a picture")
    me["#generate"].click()
    expect(me["#pending .row"]).to_contain_text(NOT_SENT)
    me["[data-field=init_image] .picks button"].click()
    expect(me["[data-field=init_image] .picks img"]).to_have_count(0)
    me.page.reload()
    assert me.page.evaluate(STORED, 1) == 1
    me.page.unroute("**/generate")
    me.page.reload()
    expect(me.shown("from a picture")).to_have_count(1)


def test_a_request_that_is_cancelled_before_its_answer_arrives_is_cancelled_on_the_server(
    visit: Visit, served: PageServer, gate: Gate
) -> None:
    me = through(visit, gate).open()
    me.unreachable_is_expected = True
    me.hold()
    gate.answers = False
    me["#tags"].fill("lost answer")
    me["#prompt"].fill("given up")
    me["#generate"].click()
    expect(me["#pending .row"]).to_contain_text("given up")
    task_id = served.get("/queue", tag="lost answer").json()["tasks"][0]["task_id"]
    me["#pending .row"].get_by_role("button", name="Cancel").click()
    expect(me["#pending .row"]).to_have_count(0)
    gate.answers = True
    assert served.wait_until_ended(task_id)["status"] == "cancelled"
    expect(me[".card"]).to_have_count(0)


def test_a_slow_upload_shows_its_progress_and_is_given_up_only_when_nothing_moves(
    visit: Visit, gate: Gate
) -> None:
    me = through(visit, gate)
    me.page.clock.install()
    me.open()
    me.unreachable_is_expected = True
    me["#init_image"].set_input_files(large_file())
    expect(me["[data-field=init_image] .picks img"]).to_be_visible()
    me.hold()
    gate.allow(300_000)
    me["#prompt"].fill("over a slow line")
    me["#generate"].click()
    words = me["#pending .row .hint"]
    expect(words).to_have_text(re.compile(r"Uploading the picture: [1-9]\d? %"))
    for _ in range(2):  # 45 seconds in all
        me.page.clock.fast_forward(STALL_MS * 3 // 4)
        before = words.inner_text()
        gate.allow(2_500_000)  # the browser sends more when a third of its buffer of 4 MB is free
        expect(words).not_to_have_text(before)
        expect(words).to_have_text(re.compile(r"Uploading the picture: \d\d %"))
    me.picture("upload")
    me.page.clock.fast_forward(STALL_MS + 1000)
    expect(words).to_have_text(NOT_SENT)
    gate.allow(EVERYTHING)
    me.page.clock.fast_forward(STALL_MS // 2)
    expect(me.card("over a slow line")).to_have_count(1)
    expect(me["#pending .row"]).to_have_count(0)
    me.card("over a slow line").get_by_role("button", name="Cancel").click()


def test_pictures_are_scaled_in_the_browser_to_what_the_task_uses(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    photo = BytesIO()
    Image.frombytes("RGB", (2400, 1800), os.urandom(2400 * 1800 * 3)).save(photo, "JPEG")
    me["#init_image"].set_input_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo.getvalue()}
    )
    expect(me["[data-field=init_image] .picks img"]).to_be_visible()
    sent: list[Request] = []
    me.page.on("request", lambda one: sent.append(one) if one.url.endswith("/generate") else None)
    me.draw("from a photo", size=128)
    expect(me.shown("from a photo")).to_have_count(1)
    assert len(photo.getvalue()) > 2_000_000
    assert len(sent[0].post_data or "") < 1_500_000
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    source = params["init_image"]
    assert source["width"] / source["height"] == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("status", "words"),
    [(413, "too large for the proxy"), (429, "this many requests"), (418, "HTTP status 418")],
)
def test_a_refusal_of_a_proxy_is_shown_as_a_sentence(visit: Visit, status: int, words: str) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(status=status, body="<html>no</html>", content_type="text/html")

    def let_through_later(route: Route) -> None:
        expect(me["#form-error"]).to_contain_text(words)
        route.continue_()

    me = visit().open()
    me.expected_statuses.add(status)
    me.page.route("**/generate", refuse)
    me["#init_image"].set_input_files(picture_file(64, 64, "navy"))
    expect(me["[data-field=init_image] .picks img"]).to_be_visible()
    me.page.route("**/estimate", let_through_later)
    me["#prompt"].fill("refused")
    me["#generate"].click()
    expect(me["#wildcards-example"]).to_have_text("refused")  # the forecast has come
    expect(me["#form-error"]).to_contain_text(words)
    expect(me["#pending .row"]).to_have_count(0)
    me.page.unroute("**/estimate")
    me["#prompt"].fill("changed")
    expect(me["#form-error"]).to_be_empty()
