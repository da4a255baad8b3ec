"""Makes the screenshots of the page for the README, with a real server and the built-in model.

    python docs/make_images.py [FOLDER] [NAME...]   writes page.png, page.gif, mask.gif,
                                                    operator.png, gallery.png, compare.png and
                                                    phone.png, or those that are named, to
                                                    docs/images

Needs Chromium. If the fonts Inter and Charis SIL are installed, they replace the fonts of macOS,
which look similar.
"""

import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from playwright.sync_api import FilePayload, Page, ViewportSize, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chromium import CHROMIUM

ROOT = Path(__file__).parent.parent
SIZE: ViewportSize = {"width": 1360, "height": 880}
GIF_WIDTH = 850
WAIT_MS = 300_000
COLOURS = 160
FRAME_S = 0.24
MOST_FRAMES = 140
LONGEST_FRAME_S = 0.2
LAST_FRAME_S = 2.5
PROMPTS = (
    "A lighthouse by the sea at sunset",
    "An orange cat in a meadow",
    "Three pink flowers in the snow",
    "A white house in the mountains at night",
    "Two red boats on the sea with clouds",
    "A beautiful landscape",
)
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><include>/etc/fonts/fonts.conf</include>{}</fontconfig>"""
FONT = """<match target="pattern"><test name="family"><string>{}</string></test>
<edit name="family" mode="assign" binding="strong"><string>{}</string></edit></match>"""
STAND_IN = {
    "system-ui": "Inter",
    "sans-serif": "Inter",
    "ui-serif": "Charis SIL",
    "serif": "Charis SIL",
}


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "server.py", "--model", "tiny", "--port", "0"]
        with subprocess.Popen(
            [*command, "--data-dir", folder, *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"serving .* on (http://\S+)", line):
                    break
            else:
                sys.exit("the server did not start")
            try:
                yield found[1]
            finally:
                process.terminate()
                process.stderr.close()


def draw(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.click("#generate")
    expect(page.locator(".card .words").filter(has_text=prompt)).not_to_have_count(0)


def someone_draws(url: str, prompt: str = "theirs", **params: int) -> str:
    """Returns the id of the task."""
    answer = requests.post(url + "/generate", json={"prompt": prompt, **params}, timeout=10)
    return str(answer.json()["task_id"])


def still(page: Page, url: str, path: Path) -> None:
    """Screenshot of unfinished tasks, one of another person, and a gallery."""
    choose = page.locator("label").filter
    choose(has=page.locator("[value=custom]")).click()
    page.fill("#width", "256")
    page.fill("#height", "256")
    for number, prompt in enumerate(PROMPTS[2:]):
        draw(page, prompt)
        expect(page.locator(".card.loaded")).to_have_count(number + 1)
    page.fill("#width", "512")
    page.fill("#height", "512")
    page.fill("#steps", "20")
    page.fill("#n", "8")
    draw(page, PROMPTS[0])
    expect(page.locator(".unfinished.running")).to_have_count(1)
    someone_draws(url, steps=20, n=4, width=512, height=512)
    page.fill("#n", "1")
    page.fill("#steps", "4")
    draw(page, PROMPTS[1])
    page.fill("#prompt", "A red ball to the left of a blue star")
    expect(page.locator("#queue .row")).to_have_count(3)
    expect(page.locator("#forecast")).to_contain_text("3 tasks")
    expect(page.locator(".status").last).to_contain_text("picture 3 of 8")
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
    page.locator(".compose").evaluate("form => form.scrollTo(0, 0)")
    save(page.screenshot(), path)


def save(screenshot: bytes, path: Path) -> None:
    """Write a PNG with 256 colours."""
    shot = Image.open(io.BytesIO(screenshot)).convert("RGB")
    palette = shot.quantize(256)
    shot.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def operators_view(page: Page, url: str, path: Path) -> None:
    """Screenshot of the operator's view after tasks of several sizes."""
    for number in range(40):
        width, height = 128 << number % 3, 128 << number % 2
        task_id = someone_draws(url, width=width, height=height, steps=20 + number % 4 * 20)
        if number % 4 == 3:
            wanted = {"task_id": task_id, "wait": "60", "delete": "false"}
            requests.get(url + "/image", params=wanted, timeout=120).raise_for_status()
    for prompt in PROMPTS[:3]:
        someone_draws(url, prompt, steps=100, n=10, width=768, height=512)
    page.goto(url + "/operator")
    expect(page.locator("#plot svg")).to_be_visible()
    expect(page.locator("#tasks tr")).to_have_count(3)
    page.evaluate("document.activeElement.blur()")
    save(page.screenshot(full_page=True), path)


