"""What each family computes for a picture, for first forecasts: arithmetic only.

From the source of mflux 0.24. Parameters are those of linear layers, without embeddings, and only
of layers whose results are used: MLX computes no others. tests/test_family_work.py counts them in
mflux's own modules.
"""

from collections.abc import Mapping
from typing import NamedTuple

from models.model_catalog import LoadSpec
from models.prompt_tokens import most_tokens


class FamilyWork(NamedTuple):
    """Figures of a family."""

    text_b: float | None = None
    """Billions of parameters of the text encoder that each token goes through; of experts, those
    that it chooses. None: unknown."""
    fixed_text_tokens: int = 0
    """Tokens that are encoded beside those of the prompt: mflux's template."""
    negative_tokens: int = 0
    """More of them with guidance: those of a negative prompt."""
    step_text_tokens: int = 128
    """Tokens of the text that go through the transformer in each step; the default is a prompt of
    some length that is not filled up."""
    text_with_picture: bool = False
    """Whether the text encoder also computes a token for each one of the picture."""
    text_quantized: bool = True
    """Whether the text encoder has the bits of the transformer."""
    text_float32: bool = False
    """Whether it computes in 32 bits, unless it is quantized."""
    step_share: float = 1.0
    """Part of the transformer's parameters that a token goes through."""
    passes: int | None = None
    """How often a step runs the transformer. None: twice with guidance."""


UNKNOWN = FamilyWork(None, 100)
"""Of tiny models, and of families that a new release of mflux brings."""
FAMILIES: Mapping[str, FamilyWork] = {
    # Its prompt is only attended to, as 512 keys and values.
    "anima": FamilyWork(0.44, step_text_tokens=32, text_quantized=False, text_float32=True),
    "boogu": FamilyWork(6.95, 40),
    "ernie_image": FamilyWork(2.91, negative_tokens=2),
    "fibo": FamilyWork(2.81, negative_tokens=8),
    # The transformer gets 256 to 512 tokens made of those of the text. The negative prompt of its
    # model card is long.
    "fibo2": FamilyWork(3.53, 10, 260, step_text_tokens=256),
    "flux": FamilyWork(4.63, step_text_tokens=512),
    "flux2": FamilyWork(2.72, negative_tokens=512, step_text_tokens=512),
    "flux3": FamilyWork(3.23, 8, 80),
    # Each step runs two transformers.
    "ideogram4": FamilyWork(6.95, 8, text_with_picture=True, passes=2),
    "iris": FamilyWork(3.53, 36, 336, step_text_tokens=300),
    "krea2": FamilyWork(3.53, 40, 41, text_quantized=False),
    "lens": FamilyWork(3.03, 120),
    # 256 learned tokens go through the text encoder, and then through a connector of 1.3 billion
    # parameters: that is as much as 425 more tokens.
    "ming_image": FamilyWork(0.79, 710, step_text_tokens=384),
    "moss_image": FamilyWork(6.92, 16, 16),
    # A negative prompt and a second pass are computed whatever the guidance. Text and picture have
    # parameters of their own in all layers.
    "qwen": FamilyWork(6.53, 79, text_quantized=False, step_share=0.5, passes=2),
    "qwen21": FamilyWork(6.95, 22, 22, text_quantized=False),
    "seedvr2": FamilyWork(0.0, step_text_tokens=58),
    # The encoder gets the prompt filled up, the transformer as it is.
    "z_image": FamilyWork(3.53, negative_tokens=512, text_float32=True),
}
LARGER_TEXT_B: Mapping[str, float] = {
    "flux2-klein-9b": 5.21,
    "flux2-klein-9b-kv": 5.21,
    "flux2-klein-base-9b": 5.21,
}
"""FamilyWork.text_b of models with another text encoder than the rest of their family."""
SMALL_TEXT_ENCODERS: Mapping[str, FamilyWork] = {
    # 0.65 billion for 256 tokens: half as many as are counted.
    "flux2": FamilyWork(0.32, negative_tokens=512, step_text_tokens=251),
    "qwen21": FamilyWork(0.66, 22, 22, text_quantized=False),
}
"""With the option small_text_encoder, by family."""


def family_work(spec: LoadSpec) -> FamilyWork:
    """The figures of a model as it is built."""
    model = spec.model
    if model.tiny:
        return UNKNOWN
    figures = FAMILIES.get(model.family, UNKNOWN)
    if model.key in LARGER_TEXT_B:
        figures = figures._replace(text_b=LARGER_TEXT_B[model.key])
    if spec.options.small_text_encoder:
        figures = SMALL_TEXT_ENCODERS.get(model.family, figures)
    own = figures.step_text_tokens
    return figures._replace(step_text_tokens=min(own, most_tokens(model) or own))
