"""What mflux's classes load beside the repositories of its registry, or only in part.

mflux's initializers name these repositories; tests/test_repositories.py compares. Downloads build
the class, so mflux chooses their files by itself.
"""

from collections.abc import Mapping

from models.model_catalog import Model

KLEIN = "black-forest-labs/FLUX.2-klein-4B"
ANIMA, IRIS, LENS, SEEDVR2 = (
    "circlestone-labs/Anima",
    "speridlabs/iris-3b",
    "Comfy-Org/Lens",
    "numz/SeedVR2_comfyUI",
)
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
    "dev-redux": {"black-forest-labs/FLUX.1-dev": ()},
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


def further(model: Model) -> tuple[str, ...]:
    """Returns the repositories that a model needs beside weights that the operator names."""
    return () if model.family in SAVED_WHOLE else model.repositories[1:]
