"""Fixtures for tests of the page: a real browser, people who visit, a real server with tiny models.

One browser and one server serve all files of a test process.
"""

import io
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from chromium import CHROMIUM
from conftest import GIVE_UP_S, ROOT, ServerProcess
from holding import Hold
from PIL import Image
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    FilePayload,
    Locator,
    Page,
    Request,
    expect,
    sync_playwright,
)

AXE = files("axe_playwright_python") / "axe.min.js"
SCREENSHOTS = ROOT / "screenshots"
WAIT_MS = 120_000
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

ENTER = """(values) => {
  for (const [id, value] of Object.entries(values)) {
    const field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }
}"""
"""Enters numbers at once: typing them takes more processor time."""


class Visitor:
    """One person with a separate browser context, and all errors seen in it.

    Animations are off by default: without a GPU they take most of the time of a test.

    Args:
        hold: of the server that is visited.
        media: color_scheme, forced_colors and reduced_motion.
    """

    def __init__(
        self, context: BrowserContext, url: str, hold: Hold | None = None, **media: Any
    ) -> None:
        self.context, self._hold = context, hold
        self.page: Page = self.context.new_page()
        self.page.emulate_media(**{"reduced_motion": "reduce", **media})
        self.page.add_init_script(VIOLATIONS)
        self.page.set_default_timeout(WAIT_MS)
        self.url = url + "/"
        self.wrong: list[str] = []
        self.unreachable_is_expected = False
        self.expected_statuses: set[int] = set()
        """Error statuses that the browser reports when the test is right."""
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._asked)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        if self.unreachable_is_expected and "Failed to load resource: net::ERR" in message.text:
            return
        if any(f"status of {status}" in message.text for status in self.expected_statuses):
            return
        if "/preview?" in message.location["url"] and "status of 410" in message.text:
            return  # the task was cancelled or failed before the request arrived
        self.wrong.append(f"{message.text} {message.location}")

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.url, "blob:")):
            self.wrong.append(f"asked {request.url}")

    def open(self) -> "Visitor":
        self.page.goto(self.url)
        # expect() would describe the whole page, for its message, each time it finds nothing.
        self["#forecast:not(:empty)"].wait_for(state="attached")
        return self

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def hold(self, after: int = 0, step: int = 1) -> None:
        """From now on pictures stop at this step, except for the next `after` pictures."""
        assert self._hold
        self._hold.close(after, step)

    def go_on(self) -> None:
        """The pictures that stopped go on."""
        assert self._hold
        self._hold.open()

    def draw(self, prompt: str, *, size: int = 64, steps: int = 2) -> None:
        self["#prompt"].fill(prompt)
        self.choose("shape", "custom")
        self["#width"].fill(str(size))
        self.page.evaluate(ENTER, {"height": size, "steps": steps})
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

    def assert_accessible(self, *rules: str) -> None:
        """axe finds no serious problem in the page as it is now, by these rules (none: by all)."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE.read_text())
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        if rules:
            options["runOnly"] = list(rules)
        found = self.page.evaluate("options => axe.run(document, options)", options)
        assert [
            (violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ] == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--process-per-site"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


UNION = "z-image-turbo-controlnet-union-2.1"
MODELS = f"noise-flux1,noise-flux2,noise-z-image,noise-fill,dev,{UNION},hed"


class PageServer(ServerProcess):
    """A server whose pictures a test can hold, from its start."""

    def __init__(self, folder: Path, *arguments: str, **options: Any) -> None:
        self.hold = Hold(folder / "hold")
        super().__init__(folder / "data", *arguments, hold=self.hold, **options)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    process = PageServer(tmp_path_factory.mktemp("page"), "--models", MODELS)
    yield process
    process.stop(signal.SIGKILL)


Scheme = Literal["light", "dark"]
Visit = Callable[..., Visitor]
MEDIA = ("color_scheme", "forced_colors", "reduced_motion")


def new_context(browser: Browser, **options: Any) -> BrowserContext:
    usual = {"viewport": {"width": 1360, "height": 900}, "service_workers": "block"}
    return browser.new_context(**(usual | options))


class UsualContext:
    """The context of the first visitor of each test. What a test leaves in it is removed.

    Its pages share a process that has shown the page before: a new one takes a second of processor
    time at its first page.
    """

    def __init__(self, browser: Browser, url: str) -> None:
        self.context = new_context(browser)
        page = self.context.new_page()  # keeps the process
        page.goto(url + "/web/base.css")
        self._devtools = self.context.new_cdp_session(page)

    def clear(self, urls: Iterable[str]) -> None:
        """Remove everything that the servers at these addresses have stored."""
        self.context.clear_cookies()
        for url in urls:
            self._devtools.send(
                "Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"}
            )


@pytest.fixture(scope="session")
def usual_context(browser: Browser, served: PageServer) -> UsualContext:
    return UsualContext(browser, served.url)


@pytest.fixture
def visit(browser: Browser, served: PageServer, usual_context: UsualContext) -> Iterator[Visit]:
    """Opens the page for another person. Fails if an error was seen on any page."""
    visitors: list[Visitor] = []

    def come(server: ServerProcess = served, **options: Any) -> Visitor:
        media = {name: options.pop(name) for name in MEDIA if name in options}
        usual = not options and not visitors
        context = usual_context.context if usual else new_context(browser, **options)
        hold = getattr(server, "hold", None)
        visitors.append(Visitor(context, server.url, hold, **media))
        return visitors[-1]

    yield come
    served.hold.open()
    wrong = [words for visitor in visitors for words in visitor.wrong]
    for visitor in visitors:
        for task_id in visitor.task_ids():
            with suppress(requests.ConnectionError):  # a server that has been stopped
                requests.delete(
                    visitor.url + "delete", params={"task_id": task_id}, timeout=GIVE_UP_S
                )
        visitor.page.close()
        if visitor.context is not usual_context.context:
            visitor.context.close()
    usual_context.clear({served.url, *(visitor.url.rstrip("/") for visitor in visitors)})
    assert wrong == []


def picture_file(width: int, height: int, colour: str) -> FilePayload:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": data.getvalue()}
