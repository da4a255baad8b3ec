"""The models as plain data, without importing mflux.

mflux_registry.py fills the catalog from mflux's own registry. FACTS has what that does not contain:
size, required login, default guidance.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import NamedTuple

from fields import Takes
from models.build_options import NO_OPTIONS, BuildOptions, Part, parts_of, quantized_share
from models.model_rules import Rules

MOST_ALIKE = 3
REFERENCE_PIXELS = 1024 * 1024
LARGE_REFERENCES = {"flux3": 4 * 1024 * 1024}
"""Pixels to which mflux scales reference images, by family. Init, mask and control images get the
size of the result."""
ALWAYS_TAKEN = frozenset({Takes.PROMPT, Takes.STEPS})
"""Fields that all pipelines but the upscalers take."""


class Lora(NamedTuple):
    """A LoRA on a model."""

    name: str
    scale: float = 1.0


class LoraFit(NamedTuple):
    """How many keys of a LoRA match a model."""

    matched: int
    keys: int
    rank: int | None = None
    """The largest of its layers; None: it has no pairs of matrices."""
    reason: str = ""
    """Why it cannot be used with the model; empty: it can be used."""


@dataclass(frozen=True)
class Pipeline:
    """A class of mflux that generates images with a model."""

    name: str
    """Module and name of the class."""
    module: str
    parameters: Mapping[str, str]
    """Parameters of its generate_image: mflux's parameter -> the field that fills it."""
    needs: frozenset[Takes] = frozenset()
    """Required fields."""
    loras: bool = False
    loaded_as: str = ""
    """Another pipeline of the model with which it shares its modules; empty: none."""
    one_image: bool = False
    """Whether `images` may have only one image."""
    control_types: tuple[str, ...] = ()
    """Values of `control_type` that it takes."""
    right_half: bool = False
    """Whether it generates a pair of pictures side by side; the right one is the result."""
    adapter: Lora | None = None
    """The LoRA that it cannot do without."""
    styles: bool = False
    """Whether it takes `lora_style`."""
    prompt_form: str = "{}"
    """Text around the prompt; {} stands for it."""
    default_width: int | None = None
    """Width of the result in pixels, if none is requested."""
    loads_control_strength: bool = False
    """Whether `control_strength` is merged into the weights when they are loaded."""
    transparent: bool = False
    """Whether its images have an alpha channel."""
    cutout: bool = False
    """Whether it draws a matte: the result is the first of `images` with this alpha channel."""
    alpha_references: bool = False
    """Whether it reads the alpha channel of `images`."""
    inpaints: bool = False
    """Whether the server keeps the source outside `mask`: the class does not know masks."""
    resolves: frozenset[str] = frozenset()
    """Fields that the class fills in itself: they are passed only if the request has them."""
    instead: frozenset[Takes] = frozenset()
    """Fields that replace all that it needs."""
    rules: Rules = field(default_factory=Rules)
    options: frozenset[str] = frozenset()
    """The build options that its constructor has (models/build_options.py)."""

    @property
    def upscales(self) -> bool:
        return Takes.UPSCALE in self.needs

    @property
    def width_factor(self) -> int:
        """So many times the width of a picture is drawn."""
        return 2 if self.right_half else 1

    @cached_property
    def takes(self) -> frozenset[Takes]:
        taken = {name for name in Takes if name in self.parameters.values()}
        if self.loras:
            taken.add(Takes.LORAS)
        if self.transparent:
            taken.add(Takes.BACKGROUND)
        if self.styles:
            taken.add(Takes.LORA_STYLE)
        if self.inpaints:
            taken |= {Takes.MASK, Takes.MASK_FEATHER}
        if self.loads_control_strength:
            taken.add(Takes.CONTROL_STRENGTH)
        if self.control_types:
            taken.add(Takes.CONTROL_TYPE)
        if "controls" in self.parameters:
            taken |= {Takes.CONTROL_IMAGES, Takes.CONTROL_TYPES, Takes.CONTROL_STRENGTHS}
        return frozenset(taken)

    def suits(self, given: frozenset[Takes]) -> bool:
        if not given <= self.takes:
            return False
        return self.needs <= given or bool(self.instead and self.instead <= given)


