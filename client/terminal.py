"""Output of the command: a progress bar, and pictures in terminals that support them."""

from __future__ import annotations

import base64
import time
from io import BytesIO
from typing import TYPE_CHECKING, Any, Callable, TextIO

from .mflux_client import ENDED, MfluxError, Status, harmless, say

if TYPE_CHECKING:
    from collections.abc import Mapping

PHASES = {
    "prompt_expansion": "writing the prompt",
    "loading": "loading the model",
    "text_encoding": "reading the prompt",
    "paused": "paused for another task",
    "decoding": "decoding",
    "image_encoding": "writing the file",
}
KITTY_CHUNK = 4096
PIXELS_OF_A_COLUMN = 8
"""About."""


class Waiting:
    """One line on a terminal about the task that is waited for, or one line for each change where
    there is no terminal (or no tqdm).

    `update` and `trouble` may be called from any thread, the rest from one.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._began_at = clock()
        self._latest: tuple[Status, float] | None = None
        self._trouble = ""
        self._said = ""
        self._bar: Any = None
        self._make_bar = _tqdm() if stream.isatty() else None

    def update(self, status: Status) -> None:
        self._trouble = ""
        self._latest = (status, self._clock())

    def trouble(self, failure: MfluxError, pause_s: float) -> None:
        self._trouble = f"{failure.message.rstrip('.')}; trying again"

    def tick(self) -> None:
        """Updates the bar; the countdown continues between two answers."""
        if self._latest is None:
            return
        status, received_at = self._latest
        now = self._clock()
        remaining_s = max((status.wait_remaining or 0) - (now - received_at), 0.0)
        if self._make_bar is None:
            line = self._trouble or f"task {status.task_id}: {in_words(status)}"
            self._say(self._trouble or status.status, line)
            return
        if self._bar is None:
            self._bar = self._make_bar(
                total=1.0,
                file=self._stream,
                desc=harmless(in_words(status, remaining_s)),
                bar_format="{desc} |{bar}| {elapsed}",
                dynamic_ncols=True,
                leave=False,
            )
        elapsed_s = now - self._began_at
        self._bar.total = elapsed_s + max(remaining_s, 0.1)
        self._bar.n = elapsed_s
        shown = harmless(self._trouble or in_words(status, remaining_s))
        self._bar.set_description_str(shown, refresh=False)
        self._bar.refresh()

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Removes the line."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, what: str, line: str) -> None:
        """Prints a line for each status."""
        if what not in (self._said, *ENDED):
            self._said = what
            say(line, self._stream)


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def in_words(status: Status, remaining_s: float | None = None) -> str:
    """ "3rd in line, about 40 s" """
    if status.ended:
        return status.status
    seconds = status.wait_remaining if remaining_s is None else remaining_s
    about = "" if seconds is None else f", about {duration(seconds)}"
    if status.status == "waiting":
        download = status.raw.get("download")
        if download:
            share = ""
            if download.get("bytes_total"):
                share = f", {min(download['bytes_done'] / download['bytes_total'], 1):.0%}"
            return f"the server downloads {download['model']}{share}"
        place = "next in line" if not status.pos else f"{ordinal(status.pos + 1)} in line"
        loading = ", the model is being loaded" if status.server == "loading" else ""
        return f"{place}{loading}{about}"
    count = status.params.get("count", 1)
    image = f"image {min(status.images_done + 1, count)} of {count}, " if count > 1 else ""
    step = f"step {min(status.steps_done + 1, status.steps_total)} of {status.steps_total}"
    return f"{image}{PHASES.get(status.phase or '', step)}{about}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number}{ending or 'th'}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{round(seconds)} s"
    if seconds < 6000:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def picture_protocol(environment: Mapping[str, str]) -> str | None:
    """How this terminal shows pictures: kitty, iterm2 or not at all."""
    if environment.get("TMUX") or environment.get("TERM", "").startswith("screen"):
        return None  # they do not pass on either protocol
    program = environment.get("TERM_PROGRAM", "")
    if (
        environment.get("KITTY_WINDOW_ID")
        or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty")
        or program == "ghostty"
    ):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return None


def picture_escape(data: bytes, protocol: str, columns: int) -> str:
    """Returns the escape sequence that shows a picture; empty if it cannot be shown.

    kitty takes PNG alone: others need Pillow.
    """
    if protocol == "iterm2":
        size = f"size={len(data)};inline=1;preserveAspectRatio=1"
        return f"\x1b]1337;File={size}:{base64.b64encode(data).decode('ascii')}\x07\n"
    png = _as_png(data)
    if png is None:
        return ""
    width = int.from_bytes(png[16:20], "big")
    fit = f",c={columns}" if width > columns * PIXELS_OF_A_COLUMN else ""
    text = base64.b64encode(png).decode("ascii")
    chunks = [text[start : start + KITTY_CHUNK] for start in range(0, len(text), KITTY_CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        head = f"a=T,f=100,q=2{fit}," if number == 0 else ""  # q=2: no answer
        parts.append(f"\x1b_G{head}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(parts) + "\n"


def _as_png(data: bytes) -> bytes | None:
    if data.startswith(b"\x89PNG"):
        return data
    try:
        from PIL import Image
    except ImportError:
        return None
    buffer = BytesIO()
    with Image.open(BytesIO(data)) as picture:
        picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
