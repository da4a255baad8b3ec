"""The words of the captions as tokenizers that mflux loads: CLIP's and T5's.

A word of the grammar is one token. CLIP's vocabulary also holds all bytes, and T5's holds printable
ASCII characters, so every prompt can be read. T5 does not change capitals: its capital pieces share
the embedding of the small ones.
"""

import itertools
import string
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from models.painter import captions
from models.tiny_weights import BYTES, byte_pairs, write_tokenizer

T5_LENGTH = 24  # tokens; longer prompts are cut
CLIP_LENGTH = 77  # fixed in mflux
PAD, END, UNKNOWN = 0, 1, 2  # of T5
_SPECIAL = ("<pad>", "</s>", "<unk>")
_SPACE = "\u2581"  # T5 writes it before each word
_WORD_SCORE, _CHARACTER_SCORE = -1.0, -20.0


@cache
def words() -> tuple[str, ...]:
    """Returns the words of all captions, sorted."""
    return tuple(sorted(captions.vocabulary()))


@cache
def t5_pieces() -> tuple[str, ...]:
    """Returns T5's pieces in the order of their numbers, without the capital ones."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    return (*_SPECIAL, _SPACE, *(_SPACE + word for word in words()), *characters)


def number_of_word(word: str) -> int:
    """Returns T5's number of a word of the captions."""
    return t5_pieces().index(_SPACE + word)


@cache
def t5_capitals() -> dict[str, int]:
    """Returns further pieces, each with the number of the piece that it is read as."""
    numbers = {piece: number for number, piece in enumerate(t5_pieces())}
    further: dict[str, int] = {}
    for piece, number in numbers.items():
        if piece in _SPECIAL:
            continue
        for variant in (piece.upper(), _SPACE + piece[1:].capitalize()):
            if variant not in numbers and variant != _SPACE:
                further.setdefault(variant, number)
    return further


@cache
def clip_vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Returns CLIP's tokens in the order of their numbers, and the merges that build the words."""
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words() if word.isalpha()}
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in parts.values()):
        pairs = Counter(pair for pieces in parts.values() for pair in itertools.pairwise(pieces))
        pair = min(pairs, key=lambda candidate: (-pairs[candidate], candidate))
        merges.append(pair)
        parts = {word: _merged(pieces, pair) for word, pieces in parts.items()}
    made = tuple(dict.fromkeys("".join(pair) for pair in merges))
    ends = tuple(f"{byte}</w>" for byte in BYTES)
    # The pooling finds the end of the prompt by the highest number.
    return (*BYTES, *ends, *made, "<|startoftext|>", "<|endoftext|>"), tuple(merges)


def write_tokenizers(folder: Path) -> None:
    """Writes the folders tokenizer (CLIP) and tokenizer_2 (T5) of a checkpoint."""
    tokens, merges = clip_vocabulary()
    clip: dict[str, Any] = {**byte_pairs(list(tokens)), "merges": [list(pair) for pair in merges]}
    write_tokenizer(folder / "tokenizer", clip, {})

    def score(piece: str) -> float:
        if piece in _SPECIAL:
            return 0.0
        return _WORD_SCORE if len(piece) > 1 else _CHARACTER_SCORE

    pieces = [(piece, score(piece)) for piece in (*t5_pieces(), *t5_capitals())]
    t5 = {"type": "Unigram", "unk_id": UNKNOWN, "vocab": pieces}
    write_tokenizer(folder / "tokenizer_2", t5, {"extra_ids": 0})


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair and not merged[-1].endswith("</w>"):
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
