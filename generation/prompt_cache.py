"""Caches text embeddings of recent prompts, with a limit of memory."""

from collections.abc import Hashable
from typing import Any

from cachetools import LRUCache


class PromptCache(LRUCache[Hashable, Any]):
    """The text embeddings of the prompts used last, up to a number of bytes.

    Replaces mflux's own `prompt_cache`, a dict that grows without a limit. The latest prompt always
    stays, whatever its size: mflux reads it again. Values are MLX arrays, or tuples and lists of
    them.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, lambda embeddings: min(_size_of(embeddings), max_bytes))
        self._fresh: set[Hashable] = set()  # cached, but perhaps not evaluated

    def __setitem__(self, prompt: Hashable, embeddings: Any) -> None:
        super().__setitem__(prompt, embeddings)
        self._fresh.add(prompt)

    def __delitem__(self, prompt: Hashable) -> None:
        super().__delitem__(prompt)
        self._fresh.discard(prompt)

    def evaluate(self) -> None:
        """Evaluates the lazy embeddings."""
        import mlx.core as mx

        mx.eval([array for key in self._fresh for array in _arrays(self[key])])
        self._fresh.clear()

    def forget_fresh(self) -> None:
        """Drops embeddings that may not be evaluated, because their picture failed."""
        for key in list(self._fresh):
            del self[key]


def _arrays(embeddings: Any) -> list[Any]:
    if isinstance(embeddings, list | tuple):
        return [array for part in embeddings for array in _arrays(part)]
    return [embeddings] if hasattr(embeddings, "nbytes") else []


def _size_of(embeddings: Any) -> int:
    return sum(array.nbytes for array in _arrays(embeddings))
