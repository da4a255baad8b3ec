"""Tokens of a prompt, as the text encoder of a model reads them: arithmetic only.

What mflux's prompt encoders do, by family, in its version 0.24: FLUX.1 pads to 256 tokens (schnell)
or 512, FLUX.2, Z-Image and Iris pad as well, FLUX.3 pads to the next multiple of 80. The others
read the tokens that there are. Most of them cut a prompt off; Boogu and Ming do not, and Qwen-Image
does not if it reads pictures as well. Ideogram 4 refuses a longer prompt.
"""

from collections.abc import Callable, Iterable

from models.model_catalog import Model
from models.prompt_forms import compact_caption

CHARACTERS_PER_TOKEN = 4
LONGEST_TOKEN = 16
"""Characters of a token, at the most, in a long prompt."""
MOST_TOKENS = {
    "flux": 512,
    "flux2": 512,
    "z_image": 512,
    "lens": 512,
    "iris": 300,
    "krea2": 1024,
    "qwen": 1058,
    "qwen21": 2048,
    "ernie_image": 2048,
    "fibo": 2048,
    "ideogram4": 2048,
    "anima": 4096,
    "flux3": 4096,
    "fibo2": 4096,
    "moss_image": 4096,
}
"""By family: what mflux cuts a prompt off at, or refuses it above."""
CHAT_TOKENS = 8
"""Of Qwen's chat template, around the prompt."""
REFUSED_ABOVE = {"ideogram4": MOST_TOKENS["ideogram4"] - CHAT_TOKENS}
"""By family: tokens of a prompt above which mflux raises an error."""
UNCUT_WITH_PICTURES = frozenset({"qwen", "qwen21"})
"""Families whose edits read the whole prompt."""
PADDED = frozenset({"flux", "flux2", "z_image", "iris"})
"""Families that fill up every prompt to the most tokens."""
MULTIPLES = {"flux3": 80}
"""Families that fill it up to a multiple of so many."""
SCHNELL_TOKENS = 256
COUNTED_TOKENS = 8192
"""A longer prompt of a family without a limit is estimated by its characters."""


def not_counted(prompt: str) -> int | None:
    return None


def tokens(
    prompt: str,
    model: Model,
    count: Callable[[str], int | None] = not_counted,
    *,
    pictures: bool = False,
) -> int:
    """Tokens that a text encoder computes for this prompt.

    Args:
        pictures: whether it reads reference images as well.
        count: counts with the model's own tokenizer; if that is None, because it was not loaded,
            CHARACTERS_PER_TOKEN characters are taken for a token.
    """
    most = most_tokens(model)
    if pictures and model.family in UNCUT_WITH_PICTURES:
        most = None
    if most and model.family in PADDED:
        return most
    longest = LONGEST_TOKEN * (most or COUNTED_TOKENS)
    found = count(prompt) if len(prompt) <= longest else None
    if found is None:
        found = len(prompt) // CHARACTERS_PER_TOKEN + 1
    multiple = MULTIPLES.get(model.family, 1)
    found = -(-found // multiple) * multiple
    return min(found, most) if most else found


def too_many_tokens(
    prompts: Iterable[str], model: Model, count: Callable[[str], int | None]
) -> int | None:
    """Tokens of the first prompt that mflux refuses for its length; None: it takes them all, or
    nobody can count them.

    Args:
        count: counts with the model's own tokenizer; None: it is not on this machine.
    """
    most = REFUSED_ABOVE.get(model.family)
    if most is None:
        return None
    texts = (compact_caption(prompt) for prompt in prompts)
    counts = (count(text) for text in texts if len(text.encode()) > most)  # a byte or more a token
    return next((found for found in counts if found is not None and found > most), None)


def most_tokens(model: Model) -> int | None:
    """The longest prompt that it reads; None: there is no limit."""
    if model.family == "flux" and model.key.startswith("schnell"):
        return SCHNELL_TOKENS
    return MOST_TOKENS.get(model.family)
