"""The catalog, read from mflux's own registry, so that a new mflux release brings its models.

Names, aliases, repositories and default steps come from AVAILABLE_MODELS; what each class takes is
read from its source, because importing all families takes seconds and this takes 0.05 s.
Only this module, tiny_modules.py, generator.py, generation/ and mlx_setup.py depend on mflux and
mlx.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fields import CONTROL_TYPES, Takes, mflux_parameters
from models import in_context, tiny_models
from models.build_options import PARTS, BuildOptions
from models.mflux_source import MfluxSource
from models.mlx_setup import prepare_mlx
from models.model_catalog import (
    DISTILLED,
    FACTS,
    FIXED_STEPS,
    UNDECIDED,
    Catalog,
    Facts,
    Model,
    Pipeline,
)
from models.model_rules import rules_of
from models.repositories import LOADED

SMALL_TEXT_WIDTH = 7680
"""Width of the text of the FLUX.2 models that can have the small text encoder (klein 4B)."""
FIELDS: Mapping[str, str] = {
    "seed": "seed",
    "prompt": "prompt",
    "num_inference_steps": "steps",
    "width": "width",
    "height": "height",
    "image_path": "init_image",
    "image_paths": "images",
    "redux_image_paths": "images",
    "mask_path": "mask",
    "masked_image_path": "mask",
    "mask_image": "mask",
    "controlnet_image_path": "control_image",
    "depth_image_path": "control_image",
    "controls": "control_image",
    **dict(mflux_parameters()),
}
"""mflux's parameter -> the field that fills it. Other parameters keep their defaults."""


SAMPLING = frozenset({"steps", "guidance"})
"""What a class may decide by itself: None is the default of its parameter."""
UNGUIDED = frozenset({"ZImage"})
"""To these, no guidance means none: they have no default of their own."""


@dataclass(frozen=True)
class Exceptions:
    """Parameters that have another meaning for a class, or no effect (None)."""

    fields: Mapping[str, str | None]
    needs: tuple[Takes, ...] = ()
    instead: tuple[Takes, ...] = ()
    one_image: bool = False
    right_half: bool = False


EXCEPTIONS: Mapping[str, Exceptions] = {
    "Flux1": Exceptions({"negative_prompt": None}),
    "Flux1Kontext": Exceptions(
        {"image_path": "images", "image_strength": None}, (Takes.IMAGES,), one_image=True
    ),
    "Flux1Fill": Exceptions({"image_strength": None}),
    # Without a depth map, mflux would download a model that makes one from image_path.
    "Flux1Depth": Exceptions({"image_path": None, "image_strength": None}, (Takes.CONTROL_IMAGE,)),
    "Flux1Redux": Exceptions({"image_strength": None}),
    "Flux1InContextDev": Exceptions(
        {"image_path": "images", "image_strength": None},
        (Takes.IMAGES,),
        one_image=True,
        right_half=True,
    ),
    "Flux1InContextFill": Exceptions(
        {"left_image_path": "images", "right_image_path": "init_image", "image_strength": None},
        (Takes.IMAGES, Takes.INIT_IMAGE, Takes.MASK),
        one_image=True,
        right_half=True,
    ),
    "Flux2KleinEdit": Exceptions({"image_strength": None}, (Takes.IMAGES,)),
    "QwenImageEdit": Exceptions({"image_path": None}),
    "QwenImage21": Exceptions({"scheduler": None}),
    "QwenImage21Edit": Exceptions(
        {
            "scheduler": None,
            "verify": "verify_retries",
            "use_step_cache": "step_cache",
            "step_cache_threshold": "step_cache",
        },
        (Takes.IMAGES,),
    ),
    "QwenImage21Controlnet": Exceptions(
        {}, (Takes.CONTROL_IMAGE,), instead=(Takes.INIT_IMAGE, Takes.MASK)
    ),
    "Krea2Controlnet": Exceptions({"image_path": None}, (Takes.CONTROL_IMAGE,)),
    "FIBOEdit": Exceptions({"image_path": "images"}, one_image=True),
}

