"""mflux's tables of the keys of LoRAs, as dictionaries.

mflux compares each key of a LoRA with each of its patterns, which takes half a minute for a LoRA of
a thousand keys where a family has thousands of patterns. Depends on mflux.
"""

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

BLOCK = "{block}"
"""Placeholder for the number of a block in mflux's patterns."""
Keys = Mapping[str, list[Any]]
"""mflux's PatternMatches, by their pattern."""


@cache
def known_keys(family: str) -> Keys:
    """Returns the LoRA keys that mflux applies to the models of a family."""
    return keys_of(target for mapping in _mappings(family) for target in mapping.get_mapping())


def keys_of(targets: Iterable[Any]) -> Keys:
    """Returns the LoRA keys of mflux's LoRATargets, with and without `.weight` at their end."""
    from mflux.models.common.lora.mapping.lora_loader import LoRALoader

    known: dict[str, list[Any]] = {}
    for match in LoRALoader._build_pattern_mappings(list(targets)):
        pattern = match.source_pattern
        for key in {pattern, pattern.removesuffix(".weight")}:
            known.setdefault(key, []).append(match)
    return known


def matches_of(key: str, known: Keys) -> Iterator[tuple[str, Any]]:
    """Matches a key like mflux: BLOCK is one of the numbers in the key.

    Yields the name of each layer that the key belongs to, and the PatternMatch.
    """
    for match in known.get(key, ()):
        yield match.target_path, match
    for number in re.finditer(r"\d+", key):
        block = str(int(number[0])) if len(number[0]) < 6 else ""
        if block != number[0]:
            continue
        for match in known.get(key[: number.start()] + BLOCK + key[number.end() :], ()):
            yield match.target_path.replace(BLOCK, block), match


def _mappings(family: str) -> Iterator[Any]:
    """mflux's tables of keys for the models of a family."""
    import mflux.models

    folder = Path(mflux.models.__path__[0], family, "weights")
    for path in sorted(folder.glob("*_lora_mapping.py")):
        module = importlib.import_module(f"mflux.models.{family}.weights.{path.stem}")
        for name, mapping in vars(module).items():
            if name.endswith("LoRAMapping") and mapping.__module__ == module.__name__:
                yield mapping
