"""The page at /: a real browser, real servers with tiny models."""

import io
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from conftest import CHROMIUM, ROOT, ServerProcess, StallingHub, StartServer, needs_chromium
from PIL import Image
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    FilePayload,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

pytestmark = needs_chromium

AXE = files("axe_playwright_python") / "axe.min.js"
SCREENSHOTS = ROOT / "screenshots"
SOMEONE = "Someone else\N{RIGHT SINGLE QUOTATION MARK}s picture"
WAIT_MS = 30_000
NO_EVENTS = """
window.EventSource = class extends EventTarget {
  static CLOSED = 2;
  readyState = 2;
  constructor() {
    super();
    queueMicrotask(() => this.dispatchEvent(new Event("error")));
  }
  close() {}
};
"""
"""An EventSource as behind a proxy that blocks event streams."""
VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`violation: ${event.violatedDirective} ${event.blockedURI}`));
"""


class Visitor:
    """One person with a separate browser context, and all errors seen in it.

    Animations are off by default: without a GPU they take most of the time of a test.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        options = {
            "viewport": {"width": 1360, "height": 900},
            "service_workers": "block",
            "reduced_motion": "reduce",
        } | options
        self.context: BrowserContext = browser.new_context(**options)
        self.context.add_init_script(VIOLATIONS)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.url = url + "/"
        self.wrong: list[str] = []
        self.unreachable_is_expected = False
        self.refusals_are_expected = False
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._asked)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        if self.unreachable_is_expected and "Failed to load resource: net::ERR" in message.text:
            return
        if self.refusals_are_expected and "status of 401" in message.text:
            return
        if "/preview?" in message.location["url"] and "status of 410" in message.text:
            return  # the task was cancelled or failed before the request arrived
        self.wrong.append(f"{message.text} {message.location}")

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.url, "blob:")):
            self.wrong.append(f"asked {request.url}")

    def open(self) -> "Visitor":
        self.page.goto(self.url)
        expect(self["#forecast"]).not_to_be_empty()
        return self

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def draw_for_long(self, prompt: str) -> None:
        """Submit a task that is still running when the test looks at it."""
        self["#n"].fill("10")
        self.draw(prompt, size=1536, steps=100)
        self["#n"].fill("1")

    def draw(self, prompt: str, *, size: int = 64, steps: int = 2) -> None:
        self["#prompt"].fill(prompt)
        self.choose("shape", "custom")
        self["#width"].fill(str(size))
        self["#height"].fill(str(size))
        self["#steps"].fill(str(steps))
        self["#generate"].click()
        expect(self.card(prompt)).not_to_have_count(0)

    def choose(self, name: str, value: str) -> None:
        radio = self.page.locator(f"input[name={name}][value='{value}']")
        self["label"].filter(has=radio).click()

    def card(self, prompt: str) -> Locator:
        return self[".card"].filter(has=self.page.get_by_text(prompt, exact=True))

    def running(self, prompt: str) -> Locator:
        """The card of a task that is being drawn: its finished pictures have cards of their own."""
        return self[".card.running"].filter(has=self.page.get_by_text(prompt, exact=True))

    def shown(self, prompt: str) -> Locator:
        """The cards of finished pictures whose image has loaded."""
        return self[".card.loaded"].filter(has=self.page.get_by_text(prompt, exact=True))

    def task_ids(self) -> list[str]:
        """Newest first."""
        keys: list[str] = self.page.eval_on_selector_all(
            ".card", "cards => cards.map(card => card.dataset.key)"
        )
        return [key.split()[0] for key in keys]

    def picture(self, name: str) -> None:
        """Write a screenshot to `screenshots/`, which a build may keep."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


UNION = "z-image-turbo-controlnet-union-2.1"
MODELS = f"tiny,tiny-flux2,tiny-z-image,tiny-fill,dev,{UNION},hed"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path_factory.mktemp("page"), "--models", MODELS)
    yield process
    process.stop(signal.SIGKILL)


Scheme = Literal["light", "dark"]
Visit = Callable[..., Visitor]


@pytest.fixture
def visit(browser: Browser, served: ServerProcess) -> Iterator[Visit]:
    """Opens the page for another person. Fails if an error was seen on any page."""
    visitors: list[Visitor] = []

    def come(server: ServerProcess = served, **options: Any) -> Visitor:
        visitors.append(Visitor(browser, server.url, **options))
        return visitors[-1]

    yield come
    wrong = [words for visitor in visitors for words in visitor.wrong]
    for visitor in visitors:
        for task_id in visitor.task_ids():
            with suppress(requests.ConnectionError):  # a server that has been stopped
                requests.delete(visitor.url + "delete", params={"task_id": task_id}, timeout=10)
        visitor.context.close()
    assert wrong == []


def picture_file(width: int, height: int, colour: str) -> FilePayload:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": data.getvalue()}


def test_the_page_is_served_with_strict_headers_and_kept_by_the_browser_until_it_changes(
    served: ServerProcess,
) -> None:
    for path in ("/", "/web/app.js", "/web/style.css"):
        answer = served.get(path)
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        again = requests.get(
            served.url + path, headers={"If-None-Match": answer.headers["ETag"]}, timeout=10
        )
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/web/", "/web/server.py", "/web/..%2fserver.py", "/web/index.htm"):
        assert served.get(path).status_code == 404
    assert "style=" not in served.get("/").text


def test_a_picture_is_generated_viewed_varied_used_as_input_and_removed(  # noqa: PLR0915
    visit: Visit, served: ServerProcess
) -> None:
    me = visit(reduced_motion="no-preference").open()
    expect(me["#empty"]).to_be_visible()
    me["#n"].fill("2")
    me["#format"].select_option("PNG")
    me.draw("a lighthouse")
    expect(me.shown("a lighthouse")).to_have_count(2)
    assert "null" not in me["main"].inner_text()
    expect(me["#empty"]).to_be_hidden()
    task_id = me.task_ids()[0]
    params = served.get("/status", task_id=task_id).json()["params"]
    assert (params["count"], params["format"], params["width"]) == (2, "PNG", 64)

    # The large view shows the parameters; an arrow key shows the next picture.
    me.card("a lighthouse").first.locator(".open").click()
    expect(me["#viewer"]).to_be_visible()
    expect(me["#viewer-params"]).to_contain_text(params["seed"])
    me.page.keyboard.press("ArrowRight")
    expect(me["#viewer-params"]).to_contain_text(str((int(params["seed"]) + 1) % 2**64))
    with me.page.expect_download() as download:
        me["#viewer-actions a"].click()
    with Image.open(download.value.path()) as saved:
        assert (saved.format, saved.size) == ("PNG", (64, 64))
    me.page.keyboard.press("Escape")
    expect(me["#viewer"]).to_be_hidden()

    # Again: the same settings. Vary: another seed.
    me["#prompt"].fill("something else")
    first = me.card("a lighthouse").first
    first.hover()
    first.get_by_role("button", name="Again").click()
    expect(me["#prompt"]).to_have_value("a lighthouse")
    expect(me["#seed"]).to_have_value(params["seed"])
    me.page.get_by_role("button", name="Undo").click()
    expect(me["#prompt"]).to_have_value("something else")
    first.hover()
    first.get_by_role("button", name="Vary").click()
    expect(me.shown("a lighthouse")).to_have_count(3)
    varied = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert varied["seed"] != params["seed"]
    assert varied["count"] == 1
    assert {**varied, "seed": "", "count": 2} == {**params, "seed": ""}

    # Use as input: the picture is not uploaded, the server has it.
    me["#n"].fill("1")
    me.card("a lighthouse").first.hover()
    me.card("a lighthouse").first.get_by_role("button", name="Use as input").click()
    expect(me["[data-field=init_image] .picks img"]).to_be_visible()
    me.draw("in winter", steps=4)
    expect(me.shown("in winter")).to_have_count(1)
    drawn = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert drawn["init_image"]["width"] == 64

    # Remove and undo; then remove without undo.
    me.card("in winter").hover()
    me.card("in winter").get_by_role("button", name="Remove").click()
    expect(me.card("in winter")).to_have_count(0)
    me.page.get_by_role("button", name="Undo").last.click()
    expect(me.shown("in winter")).to_have_count(1)
    gone = me.task_ids()[0]
    me.card("in winter").hover()
    me.card("in winter").get_by_role("button", name="Remove").click()
    with me.page.expect_request(lambda request: request.method == "DELETE"):
        pass
    expect(me["#toasts"]).to_be_empty()
    assert served.get("/image", task_id=gone).status_code in (404, 410)


def test_previews_are_shown_and_the_console_stays_empty(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit()
    heard: list[str] = []
    answers: list[int] = []
    me.page.on("console", lambda message: heard.append(message.text))
    me.page.on(
        "response",
        lambda answer: answers.append(answer.status) if "/preview?" in answer.url else None,
    )
    me.open().draw("developing", size=512, steps=60)
    expect(me.card("developing").locator(".preview")).to_be_visible()
    expect(me.shown("developing")).to_have_count(1)
    me.card("developing").locator(".open").click()
    expect(me["#viewer-picture"]).to_have_js_property("naturalWidth", 512)
    me.page.keyboard.press("Escape")
    assert {204, 200} >= set(answers) >= {200}
    assert heard == []


def test_the_pictures_of_a_batch_appear_one_by_one_and_it_stops_after_the_current_one(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me["#n"].fill("10")
    me.draw("a batch", size=768, steps=20)
    card = me[".card.unfinished"]
    stop = card.get_by_role("button", name="Stop after this picture")
    expect(me.shown("a batch").first).to_be_visible()
    expect(card).to_have_count(1)
    stop.click()
    expect(card).to_contain_text("Stops after this picture.")
    expect(stop).to_be_hidden()
    me.picture("batch")
    expect(card).to_have_count(0)
    status = served.get("/status", task_id=me.task_ids()[0]).json()
    assert (status["status"], status["images_done"]) == ("cancelled", status["last_image"] + 1)
    expect(me.shown("a batch")).to_have_count(status["images_done"])
    me.page.reload()
    expect(me.shown("a batch")).to_have_count(status["images_done"])


def test_two_people_see_each_others_tasks_but_not_each_others_prompts(visit: Visit) -> None:
    one, other = visit().open(), visit().open()
    one.draw_for_long("the secret of the one")
    expect(one["#queue .row"]).to_have_count(1)
    other.draw_for_long("what the other wants")
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
        me.context.add_init_script(NO_EVENTS)
    me.open()
    for model in ("tiny-z-image", "tiny"):
        me["#model"].select_option(model)
        expect(me["#model-note"]).to_contain_text("Not loaded")
        me.draw_for_long(f"with {model}")
        card = me.running(f"with {model}")
        expect(card).to_be_visible()
        expect(me["#model-note"]).not_to_contain_text("Not loaded")
        card.get_by_role("button", name="Cancel").click()


def test_a_task_that_waits_for_a_download_shows_its_progress(
    visit: Visit, start_server: StartServer, stalling_hub: StallingHub
) -> None:
    server = start_server("--models", "tiny,schnell", environment=stalling_hub.environment)
    me = visit(server).open()
    me["#model"].select_option("schnell")
    me.draw("a lighthouse")
    expect(me.card("a lighthouse")).to_contain_text("Downloading schnell: 0.0 of 34.0 GB")
    me["#model"].select_option("tiny")
    me.draw("a boat")
    expect(me.shown("a boat")).to_have_count(1)
    me.picture("download")
    stalling_hub.go_on.set()
    expect(me.card("a lighthouse")).to_contain_text("There is no repository")


def test_cancel_ends_a_waiting_and_a_running_task(visit: Visit, served: ServerProcess) -> None:
    me = visit().open()
    me.draw_for_long("first")
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
    expect(me["#steps"]).to_have_value("100")


def test_a_reload_loses_neither_tasks_nor_the_form(visit: Visit) -> None:
    me = visit().open()
    me["#theme"].click()
    me.draw("drawn across a reload", size=1024, steps=30)
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
    expect(me["#form-error"]).to_contain_text("Nothing is lost")
    me.page.unroute("**/generate")
    me.page.reload()
    expect(me.shown("sent, and no answer")).to_have_count(1)
    assert me.task_ids() == answered


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


def test_the_kinds_of_control_are_those_that_the_server_can_make(visit: Visit) -> None:
    me = visit().open()
    me["#model"].select_option(UNION)
    expect(me["#control_type"]).to_be_hidden()
    me["#control_image"].set_input_files(picture_file(64, 64, "navy"))
    expect(me["#control_type"]).to_be_visible()
    expect(me["#control_type"].locator("option")).to_have_text(
        ["default", "canny", "mlsd", "hed", "ready"]
    )


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


def test_a_forecast_leaves_the_error_of_an_empty_prompt(visit: Visit) -> None:
    me = visit().open()
    with me.page.expect_response(lambda answer: answer.url.endswith("/estimate")):
        me["#steps"].fill("3")
        me["#generate"].click()
        expect(me["#prompt-error"]).to_have_text("Enter a prompt.")
    expect(me["#forecast"]).to_contain_text(re.compile("about|roughly"))
    expect(me["#prompt-error"]).to_have_text("Enter a prompt.")


def test_an_error_is_shown_beside_its_field(visit: Visit) -> None:
    me = visit().open()
    me["#generate"].click()
    expect(me["#prompt-error"]).to_have_text("Enter a prompt.")
    expect(me["#prompt"]).to_be_focused()
    me["#steps"].fill("9999")
    expect(me["#steps-error"]).to_have_text("Enter a number from 1 to 100.")
    expect(me["#steps"]).to_have_attribute("aria-invalid", "")
    me["#steps"].fill("3")
    expect(me["#steps-error"]).to_be_empty()
    me.choose("shape", "custom")
    me["#width"].fill("8192")
    me["#height"].fill("8192")
    expect(me["#width-error"]).to_contain_text("width x height must be at most")
    me.wrong = [words for words in me.wrong if "status of 400" not in words]


def test_tags_are_entered_shown_and_kept_with_the_settings(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me["#tags"].fill(" christmas card, draft,,")
    me.draw_for_long("with tags")
    card = me.card("with tags")
    expect(card.locator(".tags li")).to_have_text(["christmas card", "draft"])
    task_id = me.task_ids()[0]
    listed = served.get("/queue", tag="christmas card").json()["tasks"]
    assert [task["task_id"] for task in listed] == [task_id]
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_contain_text("Cancelled.")
    me["#tags"].fill("")
    card.get_by_role("button", name="Again").click()
    expect(me["#tags"]).to_have_value("christmas card, draft")
    me["#n"].fill("1")
    me.draw("small with tags")
    expect(me.shown("small with tags").locator(".tags li")).to_have_count(2)
    me.picture("tags")
    me.shown("small with tags").locator(".open").click()
    expect(me["#viewer-params"]).to_contain_text("christmas card, draft")
    me.page.keyboard.press("Escape")
    me["#tags"].fill("x" * 41)
    expect(me["#tags-error"]).to_contain_text("1 to 40 characters")
    me.wrong = [words for words in me.wrong if "status of 400" not in words]


HOSTILE_PROMPTS = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "\"><svg onload=alert(1)>'",
    "javascript:alert(1)//<iframe srcdoc='<script>alert(1)</script>'>",
    "{{constructor.constructor('alert(1)')()}}",
)


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS)
def test_prompts_are_text_and_never_html(visit: Visit, prompt: str) -> None:
    me = visit()
    dialogs: list[str] = []

    def heard(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    me.page.on("dialog", heard)
    me.open().draw(prompt)
    expect(me.shown(prompt)).to_have_count(1)
    me.card(prompt).locator(".open").click()
    expect(me["#viewer-words"]).to_have_text(prompt)
    assert me["#grid script, #grid svg[onload], #grid iframe, [onerror], [style*=x]"].count() == 0
    assert dialogs == []


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
    me.context.add_init_script(
        f"Object.defineProperty(Navigator.prototype, 'platform', {{get: () => '{platform}'}})"
    )
    expect(me.open()[".keys"]).to_have_text(f"{keys} generates")
    me["#prompt"].fill("by the Mac's own keys")
    me.choose("scale", "Small")
    me.page.keyboard.press("Meta+Enter" if platform == "MacIntel" else "Control+Enter")
    expect(me.card("by the Mac's own keys")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_accessibility_problem(visit: Visit, scheme: str) -> None:
    me = visit(color_scheme=scheme).open()
    me["#model"].select_option("tiny-z-image")

    def check(name: str) -> None:
        me.picture(f"{name}-{scheme}")
        me.page.evaluate(AXE.read_text())
        found = me.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [
            (violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ] == []

    check("empty")
    for prompt in ("a harbour at night", "quinces and a blue jug", "a fox under birch trees"):
        me.draw(prompt, size=160)
        expect(me.shown(prompt)).to_have_count(1)
    me["#model"].select_option("dev")
    me.draw("a picture that fails")
    expect(me.card("a picture that fails")).to_contain_text("Failed.")
    expect(me["#toasts"]).to_be_empty()
    me["#model"].select_option("tiny-z-image")
    me.draw_for_long("a picture that runs")
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


def test_the_page_recovers_when_the_server_restarts(
    visit: Visit, start_server: StartServer
) -> None:
    server = start_server("--models", MODELS)
    me = visit(server).open()
    me.unreachable_is_expected = True
    me.draw("interrupted", size=1024, steps=60)
    expect(me[".unfinished.running"]).to_have_count(1)
    server.stop(signal.SIGKILL)
    expect(me["#unreachable"]).to_contain_text("The server cannot be reached")
    expect(me["body"]).to_have_attribute("data-state", "unreachable")
    me["#prompt"].fill("while it is away")
    me["#generate"].click()
    expect(me["#form-error"]).to_contain_text("Nothing is lost")
    me.picture("away")
    port = server.url.rsplit(":", 1)[1]
    again = start_server("--models", MODELS, "--port", port)
    assert again.url == server.url
    expect(me["#unreachable"]).to_be_hidden(timeout=WAIT_MS)
    expect(me.shown("interrupted")).to_have_count(1)
    me["#generate"].click()
    expect(me.shown("while it is away")).to_have_count(1)


def test_without_events_the_page_polls(visit: Visit) -> None:
    me = visit()
    me.context.add_init_script(NO_EVENTS)
    me.open().draw("without events", steps=4)
    expect(me.shown("without events")).to_have_count(1)


def test_the_page_works_below_a_path_prefix(visit: Visit, served: ServerProcess) -> None:
    me = visit()
    me.context.add_init_script(NO_EVENTS)
    prefix = served.url + "/deep/down/"
    me.page.route(
        prefix + "**",
        lambda route: route.fulfill(
            response=route.fetch(url=route.request.url.replace(prefix, served.url + "/"))
        ),
    )
    me.url = prefix  # requests to other URLs are errors
    me.open().draw("below a prefix")
    expect(me.shown("below a prefix")).to_have_count(1)


def test_the_form_shows_what_the_model_takes(visit: Visit, served: ServerProcess) -> None:
    me = visit().open()
    expect(me["[data-field=guidance]"]).to_be_hidden()
    expect(me["#model-inputs"]).to_have_text("Needs a prompt. Optional: an input image and a mask.")
    me["#model"].select_option("tiny-z-image")
    expect(me["#model-inputs"]).to_have_text(
        "Needs a prompt. Optional: guidance, a negative prompt, an input image and a mask."
    )
    expect(me["#guidance"]).to_have_value("3.5")
    me["#negative_prompt"].fill("fog")
    me["#guidance"].fill("2")
    me.draw("guided")
    expect(me.shown("guided")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert (params["guidance"], params["negative_prompt"]) == (2, "fog")
    me["#guidance"].fill("1")
    expect(me["#negative_prompt"]).to_be_disabled()
    expect(me["#negative_prompt-note"]).to_have_text("Needs guidance above 1.")

    me["#model"].select_option("tiny-fill")
    expect(me["#model-inputs"]).to_have_text(
        "Needs a prompt, an input image and a mask. Optional: guidance."
    )
    expect(me["#forecast"]).to_have_text("needs an input image")
    me["#prompt"].fill("filled")
    me["#generate"].click()
    expect(me["#init_image-error"]).to_contain_text("needs an input image")
    me["#init_image"].set_input_files(picture_file(128, 96, "teal"))
    expect(me["#forecast"]).to_have_text("needs a mask")
    me.choose("shape", "input")
    me["#mask"].set_input_files(picture_file(128, 96, "white"))
    expect(me["#forecast"]).to_contain_text(re.compile(r"\d s"))
    me["#generate"].click()
    expect(me.shown("filled")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert (params["width"], params["height"]) == (128, 96)
    assert params["mask"]["width"] == 128

    me["#model"].select_option("tiny-flux2")
    me["[data-field=init_image] [aria-label='Remove this image']"].click()
    me["#images"].set_input_files([picture_file(64, 64, "red"), picture_file(64, 64, "blue")])
    expect(me["[data-field=images] .picks img"]).to_have_count(2)
    me.draw("edited")
    expect(me.shown("edited")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert len(params["images"]) == 2


def test_the_form_offers_what_the_list_of_models_says(visit: Visit) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            if model["name"] == "tiny":
                model["takes"] += ["control_image", "control_type"]
                model |= {"control_types": ["pose", "ready"], "least_steps": 2}
                model |= {"side_step": 48, "least_side": 480, "most_side": 600}
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    me["#model"].select_option("tiny")
    expect(me["#size-words"]).to_contain_text("600")
    me.choose("scale", "Small")
    expect(me["#size-words"]).to_contain_text("480")
    expect(me["#steps"]).to_have_attribute("min", "2")
    expect(me["#control_type option"]).to_have_text(["default", "pose", "ready"])


def test_a_mask_can_be_added_to_the_input_image_of_any_model_that_takes_one(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    expect(me["[data-field=mask]"]).to_be_hidden()
    me["#init_image"].set_input_files(picture_file(128, 96, "teal"))
    expect(me["[data-field=mask]"]).to_be_visible()
    me["#mask"].set_input_files(picture_file(128, 96, "white"))
    me.draw("repainted")
    expect(me.shown("repainted")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert params["mask"]["width"] == 128
    me["[data-field=init_image] [aria-label='Remove this image']"].click()
    expect(me["[data-field=mask]"]).to_be_hidden()
    me.draw("from noise")  # the mask stays in the form and is not sent
    expect(me.shown("from noise")).to_have_count(1)


GIVE = """(kind) => new Promise((resolve) => {
  const canvas = document.createElement("canvas");
  canvas.width = 48;
  canvas.height = 32;
  canvas.toBlob((blob) => {
    const data = new DataTransfer();
    data.items.add(new File([blob], "given.png", {type: "image/png"}));
    const options = {bubbles: true, cancelable: true};
    document.body.dispatchEvent(kind === "paste"
      ? new ClipboardEvent("paste", {...options, clipboardData: data})
      : new DragEvent(kind, {...options, dataTransfer: data}));
    resolve();
  });
})"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_can_be_pasted_or_dropped_anywhere(visit: Visit, kind: str) -> None:
    me = visit().open()
    if kind == "drop":
        me.page.evaluate(GIVE, "dragenter")
        expect(me["#drop"]).to_be_visible()
    me.page.evaluate(GIVE, kind)
    expect(me["#drop"]).to_be_hidden()
    expect(me["[data-field=init_image] .picks img"]).to_have_js_property("naturalWidth", 48)
    expect(me["#size-words"]).to_have_text("as the input image")
    expect(me["#image_strength"]).to_be_visible()


