"""The page in Firefox: a picture is drawn and looked at, and a mask is painted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ServerProcess
from firefox import BINARY, Firefox
from pages import picture_file

pytestmark = pytest.mark.skipif(BINARY is None, reason="needs Firefox")

ERRORS = """
window.wrong = [];
addEventListener("error", (event) => window.wrong.push(String(event.message)));
addEventListener("unhandledrejection", (event) => window.wrong.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => window.wrong.push(event.violatedDirective));
"""
PAINTED = "document.querySelector('.mask-tools output')?.textContent"


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    folder = tmp_path / "firefox"
    folder.mkdir()
    started = Firefox(folder)
    yield started
    started.close()


def test_firefox_draws_a_picture_looks_at_it_and_paints_a_mask(
    served: ServerProcess, firefox: Firefox, tmp_path: Path
) -> None:
    firefox.open(served.url)
    firefox.run(ERRORS)
    firefox.wait("document.querySelector('#forecast').textContent")
    firefox.run("document.querySelector('input[name=shape][value=custom]').click()")
    for name in ("width", "height"):
        firefox.fill(f"#{name}", "64")
    firefox.type("#prompt", "a boat in Firefox")
    firefox.click("#generate")
    firefox.wait("document.querySelector('.card.loaded')")
    firefox.click(".card .open")
    firefox.wait("document.querySelector('#viewer-picture').naturalWidth === 64")
    firefox.click("#viewer-close")
    file = tmp_path / "picture.png"
    file.write_bytes(picture_file(128, 96, "teal")["buffer"])
    firefox.type("#init_image", str(file))
    firefox.click("#paint-mask")
    firefox.wait(f"{PAINTED} === '0 % painted'")
    firefox.drag(".paint [role=application]", (0.2, 0.5), (0.8, 0.5))
    firefox.wait(f"{PAINTED} !== '0 % painted'")
    firefox.click(".mask-brush .generate")
    firefox.wait("document.querySelector('[data-field=mask] .picks img').naturalWidth === 128")
    firefox.fill("#prompt", "repainted in Firefox")
    firefox.click("#generate")
    firefox.wait("document.querySelectorAll('.card.loaded').length === 2")
    assert firefox.run("return window.wrong") == []
    card = firefox.run("return document.querySelector('.card').dataset.key")
    params = served.get("/status", task_id=card.split()[0]).json()["params"]
    assert params["prompt"] == "repainted in Firefox"
    assert params["mask"]
