"""What the page costs a browser: bytes and milliseconds until the first paint, smoothness with 500
pictures, and the rules of accessibility.

How to read it: a real server with the tiny model and headless Chromium without a GPU, one page at a
time, nothing cached. Times depend on the machine; bytes do not. The list is scrolled by 120 pixels
a frame: a frame over 50 ms is one that people notice. If the program `lighthouse` (npm) is on the
PATH, its scores are added.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from common import Results
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chromium import CHROMIUM

ROOT = Path(__file__).parent.parent
AXE = files("axe_playwright_python") / "axe.min.js"
PICTURES = 500
WAIT_MS = 120_000
CATEGORIES = ("performance", "accessibility", "best-practices")
OBSERVE = """
window.longest = [];
const each = (run) => (list) => list.getEntries().forEach(run);
new PerformanceObserver(each((one) => window.longest.push(one.duration)))
  .observe({type: "longtask", buffered: true});
window.shift = 0;
new PerformanceObserver(each((one) => (window.shift += one.value)))
  .observe({type: "layout-shift", buffered: true});
"""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
FILL = """(count) => {
  const name = Object.keys(localStorage).find((one) => one.includes("task:"));
  const task = JSON.parse(localStorage.getItem(name));
  for (let number = 0; number < count; number++) {
    const id = `${task.id.slice(0, 12)}${String(number).padStart(4, "0")}`;
    const copy = {...task, id, created: task.created - number - 1};
    localStorage.setItem(name.replace(task.id, id), JSON.stringify(copy));
  }
}"""
SCROLL = """async () => {
  const times = [];
  for (let frame = 0; frame < 240; frame++) {
    scrollBy(0, 120);
    const before = performance.now();
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - before);
  }
  return times;
}"""


@contextmanager
def server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "server.py", "--model", "noise-flux1", "--port", "0"]
        with subprocess.Popen(
            [*command, "--data-dir", folder], cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr
            for line in process.stderr:
                if " on http://" in line:
                    break
            try:
                yield "http" + line.rpartition("http")[2].split()[0]
            finally:
                process.terminate()
                process.stderr.close()


def first_paint(browser: Browser, url: str) -> dict[str, float]:
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    sizes: list[int] = []

    def note(request: Request) -> None:
        path = request.url.removeprefix(url)
        if path == "/" or path.startswith("/web/"):
            sizes.append(request.sizes()["responseBodySize"])

    page.on("requestfinished", note)
    page.add_init_script(OBSERVE)
    page.goto(url)
    expect(page.locator("#forecast")).not_to_be_empty()
    figures: dict[str, float] = page.evaluate(f"({{paint: {PAINTED}, shift: window.shift}})")
    blocked = page.evaluate("window.longest.reduce((sum, one) => sum + Math.max(one - 50, 0), 0)")
    page.close()
    return {"bytes": sum(sizes), "files": len(sizes), **figures, "blocked": blocked}


def with_pictures(page: Page, url: str) -> list[float]:
    """Milliseconds of the frames while a list of PICTURES is scrolled."""
    page.goto(url)
    expect(page.locator("#forecast")).not_to_be_empty()
    page.fill("#prompt", "A lighthouse in the fog, early morning")
    page.click("#generate")
    page.wait_for_selector(".card.loaded")
    page.evaluate(FILL, PICTURES)
    first = page.locator(".card.picture").first.get_attribute("data-key") or ""
    task_id = first.split()[0]
    same = f"{url}/thumbnail?task_id={task_id}&index=0&size=512"
    page.route("**/thumbnail?*", lambda route: route.continue_(url=same))
    page.reload()
    page.wait_for_selector(".card.loaded")
    times: list[float] = page.evaluate(SCROLL)
    return times


def accessibility(page: Page) -> tuple[int, int]:
    """Rules of axe that the page passes and that it does not."""
    page.evaluate("scrollTo(0, 0)")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document)")
    return len(found["passes"]), len(found["violations"])


def lighthouse(url: str) -> list[tuple[str, Any]]:
    if not (program := shutil.which("lighthouse")):
        return []
    flags = "--headless=new --no-sandbox --disable-gpu"
    command = [program, url, "--output=json", "--quiet", f"--chrome-flags={flags}"]
    command += [f"--only-categories={','.join(CATEGORIES)}", "--preset=desktop"]
    command += ["--max-wait-for-load=15000"]  # the stream of events never ends
    environment = {**os.environ, "CHROME_PATH": CHROMIUM or ""}
    done = subprocess.run(command, capture_output=True, check=True, timeout=300, env=environment)
    found = json.loads(done.stdout)["categories"]
    return [(f"Lighthouse: {name}", round(100 * found[name]["score"])) for name in CATEGORIES]


def main() -> None:
    results = Results(__file__, __doc__)
    expect.set_options(timeout=WAIT_MS)
    with server() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        loads = [first_paint(browser, url) for _ in range(1 if results.quick else 3)]
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(WAIT_MS)
        frames = with_pictures(page, url)
        passed, failed = accessibility(page)
        cards = page.locator(".card").count()
        browser.close()
        scores = lighthouse(url)

    def middle(name: str) -> float:
        return median(load[name] for load in loads)

    results.table(
        "The page",
        ["", "value"],
        [
            ["bytes of page, scripts and styles until it can be used", f"{middle('bytes'):,.0f}"],
            ["files", int(middle("files"))],
            ["first contentful paint, ms", middle("paint")],
            ["long tasks above 50 ms, summed, ms", middle("blocked")],
            ["layout shift", middle("shift")],
            [f"frame while {cards} pictures are scrolled, ms, median", median(frames)],
            ["the same, p95", sorted(frames)[int(len(frames) * 0.95)]],
            ["frames above 50 ms, of 240", sum(one > 50 for one in frames)],
            ["accessibility rules of axe: passed", passed],
            ["accessibility rules of axe: violated", failed],
            *scores,
        ],
    )
    results.note("Goals: below 100,000 bytes; no rule violated; scores of at least 95.")
    results.save()


if __name__ == "__main__":
    main()
