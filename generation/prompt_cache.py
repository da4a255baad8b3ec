"""The text embeddings of the prompts used last: memory that mflux would never give back."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any


class PromptCache(MutableMapping[Hashable, Any]):
    """The text embeddings of the prompts used last, up to a number of bytes.

    Takes the place of mflux's own `prompt_cache`, a dict that grows for ever. At least the latest
    prompt stays, whatever its size. Values are MLX arrays, or tuples and lists of them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._fresh: set[Hashable] = set()  # kept, but perhaps not evaluated

    def __getitem__(self, prompt: Hashable) -> Any:
        embeddings = self._entries[prompt]
        self._entries.move_to_end(prompt)
        return embeddings

    def __setitem__(self, prompt: Hashable, embeddings: Any) -> None:
        self.pop(prompt, None)
        self._entries[prompt] = embeddings
        self._fresh.add(prompt)
        self.bytes += _size_of(embeddings)
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            del self[next(iter(self._entries))]

    def __delitem__(self, prompt: Hashable) -> None:
        self._fresh.discard(prompt)
        self.bytes -= _size_of(self._entries.pop(prompt))

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def evaluate(self) -> None:
        """Let MLX compute what is lazy still."""
        import mlx.core as mx

        mx.eval([array for key in self._fresh for array in _arrays(self._entries[key])])
        self._fresh.clear()

    def forget_fresh(self) -> None:
        """Drop what may never have been evaluated: its picture failed."""
        for key in list(self._fresh):
            del self[key]


def _arrays(embeddings: Any) -> list[Any]:
    if isinstance(embeddings, list | tuple):
        return [array for part in embeddings for array in _arrays(part)]
    return [embeddings] if hasattr(embeddings, "nbytes") else []


def _size_of(embeddings: Any) -> int:
    return sum(array.nbytes for array in _arrays(embeddings))
