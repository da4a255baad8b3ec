"""A generator that sleeps instead of drawing, and signs its pictures: what they are of, and when.

The models are loaded by mflux as usual. A picture that reaches the wrong task, or that replaces
another one, is seen by its signature.
"""

import ctypes
import itertools
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Sleeping:
    """What a process does before its main(): the generator sleeps from then on.

    Args:
        step_s: of each step, in seconds.
        namespace: file of the network namespace in which the process runs.
        clock: file that says by how many seconds the wall clock of the process (time.time) is
            wrong; none: it is right.
    """

    step_s: float
    namespace: str | None = None
    clock: Path | None = None

    def hold_pictures(self) -> None:
        """(server or worker)"""
        if self.namespace:
            _enter(self.namespace)
        if self.clock:
            self._set_clock(self.clock)
        from generator import MfluxGenerator
        from task import Drawn, Phase, Report, Stage

        numbers, step_s, pause = itertools.count(1), self.step_s, Event()

        def drawn(self_: MfluxGenerator, stage: Stage, inputs: Path, report: Report) -> Drawn:
            params, began = stage.params, time.monotonic()
            report(Phase.DENOISING, 0, params.steps)
            for step in range(1, params.steps + 1):
                pause.wait(step_s)
                report(Phase.DENOISING, step, params.steps)
            report(Phase.DECODING, params.steps, params.steps)
            signature = {
                "prompt": params.prompt,
                "seed": params.seed,
                "drawn": f"{os.getpid()}-{next(numbers)}",
                "began": began,
                "ended": time.monotonic(),
            }
            return Drawn(signed((params.width, params.height), signature))

        MfluxGenerator.generate = drawn  # type: ignore[method-assign, assignment]

    @staticmethod
    def _set_clock(clock: Path) -> None:
        right = time.time

        def wrong() -> float:
            with suppress(OSError, ValueError):
                return right() + float(clock.read_text())
            return right()

        time.time = wrong


def signed(size: tuple[int, int], signature: dict[str, Any]) -> Image.Image:
    """A picture whose pixels are this text."""
    length = 3 * size[0] * size[1]
    return Image.frombytes("RGB", size, json.dumps(signature).encode().ljust(length)[:length])


def signature_of(picture: Image.Image) -> dict[str, Any]:
    """Raises: ValueError: it has none."""
    found: dict[str, Any] = json.loads(picture.convert("RGB").tobytes().decode(errors="replace"))
    return found


def _enter(namespace: str) -> None:
    """Puts this process into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
