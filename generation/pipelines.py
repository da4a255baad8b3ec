"""Builds mflux's classes, calls them with the params of a task, and returns their metadata.

Depends on mflux and mlx.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from errors import ModelLoadError
from generation.applied_loras import Place, places_of_loras, with_second_transformer
from generation.compiling import STEP_BUILDERS, compile_without_weights
from generation.finite import check_decoded_pictures
from generation.helpers import build_helper
from generation.load_errors import explain
from generation.loading import LoadReport, checked_and_lazy, not_reported
from generation.prompt_cache import PromptCache
from models import tiny_models
from models.hub_cache import absent_from_folder, weight_files
from models.model_catalog import LoadSpec, Model, Pipeline
from models.weight_files import first_bad_file
from task import GenerationParams, InputImage, Stage

log = logging.getLogger(__name__)

ENCODERS = (
    "_encode_prompt_pair",
    "_encode_prompts",
    "_encode_prompts_with_images",
    "_encode_instruction",
)
"""Methods that encode a prompt, in the classes without a cache."""
NOT_OF_THE_PARAMS = ("generation_time_seconds", "created_at", "model_path")
"""Metadata of mflux that differ when a picture is made again, or contain a path of this machine."""
PATHS = ("image_path", "controlnet_image_path", "masked_image_path", "depth_image_path")
SWITCHES = ("verify", "use_step_cache")
"""Boolean parameters: whether their field is given."""
TRANSPARENT_PROMPT = (
    "This is an RGBA image with transparency. {} The image has alpha channel and the background is "
    "transparent."
)
"""Prompt that makes Qwen-Image 2.1 use a transparent background (mflux's documentation)."""
LISTS_OF_PATHS = ("image_paths", "redux_image_paths")


def build(
    weights: LoadSpec,
    data_dir: Path,
    before_reading: Callable[[], None] = lambda: None,
    report: LoadReport = not_reported,
) -> tuple[Any, list[Place]]:
    """Builds a class of mflux with its weights, not yet evaluated. Downloads missing files.

    Args:
        data_dir: where the tiny models are built.
        before_reading: called before files are read that cannot be read lazily.
        report: called before the files of each component.

    Returns:
        The class, without LoRAs, and where they are applied in it.

    Raises:
        ModelLoadError: with what the operator can do.
    """
    try:
        check_decoded_pictures()
        compile_without_weights()
        with (
            checked_and_lazy(before_reading, report, tiny=weights.model.tiny) as loading,
            places_of_loras() as places,
        ):
            pipeline = build_class(weights, data_dir)
            loading.finish()
        return pipeline, with_second_transformer(places, pipeline)
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        raise ModelLoadError(explain(error, weights)) from error


def check_files(model: Model) -> None:
    """Checks the headers of the weights on this machine, and that no shard is absent.

    Raises:
        ModelLoadError: a file is broken, or one of several is not in the folder of the others.
    """
    if absent := absent_from_folder(model):
        others = f"and {len(absent) - 1} more are" if len(absent) > 1 else "is"
        raise ModelLoadError(
            f"The weights of {model.name} are not complete: {absent[0].name} {others} missing. "
            f"Copy or download them again: {absent[0]}"
        )
    bad = first_bad_file(weight_files(model))
    if bad is not None:
        path, reason = bad
        raise ModelLoadError(
            f"The weights of {model.name} cannot be used: {path.name} is broken ({reason}). Remove "
            f"it, so that it is downloaded again, or replace it: {path}"
        )


def build_class(weights: LoadSpec, data_dir: Path) -> Any:
    """Calls the constructor of a class. Raises: what it raises."""
    from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig

    model = weights.model
    path: str | None
    if model.makes:
        return build_helper(weights)
    if model.tiny:
        path = model.path or str(tiny_models.ensure_checkpoint(model.name, data_dir))
        config = ModelConfig(**tiny_models.TINY_CONFIGS[model.name])
    else:
        path, config = _checked(model.path), AVAILABLE_MODELS[model.key]
    control: dict[str, Any] = {}
    if weights.control_strength is not None:
        control["controlnet_strength"] = weights.control_strength
    with tiny_models.small_modules(model.name):
        pipeline = _constructor(weights.pipeline)(
            quantize=weights.quantize,
            model_path=path,
            model_config=config,
            **control,
            **_options(weights),
        )
    if model.tiny:
        tiny_models.slim(pipeline, model.name)
    return pipeline


def _options(weights: LoadSpec) -> dict[str, Any]:
    """Arguments of the constructor for the build options that are in use."""
    options = weights.options
    given: dict[str, Any] = {name: getattr(options, name) for name in options.in_use}
    if options.compute_precision:
        from mflux.models.common.compute_precision import ComputePrecision

        given["compute_precision"] = ComputePrecision.dtype_for(options.compute_precision)
    return given


def other_face(pipeline: Any, wanted: Pipeline) -> Any:
    """Builds another class of mflux on the modules of a loaded one with the same constructor."""
    other = _class_of(wanted).__new__(_class_of(wanted))
    own = (*ENCODERS, *STEP_BUILDERS)
    kept = {name: value for name, value in vars(pipeline).items() if name not in own}
    vars(other).update(kept)
    dict.update(other, pipeline)  # MLX keeps the modules and arrays of a module as its items
    return other


def _constructor(pipeline: Pipeline) -> Callable[..., Any]:
    """Returns what builds a class of mflux."""
    return _flux1_depth if pipeline.name == "Flux1Depth" else _class_of(pipeline)


def _flux1_depth(**arguments: Any) -> Any:
    """Builds Flux1Depth without Depth Pro, as Flux1 is built.

    Its constructor downloads Depth Pro (1.9 GB, from Apple) and keeps it in memory, for photos. The
    server gives it a depth map: of a photo, the helper model makes one.
    """
    from mflux.models.flux.flux_initializer import FluxInitializer
    from mflux.models.flux.variants.depth.flux_depth import Flux1Depth
    from mlx import nn

    pipeline = Flux1Depth.__new__(Flux1Depth)
    nn.Module.__init__(pipeline)
    FluxInitializer.init(model=pipeline, **arguments)
    pipeline.depth_pro = None
    return pipeline


def _class_of(pipeline: Pipeline) -> Any:
    return getattr(importlib.import_module(pipeline.module), pipeline.name)


def remember_prompts(pipeline: Any, cache: PromptCache) -> None:
    """Let a pipeline keep the embeddings of its prompts here, evaluated when they are made.

    Most classes have a `prompt_cache` of their own, a dict that grows for ever: it is replaced.
    Others encode each prompt again: the method that does it is wrapped.
    """
    if getattr(pipeline, "prompt_cache", None) is not None:
        pipeline.prompt_cache = cache
    for name in ENCODERS:
        encode = getattr(pipeline, name, None)
        if encode and "prompt_cache" not in inspect.getsource(encode):
            owner = type(pipeline).__name__
            setattr(pipeline, name, _remembering(encode, owner, name, cache))


def _remembering(
    encode: Callable[..., Any], owner: str, name: str, cache: PromptCache
) -> Callable[..., Any]:
    def remembered(*values: Any, **arguments: Any) -> Any:
        named = (
            (argument, tuple(value) if isinstance(value, list) else value)
            for argument, value in sorted(arguments.items())
            if argument != "config"  # of one picture, and nothing that the embeddings depend on
        )
        key = (owner, name, *values, *named)
        try:
            hash(key)
        except TypeError:  # it reads pictures, which cannot be compared
            return encode(*values, **arguments)
        if key not in cache:
            cache[key] = encode(*values, **arguments)
            cache.evaluate()
        return cache[key]

    return remembered


def arguments(stage: Stage, inputs: Path) -> dict[str, Any]:
    """Returns the arguments of generate_image for one picture of a stage.

    Args:
        inputs: the folder of the pictures that the params name.
    """

    def path_of(image: InputImage | None) -> str | None:
        return None if image is None else str(inputs / f"{image.file}.png")

    params, pipeline = stage.params, stage.load_spec.pipeline
    images: Any = [path_of(image) for image in params.images]
    values: dict[str, Any] = {
        **params.model_dump(),
        "prompt": _prompt(params, pipeline),
        "init_image": path_of(params.init_image),
        "mask": path_of(params.mask),
        "control_image": path_of(params.control_image),
        "images": (images[0] if pipeline.one_image else images) if images else None,
        "upscale": params.shorter_side if params.upscale else None,
    }
    own = pipeline.resolves.intersection(params.defaulted)
    call = {
        parameter: values[field]
        for parameter, field in pipeline.parameters.items()
        if values[field] is not None and field not in own
    }
    call.update((name, True) for name in SWITCHES if name in call)
    if "controls" in call:
        call.pop("control_type", None)
        call["controls"] = [
            _control(control.type or "canny", path_of(control.image), control.strength)
            for control in params.controls
        ]
    return call


def _prompt(params: GenerationParams, pipeline: Pipeline) -> str:
    """Returns the prompt for mflux."""
    if pipeline.cutout and not params.prompt:
        from mflux.models.fibo.variants.edit.util import FIBO_EDIT_RMBG_DEFAULT_JSON_PROMPT

        return str(FIBO_EDIT_RMBG_DEFAULT_JSON_PROMPT)
    if params.background == "transparent" and pipeline.alpha_references:
        return TRANSPARENT_PROMPT.format(params.prompt)
    if pipeline.prompt_form != "{}":
        return pipeline.prompt_form.format(params.prompt)
    return params.prompt or " "  # mflux makes no token of ""


def picture_of(generated: Any, stage: Stage, inputs: Path) -> Image.Image:
    """Returns the picture that a client gets, from what mflux has drawn.

    Args:
        inputs: the folder of the pictures that the params name.
    """
    picture: Image.Image = generated.image
    if stage.load_spec.pipeline.cutout:
        matte = picture.convert("L")
        with Image.open(inputs / f"{stage.params.images[0].file}.png") as source:
            picture = source.convert("RGB").resize(matte.size, Image.Resampling.LANCZOS)
        picture.putalpha(matte)
    return picture


def _control(kind: str, path: str | None, strength: float | None) -> Any:
    from mflux.models.z_image.variants.controlnet.control_types import ControlSpec, ControlType

    # mflux hands on what is of no type that it knows: a map that needs no work.
    control_type = kind if kind == "ready" else ControlType(kind)
    return ControlSpec(control_type, path, 1.0 if strength is None else strength)


def set_tiling(pipeline: Any, tile: int | None) -> None:
    """Let a pipeline encode and decode pictures in tiles.

    Args:
        tile: their side in pixels; None: as mflux has set it.
    """
    from mflux.models.common.vae.tiling_config import TilingConfig

    if not hasattr(pipeline, "tiling_config"):
        return
    own = vars(pipeline).setdefault("own_tiling_config", pipeline.tiling_config)
    tiled = tile and TilingConfig(vae_decode_tile_size=tile, vae_encode_tile_size=tile)
    pipeline.tiling_config = tiled or own


def metadata(
    generated: Any, params: GenerationParams, weights: LoadSpec, tile: int | None = None
) -> dict[str, Any]:
    """What mflux writes about a picture into its file, without what is not of its params: equal
    params give equal files.

    Args:
        tile: side of the tiles that it was decoded in.
    """
    model, schedulers = weights.model, weights.pipeline.rules.schedulers
    details: dict[str, Any] = generated._get_metadata()
    for name in NOT_OF_THE_PARAMS:
        details.pop(name, None)
    for name in PATHS:
        if details.get(name):
            details[name] = Path(details[name]).name
    for name in LISTS_OF_PATHS:
        if details.get(name):
            details[name] = [Path(path).name for path in details[name]]
    if details.get("lora_paths"):
        details["lora_paths"] = [lora.name for lora in params.loras]
    if model.tiny or model.path:
        details["model"] = model.name
    if not params.prompt:
        details["prompt"] = ""
    details.update(_start_of(params))
    if verification := getattr(generated, "verification", None):
        details["verification"] = verification
    if schedulers:
        details["scheduler"] = params.scheduler or schedulers[0]
    if tile:
        details["vae_tiling"] = tile
    if params.preset:
        details["preset"] = params.preset
    return details


def _start_of(params: GenerationParams) -> dict[str, Any]:
    """Metadata of the picture that drawing starts from. Not all classes write them."""
    details: dict[str, Any] = {}
    if params.init_image and params.image_strength:
        details["image_path"] = f"{params.init_image.file}.png"
        details["image_strength"] = params.image_strength
    if params.mask and params.mask_feather is not None:
        details["masked_image_path"] = f"{params.mask.file}.png"
        details["mask_feather"] = params.mask_feather
    return details


def _checked(path: str | None) -> str | None:
    """mflux takes what is no folder for a repository: what cannot be one has to be a folder."""
    if path is None or (re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".")):
        return path
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {path}")
    return str(folder)
