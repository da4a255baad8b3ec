"""The page at /: pictures are drawn, shown, used and removed; strict headers, no other host."""

import io
import json
import re
from urllib.parse import urljoin

import pytest
import requests
from conftest import GIVE_UP_S, ROOT, ServerProcess, needs_chromium
from pages import NO_EVENTS, Visit, Visitor
from PIL import Image
from playwright.sync_api import Dialog, expect

from version import VERSION

pytestmark = needs_chromium

WEB = ROOT / "web"


def test_the_page_is_served_with_strict_headers_and_kept_by_the_browser_until_it_changes(
    served: ServerProcess,
) -> None:
    for path in ("/", "/web/app.js", "/web/base.css"):
        answer = served.get(path)
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        again = requests.get(
            served.url + path, headers={"If-None-Match": answer.headers["ETag"]}, timeout=GIVE_UP_S
        )
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/web/", "/web/server.py", "/web/..%2fserver.py", "/web/index.htm"):
        assert served.get(path).status_code == 404
    assert "style=" not in served.get("/").text


def test_files_below_the_path_of_their_version_are_kept_by_the_browser(
    served: ServerProcess,
) -> None:
    page = served.get("/").text
    versions = set(re.findall(r'"web/(\w+)/app\.js"', page))
    assert versions == set(re.findall(r'"web/(\w+)/\w+\.(?:js|css)"', page))
    (version,) = versions
    kept = served.get(f"/web/{version}/app.js")
    assert kept.content == (WEB / "app.js").read_bytes()
    assert "immutable" in kept.headers["Cache-Control"]
    for path in ("/web/app.js", "/web/0123456789abcdef/app.js"):  # or opened before an update
        asked = served.get(path)
        assert asked.content == kept.content
        assert asked.headers["Cache-Control"] == "no-cache"
    for path in (f"/web/{version}/", f"/web/{version}/server.py", f"/web/{version}/..%2fapp.js"):
        assert served.get(path).status_code == 404


FROM_THE_SERVER = """performance.getEntriesByType("resource")
  .filter((one) => /\\.(js|css)$/.test(one.name) && one.transferSize)
  .map((one) => one.name)"""


def test_a_page_that_is_opened_again_requests_no_script_and_no_style_sheet(visit: Visit) -> None:
    me = visit(locale="en-US").open()  # in a browser without any file
    at_first = me.page.evaluate(FROM_THE_SERVER)
    assert {name.rpartition("/")[2] for name in at_first} > {"app.js", "base.css"}
    me.open()
    assert me.page.evaluate(FROM_THE_SERVER) == []


def test_a_picture_is_generated_viewed_varied_used_as_input_and_removed(  # noqa: PLR0915
    visit: Visit, served: ServerProcess
) -> None:
    me = visit(reduced_motion="no-preference").open()
    expect(me["#empty"]).to_be_visible()
    expect(me["#version"]).to_contain_text(f"mflux-server {VERSION}")
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
    me.hold()
    me.open()
    with me.page.expect_response(lambda answer: "/preview?" in answer.url):
        me.draw("developing", size=512, steps=4)
    me.hold(step=3)  # a step after the first request has a preview
    expect(me.card("developing").locator(".preview")).to_be_visible()
    me.go_on()
    expect(me.shown("developing")).to_have_count(1)
    me.card("developing").locator(".open").click()
    expect(me["#viewer-picture"]).to_have_js_property("naturalWidth", 512)
    me.page.keyboard.press("Escape")
    assert {204, 200} >= set(answers) >= {200}
    assert heard == []


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


def test_without_events_the_page_polls(visit: Visit) -> None:
    me = visit()
    me.page.add_init_script(NO_EVENTS)
    me.open().draw("without events", steps=4)
    expect(me.shown("without events")).to_have_count(1)


def below_a_prefix(me: Visitor) -> Visitor:
    """The server as behind a proxy that puts it below a path: requests to other URLs are errors."""
    top = me.url
    me.url = top + "deep/down/"
    me.page.route(
        me.url + "**",
        lambda route: route.fulfill(
            response=route.fetch(url=route.request.url.replace(me.url, top))
        ),
    )
    return me