def test_a_picture_that_the_server_has_removed_can_be_generated_again(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me.draw("soon gone")
    expect(me.shown("soon gone")).to_have_count(1)
    requests.delete(served.url + "/delete", params={"task_id": me.task_ids()[0]}, timeout=10)
    me.wrong, wrong = [], me.wrong
    me.page.reload()
    card = me.card("soon gone")
    expect(card).to_contain_text("No longer on the server.")
    me.wrong = wrong  # the browser reports the 410 of the picture
    card.get_by_role("button", name="Again").click()
    me["#generate"].click()
    expect(me.shown("soon gone")).to_have_count(1)


def test_the_page_refers_to_no_other_host() -> None:
    for path in (ROOT / "web").iterdir():
        named = set(re.findall(r"https?://[^\s\"')]+", path.read_text()))
        assert named <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", path.read_text())


def test_the_files_of_the_page_stay_small() -> None:
    assert sum(os.path.getsize(path) for path in (ROOT / "web").iterdir()) < 120_000


def test_signing_in_with_a_key_shows_the_page_and_of_others_no_prompts(
    visit: Visit, tmp_path: Path
) -> None:
    keys = {"alice": "alice-0123456789", "bob": "bob-0123456789ab"}
    file = tmp_path / "keys.toml"
    file.write_text("".join(f'[{name}]\nkey = "{key}"\n' for name, key in keys.items()))
    server = ServerProcess(tmp_path / "data", "--models", "tiny", "--keys", str(file))
    try:
        body = {"prompt": "a secret of bob", "width": 1024, "height": 1024, "steps": 100}
        headers = {"Authorization": f"Bearer {keys['bob']}"}
        requests.post(f"{server.url}/generate", json=body, headers=headers, timeout=60)
        me = visit(server)
        me.refusals_are_expected = True
        me.page.goto(me.url)
        expect(me["#sign-in"]).to_be_visible()
        me.page.keyboard.press("Escape")
        expect(me["#sign-in-key"]).to_be_focused()
        me["#sign-in-key"].fill("no key of anybody")
        me.page.keyboard.press("Enter")
        expect(me["#key-error"]).to_have_text("This key is not known here.")
        me.refusals_are_expected = False
        me["#sign-in-key"].fill(keys["alice"])
        me.page.keyboard.press("Enter")
        expect(me["#sign-in"]).to_be_hidden()
        expect(me["#queue .who"]).to_have_text([SOMEONE])
        expect(me["body"]).not_to_contain_text("a secret of bob")
        me.open()  # the cookie stays
        expect(me["#sign-in"]).to_be_hidden()
        expect(me["#queue .who"]).to_have_text([SOMEONE])
        me.context.clear_cookies()
        me.page.goto(me.url)
        expect(me["#sign-in"]).to_be_visible()
    finally:
        server.stop(signal.SIGKILL)
