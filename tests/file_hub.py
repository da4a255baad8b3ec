"""A local model hub that serves files, and huggingface_hub in another process that fills a cache
from it, as on a machine with a network."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import GIVE_UP_S

ROOT = Path(__file__).parent.parent


class FileHub:
    """Serves `files`, by repository and name, in every revision."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.requested: list[str] = []
        """Files whose content was requested."""
        self.cache = folder / "hub"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                if content := self._answer():
                    self.wfile.write(content)
                    hub.requested.append(self.path.rpartition("/resolve/")[2].partition("/")[2])

            def _answer(self) -> bytes | None:
                repository, _, rest = self.path[1:].partition("/resolve/")
                revision, _, name = rest.partition("/")
                content = hub.files.get((repository, name))
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                    self.send_header("X-Repo-Commit", revision)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                return content

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a Python script that has this hub as its only one."""
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
        }
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            check=False,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GIVE_UP_S,
        )


@pytest.fixture
def file_hub(tmp_path: Path) -> Iterator[FileHub]:
    hub = FileHub(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
