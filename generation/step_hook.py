"""mflux's callbacks during one picture: steps reported, values checked, previews made, the source
kept outside a mask.

Depends on mflux and mlx.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from generation.finite import check_finite
from generation.inpainting import KeptSource
from generation.previews import Previews
from generation.prompt_cache import PromptCache
from task import Phase, Report

log = logging.getLogger(__name__)


@dataclass
class _Picture:
    """The picture that is being drawn."""

    report: Report
    kept: KeptSource | None = None
    """What it keeps of its source."""
    latents: Any = None
    """Those before the present step."""
    steps_done: int = 0
    steps_total: int = 0


class StepHook:
    """mflux's callbacks, registered once per loaded model.

    Everything in MLX is lazy: each callback evaluates the latents first, else the work of a step
    would be booked on the next one.
    """

    def __init__(
        self, prompt_cache: PromptCache, note_memory: Callable[[], None], previews: Previews
    ) -> None:
        self.prompt_cache = prompt_cache
        self._note_memory = note_memory
        self._previews = previews
        self._picture = _Picture(_report_to_nobody)

    @contextmanager
    def picture(self, report: Report, kept: KeptSource | None = None) -> Iterator[None]:
        """One picture is drawn inside. `report` may itself draw another one with the same model:
        this one then continues where it was."""
        before, self._picture = self._picture, _Picture(report, kept)
        try:
            yield
        finally:
            self._picture = before

    def call_before_loop(self, *, latents: Any, config: Any, **_: Any) -> None:
        import mlx.core as mx

        self.prompt_cache.evaluate()
        mx.eval(latents)
        picture = self._picture
        picture.latents = latents
        picture.steps_done = 0
        picture.steps_total = config.num_inference_steps - config.init_time_step
        picture.report(Phase.DENOISING, 0, picture.steps_total)

    def call_in_loop(
        self, *, t: int, latents: Any, config: Any, denoised: Any = None, **_: Any
    ) -> None:
        import mlx.core as mx

        picture = self._picture
        check_finite(latents, "a step")
        if picture.kept is not None:
            picture.kept.put_back(latents, config.scheduler.sigmas[t + 1])
        self._note_memory()
        with harmless("a preview failed"):
            if self._previews.must_generate():
                clean = denoised
                if clean is None:
                    clean = _without_noise(t, picture.latents, latents, config)
                elif picture.kept is not None:
                    clean = picture.kept.blended(clean, 0.0)
                self._previews.draw(clean.astype(mx.float32), config.width, config.height)
        picture.latents = latents
        picture.steps_done += 1
        picture.report(Phase.DENOISING, picture.steps_done, picture.steps_total)

    def call_after_loop(self, *, latents: Any, config: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents)
        picture = self._picture
        picture.latents = None
        with harmless("a preview failed"):
            if self._previews.may_learn():
                self._previews.keep(latents.astype(mx.float32), config.width, config.height)
        picture.report(Phase.DECODING, picture.steps_done, picture.steps_total)


def _without_noise(t: int, before: Any, after: Any, config: Any) -> Any:
    """Where step t leads: what is noise moves along a line, x = (1 - sigma) clean + sigma noise, so
    two points of it, at sigma of t and of t + 1, tell where it meets sigma = 0."""
    sigmas = getattr(config.scheduler, "sigmas", None)
    if before is None or sigmas is None or len(sigmas) <= t + 1:
        return after
    was, now = float(sigmas[t]), float(sigmas[t + 1])
    if was <= now or before.shape != after.shape:
        return after
    return after + (after - before) * (now / (was - now))


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Logs errors of optional work; the picture continues."""
    try:
        yield
    except Exception:
        log.exception(what)


def _report_to_nobody(phase: Phase, steps_done: int, steps_total: int) -> None:
    pass
