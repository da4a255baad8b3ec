"""The GPU: holds the models that are loaded, makes one picture at a time.

Loading and drawing happen on one thread, the worker's (mlx >= 0.32 ties arrays to the thread that
made them). With mflux_registry.py, pipelines.py and mlx_setup.py this is all that knows mflux and
mlx.
"""

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from errors import (
    DoesNotFit,
    LoadStopped,
    ModelLoadError,
    NotFinite,
    OutOfMemory,
    ServerError,
    WeightsTooLarge,
)
from generation.adapters import AdapterChecks, check_values
from generation.inpainting import KeptSource, keeping_source
from generation.load_errors import (
    bits_of,
    explain,
    free_frames,
    is_out_of_memory,
    too_little_memory,
)
from generation.loaded_model import LoadedModel
from generation.loading import LoadReport, bytes_of, counted_now, evaluate_in_parts, not_reported
from generation.memory_guard import MemoryGuard, Tiling
from generation.picture_memory import PictureMemory
from generation.pipelines import arguments, build, check_files, metadata, picture_of, set_tiling
from generation.previews import Previews
from generation.process_memory import PeakMeter
from generation.prompt_cache import PromptCache
from generation.step_hook import StepHook, harmless
from generation.token_counts import TokenCounts
from generation.weights_copy import WeightsCopies
from models.mlx_setup import give_back_memory
from models.model_catalog import LoadSpec, LoraFit
from models.weights_cache import WeightsCache
from task import Drawn, GenerationParams, Memory, Phase, Report, Stage

log = logging.getLogger(__name__)

PROMPT_CACHE_BYTES = 256_000_000
"""mflux keeps the text embeddings of every prompt (4 to 8 MB each on FLUX.1); we keep this much of
each model."""
SHARE_FOR_WEIGHTS = 0.75
"""Part of the machine's memory that several models may fill together."""


