"""Models that need no download: the built-in one, and small random weights for tests.

`tiny` draws what it is asked for (models/painter/). The others draw abstract colour clouds:

    noise-flux1       FLUX.1 schnell            Flux1
    noise-kontext     FLUX.1 dev, Kontext       Flux1Kontext
    noise-redux       FLUX.1 dev, Redux         Flux1Redux
    noise-controlnet  FLUX.1 dev, ControlNet    Flux1Controlnet (edges)
    noise-fill        FLUX.1 dev, Fill          Flux1Fill
    noise-flux2       FLUX.2 klein              Flux2Klein
    noise-flux2-edit  FLUX.2 klein              Flux2KleinEdit
    noise-z-image     Z-Image                   ZImage
    noise-qwen        Qwen-Image                QwenImage
    noise-seedvr2     SeedVR2                   SeedVR2
    noise-krea2       Krea 2                    Krea2
    noise-anima       Anima                     Anima
    noise-flux3       FLUX 3 klein base         Flux3Klein
    noise-flux3-edit  FLUX 3 klein base         Flux3KleinEdit
    noise-ernie       ERNIE-Image               ErnieImage
    noise-qwen21      Qwen-Image 2.1            QwenImage21
    noise-fibo2       FIBO 2                    Fibo2
    noise-fibo2-edit  FIBO 2                    Fibo2Edit

They are generated from fixed seeds on first use, take one or two megabytes on disk, and are loaded
by mflux's own classes, quantized or not. As with a trained model, their pictures depend on prompt,
seed, steps, size and input images, and are reproducible. (FLUX.1 reads the prompt as CLIP does: in
lower case, up to 75 tokens. Here a token is one byte.)

mflux fixes most sizes of these architectures in code. But neither its loader nor mlx compares the
shape of a stored weight with its module, and a weight that is not stored stays lazy: it takes no
memory until it is evaluated. So a checkpoint stores only a few narrow layers (tiny_weights.py), and
slim() removes the others from the loaded model (tiny_slimming.py). Other families are built small
(tiny_modules.py).
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from models.painter import checkpoint as painter
from models.tiny_modules import FAMILIES, built_small, write_checkpoint
from models.tiny_recipes import RECIPES, write_built_in_lora, write_flux1_lora, write_flux2_lora
from models.tiny_slimming import slim as slim_noise
from models.tiny_weights import QWEN3_LAYERS, QWEN_VOCABULARY, WIDTH, model_config

__all__ = [
    "ALL_TINY_MODELS",
    "PIPELINES",
    "TINY_CONFIGS",
    "ensure_checkpoint",
    "slim",
    "small_modules",
    "write_lora",
]

RECIPE = 5  # part of the folder's name: increase it with each change of the weights

T5_LENGTH = 8  # tokens, of 256: to the tiny T5 all prompts look alike

_FLUX1_DEV: dict[str, Any] = {
    "max_sequence_length": T5_LENGTH,
    "supports_guidance": True,
    "requires_sigma_shift": True,
}
_FLUX2: dict[str, Any] = {
    "max_sequence_length": 512,
    "supports_guidance": True,
    "requires_sigma_shift": True,
    "transformer_overrides": {
        "num_layers": 0,
        "num_single_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": WIDTH,
        "axes_dims_rope": (WIDTH // 4,) * 4,
        "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": WIDTH,
        "mlp_ratio": 1.0,
    },
    "text_encoder_overrides": {
        "vocab_size": len(QWEN_VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": QWEN3_LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": WIDTH,
    },
}
_FLUX3: dict[str, Any] = {
    "max_sequence_length": 4096,
    "supports_guidance": True,
    "requires_sigma_shift": False,
    "transformer_overrides": {"flow_map": False},
}
_FIBO2: dict[str, Any] = {
    "max_sequence_length": 4096,
    "supports_guidance": True,
    "requires_sigma_shift": False,
}
# Keyword arguments of mflux's ModelConfig. model_path is the folder from ensure_checkpoint().
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": painter.CONFIG,
    "noise-flux1": model_config(
        "noise-flux1",
        max_sequence_length=T5_LENGTH,
        supports_guidance=False,
        requires_sigma_shift=False,
    ),
    "noise-kontext": model_config("noise-kontext", **_FLUX1_DEV),
    "noise-fill": model_config("noise-fill", **_FLUX1_DEV),
    "noise-redux": model_config("noise-redux", **_FLUX1_DEV),
    # This name makes mflux extract the edges of the control image.
    "noise-controlnet": model_config(
        "noise-controlnet", **{**_FLUX1_DEV, "controlnet_model": "tiny-Canny"}
    ),
    "noise-flux2": model_config("noise-flux2", **_FLUX2),
    "noise-flux2-edit": model_config("noise-flux2-edit", **_FLUX2),
    "noise-z-image": model_config(
        "noise-z-image",
        max_sequence_length=512,
        supports_guidance=True,
        requires_sigma_shift=True,
    ),
    "noise-qwen": model_config(
        "noise-qwen",
        max_sequence_length=None,
        supports_guidance=None,
        requires_sigma_shift=True,
        sigma_max_shift=0.9,
        sigma_max_seq_len=8192,
        sigma_shift_terminal=0.02,
    ),
    "noise-seedvr2": model_config(
        "noise-seedvr2",
        num_train_steps=None,
        max_sequence_length=None,
        supports_guidance=True,
        requires_sigma_shift=None,
        transformer_overrides={
            "vid_dim": WIDTH,
            "num_layers": 0,
        },
    ),
    "noise-krea2": model_config(
        "noise-krea2",
        num_train_steps=None,
        max_sequence_length=1024,
        supports_guidance=True,
        requires_sigma_shift=True,
        sigma_max_shift=1.15,
        sigma_max_seq_len=6400,
    ),
    "noise-anima": model_config(
        "noise-anima",
        aliases=["anima-base"],  # names mflux's defaults
        max_sequence_length=4096,
        supports_guidance=True,
        requires_sigma_shift=False,
    ),
    "noise-flux3": model_config("noise-flux3", **_FLUX3),
    "noise-flux3-edit": model_config("noise-flux3-edit", **_FLUX3),
    "noise-ernie": model_config(
        "noise-ernie",
        max_sequence_length=2048,
        supports_guidance=True,
        requires_sigma_shift=True,
        sigma_base_shift=1.3863,
        sigma_max_shift=1.3863,
    ),
    "noise-qwen21": model_config(
        "noise-qwen21",
        num_train_steps=None,
        max_sequence_length=None,
        supports_guidance=True,
        requires_sigma_shift=True,
        sigma_max_shift=0.9,
        sigma_max_seq_len=8192,
        sigma_shift_terminal=0.02,
    ),
    "noise-fibo2": model_config("noise-fibo2", **_FIBO2),
    "noise-fibo2-edit": model_config("noise-fibo2-edit", **_FIBO2),
}
PIPELINES: dict[str, str] = {
    "tiny": "mflux.models.flux.variants.txt2img.flux:Flux1",
    "noise-flux1": "mflux.models.flux.variants.txt2img.flux:Flux1",
    "noise-kontext": "mflux.models.flux.variants.kontext.flux_kontext:Flux1Kontext",
    "noise-fill": "mflux.models.flux.variants.fill.flux_fill:Flux1Fill",
    "noise-redux": "mflux.models.flux.variants.redux.flux_redux:Flux1Redux",
    "noise-controlnet": "mflux.models.flux.variants.controlnet.flux_controlnet:Flux1Controlnet",
    "noise-flux2": "mflux.models.flux2.variants.txt2img.flux2_klein:Flux2Klein",
    "noise-flux2-edit": "mflux.models.flux2.variants.edit.flux2_klein_edit:Flux2KleinEdit",
    "noise-z-image": "mflux.models.z_image.variants.z_image:ZImage",
    "noise-qwen": "mflux.models.qwen.variants.txt2img.qwen_image:QwenImage",
    "noise-seedvr2": "mflux.models.seedvr2.variants.upscale.seedvr2:SeedVR2",
    "noise-krea2": "mflux.models.krea2.variants.txt2img.krea2:Krea2",
    "noise-anima": "mflux.models.anima.variants.txt2img.anima:Anima",
    "noise-flux3": "mflux.models.flux3.variants.txt2img.flux3_klein:Flux3Klein",
    "noise-flux3-edit": "mflux.models.flux3.variants.edit.flux3_klein_edit:Flux3KleinEdit",
    "noise-ernie": "mflux.models.ernie_image.variants.txt2img.ernie_image:ErnieImage",
    "noise-qwen21": "mflux.models.qwen21.variants.txt2img.qwen_image_21:QwenImage21",
    "noise-fibo2": "mflux.models.fibo2.variants.txt2img.fibo2:Fibo2",
    "noise-fibo2-edit": "mflux.models.fibo2.variants.edit.fibo2_edit:Fibo2Edit",
}
"""Module and name of mflux's class for each model."""
ALL_TINY_MODELS = tuple(TINY_CONFIGS)
BUILT_IN = "tiny"
"""The model that draws what it is asked for."""
_SHARED_CHECKPOINTS = {
    "noise-kontext": "noise-dev",
    "noise-redux": "noise-dev",
    "noise-controlnet": "noise-dev",
    "noise-flux2-edit": "noise-flux2",
    "noise-flux3-edit": "noise-flux3",
    "noise-fibo2-edit": "noise-fibo2",
}
_LORAS: dict[str, Callable[[Path], None]] = {
    BUILT_IN: write_built_in_lora,
    "noise-flux1": write_flux1_lora,
    "noise-kontext": write_flux1_lora,
    "noise-fill": write_flux1_lora,
    "noise-redux": write_flux1_lora,
    "noise-controlnet": write_flux1_lora,
    "noise-flux2": write_flux2_lora,
    "noise-flux2-edit": write_flux2_lora,
}