def fill_gallery(page: Page) -> None:
    page.locator("label").filter(has=page.locator("[value=custom]")).first.click()
    for number, prompt in enumerate(PROMPTS):
        width, height = (256, 256) if number % 3 else (384, 256)
        page.fill("#width", str(width))
        page.fill("#height", str(height))
        draw(page, prompt)
        expect(page.locator(".card.loaded")).to_have_count(number + 1)


def gallery(page: Page, _: str, path: Path) -> None:
    """Screenshot of selected pictures and a favourite, in the dark theme."""
    fill_gallery(page)
    page.locator(".card").nth(1).hover()
    page.locator(".star").nth(1).click()
    expect(page.locator(".expiry.kept")).to_have_count(1)
    page.click("#theme")
    page.click("#select")
    for number in (0, 1, 4):
        page.locator(".open").nth(number).click()
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur()")
    page.locator(".compose").evaluate("form => form.scrollTo(0, 0)")
    save(page.screenshot(animations="disabled"), path)


def compare(page: Page, _: str, path: Path) -> None:
    """Screenshot of the large view that compares two pictures."""
    fill_gallery(page)
    page.click("#select")
    for number in (1, 3):
        page.locator(".open").nth(number).click()
    page.click("#select-compare")
    page.locator("#compare-picture").evaluate("image => image.decode()")
    page.mouse.move(5, 5)
    save(page.screenshot(animations="disabled"), path)


def phone(page: Page, _: str, path: Path) -> None:
    """Two screenshots of a phone beside each other: the gallery and the large view."""
    fill_gallery(page)
    page.set_viewport_size({"width": 390, "height": 780})
    page.evaluate("document.getElementById('yours').scrollIntoView()")
    first = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
    page.locator(".open").nth(1).click()
    page.locator("#viewer-picture").evaluate("image => image.decode()")
    second = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
    both = Image.new("RGB", (first.width * 2 + 24, first.height), "white")
    both.paste(first, (0, 0))
    both.paste(second, (first.width + 24, 0))
    data = io.BytesIO()
    both.save(data, "PNG")
    save(data.getvalue(), path)


