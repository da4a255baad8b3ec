"""What mflux's classes load beside the repositories of its registry, or only in part.

mflux's initializers name these repositories; tests/test_repositories.py compares. Downloads build
the class, so mflux chooses their files by itself.
"""

from collections.abc import Mapping
from pathlib import Path

from models.model_catalog import Model

KLEIN = "black-forest-labs/FLUX.2-klein-4B"
ANIMA, IRIS, LENS, SEEDVR2 = (
    "circlestone-labs/Anima",
    "speridlabs/iris-3b",
    "Comfy-Org/Lens",
    "numz/SeedVR2_comfyUI",
)
KREA2 = "krea/Krea-2-Turbo"
Z_IMAGE = "Tongyi-MAI/Z-Image-Turbo"
Z_IMAGE_CONTROL = "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1"
_USUAL = ("vae", "transformer", "text_encoder")
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "boogu": ("vae", "transformer", "mllm"),
    "ernie_image": _USUAL,
    "fibo": _USUAL,
    "fibo2": _USUAL,
    "flux": (*_USUAL, "text_encoder_2"),
    "flux2": _USUAL,
    "flux3": _USUAL,
    "ideogram4": (*_USUAL, "unconditional_transformer"),
    "krea2": _USUAL,
    "ming_image": ("mllm", "connector", "mlp", "transformer", "vae"),
    "moss_image": _USUAL,
    "qwen": _USUAL,
    "qwen21": _USUAL,
    "z_image": _USUAL,
}
"""By family: the folders of weights that mflux reads of a model's own repository."""
_KREA2_TURBO = ("turbo.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")
_IRIS_ENCODER = {"Qwen/Qwen3-VL-4B-Instruct": ("model-*.safetensors",)}
_SEEDVR2_VAE = "ema_vae_fp16.safetensors"


def _anima(transformer: str) -> Mapping[str, tuple[str, ...]]:
    return {
        ANIMA: (
            f"split_files/diffusion_models/{transformer}.safetensors",
            "split_files/text_encoders/qwen_3_06b_base.safetensors",
            "split_files/vae/qwen_image_vae.safetensors",
        ),
        "Qwen/Qwen3-0.6B-Base": ("tokenizer.json",),
        "google/t5-v1_1-xxl": ("spiece.model",),
    }


LOADED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "dev-redux": {
        "black-forest-labs/FLUX.1-dev": (),
        "black-forest-labs/FLUX.1-Redux-dev": (
            "image_encoder/*.safetensors",
            "image_embedder/*.safetensors",
        ),
    },
    "krea-2": {KREA2: _KREA2_TURBO},
    "krea-2-controlnet-depth": {KREA2: _KREA2_TURBO},
    "z-image-turbo-controlnet-union-2.1": {
        Z_IMAGE: (),
        Z_IMAGE_CONTROL: (Z_IMAGE_CONTROL.rpartition("/")[2] + ".safetensors",),
    },
    "lens-turbo": {
        LENS: ("diffusion_models/lens_turbo_bf16.safetensors",),
        "mlx-community/gpt-oss-20b-MXFP4-Q8": (),
        KLEIN: ("vae/*.safetensors",),
    },
    "iris-3b": {IRIS: ("turbo/model.safetensors",), **_IRIS_ENCODER},
    "iris-3b-base": {IRIS: ("model.safetensors",), **_IRIS_ENCODER},
    "anima-turbo": _anima("anima-turbo-v1.1"),
    "anima-aesthetic": _anima("anima-aesthetic-v1.1"),
    "anima-base": _anima("anima-base-v1.0"),
    "seedvr2-3b": {SEEDVR2: ("seedvr2_ema_3b_fp16.safetensors", _SEEDVR2_VAE)},
    "seedvr2-7b": {SEEDVR2: ("seedvr2_ema_7b_fp16.safetensors", _SEEDVR2_VAE)},
}
"""By model: repository -> patterns of its files, as in Model.files. Weights that the operator names
replace the first one, or all."""
SAVED_WHOLE = frozenset({"anima", "iris"})
"""Families of which mflux saves all parts into one folder."""
SAVED_OTHERWISE = frozenset({"krea2"})
"""Families that mflux saves into other folders than those of their own repository."""
SAVED_TOO: Mapping[str, tuple[str, ...]] = {
    "Flux1Controlnet": ("transformer_controlnet",),
    "Flux1Redux": ("image_encoder", "image_embedder"),
    "QwenImage21Controlnet": ("controlnet",),
    "ZImageTurboControlnet": ("controlnet",),
}
"""By class: the folders into which mflux saves what it loads from a second repository. It loads
that from there if there are weights in one of them."""


def further(model: Model, folder: Path | None = None) -> tuple[str, ...]:
    """Returns the repositories that a model needs beside weights that the operator names.

    Args:
        folder: where these are; None: not on this machine.
    """
    if model.family in SAVED_WHOLE:
        return ()
    saved = [name for pipeline in model.pipelines for name in SAVED_TOO.get(pipeline.name, ())]
    if folder and any(any((folder / name).glob("*.safetensors")) for name in saved):
        return ()
    return model.repositories[1:]


def loaded_patterns(model: Model, repository: str) -> tuple[str, ...]:
    """Returns patterns of the weights that mflux loads from a repository, of which each must match
    a file. Empty: any weights may be what it loads."""
    if patterns := model.files.get(repository):
        return patterns
    is_own = repository == (model.path or next(iter(model.repositories), None))
    if not is_own or (model.path and model.family in SAVED_OTHERWISE):
        return ()
    unused = {"text_encoder"} if "small_text_encoder" in model.options.in_use else set()
    folders = FOLDERS.get(model.family, ())
    return tuple(f"{folder}/*.safetensors" for folder in folders if folder not in unused)
