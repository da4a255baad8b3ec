"""What to do about a picture or weights that do not fit into memory, in words.

Only what helps is advised, and only to those who can do it: fewer bits where with them it fits,
and as a field of the request only where tasks may choose them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from models.model_catalog import LoadSpec
from models.weight_files import BITS
from task import Stage

SMALLER_MODEL = "choose a smaller model"
LESS = {
    "prompt": "ask for a shorter prompt",
    "images": "ask for fewer or smaller reference images",
    "width": "ask for a smaller picture",
}
"""By the field at fault."""


def ask_for_less(stage: Stage, field: str) -> str:
    """Args: field: at fault."""
    if field == "width" and stage.load_spec.model.upscaler:
        return "ask for less upscaling, or upscale a smaller picture"
    return LESS[field]


def fewer_bits(
    spec: LoadSpec, allowed: Collection[int], fits: Callable[[LoadSpec], bool]
) -> list[str]:
    """How to get as many bits as fit; empty: there are none.

    Args:
        allowed: bits that tasks may ask for. Those of upscalers and helpers are the server's.
        fits: whether it fits with the weights of this load spec.
    """
    model = spec.model
    if model.stored_bits or model.makes:
        return []
    choices = [bits for bits in reversed(BITS) if bits < (spec.quantize or 16)]
    fitting = [bits for bits in choices if fits(replace(spec, quantize=bits))]
    asked = [bits for bits in fitting if bits in allowed and not model.upscaler]
    if asked:
        return [f"set quantize to {asked[0]}"]
    return [f"start the server with --quantize {fitting[0]}"] if fitting else []


def in_words(ways: Sequence[str]) -> str:
    """One of these; the model is at fault if there is none."""
    return ", or ".join(ways or [SMALLER_MODEL])