class Film:
    """Records a page from now on."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._frames: list[tuple[float, bytes]] = []
        self._devtools = page.context.new_cdp_session(page)
        self._devtools.on("Page.screencastFrame", self._came)
        self._devtools.send("Page.startScreencast", {"format": "png"})

    def _came(self, frame: dict[str, Any]) -> None:
        self._devtools.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})
        at = frame["metadata"]["timestamp"]
        if not self._frames or at - self._frames[-1][0] >= FRAME_S:
            self._frames.append((at, base64.b64decode(frame["data"])))

    def roll(self, seconds: float) -> None:
        self._page.wait_for_timeout(seconds * 1000)

    def save(self, path: Path) -> None:
        self._devtools.send("Page.stopScreencast")
        self._frames.append((time.time(), self._page.screenshot()))
        every = -(-len(self._frames) // MOST_FRAMES)
        chosen = self._frames[::-1][::every][::-1]  # with the last one
        moments = [moment for moment, _ in chosen]
        pictures = [self._small(data) for _, data in chosen]
        palette = self._palette(pictures)
        frames = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures]
        lasts = [min(later - earlier, LONGEST_FRAME_S) for earlier, later in pairwise(moments)]
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            duration=[round(seconds * 1000) for seconds in (*lasts, LAST_FRAME_S)],
            loop=0,
            optimize=True,
        )

    @staticmethod
    def _small(data: bytes) -> Image.Image:
        shot = Image.open(io.BytesIO(data)).convert("RGB")
        size = GIF_WIDTH, GIF_WIDTH * SIZE["height"] // SIZE["width"]
        return shot.resize(size, Image.Resampling.LANCZOS)

    @staticmethod
    def _palette(pictures: list[Image.Image]) -> Image.Image:
        """One palette for all frames, so that unchanged pixels compress well."""
        some = [*pictures[:: max(len(pictures) // 8, 1)], pictures[-1]]
        width, height = some[0].size
        sheet = Image.new("RGB", (width, height * len(some)))
        for number, picture in enumerate(some):
            sheet.paste(picture, (0, number * height))
        return sheet.quantize(COLOURS)


def film(page: Page, url: str, path: Path) -> None:
    for _ in range(4):  # the colours of previews are learned from finished pictures
        someone_draws(url, steps=20)
    page.wait_for_function("fetch('queue').then(a => a.json()).then(queue => queue.length === 0)")
    page.fill("#steps", "120")  # slow enough to be recorded
    page.fill("#n", "3")  # a batch, whose pictures come one by one
    page.mouse.move(5, 5)
    reel = Film(page)
    reel.roll(0.5)
    for prompt in PROMPTS[:2]:
        page.fill("#prompt", "")
        page.focus("#prompt")
        for end in range(4, len(prompt) + 4, 4):
            page.keyboard.insert_text(prompt[end - 4 : end])
            reel.roll(0.04)
        page.keyboard.press("Control+Enter")
        reel.roll(0.8)
        if prompt == PROMPTS[0]:
            someone_draws(url, steps=60)
            page.fill("#n", "1")
    expect(page.locator(".card.loaded")).to_have_count(4)
    reel.roll(0.8)
    page.locator(".card .open").first.hover()
    reel.roll(0.7)
    page.locator(".card").first.get_by_role("button", name="Vary").click()
    page.mouse.move(5, 5)
    expect(page.locator(".card.loaded")).to_have_count(5)
    reel.roll(0.8)
    page.click("#theme")
    page.mouse.move(5, 5)
    reel.roll(0.8)
    reel.save(path)


def drawn(url: str, prompt: str, **params: int) -> bytes:
    """Returns the file of a picture."""
    wanted = {"task_id": someone_draws(url, prompt, **params), "wait": "60"}
    answer = requests.get(url + "/image", params=wanted, timeout=120)
    answer.raise_for_status()
    return answer.content


def stroke(page: Page, reel: Film, points: list[tuple[float, float]]) -> None:
    """Paints with the mouse through shares of the width and the height of the picture."""
    box = page.locator(".paint [role=application]").bounding_box()
    assert box
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
        reel.roll(0.12)
    page.mouse.up()
    reel.roll(0.25)


def mask_film(page: Page, url: str, path: Path) -> None:
    """The sky of a picture is painted over and drawn again, and both pictures are compared."""
    sea = drawn(url, "The sea by day with the sun", width=768, height=576)
    source = FilePayload(name="sea.png", mimeType="image/png", buffer=sea)
    page.set_input_files("#init_image", files=[source])
    page.fill("#prompt", "The sea at night with a moon")
    page.fill("#steps", "20")
    page.fill("#image_strength", "0.05")  # the sky becomes another one
    page.locator("#paint-mask").scroll_into_view_if_needed()
    reel = Film(page)
    reel.roll(0.5)
    page.click("#paint-mask")
    slider = page.get_by_label("Size of the brush")
    expect(slider).to_be_visible()
    slider.fill("0.16")
    reel.roll(0.4)
    stroke(page, reel, [(0.06, 0.1), (0.5, 0.12), (0.94, 0.1)])
    stroke(page, reel, [(0.94, 0.28), (0.6, 0.36), (0.3, 0.3), (0.06, 0.3)])
    page.locator("label").filter(has_text="Eraser").click()
    stroke(page, reel, [(0.68, 0.24), (0.78, 0.26)])
    reel.roll(0.4)
    page.get_by_role("button", name="Use the mask").click()
    reel.roll(0.6)
    page.click("#generate")
    expect(page.locator(".card.loaded")).to_have_count(1)
    reel.roll(0.8)
    page.locator(".card .open").click()
    page.get_by_role("button", name="Before and after").click()
    expect(page.locator("#compare")).to_be_visible()
    for split in (50, 65, 80, 65, 50, 35, 20, 35, 50):
        page.locator("#compare-split").fill(str(split))
        reel.roll(0.2)
    reel.save(path)


def main(folder: Path, names: list[str]) -> None:
    expect.set_options(timeout=WAIT_MS)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        fonts = Path(temporary) / "fonts.conf"
        fonts.write_text(FONTS.format("".join(FONT.format(*pair) for pair in STAND_IN.items())))
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu"],
            env={**os.environ, "FONTCONFIG_FILE": str(fonts)},
        )
        small = ("--max-pixels", "65536", "--max-steps", "200")
        takes = (
            (still, "page.png", ()),
            (operators_view, "operator.png", ()),
            (gallery, "gallery.png", ()),
            (compare, "compare.png", ()),
            (phone, "phone.png", ()),
            (film, "page.gif", small),
            (mask_film, "mask.gif", ()),
        )
        for take, name, limits in takes:
            if names and name not in names:
                continue
            with server(*limits) as url:
                page = browser.new_page(viewport=SIZE)
                page.set_default_timeout(WAIT_MS)
                page.goto(url)
                expect(page.locator("#forecast")).not_to_be_empty()
                take(page, url, folder / name)
                page.close()
            print(folder / name, (folder / name).stat().st_size, "bytes")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images", sys.argv[2:])
