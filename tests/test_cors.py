"""Pages of other origins: shut out, but for those that the operator lets in."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from conftest import ServerProcess, StartServer, needs_chromium
from pages import WAIT_MS
from playwright.sync_api import Browser, Error

PAGE = "https://lite.example"


def preflight(server: ServerProcess, path: str, origin: str = PAGE) -> requests.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    return requests.options(server.url + path, headers=headers, timeout=60)


def test_without_the_option_no_origin_is_let_in(server: ServerProcess) -> None:
    answer = preflight(server, "/v1/images/generations")
    assert "Access-Control-Allow-Origin" not in answer.headers
    url = server.url + "/v1/images/generations"
    answer = requests.post(url, json={"prompt": "x"}, headers={"Origin": PAGE}, timeout=60)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "foreign_page"


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img", "/generate"])
def test_an_allowed_page_may_send_authorization_and_json(
    start_server: StartServer, path: str
) -> None:
    server = start_server(
        "--model", "noise-flux1", "--cors-origins", f"https://other.example,{PAGE}/"
    )
    answer = preflight(server, path)
    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    allowed = answer.headers["Access-Control-Allow-Headers"]
    assert allowed == "authorization,content-type,x-stainless-os"
    assert {"GET", "POST", "DELETE"} <= set(
        answer.headers["Access-Control-Allow-Methods"].split(", ")
    )
    assert int(answer.headers["Access-Control-Max-Age"]) > 0
    assert answer.headers["Access-Control-Allow-Private-Network"] == "true"
    assert set(answer.headers["Vary"].split(", ")) == {
        "Origin",
        "Access-Control-Request-Method",
        "Access-Control-Request-Headers",
    }
    small = {"prompt": "x", **({"size": "64x64"} if path.startswith("/v1") else {"width": 64})}
    for body, status in ((small, 200), ({"prompt": 5}, 400)):
        headers = {"Origin": PAGE, "Authorization": "Bearer none"}
        answer = requests.post(server.url + path, json=body, headers=headers, timeout=60)
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
    for origin in ("https://evil.example", "null", "http://lite.example", PAGE + ".evil.example"):
        assert "Access-Control-Allow-Origin" not in preflight(server, path, origin).headers
        headers = {"Origin": origin}
        answer = requests.post(server.url + path, json={"prompt": "x"}, headers=headers, timeout=60)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_star_allows_every_origin(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--cors-origins", "*")
    answer = preflight(server, "/v1/models", "null")
    assert answer.headers["Access-Control-Allow-Origin"] == "null"
    assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.fixture
def other_site(tmp_path: Path) -> Iterator[str]:
    """A page of another origin that draws a picture."""
    (tmp_path / "index.html").write_text("<!doctype html><title>another site</title>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()
        thread.join()


DRAW = """async url => {
  const answer = await fetch(url, {method: "POST", body: '{"prompt": "x", "size": "64x64"}',
    headers: {"Content-Type": "application/json", "Authorization": "Bearer none"}});
  const image = new Image();
  image.src = "data:image/png;base64," + (await answer.json()).data[0].b64_json;
  await image.decode();
  return image.naturalWidth;
}"""


@needs_chromium
def test_a_page_of_another_origin_draws_in_a_real_browser(
    browser: Browser, server: ServerProcess, start_server: StartServer, other_site: str
) -> None:
    open_server = start_server("--model", "noise-flux1", "--cors-origins", other_site)
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(other_site)
    assert page.evaluate(DRAW, open_server.url + "/v1/images/generations") == 64
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate(DRAW, server.url + "/v1/images/generations")
    page.close()
