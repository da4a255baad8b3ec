"""The text encoders of the built-in model are taught what captions say."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from models.mlx_setup import prepare_mlx
from models.painter import checkpoint, reading, training
from models.painter.captions import caption
from models.painter.grammar import COLOURS, PLACES, Scene, Thing, random_scene
from models.painter.vocabulary import number_of_word


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model that is in the repository."""
    prepare_mlx()
    folder: Path = tmp_path_factory.mktemp("landed")
    checkpoint.unpack(folder)
    return checkpoint.load(folder)


def test_labels_say_what_the_caption_says_of_a_thing() -> None:
    thing = Thing("ball", "blue", count=2, size="small", place="right")
    colour, place, count, size = reading.thing_labels(thing)
    assert (list(COLOURS)[colour], PLACES[place], count) == ("blue", "right", 1)
    assert size != reading.thing_labels(Thing("ball", "blue"))[3]
    scene = Scene("sea", "night", ("moon",))
    assert reading.scene_labels(scene) != reading.scene_labels(Scene("sea", "night", ("stars",)))
    assert reading.scene_labels(scene) != reading.scene_labels(Scene("snow", "night", ("moon",)))
    for number in range(200):
        scene = random_scene(Random(number))
        labels = [reading.thing_labels(thing) for thing in scene.things]
        for found, counts in [
            (reading.scene_labels(scene), reading.SCENE_ANSWERS),
            *((label, reading.THING_ANSWERS) for label in labels),
        ]:
            assert len(found) == len(counts)
            assert all(0 <= label < count for label, count in zip(found, counts, strict=True))


def test_each_question_is_asked_at_the_word_for_the_thing(flux: Any) -> None:
    asked = reading.questions(flux.tokenizers, Random(4), count=60)
    random = Random(4)
    scenes = [random_scene(random) for _ in range(60)]
    texts = [caption(scene, random) for scene in scenes]
    assert len(asked.things) == sum(len(scene.things) for scene in scenes)
    seen = [thing for scene in scenes for thing in scene.things]
    for number, position, thing in zip(asked.captions, asked.positions, seen, strict=True):
        words = {thing.name, f"{thing.name}s"}
        assert asked.t5[number, position] in {number_of_word(word) for word in words}
        assert words & set(texts[number].split())


def test_a_reader_learns_its_captions(flux: Any) -> None:
    parts = training.trained_parts(flux)
    before = [np.array(value) for value in _arrays(parts)]
    reader = reading.Reader(parts, width=64, seed=1)
    asked = reading.questions(flux.tokenizers, Random(1), count=8)
    losses = [reader.learn(asked, progress) for progress in np.linspace(0.2, 1, 25)]
    assert losses[-1] < losses[0] / 4
    assert reader.right(asked)[0] > 0.95
    assert any(
        not np.array_equal(old, np.array(new))
        for old, new in zip(before, _arrays(parts), strict=True)
    )


@pytest.mark.slow
def test_the_text_encoders_know_which_colour_and_place_belong_to_which_thing(
    tmp_path: Path,
) -> None:
    prepare_mlx()
    import mlx.core as mx

    from models.painter.batched import encode_t5

    checkpoint.unpack(tmp_path)
    flux = checkpoint.load(tmp_path)

    def words(seed: int, count: int) -> tuple[Any, Any]:
        asked = reading.questions(flux.tokenizers, Random(seed), count)
        texts = np.array(encode_t5(flux.t5_text_encoder, mx.array(asked.t5)))
        seen = texts[asked.captions, asked.positions]
        return np.hstack([seen, np.ones((len(seen), 1))]), asked.things

    # Linear answers, fitted to some captions, are right for others.
    given, labels = words(2, 1000)
    asked, expected = words(99, 200)
    for number in (0, 1):
        wanted = np.eye(labels[:, number].max() + 1)[labels[:, number]]
        weights = np.linalg.lstsq(given, wanted, rcond=None)[0]
        right = (asked @ weights).argmax(1) == expected[:, number]
        assert right.mean() > 0.95


def _arrays(parts: Any) -> list[Any]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(parts.t5_text_encoder.parameters())]