@dataclass(frozen=True, eq=False)
class Model:
    """A model, as known before its weights are loaded."""

    name: str
    """The name in requests and options; for real models also mflux's key."""
    family: str
    title: str
    default_steps: int
    default_guidance: float | None
    """None: the model has no guidance (distilled), or its own schedule."""
    parameters_b: float
    """Billions of parameters of the transformer: scales the forecast before the first
    measurement."""
    pipelines: tuple[Pipeline, ...] = ()
    repositories: tuple[str, ...] = ()
    """Hugging Face repositories of the weights; empty: built by tiny_models.py."""
    gated: bool = False
    """Whether the download needs a login and an accepted licence."""
    weights_gb: float | None = None
    """Size of the download in 10^9 bytes, or of the files that the operator has named; None:
    unknown."""
    aliases: tuple[str, ...] = ()
    base: str | None = None
    """Local weights: name of the model with the same architecture. None: not local weights."""
    path: str | None = None
    """Folder or repository of the weights that the operator has set."""
    stored_bits: int | None = None
    """Bits to which these weights are stored quantized; None: they are not, or it is unknown."""
    makes: str = ""
    """Helper models: the field of the drawing stage that its result fills, `prompt` or
    `control_image`. Empty: it draws."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Repository -> patterns of the files that it loads. Without patterns: all weights."""
    url: str = ""
    """Where mflux downloads its only file from, if not from Hugging Face."""
    options: BuildOptions = NO_OPTIONS
    """How it is built."""
    loaded_shares: Mapping[int | None, float] = field(default_factory=dict)
    """Bits (None: as stored) -> bytes in memory / bytes of its files. Empty: they are not here."""
    float32: bool = False
    """Whether its weights have 32 bits in memory, unless they are quantized."""

    @property
    def own_bytes(self) -> float:
        """Approximate size of its weights; if unknown, two bytes per parameter."""
        return (self.weights_gb or 2 * self.parameters_b) * 1e9

    @property
    def parts(self) -> tuple[Part, ...]:
        """What its options load in place of parts of it."""
        return parts_of(self.family, self.options)

    @property
    def download_bytes(self) -> float:
        """Approximate size of what is downloaded of it and for it."""
        return self.own_bytes + sum(p.download_gb - p.replaced_gb for p in self.parts) * 1e9

    @property
    def tiny(self) -> bool:
        return not self.repositories and not self.url

    @property
    def key(self) -> str:
        """mflux's name of the architecture."""
        return self.base or self.name

    @cached_property
    def takes(self) -> frozenset[Takes]:
        return frozenset().union(*(pipeline.takes for pipeline in self.pipelines))

    @property
    def mask_of(self) -> frozenset[Takes]:
        """Fields whose picture a mask can belong to."""
        masked = (pipeline.takes for pipeline in self.pipelines if Takes.MASK in pipeline.takes)
        return frozenset().union(*masked) & {Takes.INIT_IMAGE, Takes.IMAGES}

    @cached_property
    def ignored(self) -> frozenset[Takes]:
        """Fields that may be given and change nothing."""
        return frozenset().union(*(pipeline.rules.ignored for pipeline in self.pipelines))

    @property
    def needs(self) -> frozenset[Takes]:
        """Fields without which none of its pipelines can draw."""
        needed = [frozenset() if p.instead else p.needs for p in self.pipelines]
        return frozenset.intersection(*needed) if needed else frozenset()

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Names that `scheduler` may have; its own one first."""
        names = (name for pipeline in self.pipelines for name in pipeline.rules.schedulers)
        return tuple(dict.fromkeys(names))

    @property
    def most_images(self) -> int | None:
        """Pictures that `images` may hold; None: as many as a request may."""
        most = [p.rules.most_images for p in self.pipelines if Takes.IMAGES in p.takes]
        return None if None in most else max(filter(None, most), default=None)

    @cached_property
    def upscaler(self) -> bool:
        return any(pipeline.upscales for pipeline in self.pipelines)

    @property
    def reference_pixels(self) -> int:
        """Pixels to which reference images are scaled down."""
        return LARGE_REFERENCES.get(self.family, REFERENCE_PIXELS)

    def pipeline_for(self, given: frozenset[Takes]) -> Pipeline | None:
        """Returns the first pipeline that takes all these fields and has all that it requires."""
        return next((p for p in self.pipelines if p.suits(given)), None)


@dataclass(frozen=True, eq=False)
class LoadSpec:
    """What must be in memory before a task can run. Load specs with the same key need the same
    weights; their LoRAs may differ, they are exchanged without loading."""

    model: Model
    pipeline: Pipeline
    quantize: int | None
    """Bits that the weights have in memory. Weights that are stored quantized keep theirs."""
    loras: tuple[Lora, ...] = ()
    control_strength: float | None = None
    """For pipelines that merge it into the weights."""
    key: str = field(init=False)

    @property
    def expected_bytes(self) -> float:
        """Approximate memory of its weights, before they were loaded once: the size of the files
        or of the download, scaled to the requested bits unless they are stored so. Without the
        files, as if all of it were quantized from 16 bits."""
        model, bits = self.model, self.quantize
        all_quantized = quantized_share(bits)
        share = model.loaded_shares.get(bits, all_quantized) if not model.stored_bits else 1.0
        parts_gb = sum(
            part.dense_gb
            + part.quantized_gb * all_quantized
            - part.replaced_gb
            * (part.replaced_share(bits) if model.loaded_shares else all_quantized)
            for part in model.parts
        )
        return model.own_bytes * share + parts_gb * 1e9

    @cached_property
    def options(self) -> BuildOptions:
        """How it is built: the options that its class has."""
        return self.model.options.of(self.pipeline.options)

    def __post_init__(self) -> None:
        if self.model.stored_bits:
            object.__setattr__(self, "quantize", self.model.stored_bits)
        key = self.model.name
        if self.quantize:
            key += f"/q{self.quantize}"
        key += self.options.suffix
        loaded_as = self.pipeline.loaded_as or self.pipeline.name
        if loaded_as != self.model.pipelines[0].name:
            key += f"/{loaded_as}"
        if self.control_strength is not None:
            key += f"/control{self.control_strength:g}"
        object.__setattr__(self, "key", key)

    def same_as(self, other: "LoadSpec") -> bool:
        """Whether both need the same weights with the same LoRAs."""
        return (self.key, self.loras) == (other.key, other.loras)


class Catalog:
    """All models in the order of mflux, the tiny ones last."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.models = tuple(models)
        self._by_name = {
            name.lower(): model for model in self.models for name in (model.name, *model.aliases)
        }

    def find(self, name: str) -> Model | None:
        """Returns the model of this name or alias, or None; upper and lower case are equal."""
        return self._by_name.get(name.lower())

    def like(self, name: str) -> str:
        """Returns " Did you mean a or b?" with similar names, for the error about an unknown model;
        empty if no name is similar."""
        asked = name.lower()[:100]
        similar = get_close_matches(asked, self._by_name, n=MOST_ALIKE, cutoff=0.7)
        longer = sorted((one for one in self._by_name if asked in one), key=len)
        shorter = [one for one in self._by_name if one in asked]
        found = [*longer, *similar, *shorter] if len(asked) > 1 else []
        names = list(dict.fromkeys(self._by_name[one].name for one in found))
        *others, last = names[:MOST_ALIKE] or [""]
        words = f"{', '.join(others)} or {last}" if others else last
        return f" Did you mean {words}?" if words else ""


