"""The GPU: the only file that imports mflux or mlx. Loads a model, makes one image at a time.

Both happen on one thread, the worker's (mlx >= 0.32 ties arrays to the thread that made them). The
heavy imports happen in functions, so that `server.py --help` answers at once.
"""

import ctypes
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import tiny_models
from errors import ModelLoadError
from model_catalog import Family, Model
from task import GenerationParams, Phase, Report

log = logging.getLogger(__name__)

PROMPTS_CACHED = 8
"""mflux keeps the text embeddings of every prompt (4 to 8 MB each on FLUX.1); we keep these."""


class MlxMissing(Exception):
    """mlx cannot be imported; the message says what to install."""


def prepare_mlx() -> bool:
    """Import mlx, once, before anything else of this module is used.

    Returns:
        Whether MLX has a GPU here.

    Raises:
        MlxMissing: with the sentence for the operator.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if sys.platform == "linux":
        _preload_fast_blas()
    try:
        import mlx.core as mx
    except ImportError as error:
        raise MlxMissing(
            f"mlx cannot be imported ({error}): run 'pip install --no-deps -r requirements.txt' "
            "with Python 3.11 or newer on macOS with Apple Silicon or on Linux x86_64."
        ) from None
    return bool(mx.is_available(mx.gpu))


class MfluxGenerator:
    """One model of the catalog, drawn with mflux.

    Args:
        quantize: bits to quantize the weights to when loading (3, 4, 5, 6, 8), or None.
        path: local folder or Hugging Face repository to take the weights from, or None for the
            model's own repository.
        data_dir: where the tiny models are built.
    """

    def __init__(
        self, model: Model, quantize: int | None, path: str | None, data_dir: Path
    ) -> None:
        self._model = model
        self._quantize = quantize
        self._path = path
        self._data_dir = data_dir
        self._pipeline: Any = None
        self._hook = _Hook()

    def load(self) -> int | None:
        """Load the weights.

        Returns:
            The bits they are quantized to, None if they are not. What is stored wins over what was
            asked for.

        Raises:
            ModelLoadError: with what the operator can do.
        """
        try:
            self._pipeline = self._load()
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            raise ModelLoadError(_explain(error, self._model, self._path)) from error
        bits: int | None = self._pipeline.bits
        return bits

    def generate(self, params: GenerationParams, report: Report) -> Image.Image:
        """Make one picture.

        Args:
            report: called when a phase is reached and after each step, on this thread, once the
                work up to there is really done; what it raises ends the generation and comes out
                of here, and the next picture is not affected.
        """
        self._hook.report = report
        guidance = {} if params.guidance is None else {"guidance": params.guidance}
        try:
            generated = self._pipeline.generate_image(
                seed=params.seed,
                prompt=params.prompt,
                num_inference_steps=params.steps,
                width=params.width,
                height=params.height,
                **guidance,
            )
        except BaseException:
            self._prompt_cache.pop(params.prompt, None)  # it may hold arrays never evaluated
            raise
        finally:
            self._hook.report = _report_to_nobody
            while len(self._prompt_cache) > PROMPTS_CACHED:
                del self._prompt_cache[next(iter(self._prompt_cache))]
        picture: Image.Image = generated.image
        return picture

    @property
    def _prompt_cache(self) -> dict[str, Any]:
        cache: dict[str, Any] = getattr(self._pipeline, "prompt_cache", {})
        return cache

    def _load(self) -> Any:
        import mlx.core as mx
        from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig

        if self._model.tiny:
            path: str | None = str(tiny_models.ensure_checkpoint(self._model.name, self._data_dir))
            config = ModelConfig(**tiny_models.TINY_CONFIGS[self._model.name])
        else:
            path, config = self._path, AVAILABLE_MODELS[self._model.name]
        pipeline = _pipeline_class(self._model.family)(
            quantize=self._quantize, model_path=path, model_config=config
        )
        if self._model.tiny:
            tiny_models.slim(pipeline)
        mx.eval(pipeline.parameters())
        _evaluate_text_embeddings(pipeline)
        pipeline.callbacks.register(self._hook)
        self._hook.prompt_cache = getattr(pipeline, "prompt_cache", {})
        return pipeline


def _report_to_nobody(phase: Phase, steps_done: int, steps_total: int) -> None:
    pass


class _Hook:
    """mflux's callbacks, registered once per loaded model.

    Everything in MLX is lazy: each callback evaluates the latents first, else the work of a step
    would be booked on the next one.
    """

    def __init__(self) -> None:
        self.report: Report = _report_to_nobody
        self.prompt_cache: dict[str, Any] = {}
        self._steps_done = 0
        self._steps_total = 0

    def call_before_loop(self, *, prompt: str, latents: Any, config: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents, self.prompt_cache.get(prompt, ()))
        self._steps_done = 0
        self._steps_total = config.num_inference_steps - config.init_time_step
        self.report(Phase.DENOISING, 0, self._steps_total)

    def call_in_loop(self, *, latents: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents)
        self._steps_done += 1
        self.report(Phase.DENOISING, self._steps_done, self._steps_total)

    def call_after_loop(self, *, latents: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents)
        self.report(Phase.DECODING, self._steps_done, self._steps_total)


def _pipeline_class(family: Family) -> Any:
    if family is Family.FLUX1:
        from mflux.models.flux.variants.txt2img.flux import Flux1

        return Flux1
    from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

    return Flux2Klein


def _evaluate_text_embeddings(pipeline: Any) -> None:
    """Make FLUX.2's text encoding happen where it is called and not within the first step.

    FLUX.1 needs no such help: its embeddings are in the prompt cache, where the hook finds them.
    """
    import mlx.core as mx

    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is None:
        return
    encode = encoder.get_prompt_embeds

    def encode_and_evaluate(*args: Any, **kwargs: Any) -> Any:
        embeddings = encode(*args, **kwargs)
        mx.eval(embeddings)
        return embeddings

    encoder.get_prompt_embeds = encode_and_evaluate


def _preload_fast_blas() -> None:
    """Let mlx's CPU build use the OpenBLAS that opencv (a package mflux needs) brings along.

    mlx links the system's `cblas_*` functions, on most Linux machines the reference BLAS, 50 times
    slower. What is loaded first wins the symbol lookup. On a Mac MLX has Metal and Accelerate.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    opencv = importlib.util.find_spec("cv2")
    if opencv is None or opencv.origin is None:
        return
    libraries = Path(opencv.origin).parent.parent / "opencv_python.libs"
    for pattern in ("libquadmath*.so*", "libgfortran*.so*", "libopenblas*.so*"):
        for library in sorted(libraries.glob(pattern)):
            try:
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            except OSError as error:
                log.debug("%s cannot be loaded: %s", library.name, error)


def _explain(error: Exception, model: Model, path: str | None) -> str:
    """One sentence: what went wrong while loading, and what the operator can do."""
    import httpx
    from huggingface_hub import errors as hub

    source = path or model.repository or model.name
    otherwise = "choose another model (--model) or give a local folder with its weights (--path)"
    page = f"huggingface.co/{source}"
    if isinstance(error, hub.GatedRepoError):
        return (
            f"The weights of {model.name} are gated: accept the licence at {page}, log in with "
            f"'hf auth login', and start again; or {otherwise}."
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return (
            f"There is no repository {source}, or it is private: log in with 'hf auth login' "
            f"if it is yours, or {otherwise}."
        )
    if isinstance(
        error, hub.LocalEntryNotFoundError | hub.HfHubHTTPError | httpx.HTTPError | OSError
    ):
        if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
            return (
                f"The weights of {model.name} cannot be read from {source} ({error}): {otherwise}."
            )
        return (
            f"The weights of {model.name} cannot be downloaded from {page} "
            f"({_first_line(error)}): check the connection, or {otherwise}."
        )
    reason = _first_line(error)
    return f"The model {model.name} cannot be loaded from {source} ({reason}): {otherwise}."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
