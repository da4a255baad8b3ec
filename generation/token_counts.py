"""Counts the tokens of prompts with the tokenizers of the models that were loaded.

The tokenizer of a loaded model belongs to the worker's thread: mflux changes its settings with each
prompt, and an encoding on another thread would make that fail ("Already borrowed"). So each model's
tokenizer is copied when it is loaded. The copies stay when the weights go.
"""

import logging
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from errors import InvalidInput
from models.hub_cache import source_folders
from models.model_catalog import Model
from models.prompt_tokens import REFUSED_ABOVE, too_many_tokens
from task import GenerationParams

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

KEPT = 4
"""Copies; each is some 10 MB."""
COUNTS_KEPT = 64
FILE = "tokenizer/tokenizer.json"
"""Of a model that was not loaded yet, in its folder."""


class TokenCounts:
    """keep() belongs to the worker's thread; any thread may call the others."""

    def __init__(self) -> None:
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()

    def keep(self, model: str, pipeline: Any) -> None:
        """Copy the tokenizer of a model that was loaded."""
        from tokenizers import Tokenizer

        own = _tokenizer_of(pipeline)
        if own is not None and model not in self._tokenizers:
            self._keep(model, Tokenizer.from_str(own.to_str()))

    def count(self, model: str, prompt: str) -> int | None:
        """Tokens of a prompt; None: this model was not loaded, or keeps its tokenizer elsewhere."""
        tokenizer = self._tokenizers.get(model)
        return _counted(tokenizer, prompt) if tokenizer else None

    def refusal(self, params: GenerationParams, model: Model) -> InvalidInput | None:
        """Why mflux would not take a prompt of these params; None: it does, or the tokenizer of
        the model is not on this machine yet."""

        def count(prompt: str) -> int | None:
            if model.name not in self._tokenizers:
                self._read(model)
            return self.count(model.name, prompt)

        found = too_many_tokens(params.prompts or (params.prompt,), model, count)
        if found is None:
            return None
        return InvalidInput(
            f"{{field}} has {found} tokens, and {model.name} reads {REFUSED_ABOVE[model.family]}: "
            "shorten it.",
            field="prompt",
        )

    def _read(self, model: Model) -> None:
        """Keep the tokenizer of a model that was not loaded."""
        from tokenizers import Tokenizer

        paths = [folder / FILE for folder in source_folders(model)]
        path = next((path for path in paths if path.is_file()), None)
        try:
            if path is not None:
                self._keep(model.name, Tokenizer.from_file(str(path)))
        except Exception as error:  # its own class, without a base that says more
            log.warning("the tokenizer of %s cannot be read: %s", model.name, error)

    def _keep(self, model: str, tokenizer: "Tokenizer") -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        kept = OrderedDict({**self._tokenizers, model: tokenizer})
        while len(kept) > KEPT:
            kept.popitem(last=False)
        self._tokenizers = kept


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