def test_the_documentation_works_below_a_path_prefix(visit: Visit) -> None:
    me = below_a_prefix(visit())
    me.page.goto(me.url + "swagger")
    block = me["#operations-server-get_health"]
    block.locator(".opblock-summary").first.click()
    block.locator("button.try-out__btn").click()
    with me.page.expect_response(me.url + "health") as answer:
        block.locator("button.execute").click()
    assert answer.value.status == 200
    expect(block.locator(".live-responses-table .highlight-code").first).to_contain_text('"status"')


def test_the_page_works_below_a_path_prefix(visit: Visit) -> None:
    me = visit()
    me.page.add_init_script(NO_EVENTS)
    below_a_prefix(me).open().draw("below a prefix")
    expect(me.shown("below a prefix")).to_have_count(1)


def test_the_page_refers_to_no_other_host() -> None:
    assert (WEB / "app.js").exists()
    for path in WEB.rglob("*.*"):
        if path.suffix == ".png":
            continue
        named = set(re.findall(r"https?://[^\s\"')]+", path.read_text()))
        assert named <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", path.read_text())


AT_ONCE = r'from "\./|(?:href|src)="web/(?:\{\{version\}\}/)?'
LATER = rf'{AT_ONCE}|import\("\./|sheet\("\./|\? "web/'


def loaded(name: str, kinds: str = AT_ONCE) -> set[str]:
    """This file of web/, and all that it loads."""
    found, names = set[str](), [name]
    while names:
        if (name := names.pop()) not in found:
            found.add(name)
            text = (WEB / name).read_bytes().decode("utf-8", "ignore")
            names += re.findall(rf'(?:{kinds})([\w.]+)"', text)
    return found


def bytes_on_the_wire(served: ServerProcess, name: str) -> int:
    """Of a page: in the language whose texts are the longest."""
    if not name.endswith(".html"):
        answer = served.get(f"/web/{name}")
        assert answer.content == (WEB / name).read_bytes()
        return int(answer.headers["Content-Length"])
    path = "/" if name == "index.html" else f"/{name.removesuffix('.html')}"
    answers = [
        requests.get(served.url + path, headers={"Accept-Language": texts.stem}, timeout=60)
        for texts in (WEB / "languages").glob("*.json")
    ]
    return max(int(answer.headers["Content-Length"]) for answer in answers)


def test_the_files_of_the_page_are_small_on_the_wire(served: ServerProcess) -> None:
    page, view = loaded("index.html"), loaded("operator.html")
    later = loaded("index.html", LATER)
    icons = {
        icon["src"] for icon in json.loads((WEB / "manifest.webmanifest").read_text())["icons"]
    }
    assert {path.name for path in WEB.glob("*.*")} == page | view | later | icons
    assert sum(bytes_on_the_wire(served, name) for name in page) < 80_000
    assert sum(bytes_on_the_wire(served, name) for name in view) < 60_000


def test_the_page_can_be_installed(visit: Visit) -> None:
    """Chromium itself finds nothing that is missing."""
    me = visit().open()
    devtools = me.context.new_cdp_session(me.page)
    found = devtools.send("Page.getAppManifest")
    assert found["errors"] == []
    assert found["url"] == me.url + "web/manifest.webmanifest"
    manifest = json.loads(found["data"])
    base = me.url + "web/"
    assert urljoin(base, manifest["start_url"]) == urljoin(base, manifest["scope"]) == me.url
    for icon in manifest["icons"]:
        answer = me.page.request.get(base + icon["src"])
        assert answer.headers["content-type"] == icon["type"]
        if icon["sizes"] != "any":
            with Image.open(io.BytesIO(answer.body())) as image:
                assert f"{image.width}x{image.height}" == icon["sizes"]
    errors = devtools.send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [error["errorId"] for error in errors] in ([], ["in-incognito"])
