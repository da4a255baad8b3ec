"""Work and predicted seconds of the stages of a task.

Not thread-safe: its owner holds a lock.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from models.family_work import FamilyWork, family_work
from models.model_catalog import LoadSpec, Model
from models.model_rules import SIDE_STEP
from models.prompt_tokens import tokens
from scheduler.prompts import Prompts
from task import Stage
from timing.speeds import Product, product_of
from timing.work import REFERENCE_TOKENS
from timing_model import Confidence, Durations, TimingModel, Work

HELPER_TOKENS = REFERENCE_TOKENS
"""Of a helper model, which takes the same time for every size of the image."""
COPY = "/copy"
"""End of the key under which the time of loading a copy is learned."""
TOKENS_STEP = 16
"""Lengths of prompts are rounded up to a multiple of this."""
WORKS_KEPT = 1_000
"""Size of the cache of stages; each holds its params in memory."""


class Estimates:
    """What the timing model predicts for stages and loads, by model and quantization.

    Args:
        has_copy: whether the quantized weights of this key are loaded from a copy.
    """

    def __init__(
        self, timing: TimingModel, has_copy: Callable[[str], bool] = lambda key: False
    ) -> None:
        self.timing = timing
        self._has_copy = has_copy
        self.count_tokens: Callable[[str, str], int | None] = lambda model, prompt: None
        """Tokens of a prompt, by name of the model; None: its tokenizer was not loaded."""
        self._bits: dict[str, int | None] = {}  # by load spec, once it was loaded
        self._version = 0
        self._works: dict[int, tuple[Stage, Work]] = {}  # by id(): a stage has no cheap hash
        self._counts: dict[tuple[str, str], int] = {}
        self.prompts = Prompts()

    @property
    def version(self) -> tuple[int, int]:
        """Changes when an estimate changes."""
        return self.timing.version, self._version

    def bits(self, spec: LoadSpec) -> int | None:
        """Bits that weights are quantized to: as requested, until they are loaded."""
        return self._bits.get(spec.key, spec.quantize)

    def product(self, spec: LoadSpec) -> Product:
        """The kind of product that a model mostly computes."""
        float32 = spec.model.float32 or spec.options.compute_precision == "float32"
        return product_of(self.bits(spec), float32=float32)

    def _text_product(self, spec: LoadSpec, figures: FamilyWork) -> Product:
        """The kind of product that its text encoder mostly computes."""
        float32 = spec.model.float32 or figures.text_float32
        return product_of(self.bits(spec) if figures.text_quantized else None, float32=float32)

    def was_loaded(self, spec: LoadSpec) -> bool:
        return spec.key in self._bits

    def take_counts(self, model: Model, counts: Mapping[str, int]) -> None:
        """The prompt_tokens() of these prompts: those of waiting stages are forecast by them."""
        self._counts = {(model.name, prompt): found for prompt, found in counts.items()}
        if counts:
            self._works.clear()

    def learn_bits(self, spec: LoadSpec, bits: int | None) -> bool:
        """Weights were loaded, quantized to this many bits. Returns whether that is new."""
        is_new, is_first = bits != self.bits(spec), not self.was_loaded(spec)
        self._bits[spec.key] = bits
        if is_new or is_first:  # after the first load, tokens are counted
            self._works.clear()
        self._version += is_new
        return is_new

    def copies_changed(self) -> None:
        """There are other copies of quantized weights than before."""
        self._version += 1

    def load_key(self, spec: LoadSpec) -> str:
        """Returns the key of the loading time: model, quantization, whether from a copy."""
        return self._key(spec) + (COPY if self._has_copy(spec.key) else "")

    def _key(self, spec: LoadSpec) -> str:
        bits = self.bits(spec)
        name = f"{spec.model.name}/q{bits}" if bits else spec.model.name
        return name + spec.options.suffix

    def timing_key(self, stage: Stage) -> str:
        """Returns the key of the timing law: the model, its quantization, and what changes a step's
        work: guidance above 1, with which most models run each step twice, and input images."""
        model, params = stage.load_spec.model, stage.params
        key = self._key(stage.load_spec)
        if model.makes:
            return key
        if self._runs_steps_twice(stage):
            key += "/guided"
        for name in ("step_cache", "cfg_end"):
            if (share := getattr(params, name)) is not None:
                key += f"/{name}{share:.1f}"
        if params.verify_retries:
            key += "/verified"
        if params.images:
            key += f"/images{len(params.images)}"
        if params.control_image:
            key += f"/control{len(params.control_images) or ''}"
        if params.init_image and not model.upscaler:
            key += "/img2img"
        return key

    @staticmethod
    def _runs_steps_twice(stage: Stage) -> bool:
        """Whether each step runs with the prompt and without it."""
        model, params = stage.load_spec.model, stage.params
        return not model.makes and (params.guidance or 0) > 1 and model.family != "flux"

    def work(self, stage: Stage) -> Work:
        """The work of all images of a stage, as if its prompt were new."""
        known, work = self._works.get(id(stage), (None, None))
        if known is not stage or work is None:
            work = self._work(stage)
            if len(self._works) >= WORKS_KEPT:
                self._works.clear()
            self._works[id(stage)] = stage, work
        return work

    def _work(self, stage: Stage) -> Work:
        model, params = stage.load_spec.model, stage.params
        tokens = stage.tokens
        if model.makes:
            tokens = HELPER_TOKENS
        if model.upscaler:
            width, height = params.final_size
            tokens = max(width * height // SIDE_STEP**2, 1)
        return replace(
            self.work_of_key(
                self.timing_key(stage), stage.load_spec, guided=self._runs_steps_twice(stage)
            ),
            tokens=tokens,
            steps=params.steps_run,
            format=params.format,
            images=stage.images_left,
            text_each=bool(params.inputs) or model.upscaler,
            prompt_each=bool(params.prompts),
            width=params.width,
            prompt_tokens=self._counts.get((model.name, params.prompt))
            or self.prompt_tokens(params.prompt, model),
        )

    def work_of_key(self, key: str, spec: LoadSpec, *, guided: bool = False) -> Work:
        """The work of a picture of REFERENCE_TOKENS with this timing key, with the default steps of
        its model."""
        figures, model = family_work(spec), spec.model
        passes = figures.passes or (2 if guided else 1)
        return Work(
            model=key,
            parameters_b=model.parameters_b * figures.step_share * passes,
            tokens=REFERENCE_TOKENS,
            steps=model.default_steps,
            format="JPEG",
            product=self.product(spec),
            text_b=figures.text_b,
            text_product=self._text_product(spec, figures),
            fixed_text_tokens=figures.fixed_text_tokens + guided * figures.negative_tokens,
            step_text_tokens=figures.step_text_tokens,
            text_with_picture=figures.text_with_picture,
        )

    def prompt_tokens(self, prompt: str, model: Model) -> int:
        """Rounded up, so that many tasks have the same work. Takes milliseconds for a long prompt;
        any thread may call it, without a lock."""

        def count(text: str) -> int | None:
            return self.count_tokens(model.name, text)

        return -(-tokens(prompt, model, count) // TOKENS_STEP) * TOKENS_STEP

    def actual_work(self, stage: Stage) -> Work:
        """The work of a stage that runs, or would run now."""
        work = self.work(stage)
        return replace(work, prompt_cached=True) if self.prompts.is_encoded(stage) else work

    def durations(self, *stages: Stage) -> Durations:
        """Predicted seconds of these stages, one after the other, with the prompts that are in
        memory now."""
        return self.durations_of(map(self.actual_work, stages))

    def durations_of(self, works: Iterable[Work]) -> Durations:
        """Predicted seconds of the works of a task, one after the other."""
        each = [*map(self.timing.durations, works)]
        if len(each) == 1:
            return each[0]
        order = list(Confidence)
        return replace(
            each[-1],
            before_s=sum(durations.gpu_s for durations in each[:-1]),
            sigma=max(durations.sigma for durations in each),
            confidence=min((durations.confidence for durations in each), key=order.index),
        )

    def load_s(self, spec: LoadSpec) -> float:
        read_b = spec.model.parameters_b
        if self._has_copy(spec.key):
            read_b *= (self.bits(spec) or 16) / 16
        return self.timing.load_s(self.load_key(spec), read_b)

    def load_sigma(self, spec: LoadSpec) -> float:
        """Spread of log(truth / forecast) of a load."""
        return self.timing.load_sigma(self.load_key(spec))

    def loads_s(self, specs: Iterable[LoadSpec]) -> float:
        """Seconds to load all of these."""
        return sum(self.load_s(spec) for spec in specs)
