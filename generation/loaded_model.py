"""A model in memory: mflux's class, other classes on the same modules, and the LoRAs on it.

Depends on mflux and mlx.
"""

from collections.abc import Callable
from typing import Any

from errors import without_folders
from generation.adapters import Sizes, layer_sizes, raised_by_adapter, unusable
from generation.applied_loras import AppliedLoras, Place
from generation.compiling import KeptSteps
from generation.load_errors import first_line
from generation.loading import bytes_of
from generation.pipelines import other_face, remember_prompts
from generation.step_hook import StepHook
from models.model_catalog import LoadSpec, Pipeline


class LoadedModel:
    """
    Args:
        spec: what it was loaded for.
        pipeline: an evaluated class of mflux, without LoRAs.
        places: where LoRAs are applied in it.
        hook: its callback.
    """

    def __init__(self, spec: LoadSpec, pipeline: Any, places: list[Place], hook: StepHook) -> None:
        self.spec = spec
        self.pipeline = pipeline
        self.hook = hook
        self.layer_sizes: Sizes = layer_sizes(places[0].transformer) if places else {}
        self._base_bytes = bytes_of(pipeline)
        self._loras = AppliedLoras(places)
        self._steps = KeptSteps()
        self._faces: dict[str, Any] = {type(pipeline).__name__: pipeline}
        """By the name of mflux's class."""
        if not spec.model.makes:
            self._keep_between_pictures(pipeline)
            pipeline.callbacks.register(hook)

    @property
    def weights_bytes(self) -> int:
        """Memory of its weights and of the LoRAs on it."""
        return self._base_bytes + self._loras.bytes

    @property
    def missing_bytes(self) -> int:
        """Of its weights, that mflux has released until the next text (low_ram)."""
        low_ram = self.spec.options.low_ram
        return max(self._base_bytes - bytes_of(self.pipeline), 0) if low_ram else 0

    def face(self, wanted: Pipeline) -> Any:
        """The model as the class that is wanted."""
        if wanted.name not in self._faces:
            self._faces[wanted.name] = other_face(self.pipeline, wanted)
            self._keep_between_pictures(self._faces[wanted.name])
        face = self._faces[wanted.name]
        if self._loras.places:  # mflux writes them into the metadata
            face.lora_paths = [file for file, _ in self._loras.applied]
            face.lora_scales = [scale for _, scale in self._loras.applied]
        return face

    def apply_loras(self, weights: LoadSpec, lora_path: Callable[[str], str]) -> bool:
        """Apply the LoRAs of a load spec in place of others; returns whether that changed any.

        Raises:
            UnusableAdapter: mflux cannot apply one. The model has none then.
        """
        try:
            changed = self._loras.apply(weights.loras, lora_path)
        except Exception as error:
            self._steps.clear()
            if not raised_by_adapter(error):
                raise
            names = "', '".join(lora.name for lora in weights.loras)
            reason = f"with {weights.model.name}, {without_folders(first_line(error))}"
            raise unusable(names, reason) from error
        if changed:
            self._steps.clear()
            if self.spec.options.compute_precision:  # that of the LoRAs' layers, too
                transformer = self.pipeline.transformer
                transformer.apply_compute_precision(self.pipeline.compute_precision)
        return changed

    def remove_loras(self) -> None:
        self._loras.remove()
        self._steps.clear()

    def _keep_between_pictures(self, face: Any) -> None:
        """Let a class reuse what the previous picture has computed."""
        remember_prompts(face, self.hook.prompt_cache)
        self._steps.keep(face)