def ensure_checkpoint(name: str, data_dir: Path) -> Path:
    """Returns the folder of one of ALL_TINY_MODELS; builds it if it is missing.

    The folder is renamed when it is complete; several processes may build it at the same time.
    """
    name = _SHARED_CHECKPOINTS.get(name, name)
    folder = data_dir / "tiny-models" / f"{name}-v{RECIPE}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch, folder.name)
        if name in FAMILIES:
            write_checkpoint(name, draft)
        elif name == BUILT_IN:
            painter.unpack(draft)
        else:
            RECIPES[name](draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process was first, with the same bytes
    return folder


def small_modules(name: str) -> AbstractContextManager[None]:
    """While a tiny model is loaded: mflux builds its modules small, if slim() cannot."""
    name = _SHARED_CHECKPOINTS.get(name, name)
    return built_small(name) if name in FAMILIES else nullcontext()


def slim(model: Any, name: str) -> None:
    """Removes the layers that the checkpoint of a loaded model does not store. Call it once, after
    loading (and quantizing) and before anything evaluates the parameters."""
    if name == BUILT_IN:
        from models.painter.narrowing import narrow

        narrow(model)
    else:
        slim_noise(model)


def write_lora(path: Path, name: str) -> None:
    """Writes a LoRA of a few kilobytes that changes the pictures of a FLUX model.

    Raises:
        ValueError: for other models: mflux merges a LoRA by evaluating the whole transformer,
            before slim() could remove layers.
    """
    if name not in _LORAS:
        raise ValueError(f"{name} takes no LoRA")
    _LORAS[name](path)