class MfluxGenerator:
    """The models in memory.

    Args:
        data_dir: where the tiny models are built.
        models_in_memory: most of them at a time; the one used longest ago makes room.
        lora_path: what mflux loads an adapter of this name from.
        cache_limit_bytes: most freed memory that MLX keeps for reuse; None: MLX's own limit.
        guard: decides which pictures fit into memory; default: by what this machine has.
        previews: is given the latents of pictures while they are drawn.
        weights_cache: copies of quantized weights; None: there are none.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        models_in_memory: int = 1,
        lora_path: Callable[[str], str] = str,
        cache_limit_bytes: int | None = None,
        guard: MemoryGuard | None = None,
        previews: Previews | None = None,
        weights_cache: WeightsCache | None = None,
    ) -> None:
        self._memory = Memory()
        self.resident: tuple[str, ...] = ()
        """Keys of the weights in memory, the latest used first; any thread may read it."""
        self._data_dir = data_dir
        self._models_in_memory = models_in_memory
        self._lora_path = lora_path
        self._cache_limit_bytes = cache_limit_bytes
        self.guard = guard or MemoryGuard()
        self._previews = previews or Previews(on=False)
        self._copies = WeightsCopies(weights_cache, lambda spec: build(spec, data_dir)[0])
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # the latest used last
        self._peak = PeakMeter()
        self._begun = 0
        """Number of pictures that were begun."""
        self._last_size: tuple[int, int] | None = None
        self._adapters = AdapterChecks(lora_path)
        self.token_counts = TokenCounts()
        self.guard.count_tokens = self.token_counts.count

    @property
    def memory(self) -> Memory:
        """Memory of MLX now, also during a load or a step. Any thread may read it."""
        return counted_now(self._memory)

    def load(self, weights: LoadSpec, report: LoadReport = not_reported) -> int | None:
        """Load weights, after making room for them; their LoRAs are checked, but not applied. Calls
        report() after each part.

        Returns:
            The bits they are quantized to, None if they are not. What is stored wins over what was
            asked for.

        Raises:
            ModelLoadError: with what the operator can do.
            UnusableAdapter, NotSupported: an adapter is broken, missing, or of another model.
        """
        try:
            return self._copies.load(weights, lambda source: self._load(weights, source, report))
        except (ModelLoadError, ServerError, LoadStopped) as error:
            free_frames(error)
            raise
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            free_frames(error)
            raise ModelLoadError(explain(error, weights)) from error

    def _load(self, weights: LoadSpec, source: LoadSpec, report: LoadReport) -> int | None:
        """Args: source: the same weights, perhaps in another folder."""
        import mlx.core as mx

        if self._cache_limit_bytes is not None:
            mx.set_cache_limit(self._cache_limit_bytes)
        check_files(source.model)
        self.check_adapters(weights)
        check_values(weights, self._lora_path)
        pipeline, places = build(  # downloads and checks, before a loaded model is dropped for it
            source,
            self._data_dir,
            before_reading=lambda: self._make_room(weights.expected_bytes),
            report=report,
        )
        bits, new_bytes = bits_of(pipeline, weights), bytes_of(pipeline)
        if refusal := self.guard.load_refusal(weights, new_bytes, self.memory.weights_bytes):
            raise WeightsTooLarge(refusal)
        self._make_room(new_bytes, save=True)
        evaluate_in_parts(pipeline, report)
        mx.eval(pipeline, mx.random.state)  # its modules drew from it, to no purpose:
        # left lazy, all these draws would be kept, about 1 MB for each model ever loaded
        hook = StepHook(PromptCache(PROMPT_CACHE_BYTES), self._note_memory, self._previews)
        loaded = LoadedModel(weights, pipeline, places, hook)
        self._loaded[weights.key] = loaded
        self.guard.learn_weights(weights, loaded.weights_bytes)
        self._adapters.learn(weights.model, loaded.layer_sizes)
        self.token_counts.keep(weights.model.name, pipeline)
        self._note_resident()
        return bits

    def save_copies(self, may_continue: Callable[[], bool]) -> bool:
        """When there is nothing else to do: save copies of quantized weights until may_continue()
        is False, remove some if the disk is nearly full. Returns whether there is a new copy."""
        self._copies.prune()
        loaded = list(self._loaded.values())
        saved = [self._save_copy(one, may_continue) for one in loaded]
        return any(saved)

    def _save_copy(self, loaded: LoadedModel, may_continue: Callable[[], bool]) -> bool:
        if not self._copies.wants(loaded.spec):
            return False
        loaded.remove_loras()
        self._note_resident()
        return self._copies.save(loaded.pipeline, loaded.spec, may_continue)

    def apply_adapters(self, weights: LoadSpec) -> None:
        """Apply the LoRAs of a load spec, whose weights are in memory, in place of others.

        Raises:
            UnusableAdapter, NotSupported: one is broken, missing, or of another model.
        """
        loaded = self._loaded[weights.key]
        if weights.loras:
            self.check_adapters(weights)
            check_values(weights, self._lora_path)
        if loaded.apply_loras(weights, self._lora_path):
            self._note_resident()

    def unload(self) -> None:
        """Free all weights."""
        while self._loaded:
            self._drop_oldest()
        give_back_memory()
        self._note_resident()

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        """Generates one picture. The weights must be loaded, with the stage's adapters.

        Args:
            inputs: the folder of the pictures that the stage's params name.
            report: called when a phase is reached and after each step, on this thread, once the
                work up to there is really done; what it raises ends the generation and comes out
                of here, and the next picture is not affected. After a step it may generate other
                pictures with the same weights: neither changes the other.
        """
        params, weights = stage.params, stage.load_spec
        loaded = self._use(weights)
        if refusal := self.token_counts.refusal(params, weights.model):
            raise refusal  # its tokenizer was not on this machine before
        plan = self.guard.plan_now(stage, self._give_back(weights.key), loaded.missing_bytes)
        if plan.refusal:
            raise DoesNotFit(plan.refusal, field=plan.field)
        set_tiling(loaded.face(weights.pipeline), plan.tile)
        self._prepare_memory(params)
        self._begun = number = self._begun + 1
        own_decoder = weights.model.tiny or weights.model.path is not None
        decoder = weights.model.name if own_decoder else weights.model.family
        with (
            keeping_source(stage, inputs) as kept,
            self._previews.picture(weights.model.family, decoder),
        ):
            generated = self._generated(loaded, stage, inputs, self._measured(report), kept)
            with harmless("nothing could be learned for previews"):
                self._previews.learn(generated.image)
        if number == self._begun:  # else the peak is that of another picture
            self._learn_memory(stage, plan.tile)
        if weights.pipeline.right_half:
            generated = generated.get_right_half()
        picture = picture_of(generated, stage, inputs)
        if kept is not None:
            picture = kept.over_source(picture)
        details: dict[str, Any] | None = None
        with harmless("a picture goes without metadata"):
            details = metadata(generated, params, weights, plan.tile)
        return Drawn(picture, details)

    def _generated(
        self,
        loaded: LoadedModel,
        stage: Stage,
        inputs: Path,
        report: Report,
        kept: KeptSource | None,
    ) -> Any:
        """What mflux returns for a picture."""
        hook, face = loaded.hook, loaded.face(stage.load_spec.pipeline)
        try:
            with hook.picture(report, kept):
                return face.generate_image(**arguments(stage, inputs))
        except NotFinite:
            hook.prompt_cache.clear()  # the embeddings may hold the NaN
            raise
        except BaseException as error:
            hook.prompt_cache.forget_fresh()
            self._check_memory_error(error, stage)
            raise

    def prepare(self, stage: Stage, inputs: Path, report: Report) -> str | Image.Image:
        """Run a helper model that is loaded; returns a prompt or a control image.

        Args: as those of generate().
        """
        helper = self._use(stage.load_spec).pipeline
        report(Phase.DENOISING, 0, 1)
        try:
            made: str | Image.Image = helper.run(
                stage, inputs, lambda: report(Phase.DENOISING, 0, 1)
            )
        except BaseException as error:
            self._check_memory_error(error, stage)
            raise
        report(Phase.DENOISING, 1, 1)
        report(Phase.DECODING, 1, 1)
        self._note_memory()
        return made

    def _use(self, weights: LoadSpec) -> LoadedModel:
        """Returns what is loaded, as the latest used."""
        self._loaded.move_to_end(weights.key)
        self.resident = tuple(reversed(self._loaded))
        return self._loaded[weights.key]

    def _check_memory_error(self, error: BaseException, stage: Stage) -> None:
        """Raises: OutOfMemory: the error says that memory was too small."""
        if is_out_of_memory(error):
            list(self._give_back(stage.load_spec.key))
            free_frames(error)
            sentence = too_little_memory(stage, self.guard.bits)
            raise OutOfMemory(sentence) from error

    def check_adapters(self, weights: LoadSpec) -> tuple[str, ...]:
        """Check the adapters of weights, as AdapterChecks.check()."""
        return self._adapters.check(weights)

    def fit_of_adapter(self, path: Path, weights: LoadSpec) -> LoraFit:
        """How the LoRA in a file fits the model of a load spec; any thread may call."""
        return self._adapters.fit(path, weights)

    def refusal(self, stage: Stage, *, memory: bool = True) -> ServerError | None:
        """Why a picture of this stage would not be drawn, with the field at fault; None: it would.
        Any thread may call.

        Args:
            memory: whether it must fit into this machine's memory.
        """
        model = stage.load_spec.model
        if model.makes:
            return None
        if refusal := self.token_counts.refusal(stage.params, model):
            return refusal
        plan = self.guard.plan(stage)
        return DoesNotFit(plan.refusal, field=plan.field) if memory and plan.refusal else None

    def _make_room(self, new_bytes: float, *, save: bool = False) -> None:
        """Drop models until there is room for one of this size; others stay only where memory
        allows it: they and the new one together.

        Args:
            save: copies of their weights first: a server that is never idle saves them only here.
        """
        while self._loaded and (
            len(self._loaded) >= self._models_in_memory
            or self.memory.weights_bytes + new_bytes > SHARE_FOR_WEIGHTS * self.guard.limit_bytes
        ):
            oldest = next(iter(self._loaded.values()))
            if save:
                self._save_copy(oldest, lambda: True)
            self._drop_oldest()

    def _give_back(self, key: str) -> Iterator[bool]:
        """Gives back what was freed and is kept, then drops one model after the other, but not this
        one; yields after each."""
        import mlx.core as mx

        mx.clear_cache()
        give_back_memory()
        yield True
        while len(self._loaded) > 1 and next(iter(self._loaded)) != key:
            self._drop_oldest()
            yield True

    def _drop_oldest(self) -> None:
        import mlx.core as mx

        key, dropped = self._loaded.popitem(last=False)
        log.info("%s makes room", key)
        del dropped
        mx.synchronize()  # MLX's own thread may still hold what it computed last
        gc.collect()  # the modules of a model refer to each other
        mx.clear_cache()
        self._note_resident()

    def _note_resident(self) -> None:
        self.resident = tuple(reversed(self._loaded))
        sizes = {key: loaded.weights_bytes for key, loaded in self._loaded.items()}
        total = self.guard.limit_bytes
        self._memory = replace(
            self._memory,
            weights_bytes=sum(sizes.values()),
            loaded_bytes={**self._memory.loaded_bytes, **sizes},
            total_bytes=total,
            room_bytes=int(SHARE_FOR_WEIGHTS * total),
        )
        self._note_memory()

    def _prepare_memory(self, params: GenerationParams) -> None:
        """Buffers of another size are of no use to this picture: give them back."""
        import mlx.core as mx

        size = (params.width, params.height)
        if self._last_size not in (None, size):
            mx.clear_cache()
        self._last_size = size
        self._peak.begin()

    def _measured(self, report: Report) -> Report:
        """The report of a picture, that measures the memory of its phases."""

        def measuring(phase: Phase, steps_done: int, steps_total: int) -> None:
            if phase is Phase.DECODING or (phase is Phase.DENOISING and steps_done == 0):
                self._peak.next_phase()
            report(phase, steps_done, steps_total)

        return measuring

    def _learn_memory(self, stage: Stage, tile: Tiling) -> None:
        self._note_memory()
        params, phases = stage.params, self._peak.phases()
        if params.inputs or len(phases) != len(PictureMemory._fields):
            return  # their share says nothing about other pictures
        weights = self.memory.weights_bytes
        self.guard.learn(stage, tile, PictureMemory(*(max(p - weights, 0) for p in phases)))

    def _note_memory(self) -> None:
        self._memory = replace(self._memory, peak_bytes=self._peak.counted_bytes())
