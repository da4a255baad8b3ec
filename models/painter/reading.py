"""Teaches the text encoders what captions say, before the transformer learns to draw it.

From pictures alone they would learn it hundreds of times slower, and until then a picture's things
get colours and places of each other.
"""

from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.painter.captions import caption
from models.painter.grammar import (
    COLOURS,
    GROUNDS,
    PLACES,
    SIZES,
    TIMES,
    Scene,
    Thing,
    random_scene,
)
from models.painter.vocabulary import number_of_word

Labels = NDArray[np.int32]

LESSONS = 250
_CAPTIONS = 48  # of a lesson
_TEXT_RATE, _BIAS_RATE, _RATE = 3e-4, 0.01, 2e-3
_PLAIN = ("", *COLOURS)
_ANY_GROUND = ("", *GROUNDS)
_LIGHTS = ("sun", "moon", "stars", "clouds")
# How many answers each question has. T5 is asked at the word for a thing, CLIP about the scene.
THING_ANSWERS = (len(COLOURS), len(PLACES), 3, len(SIZES))
SCENE_ANSWERS = (len(_ANY_GROUND), len(TIMES), len(_PLAIN), *(2 for _ in _LIGHTS))


def thing_labels(thing: Thing) -> tuple[int, ...]:
    """Returns the number of the right answer to each question."""
    return (
        list(COLOURS).index(thing.colour),
        PLACES.index(thing.place),
        thing.count - 1,
        list(SIZES).index(thing.size),
    )


def scene_labels(scene: Scene) -> tuple[int, ...]:
    lights = (int(name in scene.sky) for name in _LIGHTS)
    ground, plain = _ANY_GROUND.index(scene.ground), _PLAIN.index(scene.plain)
    return (ground, TIMES.index(scene.time), plain, *lights)


@dataclass(frozen=True)
class Questions:
    t5: Labels  # (captions, T5_LENGTH)
    clip: Labels  # (captions, CLIP_LENGTH)
    captions: Labels  # (things,): the number of each thing's caption
    positions: Labels  # (things,): of its word
    things: Labels  # (things, questions)
    scenes: Labels  # (captions, questions)


def questions(tokenizers: dict[str, Any], random: Random, count: int = _CAPTIONS) -> Questions:
    scenes = [random_scene(random) for _ in range(count)]
    texts = [caption(scene, random) for scene in scenes]
    t5, clip = (
        np.array(tokenizers[name].tokenize(texts).input_ids, np.int32) for name in ("t5", "clip")
    )
    found = [
        (number, int(places[0]), thing_labels(thing))
        for number, scene in enumerate(scenes)
        for thing in scene.things
        if len(places := np.flatnonzero(np.isin(t5[number], _names(thing.name))))
    ]
    captions, positions, things = zip(*found, strict=True)
    return Questions(
        t5=t5,
        clip=clip,
        captions=np.array(captions, np.int32),
        positions=np.array(positions, np.int32),
        things=np.array(things, np.int32),
        scenes=np.array([scene_labels(scene) for scene in scenes], np.int32),
    )


@cache
def _names(name: str) -> tuple[int, int]:
    return number_of_word(name), number_of_word(f"{name}s")


class Reader:
    """The text encoders and a linear layer behind each, which gives the answers."""

    def __init__(self, parts: Any, width: int, seed: int) -> None:
        import mlx.core as mx
        from mlx import nn, optimizers

        mx.random.seed(seed)
        self.model = nn.Module()
        self.model.t5, self.model.clip = parts.t5_text_encoder, parts.clip_text_encoder
        self.model.of_thing = nn.Linear(width, sum(THING_ANSWERS))
        self.model.of_scene = nn.Linear(width, sum(SCENE_ANSWERS))
        self._optimizer = optimizers.MultiOptimizer(
            [
                optimizers.AdamW(_TEXT_RATE, betas=[0.9, 0.98]),
                optimizers.AdamW(_BIAS_RATE, betas=[0.9, 0.98]),
                optimizers.AdamW(_RATE, betas=[0.9, 0.98]),
            ],
            [_is_t5_matrix, lambda name, _: "relative_attention_bias" in name],
        )
        self._rates = (_TEXT_RATE, _BIAS_RATE, _RATE)
        self._optimizer.init(self.model.trainable_parameters())

    def learn(self, asked: Questions, progress: float) -> float:
        """Returns the loss of one step. The rates fall in the second half of the progress."""
        import mlx.core as mx
        from mlx import nn, optimizers

        share = max(0.03, min(1.0, 50 * progress, 2 - 2 * progress))
        for optimizer, rate in zip(self._optimizer.optimizers, self._rates, strict=True):
            optimizer.learning_rate = rate * share
        loss, gradients = nn.value_and_grad(self.model, partial(self._loss, asked))()
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        self._optimizer.update(self.model, gradients)
        mx.eval(self.model.parameters(), self._optimizer.state)
        return float(loss.item())

    def right(self, asked: Questions) -> tuple[float, float]:
        """Returns the shares of right answers, about things and about scenes."""
        shares = []
        for answers, labels in self._answers(asked):
            found = np.stack([np.array(answer.argmax(-1)) for answer in answers], axis=1)
            shares.append(float((found == labels).mean()))
        return shares[0], shares[1]

    def _loss(self, asked: Questions) -> Any:
        import mlx.core as mx
        from mlx import nn

        return sum(
            nn.losses.cross_entropy(answer, mx.array(labels[:, number]), reduction="mean")
            for answers, labels in self._answers(asked)
            for number, answer in enumerate(answers)
        )

    def _answers(self, asked: Questions) -> list[tuple[list[Any], Labels]]:
        import mlx.core as mx

        from models.painter.batched import encode_clip, encode_t5

        model = self.model
        texts = encode_t5(model.t5, mx.array(asked.t5))
        words = texts[mx.array(asked.captions), mx.array(asked.positions)]
        pooled = encode_clip(model.clip, mx.array(asked.clip))
        return [
            (_split(model.of_thing(words), THING_ANSWERS), asked.things),
            (_split(model.of_scene(pooled), SCENE_ANSWERS), asked.scenes),
        ]


def teach(parts: Any, tokenizers: dict[str, Any], width: int, lessons: int, seed: int) -> None:
    """Trains the text encoders of `parts`. A lesson takes half a second."""
    reader, random = Reader(parts, width, seed), Random(seed)
    for number in range(lessons):
        reader.learn(questions(tokenizers, random), number / lessons)


def _split(values: Any, counts: tuple[int, ...]) -> list[Any]:
    import mlx.core as mx

    parts: Any = mx.split(values, np.cumsum(counts)[:-1].tolist(), axis=-1)
    return list(parts)


def _is_t5_matrix(name: str, array: Any) -> bool:
    """Says whether it is a matrix of T5's blocks. Some of them sum 4096 values, so at the rate of
    the others each step would undo what the last one learned."""
    return "t5_blocks." in name and array.ndim == 2 and "relative_attention_bias" not in name
