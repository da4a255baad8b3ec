"""The models this server knows, as plain data: light to import, no weights, no mflux.

mflux_registry.py fills the catalog from mflux's own registry. What mflux does not say of a model
(how large it is, whether a login is asked for, its usual guidance) stands here, one line a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NamedTuple

from fields import Takes

MOST_ALIKE = 3


REFERENCE_PIXELS = 1024 * 1024
LARGE_REFERENCES = {"flux3": 4 * 1024 * 1024}
"""By family, what mflux scales reference pictures down to. Init, mask and control pictures are
scaled to the size of the result."""
ALWAYS_TAKEN = frozenset({Takes.PROMPT, Takes.STEPS})
"""By all but the upscalers."""


@dataclass(frozen=True)
class Pipeline:
    """One of mflux's classes that draws with a model."""

    name: str
    """Of the class."""
    module: str
    parameters: Mapping[str, str]
    """What its generate_image takes: mflux's parameter -> the field of ours that fills it."""
    needs: frozenset[Takes] = frozenset()
    """Fields without which it cannot draw."""
    loras: bool = False
    loaded_as: str = ""
    """Another pipeline of the model whose modules it shares; empty: it is loaded for itself."""
    one_image: bool = False
    """Whether it takes just one of `images`."""
    right_half: bool = False
    """Whether it draws a pair of pictures, of which the right one is meant."""

    @property
    def takes(self) -> frozenset[Takes]:
        taken = {name for name in Takes if name in self.parameters.values()}
        return frozenset(taken | {Takes.LORAS} if self.loras else taken)

    def suits(self, given: frozenset[Takes]) -> bool:
        return self.needs <= given <= self.takes


@dataclass(frozen=True, eq=False)
class Model:
    """What the server must know of a model before its weights are loaded."""

    name: str
    """The name that clients and `--model` use; for real models also mflux's own key."""
    family: str
    title: str
    default_steps: int
    default_guidance: float | None
    """None: the model is distilled without guidance, or has a schedule of its own."""
    parameters_b: float
    """Size of the transformer in billions of parameters: scales the forecast before anything
    was measured."""
    pipelines: tuple[Pipeline, ...] = ()
    repositories: tuple[str, ...] = ()
    """Hugging Face repositories of the weights; empty: built by tiny_models.py."""
    gated: bool = False
    """Whether a repository asks for a login and an accepted licence."""
    weights_gb: float | None = None
    """Download in units of 10^9 bytes; None: nobody has said."""
    aliases: tuple[str, ...] = ()
    base: str | None = None
    """Name of the catalog's model whose architecture local weights have; None: its own."""
    path: str | None = None
    """Folder or repository that the weights come from, where the operator said so."""

    @property
    def download_bytes(self) -> float:
        """Size of its weights, about; where it is not known, two bytes for each parameter."""
        return (self.weights_gb or 2 * self.parameters_b) * 1e9

    @property
    def tiny(self) -> bool:
        return not self.repositories

    @property
    def key(self) -> str:
        """mflux's name of the architecture."""
        return self.base or self.name

    @property
    def takes(self) -> frozenset[Takes]:
        return frozenset().union(*(pipeline.takes for pipeline in self.pipelines))

    @property
    def upscaler(self) -> bool:
        return any(Takes.UPSCALE in pipeline.needs for pipeline in self.pipelines)

    @property
    def reference_pixels(self) -> int:
        """Pixels of a reference picture that mflux uses; larger ones are scaled down."""
        return LARGE_REFERENCES.get(self.family, REFERENCE_PIXELS)

    def pipeline_for(self, given: frozenset[Takes]) -> Pipeline | None:
        """The first of its pipelines that honours all of these fields and lacks none."""
        return next((p for p in self.pipelines if p.suits(given)), None)


class Lora(NamedTuple):
    """An adapter that is merged into the weights when they are loaded."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class LoadSpec:
    """What has to be loaded before a task can run. Two that have the same key are the same."""

    model: Model
    pipeline: Pipeline
    quantize: int | None
    """Bits asked for; what is stored wins."""
    loras: tuple[Lora, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        key = self.model.name
        if self.quantize:
            key += f"/q{self.quantize}"
        loaded_as = self.pipeline.loaded_as or self.pipeline.name
        if loaded_as != self.model.pipelines[0].name:
            key += f"/{loaded_as}"
        for lora in self.loras:
            key += f"+{lora.name}:{lora.scale:g}"
        object.__setattr__(self, "key", key)


class Catalog:
    """Every model there is, in mflux's order, the tiny ones last."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.models = tuple(models)
        self._by_name = {
            name.lower(): model for model in self.models for name in (model.name, *model.aliases)
        }

    def find(self, name: str) -> Model | None:
        """The model of this exact name or alias, in any case of letters; None if there is none."""
        return self._by_name.get(name.lower())

    def like(self, name: str) -> str:
        """What to say to who asked for one that is not there: " Did you mean a or b?", or nothing
        where none has a similar name or alias."""
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
    """What mflux's registry does not say of a model."""

    title: str
    parameters_b: float = 6.0
    weights_gb: float | None = None
    guidance: float | None = None
    """Its usual guidance; None: it has none, or mflux knows best."""
    gated: bool = False


UNDECIDED = Facts("not described yet")
"""Of a model that a new release of mflux brought: it works, with a poor first forecast."""

# Sizes are those that mflux's READMEs and the repositories tell; guidance is the default of
# mflux's command for the model.
FACTS = {
    "schnell": Facts("FLUX.1 schnell, 12 B", 12.0, 34, None, gated=True),
    "dev": Facts("FLUX.1 dev, 12 B", 12.0, 34, 3.5, gated=True),
    "krea-dev": Facts("FLUX.1 Krea dev, 12 B", 12.0, 34, 3.5, gated=True),
    "dev-kontext": Facts("FLUX.1 Kontext, edits a picture", 12.0, 34, 2.5, gated=True),
    "dev-fill": Facts("FLUX.1 Fill, repaints what a mask shows", 12.0, 34, 30.0, gated=True),
    "dev-fill-catvton": Facts("CatVTON, a garment onto a person", 12.0, 58, 30.0, gated=True),
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
"""Whose registry entry speaks of guidance, while mflux's command for them refuses it."""
FIXED_STEPS = frozenset({"iris-3b"})
"""Which draw with their own number of steps, whatever is asked for."""

DEFAULT_MODEL = "schnell"
DEFAULT_MODEL_WITHOUT_GPU = "tiny"
