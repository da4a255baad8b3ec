"""Firefox for tests: without a window, driven by Marionette, the protocol that it speaks itself.

Playwright drives only its own build of Firefox, and geckodriver, which translates to this protocol,
is not in Debian.
"""

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from conftest import until

BINARY = shutil.which("firefox-esr") or shutil.which("firefox")
WAIT_S = 120
PREFERENCES = {
    "marionette.port": 0,  # any that is free: Firefox writes it into a file
    "app.update.disabledForTesting": True,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.update.enabled": False,
    "intl.accept_languages": "en",
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
}
"""Firefox asks no host but the server."""
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver returns an element."""


class Firefox:
    """A browser with one page.

    Args:
        folder: for its profile; empty.
    """

    def __init__(self, folder: Path) -> None:
        assert BINARY
        lines = [
            f"user_pref({json.dumps(name)}, {json.dumps(value)});\n"
            for name, value in PREFERENCES.items()
        ]
        (folder / "user.js").write_text("".join(lines))
        command = [BINARY, "--headless", "--marionette", "--no-remote", "--profile", str(folder)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._socket = self._connected(folder / "MarionetteActivePort")
            self._read = self._socket.makefile("rb")
            self._message()  # its greeting
            self._number = 0
            self.do("WebDriver:NewSession", strictFileInteractability=False)
            self.do("WebDriver:SetTimeouts", implicit=WAIT_S * 1000, script=WAIT_S * 1000)
        except BaseException:
            self.close()
            raise

    def _connected(self, port: Path) -> socket.socket:
        def written() -> bool:
            assert self._process.poll() is None, "Firefox has ended"
            return port.exists() and port.read_text() != ""

        until(written)
        return socket.create_connection(("127.0.0.1", int(port.read_text())), 2 * WAIT_S)

    def _message(self) -> Any:
        """A message: its length in digits, a colon, JSON."""
        digits = b""
        while (byte := self._read.read(1)) != b":":
            assert byte, "Firefox has ended"
            digits += byte
        return json.loads(self._read.read(int(digits)))

    def do(self, command: str, **parameters: Any) -> Any:
        """Returns the result of a command."""
        self._number += 1
        data = json.dumps([0, self._number, command, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(data), data))
        _, number, error, result = self._message()
        assert number == self._number
        assert error is None, error
        return result["value"] if isinstance(result, dict) and "value" in result else result

    def open(self, url: str) -> None:
        self.do("WebDriver:Navigate", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Returns what the script returns; a promise is awaited."""
        return self.do("WebDriver:ExecuteScript", script=script, args=arguments)

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true.

        Raises:
            AssertionError: it is not true within WAIT_S.
        """
        self.run(
            f"""return new Promise((done) => {{
              const look = () => (({condition}) ? done() : setTimeout(look, 30));
              look();
            }})"""
        )

    def _element(self, selector: str) -> str:
        found = self.do("WebDriver:FindElement", using="css selector", value=selector)
        return str(found[ELEMENT])

    def click(self, selector: str) -> None:
        """Waits until it is shown."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        self.do("WebDriver:ElementClick", id=self._element(selector))

    def type(self, selector: str, text: str) -> None:
        """Adds a text to a field; to one for files, a file of this path."""
        self.do("WebDriver:ElementSendKeys", id=self._element(selector), text=text)

    def fill(self, selector: str, text: str) -> None:
        """Replaces the text of a field. WebDriver's own command for it sends no input event."""
        self.run(
            "const field = document.querySelector(arguments[0]); field.focus(); field.select()",
            selector,
        )
        self.type(selector, text)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse over an element, between shares of its width and height."""
        box = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.x, box.y, box.width, box.height]",
            selector,
        )
        first, last = (
            {
                "type": "pointerMove",
                "x": round(box[0] + across * box[2]),
                "y": round(box[1] + down * box[3]),
            }
            for across, down in (start, end)
        )
        pressed = [{"type": "pointerDown", "button": 0}, last, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": [first, *pressed]}
        self.do("WebDriver:PerformActions", actions=[mouse])

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if hasattr(self, "_socket"):
            self._read.close()
            self._socket.close()