TRANSPARENT = ("QwenImage21Edit", "QwenImage21Controlnet", "MingImage")
"""Classes whose VAE decodes an alpha channel. Other than the Turbo and base class of Qwen-Image
2.1 for drawing, they return it."""
ALPHA_REFERENCES = ("QwenImage21Edit",)
"""Classes that read the alpha channel of reference images; the others see them on white."""
DRAWS_WITHOUT_IMAGES = "QwenImage21Edit"
"""An editing class that also draws without a picture: the only way to a transparent image."""
OF_PICTURES = frozenset(
    {
        Takes.IMAGES,
        Takes.MASK,
        Takes.EDIT_STRENGTH,
        Takes.AUTO_MASK,
        Takes.VERIFY_RETRIES,
        Takes.OUTPUT_RESOLUTION,
    }
)
MAPS: Mapping[str, tuple[str, ...]] = {
    "ZImageTurboControlnet": CONTROL_TYPES,
    "QwenImage21Controlnet": ("depth", "hed", "pose"),
    "Krea2Controlnet": ("depth",),
    "Flux1Depth": ("depth",),
}
"""By class: the kinds of control that can be made from a picture. Without one, control_image is the
map itself; Z-Image then looks for edges."""
IC_EDIT = "dev-fill"
"""The model that edits in context: it draws the picture once more beside the given one."""
CUTOUT = "fibo-edit-rmbg"
"""The model that draws a matte of the picture that it is given."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "dev": ("Flux1", "Flux1InContextDev"),
    "dev-kontext": ("Flux1Kontext",),
    "dev-fill": ("Flux1Fill",),
    "dev-fill-catvton": ("Flux1InContextFill",),
    "dev-depth": ("Flux1Depth",),
    "krea-2-controlnet-depth": ("Krea2Controlnet",),
    "lens-turbo": ("LensImage",),
    "flux2-klein-4b": ("Flux2Klein", "Flux2KleinEdit"),
    "flux2-klein-9b": ("Flux2Klein", "Flux2KleinEdit"),
    "flux2-klein-9b-kv": ("Flux2Klein", "Flux2KleinEdit"),
    "flux2-klein-base-4b": ("Flux2Klein", "Flux2KleinEdit"),
    "flux2-klein-base-9b": ("Flux2Klein", "Flux2KleinEdit"),
    "flux3-image-klein": ("Flux3Klein", "Flux3KleinEdit"),
    "flux3-image-klein-base": ("Flux3Klein", "Flux3KleinEdit"),
    "fibo2": ("Fibo2", "Fibo2Edit"),
    "qwen-image-2.1": ("QwenImage21", "QwenImage21Edit"),
    "qwen-image-2.1-turbo": ("QwenImage21", "QwenImage21Edit"),
    "z-image-turbo": ("ZImage",),
    "noise-flux2": ("Flux2Klein", "Flux2KleinEdit"),
    "noise-flux3": ("Flux3Klein", "Flux3KleinEdit"),
    "noise-fibo2": ("Fibo2", "Fibo2Edit"),
}
"""Models with several classes, or with another class than in MODEL_CLASSES of mflux's save.py. That
table is used for all others."""


@cache
def read_catalog() -> Catalog:
    """Returns all models of the installed mflux, in its order, and the tiny ones."""
    prepare_mlx()
    from mflux.cli.defaults.defaults import model_inference_steps
    from mflux.models.common.config.model_config import AVAILABLE_MODELS

    sources = _Sources()
    models = [
        _model(key, config, model_inference_steps(key), sources)
        for key, config in AVAILABLE_MODELS.items()
    ]
    return Catalog([*models, *_tiny(sources)])


def find_model(name: str) -> Model | None:
    """Returns the model of this name or alias; upper and lower case are equal."""
    return read_catalog().find(name)


def _model(key: str, config: Any, steps: int, sources: "_Sources") -> Model:
    facts = FACTS.get(key, UNDECIDED)
    without = {Takes.GUIDANCE, Takes.NEGATIVE_PROMPT}
    if config.supports_guidance is not False and key not in DISTILLED:
        without = set()
    if key in FIXED_STEPS:
        without.add(Takes.STEPS)
    names = CLASSES.get(key) or sources.saved_with(key)
    # No class of mflux loads custom_transformer_model.
    repositories = (config.model_name, config.controlnet_model)
    loaded = LOADED.get(key, {})
    pipelines = tuple(_ruled(pipeline, key, without) for pipeline in sources.pipelines(names))
    if key == IC_EDIT:
        edit = _without(sources.pipeline("Flux1InContextFill"), {Takes.INIT_IMAGE, Takes.MASK})
        edit = replace(
            edit,
            needs=frozenset({Takes.IMAGES}),
            adapter=in_context.EDIT,
            prompt_form=in_context.EDIT_PROMPT,
            default_width=in_context.EDIT_WIDTH,
        )
        pipelines = (*pipelines, _ruled(edit, key, without))
    if key == CUTOUT:
        pipelines = tuple(replace(p, cutout=True, transparent=True) for p in pipelines)
    pipelines = _with_inpainting(pipelines)
    family = pipelines[0].module.split(".")[2] if pipelines else "unknown"
    overrides = getattr(config, "transformer_overrides", {})
    if family == "flux2" and overrides.get("joint_attention_dim") != SMALL_TEXT_WIDTH:
        pipelines = _without_options(pipelines, {"small_text_encoder"})
    return Model(
        name=key,
        family=family,
        title=facts.title,
        default_steps=steps if Takes.UPSCALE not in _taken(pipelines) else 1,
        default_guidance=facts.guidance if Takes.GUIDANCE in _taken(pipelines) else None,
        parameters_b=facts.parameters_b,
        pipelines=pipelines,
        repositories=tuple(dict.fromkeys((*loaded, *filter(None, repositories)))),
        files=loaded,
        gated=facts.gated,
        weights_gb=facts.weights_gb,
        aliases=tuple(alias for alias in config.aliases if alias.lower() != key.lower()),
    )


def _tiny(sources: "_Sources") -> Iterator[Model]:
    for name in tiny_models.TINY_CONFIGS:
        if name in TINY_PARTS:
            continue
        of = CLASSES.get(name) or (tiny_models.PIPELINES[name].rpartition(":")[2],)
        without = {Takes.GUIDANCE, Takes.NEGATIVE_PROMPT}
        config = tiny_models.TINY_CONFIGS[name]
        if config["supports_guidance"] is not False and name not in TINY_DISTILLED:
            without = set()
        pipelines = tuple(_ruled(pipeline, name, without) for pipeline in sources.pipelines(of))
        if pipelines[0].module.split(".")[2] not in TINY_LORAS:
            pipelines = tuple(replace(pipeline, loras=False) for pipeline in pipelines)
        steps, guidance = TINY_DEFAULTS.get(name, (4, 3.5))
        pipelines = _without_options(_with_inpainting(pipelines), {name for _, name in PARTS})
        parameters_b = TINY_PARAMETERS_B.get(name, 0.0004)
        title = BUILT_IN_TITLE
        if name in TINY_TITLES:
            title = f"Noise {TINY_TITLES[name]}: random weights that draw abstract noise, for tests"
        facts = Facts(title, parameters_b)
        yield Model(
            name=name,
            family=pipelines[0].module.split(".")[2],
            title=facts.title,
            default_steps=1 if Takes.UPSCALE in _taken(pipelines) else steps,
            default_guidance=guidance if Takes.GUIDANCE in _taken(pipelines) else None,
            parameters_b=facts.parameters_b,
            pipelines=pipelines,
            aliases=FORMER_NAMES.get(name, ()),
        )


TINY_PARAMETERS_B: Mapping[str, float] = {
    "tiny": 0.0002,
    "noise-flux1": 0.00002,
    "noise-z-image": 0.0002,
    "noise-ernie": 0.0002,
    "noise-krea2": 0.0007,
    "noise-flux3": 0.0012,
    "noise-flux3-edit": 0.0012,
    "noise-fibo2": 0.0015,
    "noise-fibo2-edit": 0.0015,
}
"""Those that compute in a step, from measured pictures: some layers of the tiny models are narrow,
and what is fixed in a picture takes a large part of it."""
FORMER_NAMES: Mapping[str, tuple[str, ...]] = {
    name: (name.replace("noise-", "tiny-"),)
    for name in tiny_models.ALL_TINY_MODELS
    if name not in {tiny_models.BUILT_IN, "noise-flux1"}
}
"""For tasks that have waited since an earlier version, and for options."""
BUILT_IN_TITLE = "Tiny painter: simple scenes, built in"
TINY_TITLES: Mapping[str, str] = {
    "noise-flux1": "FLUX.1",
    "noise-kontext": "FLUX.1 Kontext",
    "noise-fill": "FLUX.1 Fill",
    "noise-redux": "FLUX.1 Redux",
    "noise-controlnet": "FLUX.1 ControlNet",
    "noise-flux2": "FLUX.2 klein",
    "noise-z-image": "Z-Image",
    "noise-qwen": "Qwen-Image",
    "noise-seedvr2": "SeedVR2",
    "noise-krea2": "Krea 2",
    "noise-anima": "Anima",
    "noise-flux3": "FLUX 3 klein base",
    "noise-ernie": "ERNIE-Image",
    "noise-qwen21": "Qwen-Image 2.1",
    "noise-fibo2": "FIBO 2",
}
TINY_LORAS = ("flux", "flux2")
"""Families whose tiny models can have LoRAs: merging does not evaluate the missing layers."""
TINY_PARTS = frozenset({"noise-flux2-edit", "noise-flux3-edit", "noise-fibo2-edit"})
"""Tiny models that are part of another one."""
TINY_DISTILLED = frozenset({"noise-flux2"})
TINY_DEFAULTS: Mapping[str, tuple[int, float | None]] = {
    "noise-anima": (30, 4.0),
    "noise-flux3": (50, 3.5),
    "noise-qwen21": (40, 1.0),
    "noise-fibo2": (25, 5.0),
}
"""Steps and guidance of the classes that decide them by themselves."""


def _taken(pipelines: tuple[Pipeline, ...]) -> frozenset[Takes]:
    return frozenset().union(*(pipeline.takes for pipeline in pipelines))


def _without(pipeline: Pipeline, fields: frozenset[Takes] | set[Takes]) -> Pipeline:
    kept = {name: field for name, field in pipeline.parameters.items() if field not in fields}
    return replace(pipeline, parameters=kept)


def _without_options(
    pipelines: tuple[Pipeline, ...], names: Collection[str]
) -> tuple[Pipeline, ...]:
    return tuple(replace(one, options=one.options.difference(names)) for one in pipelines)


def _ruled(pipeline: Pipeline, model: str, without: set[Takes]) -> Pipeline:
    """As a model uses it: with its rules, and without fields that it ignores or does not have."""
    rules = rules_of(model, pipeline.name)
    return replace(_without(pipeline, without | rules.ignored), rules=rules)


def _with_inpainting(pipelines: tuple[Pipeline, ...]) -> tuple[Pipeline, ...]:
    """Adds inpainting to the pipelines that start from the latents of a picture."""
    started = [pipeline for pipeline in pipelines if Takes.IMAGE_STRENGTH in pipeline.takes]
    needs = frozenset({Takes.INIT_IMAGE, Takes.MASK})
    inpainting = (
        replace(pipeline, inpaints=True, needs=pipeline.needs | needs) for pipeline in started
    )
    return (*pipelines, *inpainting)


class _Sources(MfluxSource):
    """Builds pipelines from the source of mflux."""

    def pipelines(self, names: Sequence[str]) -> Iterator[Pipeline]:
        """Returns the pipelines of a model. Those with the same constructor share their modules."""
        for name in names:
            pipeline = self.pipeline(name)
            if name != names[0] and self._constructor(name) == self._constructor(names[0]):
                pipeline = replace(pipeline, loaded_as=names[0])
            yield pipeline
            if name == DRAWS_WITHOUT_IMAGES:
                yield replace(
                    _without(pipeline, set(OF_PICTURES)), needs=frozenset({Takes.BACKGROUND})
                )

    def pipeline(self, name: str) -> Pipeline:
        node = self._class(name)
        required, optional = self._parameters(node, "generate_image")
        constructor = {p for names in self._parameters(node, "__init__") for p in names}
        exceptions = EXCEPTIONS.get(name, Exceptions({}))
        fields = {**FIELDS, **exceptions.fields}
        parameters = {
            parameter: field
            for parameter in (*required, *optional)
            if (field := fields.get(parameter)) is not None
        }
        needed = {parameters[parameter] for parameter in required if parameter in parameters}
        if "controls" in parameters:
            parameters["control_type"] = "control_type"
        return Pipeline(
            name=name,
            module=self.module(name),
            parameters=parameters,
            needs=frozenset({t for t in Takes if t in needed} - {Takes.PROMPT, Takes.STEPS})
            | frozenset(exceptions.needs),
            loras="lora_paths" in constructor,
            options=frozenset(BuildOptions._fields) & constructor,
            one_image=exceptions.one_image,
            right_half=exceptions.right_half,
            styles=name == "Flux1InContextDev",
            loads_control_strength="controlnet_strength" in constructor,
            control_types=MAPS.get(name, ()),
            transparent=name in TRANSPARENT,
            alpha_references=name in ALPHA_REFERENCES,
            resolves=(SAMPLING & {parameters.get(one, "") for one in self._undecided(node)})
            - ({"guidance"} if name in UNGUIDED else set()),
            instead=frozenset(exceptions.instead),
        )
