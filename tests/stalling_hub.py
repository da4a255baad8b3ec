"""A local model hub that stalls."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import GIVE_UP_S


class StallingHub:
    """A local model hub that does not answer until `go_on` is set, and then refuses."""

    def __init__(self, folder: Path) -> None:
        self.go_on = go_on = threading.Event()

        class Hub(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                go_on.wait(GIVE_UP_S)
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hub"),
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stalling_hub(tmp_path: Path) -> Iterator[StallingHub]:
    hub = StallingHub(tmp_path)
    yield hub
    hub.go_on.set()
    hub.server.shutdown()
    hub.server.server_close()
