"""What mflux can do and the server does not, with the reason; docs/models.md lists it.

A test compares it with mflux's signatures: a new parameter of mflux is either filled by a field of
ours or named here.
"""

from collections.abc import Mapping

SAME_PICTURE = "changes speed or memory, not what can be drawn; mflux's default is used"

CLASSES: Mapping[str, str] = {
    "Flux1Concept": "draws a heat map of one word of the prompt beside the picture",
    "Flux1ConceptFromImage": "draws a heat map of one word over a picture, and no new picture",
}
"""Classes of mflux that draw, and that no model uses."""
PARAMETERS: Mapping[str, str] = {
    "pid_decode": "PiD decodes inside mflux's call with 8 GB of weights of its own, four times as "
    "large a picture: mflux neither loads nor frees them apart, so the memory check, the forecast "
    "and the sizes of an answer would be wrong. `upscale` with SeedVR2 is the way to more detail",
    "pid_degrade_sigma": "belongs to pid_decode",
    "use_kv_cache": SAME_PICTURE,
    "teacache_ratio": "an older name of step_cache_ratio",
    "render_text_images": "mflux's default reads the texts to draw from the JSON prompt",
    "enhance_prompt": "another prompt would be drawn than the one that the answer repeats",
    "strict_caption_validation": "mflux warns of a caption that is no JSON, and draws it",
    "warn_on_caption_issues": "the warning goes to mflux's log, which no client reads",
    "conditioning_sigma": "the noise level that the model was distilled with; mflux's command has "
    "no option for it either",
}
"""Parameters of generate_image that no class gets."""
OF_ONE_LORA = (
    "the checkpoint brings its own schedule. The other one, viggle_turbo, belongs to one LoRA for "
    "the base model, and draws well only with it and in 6 steps"
)
OF_ONE_CLASS: Mapping[tuple[str, str], str] = {
    ("Flux1", "negative_prompt"): "FLUX.1 dev and schnell draw without a negative branch",
    ("Flux1Kontext", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux1Fill", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux1Depth", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux1Redux", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux1InContextDev", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux1InContextFill", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux2KleinEdit", "image_strength"): "mflux reads it and does nothing with it",
    ("Flux1Depth", "image_path"): "the photo whose depth is followed is control_image",
    ("Krea2Controlnet", "image_path"): "the photo whose depth is followed is control_image",
    ("QwenImageEdit", "image_path"): "its pictures are images",
    ("QwenImage21", "scheduler"): OF_ONE_LORA,
    ("QwenImage21Edit", "scheduler"): OF_ONE_LORA,
}
"""Parameters of generate_image that other classes get."""
FROM_NOISE = (
    "the class starts from noise alone. A mask needs the latents of the picture at the noise of "
    "each step, which mflux computes only for classes with `image_strength`"
)
MASKS: Mapping[str, str] = {
    "Anima": FROM_NOISE,
    "BooguImage": FROM_NOISE,
    "Flux1Controlnet": FROM_NOISE,
    "Flux1Depth": FROM_NOISE,
    "Flux1InContextDev": FROM_NOISE,
    "Flux1Kontext": FROM_NOISE,
    "Flux1Redux": FROM_NOISE,
    "Flux2KleinEdit": FROM_NOISE,
    "Flux3Klein": FROM_NOISE,
    "Flux3KleinEdit": FROM_NOISE,
    "Fibo2": FROM_NOISE,
    "Ideogram4": FROM_NOISE,
    "Iris": FROM_NOISE,
    "Krea2Controlnet": FROM_NOISE,
    "LensImage": FROM_NOISE,
    "MingImage": FROM_NOISE,
    "MOSSImage": FROM_NOISE,
    "QwenImageEdit": FROM_NOISE,
    "ZImageTurboControlnet": FROM_NOISE,
    "SeedVR2": "an upscaler draws the whole picture",
}
"""Classes that take no `mask`."""
CONSTRUCTORS: Mapping[str, str] = {
    "bake_lora": "LoRAs are never merged into the weights, so tasks with other LoRAs share them",
    "compute_precision": SAME_PICTURE,
    "float32": SAME_PICTURE,
    "low_ram": SAME_PICTURE,
    "text_encoder_quantize": "the text encoder gets the bits of `quantize`",
    "small_text_encoder": "experimental in mflux; it drifts from the native encoder",
    "small_decoder": SAME_PICTURE,
    "controlnet_path": "the model names its ControlNet",
    "encoder_path": "the model names its encoder",
}
"""Arguments with which a class is constructed."""
