"""In-context LoRAs that mflux names: styles, and the one for in-context editing (IC-Edit)."""

from models.model_catalog import Lora

STYLE_FILES = {
    "couple": "couple-profile",
    "storyboard": "film-storyboard",
    "font": "font-design",
    "home": "home-decoration",
    "illustration": "portrait-illustration",
    "portrait": "portrait-photography",
    "ppt": "ppt-templates",
    "sandstorm": "sandstorm-visual-effect",
    "sparklers": "sparklers-visual-effect",
    "identity": "visual-identity-design",
}
EDIT = Lora("RiverZ/normal-lora:pytorch_lora_weights.safetensors")
EDIT_WIDTH = 512
"""Pixels: the width of the images that the LoRA was trained with."""
EDIT_PROMPT = (
    "A diptych with two side-by-side images of the same scene. On the right, the scene is exactly "
    "the same as on the left but {}"
)


def style(name: str) -> Lora:
    """Returns the LoRA of a style."""
    return Lora(f"ali-vilab/In-Context-LoRA:{STYLE_FILES[name]}.safetensors")
