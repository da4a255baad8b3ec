"""The GPU: the only file that imports mflux or mlx. Loads a model, makes one image at a time.

Both happen on one thread, the worker's (mlx >= 0.32 ties arrays to the thread that made them). The
heavy imports happen in functions, so that `server.py --help` answers at once.
"""

import ctypes
import importlib.util
import logging
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

import tiny_models
from errors import DoesNotFit, ModelLoadError
from model_catalog import Family, Model
from task import GenerationParams, Memory, Phase, Report

log = logging.getLogger(__name__)

PROMPT_CACHE_BYTES = 256_000_000
"""mflux keeps the text embeddings of every prompt (4 to 8 MB each on FLUX.1); we keep this much."""
PRIOR_BYTES_PER_PIXEL = 2048
"""Memory that a picture needs beside the weights, before one was measured: the decoder holds about
four feature maps of 128 channels in 32 bits for each pixel."""
MEMORY_MARGIN = 1.2


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
        cache_limit_bytes: most freed memory that MLX keeps for reuse; None: MLX's own limit.
        check_memory: refuse pictures that would not fit into memory.
    """

    def __init__(
        self,
        model: Model,
        quantize: int | None,
        path: str | None,
        data_dir: Path,
        *,
        cache_limit_bytes: int | None = None,
        check_memory: bool = True,
    ) -> None:
        self.memory = Memory()
        """MLX's memory after the latest step; any thread may read it."""
        self._model = model
        self._quantize = quantize
        self._path = path
        self._data_dir = data_dir
        self._cache_limit_bytes = cache_limit_bytes
        self._check_memory = check_memory
        self._bytes_per_pixel: float | None = None
        self._last_size: tuple[int, int] | None = None
        self._pipeline: Any = None
        self._hook = _Hook(self._note_memory)

    def load(self) -> int | None:
        """Load the weights.

        Returns:
            The bits they are quantized to, None if they are not. What is stored wins over what was
            asked for.

        Raises:
            ModelLoadError: with what the operator can do.
        """
        try:
            self._pipeline = None
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
        if refusal := self.refusal(params):
            raise DoesNotFit(refusal)
        self._prepare_memory(params)
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
            self._hook.prompt_cache.pop(params.prompt, None)  # may hold arrays never evaluated
            raise
        finally:
            self._hook.report = _report_to_nobody
        self._learn_memory(params)
        picture: Image.Image = generated.image
        return picture

    def refusal(self, params: GenerationParams) -> str | None:
        """Why a picture of this size would not fit into memory; None: it fits, or nobody asks.

        Estimate: the weights, and for each pixel PRIOR_BYTES_PER_PIXEL; once pictures were made,
        the most that one of them took for each pixel; and a margin. Any thread may call.
        """
        if not self._check_memory or not self.memory.weights_bytes:
            return None
        per_pixel = self._bytes_per_pixel or PRIOR_BYTES_PER_PIXEL
        picture = params.width * params.height * per_pixel * MEMORY_MARGIN
        needed = self.memory.weights_bytes + picture
        if needed <= self.memory.total_bytes:
            return None
        return (
            f"A picture of {params.width} x {params.height} needs about {needed / 1e9:.1f} GB of "
            f"memory, this machine has {self.memory.total_bytes / 1e9:.1f} GB."
        )

    def _prepare_memory(self, params: GenerationParams) -> None:
        """Buffers of another size are of no use to this picture: give them back."""
        import mlx.core as mx

        size = (params.width, params.height)
        if self._last_size not in (None, size):
            mx.clear_cache()
        self._last_size = size
        mx.reset_peak_memory()

    def _learn_memory(self, params: GenerationParams) -> None:
        self._note_memory()
        pixels = params.width * params.height
        if pixels >= 512 * 512:  # smaller ones say little about larger ones
            taken = max(self.memory.peak_bytes - self.memory.weights_bytes, 0)
            self._bytes_per_pixel = max(self._bytes_per_pixel or 0.0, taken / pixels)

    def _note_memory(self) -> None:
        import mlx.core as mx

        self.memory = replace(
            self.memory,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            cache_bytes=mx.get_cache_memory(),
        )

    def _load(self) -> Any:
        import mlx.core as mx
        from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig

        if self._cache_limit_bytes is not None:
            mx.set_cache_limit(self._cache_limit_bytes)
        if self._model.tiny:
            path: str | None = str(tiny_models.ensure_checkpoint(self._model.name, self._data_dir))
            config = ModelConfig(**tiny_models.TINY_CONFIGS[self._model.name])
        else:
            path, config = _checked(self._path), AVAILABLE_MODELS[self._model.name]
        pipeline = _pipeline_class(self._model.family)(
            quantize=self._quantize, model_path=path, model_config=config
        )
        if self._model.tiny:
            tiny_models.slim(pipeline)
        mx.eval(pipeline.parameters())
        _evaluate_text_embeddings(pipeline)
        pipeline.callbacks.register(self._hook)
        self._hook.prompt_cache = pipeline.prompt_cache = PromptCache(PROMPT_CACHE_BYTES)
        self.memory = Memory(weights_bytes=mx.get_active_memory(), total_bytes=_total_memory())
        return pipeline


