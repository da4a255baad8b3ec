"""A server whose pictures stop at their first step for as long as a test needs to look at them.

The picture is drawn by mflux as usual; only its time is the test's. A test that needs a running
task holds it instead of drawing a large one: the state is there on every machine, however slow the
test or fast the server is, and takes no processor time.
"""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOOK_S = 0.1
"""Between two looks at the file, and two reports of a held picture, which may be cancelled."""
DENOISING, DECODING = "denoising", "decoding"
WITHIN = "within "
"""Before a phase: held within a step of it, which reports nothing."""


class Hold:
    """A file that a test and its servers share: pictures are held while it exists."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def close(self, after: int = 0, step: int = 1, phase: str = DENOISING) -> None:
        """From now on each picture is held at this step, or when it is decoded, or within this
        step, except for the next `after` pictures."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{after} {step} {phase}")
        new.replace(self.file)

    def open(self) -> None:
        """The held pictures go on, and no further ones are held."""
        self.file.unlink(missing_ok=True)

    def passes(self) -> bool:
        """(server) Whether the picture that begins now is one of those that are not held."""
        after, step, phase = self._read()
        if after:
            self.close(after - 1, step, phase)
        return after > 0

    def holds(self, phase: str, steps_done: int) -> bool:
        """(server) Whether a picture that may be held waits in this phase at this step."""
        _, step, held = self._read()
        return phase == held.removeprefix(WITHIN) and steps_done >= step

    @property
    def reports(self) -> bool:
        """(server) Whether a held picture reports meanwhile; not within a step."""
        return not self._read()[2].startswith(WITHIN)

    def _read(self) -> tuple[int, int, str]:
        with suppress(FileNotFoundError):
            after, step, phase = self.file.read_text().split(maxsplit=2)
            return int(after), int(step), phase
        return 0, 0, ""

    def hold_pictures(self) -> None:
        """(server) From now on this process's generator looks at the file."""
        from generator import MfluxGenerator
        from task import Drawn, Phase, Report, Stage

        pause, generate = threading.Event(), MfluxGenerator.generate

        def held(self_: MfluxGenerator, stage: Stage, inputs: Path, report: Report) -> Drawn:
            passes = self.passes()

            def reported(phase: Phase, steps_done: int, steps_total: int) -> None:
                report(phase, steps_done, steps_total)
                while not passes and self.holds(phase.value, steps_done):
                    pause.wait(LOOK_S)
                    if self.reports:
                        report(phase, steps_done, steps_total)

            return generate(self_, stage, inputs, reported)

        MfluxGenerator.generate = held  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import server
    import supervision

    Hold(Path(os.environ["HOLD"])).hold_pictures()
    supervision.end_process(server.main(sys.argv[1:]))
