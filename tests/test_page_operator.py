"""The operator's view: what it shows of real tasks, what its buttons do, and who may open it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess, needs_chromium
from holding import DECODING
from pages import PageServer, Scheme, Visit, Visitor
from playwright.sync_api import Locator, expect

pytestmark = needs_chromium

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
KEY = "key-of-the-operator"
LEAST_TASKS = 10
FIRST_PAINT_BYTES = 100_000


class Operator:
    """Calls of the API by the operator of the shared server."""

    def __init__(self, url: str) -> None:
        self.url, self.ids = url, list[str]()

    def ask(self, method: str, path: str, **options: Any) -> Any:
        answer = requests.request(method, self.url + path, timeout=120, **options)
        answer.raise_for_status()
        return answer.json()

    def submit(self, prompt: str, **fields: Any) -> str:
        body = {
            "model": "noise-flux1",
            "prompt": prompt,
            "width": 64,
            "height": 64,
            "steps": 2,
            **fields,
        }
        self.ids.append(self.ask("POST", "/generate", json=body)["task_id"])
        return self.ids[-1]

    def draw(self, count: int) -> None:
        ids = [self.submit(f"picture {number}") for number in range(count)]
        for task_id in ids:
            wanted = {"task_id": task_id, "wait": "60", "delete": "false"}
            image = requests.get(f"{self.url}/image", params=wanted, timeout=120)
            image.raise_for_status()

    def draw_until_compared(self, count: int) -> None:
        """Until so many forecasts are compared with what came: the first ones are guesses."""
        for _ in range(20):
            if self.ask("GET", "/stats")["forecasts_compared"] >= count:
                return
            self.draw(4)
        raise AssertionError("forecasts are not compared with what came")

    def clear(self) -> None:
        self.ask("POST", "/queue/resume")
        self.ask("POST", "/machines/local/resume")
        for task_id in self.ids:
            requests.delete(f"{self.url}/delete", params={"task_id": task_id}, timeout=60)


@pytest.fixture
def operator(served: PageServer) -> Iterator[Operator]:
    found = Operator(served.url)
    yield found
    served.hold.open()
    found.clear()


def opened(me: Visitor) -> Visitor:
    me.page.goto(me.url + "operator")
    expect(me["#verdict"]).not_to_be_empty()
    return me


def row(me: Visitor, table: str, words: str | re.Pattern[str]) -> Locator:
    return me[f"#{table} tr"].filter(has_text=words)


def test_the_view_shows_forecasts_and_truth_of_real_tasks(visit: Visit, operator: Operator) -> None:
    operator.draw_until_compared(LEAST_TASKS)
    me = opened(visit())
    stats = operator.ask("GET", "/stats")
    count = len(stats["last_tasks"])
    assert count >= LEAST_TASKS
    expect(me["#verdict"]).to_contain_text(
        re.compile(rf"The forecast (can|is|cannot) .* half of the last {count} tasks .* p90")
    )
    expect(me["#plot .point"]).to_have_count(count)
    late = sum(task["actual_s"] > task["p90_s"] for task in stats["last_tasks"])
    expect(me["#plot .point.late"]).to_have_count(late)
    expect(me["#plot .p90"]).to_have_count(1)
    me["#last-tasks-title"].click()
    expect(me["#last-tasks tr"]).to_have_count(count)
    expect(me["#last-tasks tr"].first).to_contain_text("noise-flux1")
    expect(row(me, "steps", re.compile(r"64 \W 64")).first).to_contain_text("noise-flux1")
    expect(me["#bars rect.busy"]).to_have_count(24)
    assert float(me["#bars rect.busy"].last.get_attribute("height") or 0) > 0
    expect(row(me, "clients", "everybody")).to_contain_text("100")
    expect(row(me, "machines", "local")).to_contain_text("noise-flux1")
    expect(me["#disk"]).to_contain_text("free")
    me.picture("operator")


def test_the_latest_error_says_what_failed(visit: Visit, operator: Operator) -> None:
    task_id = operator.submit("a picture that fails", model="dev")
    for _ in range(20):
        status = operator.ask("GET", "/status", params={"task_id": task_id, "wait": "60"})["status"]
        if status == "failed":
            break
    assert status == "failed"
    me = opened(visit())
    expect(me["#errors"]).to_contain_text("The weights of dev cannot be downloaded")


def test_tasks_are_moved_and_cancelled_and_the_queue_is_paused(
    visit: Visit, operator: Operator, served: PageServer
) -> None:
    me = visit()
    served.hold.close(phase=DECODING)  # a picture of which no step is left is not preempted
    operator.submit("runs")
    for prompt in ("waits first", "waits second"):
        operator.submit(prompt)
    opened(me)
    places = me["#tasks tr td:nth-child(3)"]
    expect(row(me, "tasks", "runs")).to_contain_text("now")
    expect(places).to_have_text(["runs", "waits first", "waits second"])
    row(me, "tasks", "waits second").get_by_role("button", name="To the front").click()
    expect(places).to_have_text(["runs", "waits second", "waits first"])
    row(me, "tasks", "waits second").get_by_role("button", name="Cancel").click()
    expect(places).to_have_text(["runs", "waits first"])
    me["#pause"].click()
    expect(me["#pause"]).to_have_text("Resume the queue")
    expect(me["#queue-words"]).to_contain_text("Paused")
    me.go_on()
    expect(places).to_have_text(["waits first"])
    me["#pause"].click()
    expect(me["#queue-words"]).to_have_text("Empty.")


def test_a_machine_is_drained_and_resumed(visit: Visit, operator: Operator) -> None:
    me = opened(visit())
    machine = row(me, "machines", "local")
    machine.get_by_role("button", name="Drain").click()
    expect(machine).to_contain_text("drained")
    assert operator.ask("GET", "/machines")["machines"][0]["drained"]
    machine.get_by_role("button", name="Resume").click()
    expect(machine).not_to_contain_text("drained")
    assert not operator.ask("GET", "/machines")["machines"][0]["drained"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_view_fits_on_a_phone_and_axe_finds_nothing_serious(
    visit: Visit, operator: Operator, scheme: Scheme
) -> None:
    operator.draw_until_compared(LEAST_TASKS)
    me = visit(**PHONE, color_scheme=scheme)
    me.hold()
    operator.submit("runs")
    operator.submit("a very long word: " + "w" * 150)
    opened(me)
    expect(me["#tasks tr"]).to_have_count(2)
    me["#last-tasks-title"].click()
    me["#hours-title"].click()
    wide = me.page.evaluate("document.documentElement.scrollWidth")
    assert wide == 360
    small = me.page.evaluate(
        """() => [...document.querySelectorAll("button, a, summary")]
          .filter((node) => node.checkVisibility())
          .map((node) => [node.outerHTML.slice(0, 90), node.getBoundingClientRect()])
          .filter(([, box]) => box.height < 43.9 || box.width < 43.9)
          .map(([words]) => words)"""
    )
    assert small == []
    me.picture(f"operator-phone-{scheme}")
    me.assert_accessible()


def test_points_and_bars_are_seen_with_forced_colours(visit: Visit, operator: Operator) -> None:
    operator.draw(2)
    me = opened(visit(forced_colors="active"))
    expect(me["#bars rect.busy"]).to_have_count(24)
    fill, ink = me.page.evaluate(
        "[getComputedStyle(document.querySelector('.busy')).fill,"
        " getComputedStyle(document.body).color]"
    )
    assert fill == ink


def test_the_main_page_has_a_link_to_the_view_and_loads_nothing_of_it(visit: Visit) -> None:
    me = visit(locale="en-US")  # in a browser without any file
    loaded: dict[str, int] = {}

    def note(request: Any) -> None:
        name = re.sub(r"^web/\w+/", "web/", request.url.removeprefix(me.url))
        loaded[name] = request.sizes()["responseBodySize"]

    me.page.on("requestfinished", note)
    me.open()
    expect(me["#operator"]).to_be_visible()
    files_loaded = {name: size for name, size in loaded.items() if name in ("",) or "web/" in name}
    assert {"", "web/app.js", "web/base.css"} <= set(files_loaded)
    assert not [name for name in files_loaded if "operator" in name or "charts" in name]
    assert sum(files_loaded.values()) < FIRST_PAINT_BYTES
    me["#operator"].click()
    expect(me["#verdict"]).not_to_be_empty()


def test_the_view_asks_for_the_key_of_an_operator_where_there_is_one(
    visit: Visit, tmp_path: Path
) -> None:
    server = ServerProcess(tmp_path / "data", "--model", "noise-flux1", "--operator-key", KEY)
    try:
        me = visit(server).open()
        me.expected_statuses.add(401)
        expect(me["#operator"]).to_be_hidden()
        me.page.goto(me.url + "operator")
        me["#sign-in-key"].fill("a wrong key")
        me.page.keyboard.press("Enter")
        expect(me["#key-error"]).to_have_text("This is not the key of an operator.")
        expect(me["#content"]).to_be_hidden()
        me["#sign-in-key"].fill(KEY)
        me.page.keyboard.press("Enter")
        expect(me["#verdict"]).to_contain_text("Too early to say")
        me.page.reload()
        expect(me["#verdict"]).to_contain_text("Too early to say")
        me["#pause"].click()
        expect(me["#pause"]).to_have_text("Resume the queue")
    finally:
        server.stop()
