"""Counts the tokens of prompts with the tokenizers of the models that were loaded.

The tokenizer of a loaded model belongs to the worker's thread: mflux changes its settings with each
prompt, and an encoding on another thread would make that fail ("Already borrowed"). So each model's
tokenizer is copied when it is loaded. The copies stay when the weights go.
"""

from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEPT = 4
"""Copies; each is some 10 MB."""
COUNTS_KEPT = 64


class TokenCounts:
    """keep() belongs to the worker's thread; any thread may call count()."""

    def __init__(self) -> None:
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()

    def keep(self, model: str, pipeline: Any) -> None:
        """Copy the tokenizer of a model that was loaded."""
        from tokenizers import Tokenizer

        own = _tokenizer_of(pipeline)
        if own is None or model in self._tokenizers:
            return
        copy = Tokenizer.from_str(own.to_str())
        copy.no_padding()
        copy.no_truncation()
        kept = OrderedDict({**self._tokenizers, model: copy})
        while len(kept) > KEPT:
            kept.popitem(last=False)
        self._tokenizers = kept

    def count(self, model: str, prompt: str) -> int | None:
        """Tokens of a prompt; None: this model was not loaded, or keeps its tokenizer elsewhere."""
        tokenizer = self._tokenizers.get(model)
        return _counted(tokenizer, prompt) if tokenizer else None


@lru_cache(COUNTS_KEPT)
def _counted(tokenizer: "Tokenizer", prompt: str) -> int:
    """A long prompt takes milliseconds, and is asked for several times: first before the queue's
    lock is taken."""
    return len(tokenizer.encode(prompt))


def _tokenizer_of(pipeline: Any) -> "Tokenizer | None":
    """That of a pipeline's large text encoder: T5 in FLUX.1, Qwen3 in Anima."""
    from tokenizers import Tokenizer

    known = dict(getattr(pipeline, "tokenizers", None) or {})
    known.pop("clip", None)
    for one in (*known.values(), getattr(pipeline, "text_encoder", None)):
        own = getattr(one, "tokenizer", None)
        own = getattr(own, "backend_tokenizer", own)
        if isinstance(own, Tokenizer):
            return own
    return None