class Facts(NamedTuple):
    """Properties of a model that mflux's registry does not contain."""

    title: str
    parameters_b: float = 6.0
    weights_gb: float | None = None
    guidance: float | None = None
    """Default guidance; None: it has none, or mflux decides."""
    gated: bool = False


UNDECIDED = Facts("not described yet")
"""For models of a new release of mflux: they work, but the first forecast is inaccurate."""

# Sizes are from mflux's READMEs and the repositories; guidance is the default of mflux's command
# for the model, with two exceptions: FLUX.2 klein base and Z-Image are drawn with 4, as their model
# cards do. mflux's commands use 1 and 0 for them, which turns guidance off: the first shares its
# command with the distilled models, and mflux's README draws the second with 4.
FACTS = {
    "schnell": Facts("FLUX.1 schnell, 12 B", 12.0, 34, None, gated=True),
    "dev": Facts("FLUX.1 dev, 12 B", 12.0, 34, 3.5, gated=True),
    "krea-dev": Facts("FLUX.1 Krea dev, 12 B", 12.0, 34, 3.5, gated=True),
    "dev-kontext": Facts("FLUX.1 Kontext, edits a picture", 12.0, 34, 2.5, gated=True),
    "dev-fill": Facts("FLUX.1 Fill, repaints what a mask shows", 12.0, 34, 30.0, gated=True),
    "dev-fill-catvton": Facts("CatVTON, a garment onto a person", 12.0, 34, 30.0, gated=True),
    "dev-redux": Facts("FLUX.1 Redux, varies pictures", 12.0, 35, 3.5, gated=True),
    "dev-depth": Facts("FLUX.1 Depth, follows a depth map", 12.0, 34, 10.0, gated=True),
    "dev-controlnet-canny": Facts("FLUX.1 dev, follows edges", 12.0, 38, 3.5, gated=True),
    "schnell-controlnet-canny": Facts("FLUX.1 schnell, follows edges", 12.0, 38, gated=True),
    "dev-controlnet-upscaler": Facts("FLUX.1 dev upscaler", 12.0, 38, gated=True),
    "flux2-klein-4b": Facts("FLUX.2 klein, 4 B, distilled", 4.0, 15),
    "flux2-klein-9b": Facts("FLUX.2 klein, 9 B, distilled", 9.0, 32, gated=True),
    "flux2-klein-9b-kv": Facts("FLUX.2 klein, 9 B, quick edits", 9.0, 32, gated=True),
    "flux2-klein-base-4b": Facts("FLUX.2 klein base, 4 B", 4.0, 15, 4.0),
    "flux2-klein-base-9b": Facts("FLUX.2 klein base, 9 B", 9.0, 32, 4.0, gated=True),
    "flux3-image-klein": Facts("FLUX 3 klein, distilled", 5.5, 20),
    "flux3-image-klein-base": Facts("FLUX 3 klein base", 5.5, 20, 3.5),
    "qwen-image": Facts("Qwen-Image, 20 B", 20.0, 58, 3.5),
    "qwen-image-edit": Facts("Qwen-Image-Edit 2509, 20 B", 20.0, 58, 2.5),
    "qwen-image-edit-2511": Facts("Qwen-Image-Edit 2511, 20 B", 20.0, 58, 2.5),
    "qwen-image-2.1": Facts("Qwen-Image 2.1, 7 B", 7.0, 33, 1.0),
    "qwen-image-2.1-turbo": Facts("Qwen-Image 2.1 Turbo, 7 B", 7.0, 33),
    "qwen-image-2.1-controlnet-union": Facts("Qwen-Image 2.1, follows a control", 7.0, 36, 1.0),
    "qwen-image-2.1-turbo-controlnet-union": Facts("Qwen-Image 2.1 Turbo, controlled", 7.0, 36),
    "z-image": Facts("Z-Image, 6 B", 6.15, 31, 4.0),
    "z-image-turbo": Facts("Z-Image Turbo, 6 B, distilled", 6.15, 31),
    "z-image-turbo-controlnet-union-2.1": Facts("Z-Image Turbo, follows a control", 6.15, 38),
    "fibo": Facts("FIBO, 8 B, JSON prompts", 8.0, 24, 5.0, gated=True),
    "fibo-lite": Facts("FIBO Lite, 8 B", 8.0, 24, 1.0, gated=True),
    "fibo-edit": Facts("FIBO Edit, 8 B", 8.0, 24, 3.5, gated=True),
    "fibo-edit-rmbg": Facts("FIBO Edit, removes the background", 8.0, 24, 1.0, gated=True),
    "fibo2": Facts("FIBO 2.0 dev, 8 B", 8.0, 25.5, 5.0),
    "fibo2-edit-turbo": Facts("FIBO 2.0 Edit Turbo, 8 B", 8.0, 25.5),
    "krea-2": Facts("Krea 2 Turbo, 12 B", 12.0, 33, 1.0),
    "krea-2-raw": Facts("Krea 2 Raw, 12 B", 12.0, 33, 1.0),
    "krea-2-controlnet-depth": Facts("Krea 2, follows a depth map", 12.0, 36, 1.0),
    "ernie-image": Facts("ERNIE-Image, 8 B", 8.0, 22, 4.0),
    "ernie-image-turbo": Facts("ERNIE-Image Turbo, 8 B", 8.0, 22),
    "ideogram-4-fp8": Facts("Ideogram 4", 9.3, 28, gated=True),
    "iris-3b": Facts("Iris 3B Turbo, always 4 steps", 2.8, 14),
    "iris-3b-base": Facts("Iris 3B", 2.8, 19, 3.0),
    "moss-image-sft": Facts("MOSS-Image SFT, 4.9 B", 4.9, 27, 3.0),
    "moss-image-base": Facts("MOSS-Image base, 4.9 B", 4.9, 27, 3.0),
    "lens-turbo": Facts("Lens Turbo, 3.8 B", 3.8, 20),
    "anima-turbo": Facts("Anima Turbo, 2 B", 2.0, 5.6, 1.0),
    "anima-aesthetic": Facts("Anima Aesthetic, 2 B", 2.0, 5.6, 4.0),
    "anima-base": Facts("Anima base, 2 B", 2.0, 5.6, 4.0),
    "boogu-image-turbo": Facts("Boogu Image Turbo, 10 B", 10.0, 37),
    "ming-image-design": Facts("Ming-Image design, 6 B", 6.15, 50, 1.0),
    "seedvr2-3b": Facts("SeedVR2 upscaler, 3 B", 3.4, 7),
    "seedvr2-7b": Facts("SeedVR2 upscaler, 7 B", 8.2, 17),
}
DISTILLED = frozenset({"flux2-klein-4b", "flux2-klein-9b", "flux2-klein-9b-kv"})
"""Models with guidance in the registry, although mflux's command for them refuses it."""
FIXED_STEPS = frozenset({"iris-3b"})
"""Models with a fixed number of steps."""

DEFAULT_MODEL = "schnell"
DEFAULT_MODEL_WITHOUT_GPU = "tiny"
