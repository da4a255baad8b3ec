"""The processes of the decoder end, die and are replaced."""

import os
import sys
import threading
from collections.abc import Iterator

import pytest
from conftest import GIVE_UP_S
from picture_files import LIMIT, PICTURE, decoder_of, file_of
from PIL import Image

from decoding.decoder import PictureDecoder, PictureReader
from errors import InvalidInput, TooManyWaiting
from images import to_png


@pytest.fixture(scope="module")
def decoder() -> Iterator[PictureDecoder]:
    """One whose children have the usual limits."""
    made = PictureDecoder(LIMIT, processes=1)
    yield made
    made.close()


def test_one_process_reads_picture_after_picture_and_is_replaced_in_time() -> None:
    with decoder_of(pictures_each=2) as decoder:
        seen = []
        for _ in range(3):
            with decoder.reading() as reader:
                assert reader.png(to_png(PICTURE), "image").data == to_png(PICTURE)
                seen.append(process_of(reader))
        assert seen[0] == seen[1] != seen[2]


def process_of(reader: PictureReader) -> int:
    assert reader._child
    return reader._child._process.pid


def test_an_idle_process_ends_and_the_next_picture_gets_another_one() -> None:
    with decoder_of(idle_s=0.05) as decoder:
        with decoder.reading() as reader:
            reader.png(to_png(PICTURE), "image")
            assert reader._child
            first = reader._child._process
        first.wait(GIVE_UP_S)
        with decoder.reading() as reader:
            assert reader.png(to_png(PICTURE), "image").width == 64
            assert process_of(reader) != first.pid


def test_a_process_that_is_killed_between_two_pictures_affects_no_request() -> None:
    with decoder_of() as decoder, decoder.reading() as reader:
        reader.size(to_png(PICTURE), "image")
        before = process_of(reader)
        os.kill(before, 9)
        assert reader.png(to_png(PICTURE), "image").width == 64  # tried again with a fresh one
        assert process_of(reader) != before


def test_a_process_that_dies_of_a_picture_is_an_error_of_its_field() -> None:
    with decoder_of() as decoder:
        killed = decoder.take()
        os.kill(killed._process.pid, 9)
        decoder.give_back(killed)
        with decoder.reading() as reader:
            with pytest.raises(InvalidInput, match="images cannot be decoded") as caught:
                reader.png(to_png(PICTURE), "images")
            assert caught.value.field == "images"
            assert reader.png(to_png(PICTURE), "images").width == 64


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce memory limits")
def test_a_picture_that_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoding.decoder.BASE_BYTES", 150_000_000)
    monkeypatch.setattr("decoding.decoder.BYTES_PER_PIXEL", 0)
    with decoder_of() as decoder:
        decoder.max_pixels = 50_000_000
        large = file_of(Image.new("1", (7000, 7000)), "PNG")
        with decoder.reading() as reader:
            with pytest.raises(InvalidInput, match="memory"):
                reader.png(large, "image")
            assert reader.png(to_png(PICTURE), "image").width == 64


def test_a_full_decoder_queue_is_a_429_and_the_others_are_decoded() -> None:
    with decoder_of(line=1) as decoder:
        waits, pause, answers = threading.Event(), threading.Event(), []

        def read() -> None:
            waits.set()
            with decoder.reading() as reader:
                answers.append(reader.png(to_png(PICTURE), "image").width)

        with decoder.reading() as reader:
            waiter = threading.Thread(target=read)
            waiter.start()
            assert waits.wait(GIVE_UP_S)
            while decoder._line._value > 0:  # until it waits
                pause.wait(0.001)
            with pytest.raises(TooManyWaiting) as caught, decoder.reading():
                pass
            assert caught.value.retry_after_s > 0
            assert reader.png(to_png(PICTURE), "image").width == 64
        waiter.join(GIVE_UP_S)
        assert answers == [64]


def test_no_process_runs_before_the_first_picture_or_after_the_end() -> None:
    decoder = PictureDecoder(LIMIT)
    assert decoder._free == []
    with decoder.reading() as reader:
        reader.size(to_png(PICTURE), "image")
        assert reader._child
        process = reader._child._process
    decoder.close()
    assert process.wait(GIVE_UP_S) is not None