def _report_to_nobody(phase: Phase, steps_done: int, steps_total: int) -> None:
    pass


class PromptCache(MutableMapping[str, Any]):
    """The text embeddings of the prompts used last, up to a number of bytes.

    Takes the place of mflux's own `prompt_cache`, a dict that grows for ever. At least the latest
    prompt stays, whatever its size. Values are MLX arrays, or tuples and lists of them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[str, Any] = OrderedDict()

    def __getitem__(self, prompt: str) -> Any:
        embeddings = self._entries[prompt]
        self._entries.move_to_end(prompt)
        return embeddings

    def __setitem__(self, prompt: str, embeddings: Any) -> None:
        self.pop(prompt, None)
        self._entries[prompt] = embeddings
        self.bytes += _size_of(embeddings)
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            del self[next(iter(self._entries))]

    def __delitem__(self, prompt: str) -> None:
        self.bytes -= _size_of(self._entries.pop(prompt))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _size_of(embeddings: Any) -> int:
    if isinstance(embeddings, list | tuple):
        return sum(_size_of(part) for part in embeddings)
    return int(getattr(embeddings, "nbytes", 0))


def _total_memory() -> int:
    """Bytes of the machine's memory; Apple Silicon's GPU shares them."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Hook:
    """mflux's callbacks, registered once per loaded model.

    Everything in MLX is lazy: each callback evaluates the latents first, else the work of a step
    would be booked on the next one.
    """

    def __init__(self, note_memory: Callable[[], None]) -> None:
        self.report: Report = _report_to_nobody
        self.prompt_cache: MutableMapping[str, Any] = {}
        self._note_memory = note_memory
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
        self._note_memory()
        self._steps_done += 1
        self.report(Phase.DENOISING, self._steps_done, self._steps_total)

    def call_after_loop(self, *, latents: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents)
        self.report(Phase.DECODING, self._steps_done, self._steps_total)


def _checked(path: str | None) -> str | None:
    """mflux takes what is no folder for a repository: what cannot be one has to be a folder."""
    if path is None or (re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".")):
        return path
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {path}")
    return str(folder)


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
    if model.tiny:
        return f"The model {model.name} cannot be built in the data dir ({_first_line(error)})."
    refused = isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403)
    if isinstance(error, hub.GatedRepoError) or (
        refused and not isinstance(error, hub.RepositoryNotFoundError)
    ):
        return (
            f"The weights of {model.name} are only for those who log in: accept the licence at "
            f"{page}, log in with 'hf auth login', and start again; or {otherwise}."
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
