"""Which prompts are in memory, encoded, when the stages that wait with them start.

Not thread-safe: its owner holds a lock. Several machines count as one: a prompt that one of them
has encoded is taken to be in the memory of the others, too.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from task import Stage
from timing.corrections import Bools, Ints

TOKENS_KEPT = 32 * 512
"""About as many tokens of prompts as generator.py keeps the embeddings of: 16 KB each."""
UNKNOWN = 0
"""Number of a prompt that no other stage has, and of prompts that are never kept."""
Prompt = tuple[str, str, str]
"""Key of the weights, prompt, negative prompt: with another one, a part is encoded again."""


class _Encoded(NamedTuple):
    number: int
    by: int
    """id() of the params of the stage that has encoded it."""
    tokens: int


class Prompts:
    """The prompts of the stages that wait, by number, and those that were encoded."""

    def __init__(self) -> None:
        self._numbers: dict[Prompt, int] = {}
        self._next = count(UNKNOWN + 1)
        self._waiting: Counter[int] = Counter()
        self._encoded: OrderedDict[Prompt, _Encoded] = OrderedDict()
        self._in_memory: set[int] = set()  # numbers of these
        self._tokens = 0  # of these

    def number(self, stage: Stage) -> int:
        return self._numbers.get(_prompt(stage), UNKNOWN)

    def joins(self, stage: Stage) -> int:
        """A stage waits. Returns the number of its prompt."""
        if stage.params.prompts:  # each image has its own
            return UNKNOWN
        prompt = _prompt(stage)
        number = self._numbers.get(prompt)
        if number is None:
            number = self._numbers[prompt] = next(self._next)
        self._waiting[number] += 1
        return number

    def leaves(self, stage: Stage) -> bool:
        """A stage no longer waits. Returns whether another one has to encode its prompt now."""
        prompt = _prompt(stage)
        number = self._numbers.get(prompt, UNKNOWN)
        if stage.params.prompts or number == UNKNOWN:
            return False
        self._waiting[number] -= 1
        others = self._waiting[number] > 0
        if not others:
            del self._waiting[number]
            self._forget(prompt)
        return others and prompt not in self._encoded

    def starts(self, stage: Stage, tokens: int) -> bool:
        """A stage that waits is claimed: its prompt will be in memory. Returns whether that of
        another stage that waits will not be any more."""
        prompt = _prompt(stage)
        if stage.params.prompts or prompt not in self._numbers:
            return False
        if prompt not in self._encoded:
            own = _Encoded(self._numbers[prompt], id(stage.params), tokens)
            self._encoded[prompt] = own
            self._in_memory.add(own.number)
            self._tokens += tokens
        self._encoded.move_to_end(prompt)
        missed = False
        while len(self._encoded) > 1 and self._tokens > TOKENS_KEPT:
            missed |= self._drop(next(iter(self._encoded)))
        return missed

    def only(self, keys: Sequence[str], starting: Iterable[Stage]) -> None:
        """Only these weights are in memory: what was encoded with others is gone, but for the
        prompts of stages that have not encoded theirs yet."""
        kept = {_prompt(stage) for stage in starting}
        for prompt in list(self._encoded):
            if prompt[0] not in keys and prompt not in kept:
                self._drop(prompt)

    def is_encoded(self, stage: Stage) -> bool:
        """Whether another stage has encoded its prompt, or will have before any other one."""
        known = self._encoded.get(_prompt(stage))
        return not stage.params.prompts and known is not None and known.by != id(stage.params)

    def is_repeated(self, number: int) -> bool:
        """Whether the prompt may be in memory when a stage starts that waits with it."""
        return self._waiting[number] > 1 or number in self._in_memory

    def repeated(self, numbers: Ints, tokens: Ints) -> Bools:
        """By stage, in the order in which they run, whether its prompt is in memory then: memory
        holds those that were encoded last.

        Args:
            numbers: of the prompts.
            tokens: of the prompts.
        """
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1])
        earlier, later = order[same], order[same + 1]
        again = np.zeros(len(numbers), bool)
        again[later] = True
        encoded_tokens = np.cumsum(tokens * ~again)
        since = encoded_tokens.copy()  # the prompt was encoded
        since[later] -= encoded_tokens[earlier] - tokens[earlier]
        in_memory = np.array([*self._in_memory], np.intp)
        begins, ends = ordered.searchsorted(in_memory), ordered.searchsorted(in_memory, "right")
        again[order[begins[begins < ends]]] = True
        found: Bools = again & (numbers != UNKNOWN) & (since <= TOKENS_KEPT)
        return found

    def _drop(self, prompt: Prompt) -> bool:
        """A prompt leaves memory. Returns whether a stage waits with it."""
        encoded = self._encoded.pop(prompt)
        self._in_memory.remove(encoded.number)
        self._tokens -= encoded.tokens
        self._forget(prompt)
        return encoded.number in self._waiting

    def _forget(self, prompt: Prompt) -> None:
        """Forget the number of a prompt that is not in memory and with which no stage waits."""
        number = self._numbers.get(prompt, UNKNOWN)
        if prompt not in self._encoded and number not in self._waiting:
            self._numbers.pop(prompt, None)


def _prompt(stage: Stage) -> Prompt:
    params = stage.params
    return stage.load_spec.key, params.prompt, params.negative_prompt or ""
