"""Waits for a task: shows it, saves its images as they come, and obeys Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from collections import deque
from concurrent.futures import Future, wait
from threading import Thread
from typing import TYPE_CHECKING

from .mflux_client import Client, Status, say
from .options import PATIENCE_S
from .terminal import Waiting

if TYPE_CHECKING:
    from .output import Output

TICK_S = 0.2


class Watched:
    """A task that is waited for. A thread of its own asks the server and fetches images, so that
    the bar moves and Ctrl-C is obeyed at once."""

    def __init__(
        self, options: argparse.Namespace, client: Client, task_id: str, output: Output
    ) -> None:
        self.interrupted = 0
        """How often Ctrl-C was pressed."""
        self._options, self._client = options, client
        self._task_id, self._output = task_id, output
        self._shown = Waiting(sys.stderr)
        self._ended: Future[Status] = Future()
        self._images: deque[tuple[str, bytes]] = deque()
        """Fetched, to be written."""

    def until_ended(self) -> Status:
        """Save the images until the task has ended.

        Raises:
            KeyboardInterrupt: the user does not wait any longer, and the task goes on.
            OSError: an image cannot be written.
            MfluxError
        """
        Thread(target=self._listen, name="waits", daemon=True).start()
        pressed: list[int] = []
        # Noted and not raised: an exception could come while a lock is held.
        before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
        try:
            while not wait([self._ended], TICK_S).done:
                self._shown.tick()
                self._write_images()
                while len(pressed) > self.interrupted:
                    self.interrupted += 1
                    self._interrupt()
            self._write_images()
            return self._ended.result()
        finally:
            signal.signal(signal.SIGINT, before)
            self._shown.close()

    def _listen(self) -> None:
        patience_s = PATIENCE_S if self._options.retry_s is None else self._options.retry_s
        try:
            with Client(
                self._options.url,
                key=self._options.key,
                retry_s=patience_s,
                on_retry=self._shown.trouble,
            ) as client:

                def update(status: Status) -> None:
                    self._shown.update(status)
                    self._images.extend(self._output.fetch(client, status))

                self._ended.set_result(client.wait(self._task_id, on_status=update))
        except BaseException as error:
            self._ended.set_exception(error)

    def _write_images(self) -> None:
        if self._images:
            self._shown.clear()
        while self._images:
            self._output.write(*self._images.popleft())

    def _interrupt(self) -> None:
        """The first Ctrl-C ends the task after the present image, the second one now. A task that
        this command has not submitted (--task) goes on."""
        if self._options.task or self.interrupted > 2:
            raise KeyboardInterrupt
        self._shown.clear()
        if self.interrupted == 1:
            was = self._client.cancel(self._task_id, after_current=True)
            if was == "running":
                _say(
                    f"task {self._task_id} ends after the picture that is being drawn; Ctrl-C "
                    "again cancels it now"
                )
        elif not self._client.status(self._task_id).ended:  # an ended one would be removed
            self._client.cancel(self._task_id)


def _say(message: str) -> None:
    line_before = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
    say(f"{line_before}mflux: {message}", sys.stderr)
