"""Measures the phases and steps of one picture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from task import Phase
from timing_model import Measured


class Stopwatch:
    """Seconds of the phases and steps of one picture, from now on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase = Phase.TEXT_ENCODING
        self._steps_done = 0
        self._phase_at = self._step_at = clock()
        self._phase_s: dict[Phase, float] = {}
        self._step_s: list[float] = []

    def reached(self, phase: Phase, steps_done: int) -> None:
        """A phase began or a step ended, at this moment."""
        at = self._clock()
        if phase is not self._phase:
            self._phase_s[self._phase] = at - self._phase_at
            self._phase, self._phase_at, self._step_at = phase, at, at
        elif steps_done > self._steps_done:
            self._step_s.append(at - self._step_at)
            self._step_at = at
        self._steps_done = steps_done

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time inside is not measured."""
        at = self._clock()
        try:
            yield
        finally:
            stopped_s = self._clock() - at
            self._phase_at += stopped_s
            self._step_at += stopped_s

    def measured(self) -> Measured:
        """The picture is drawn."""
        self.reached(Phase.IMAGE_ENCODING, self._steps_done)
        return Measured(
            text_encoding_s=self._phase_s.get(Phase.TEXT_ENCODING, 0.0),
            step_s=tuple(self._step_s),
            decoding_s=self._phase_s.get(Phase.DECODING, 0.0),
            image_encoding_s=0.0,
        )
