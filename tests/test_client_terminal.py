"""The command of the client on a terminal: bars, pictures, Ctrl-C, words."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, at, status
from conftest import ServerProcess
from far_ends import FakeTask, Terminal, command
from PIL import Image as pillow

from client.mflux_client import MfluxError
from client.terminal import Waiting, duration, in_words, ordinal, picture_escape, picture_protocol

LONG = ("--width", "2048", "--height", "2048", "--steps", "100")


def test_a_bar_moves_in_time_until_the_picture_is_there(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    with Terminal("x", "-o", "out.png", environment=at(url), cwd=tmp_path) as terminal:
        terminal.expect("3rd in line, about 3")  # the countdown continues between two answers
        task.set(pos=0, wait_remaining=20)
        terminal.expect("next in line, about ")
        task.set(status="running", steps_done=1, wait_remaining=10, phase="denoising")
        terminal.expect("step 2 of 4, about ")
        terminal.expect("█")
        task.set(status="done", wait_remaining=None)
        terminal.expect("out.png")
        assert terminal.exit_code() == 0
        assert (tmp_path / "out.png").read_bytes() == task.picture
        assert "\x1b_G" not in terminal.shown
        assert "\x1b]1337" not in terminal.shown


def test_the_real_server_on_a_terminal(server: ServerProcess, tmp_path: Path) -> None:
    def terminal(*arguments: str) -> Terminal:
        return Terminal("x", "-o", "out.png", *arguments, environment=at(server.url), cwd=tmp_path)

    with terminal(*SMALL) as drawn:
        assert drawn.exit_code() == 0
        assert re.search(r"out\.png\s+mflux: seed \d+, [\d.]+ s\s*$", drawn.shown)
    with terminal(*LONG) as cancelled:
        cancelled.expect(", about ")
        cancelled.expect("step ")
        cancelled.interrupt()
        cancelled.expect("Ctrl-C again cancels it now")
        cancelled.interrupt()
        cancelled.expect("was cancelled")
        assert cancelled.exit_code() == 130
    assert server.get("/queue").json()["length"] == 0


THREE = {"status": "running", "params": {"prompt": "x", "count": 3}, "phase": "denoising"}


def test_each_image_is_written_when_it_is_stored_and_ctrl_c_keeps_the_present_one(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(**THREE)
    with Terminal("x", "-o", "out.png", environment=at(url), cwd=tmp_path) as terminal:
        terminal.expect("image 1 of 3")
        task.set(images_done=1)
        terminal.expect("out-0.png")
        assert (tmp_path / "out-0.png").read_bytes() == task.picture
        terminal.interrupt()
        terminal.expect(
            "task abc123 ends after the picture that is being drawn; Ctrl-C again cancels it now"
        )
        task.set(status="cancelled", images_done=2)
        terminal.expect("out-1.png")
        terminal.expect("task abc123 was cancelled.")
        assert terminal.exit_code() == 130
    assert task.stopped.is_set()
    assert not task.deleted.is_set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.png", "out-1.png"]


def test_a_second_ctrl_c_cancels_the_task_now(fake: tuple[FakeTask, str], tmp_path: Path) -> None:
    task, url = fake
    task.set(**THREE, images_done=1)
    with Terminal("x", "-o", "out.png", environment=at(url), cwd=tmp_path) as terminal:
        terminal.expect("out-0.png")
        terminal.interrupt()
        terminal.expect("Ctrl-C again cancels it now")
        terminal.interrupt()
        terminal.expect("task abc123 was cancelled.")
        assert terminal.exit_code() == 130
    assert task.deleted.is_set()
    assert (tmp_path / "out-0.png").exists()


def test_ctrl_c_cancels_a_task_that_waits(fake: tuple[FakeTask, str]) -> None:
    task, url = fake
    with Terminal("x", environment=at(url)) as terminal:
        terminal.expect("3rd in line")
        terminal.interrupt()
        terminal.expect("task abc123 was cancelled.")
        assert terminal.exit_code() == 130
    assert task.deleted.is_set()


def test_a_picture_that_is_finished_after_ctrl_c_is_written(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(status="running", phase="denoising")
    with Terminal("x", "-o", "out.png", environment=at(url), cwd=tmp_path) as terminal:
        terminal.expect("step 1 of 4")
        terminal.interrupt()
        terminal.expect("ends after the picture that is being drawn")
        task.set(status="done", images_done=1)
        terminal.expect("out.png")
        assert terminal.exit_code() == 0
    assert not task.deleted.is_set()


def test_ctrl_c_leaves_a_task_that_another_command_has_submitted(
    fake: tuple[FakeTask, str],
) -> None:
    task, url = fake
    with Terminal("--task", "abc123", environment=at(url)) as terminal:
        terminal.expect("3rd in line")
        terminal.interrupt()
        terminal.expect("task abc123 goes on. Fetch its picture: python3 -m client --task abc123")
        assert terminal.exit_code() == 130
    assert not task.deleted.is_set()
    assert not task.stopped.is_set()


def test_an_archive_has_the_stored_images_of_a_cancelled_task(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(**{**THREE, "status": "cancelled"}, images_done=2)
    done = command("x", "-o", "out.zip", environment=at(url), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == b"out.zip\n"
    assert (tmp_path / "out.zip").read_bytes() == task.picture


def test_the_picture_appears_in_terminals_that_can(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(status="done")

    def shown(environment: dict[str, str], *arguments: str) -> str:
        place: dict[str, Any] = {"environment": at(url) | environment, "cwd": tmp_path}
        with Terminal("x", "-o", "o.png", "--overwrite", *arguments, **place) as terminal:
            assert terminal.exit_code() == 0
            return terminal.shown

    iterm = shown({"TERM_PROGRAM": "iTerm.app"})
    sent = re.search(r"\x1b\]1337;File=size=(\d+);inline=1;preserveAspectRatio=1:(\S+)\x07", iterm)
    assert sent
    assert base64.b64decode(sent[2]) == task.picture
    assert int(sent[1]) == len(task.picture)
    kitty = shown({"TERM": "xterm-kitty"})
    assert unkitty(kitty) == task.picture
    assert ",c=120," in kitty
    assert "\x1b_G" not in shown({"TERM": "xterm-kitty"}, "--no-show")
    piped = command("x", "-o", "p.png", environment=at(url) | {"TERM": "xterm-kitty"}, cwd=tmp_path)
    assert piped.stdout == b"p.png\n"


def unkitty(text: str) -> bytes:
    """The picture of kitty's escapes, after a look at their form."""
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert parts[0][0].startswith("a=T,f=100,q=2,")
    assert [head[-3:] for head, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]
    assert all(len(chunk) <= 4096 for _, chunk in parts)
    return base64.b64decode("".join(chunk for _, chunk in parts))


def test_kitty_gets_png_whatever_the_format() -> None:
    buffer = io.BytesIO()
    pillow.new("RGB", (64, 64), "red").save(buffer, format="JPEG")
    text = picture_escape(buffer.getvalue(), "kitty", 100)
    with pillow.open(io.BytesIO(unkitty(text))) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    assert ",c=" not in text


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, None),
    ],
)
def test_the_terminal_is_known_by_its_environment(
    environment: dict[str, str], protocol: str | None
) -> None:
    assert picture_protocol(environment) == protocol


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pos": 0, "wait_remaining": 5}, "next in line, about 5 s"),
        ({"pos": 10, "wait_remaining": 600}, "11th in line, about 10 min"),
        (
            {"pos": 1, "server": "loading", "wait_remaining": 9},
            "2nd in line, the model is being loaded, about 9 s",
        ),
        (
            {"download": {"model": "dev", "bytes_done": 12, "bytes_total": 48}},
            "the server downloads dev, 25%",
        ),
        ({"download": {"model": "dev", "bytes_done": 12}}, "the server downloads dev"),
        ({"status": "running", "phase": "text_encoding"}, "reading the prompt"),
        (
            {"status": "running", "phase": "denoising", "steps_done": 4, "wait_remaining": 1},
            "step 4 of 4, about 1 s",
        ),
        (
            {"status": "running", "images_done": 1, "params": {"count": 3}},
            "image 2 of 3, step 1 of 4",
        ),
        ({"status": "cancelled"}, "cancelled"),
    ],
)
def test_the_status_of_a_task_in_words(fields: dict[str, Any], words: str) -> None:
    assert in_words(status(**fields)) == words


def test_numbers_in_words() -> None:
    assert [ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]
    )
    assert [duration(s) for s in (0, 99, 130, 7200)] == ["0 s", "99 s", "2 min", "2.0 h"]


def test_without_a_terminal_each_change_is_a_line() -> None:
    stream = io.StringIO()
    shown = Waiting(stream)
    shown.tick()
    for fields in (
        {"pos": 2, "wait_remaining": 40},
        {"pos": 1, "wait_remaining": 30},
        {"status": "running", "phase": "denoising"},
        {"status": "running", "phase": "decoding"},
    ):
        shown.update(status(**fields))
        shown.tick()
    shown.trouble(MfluxError("unreachable", "No answer from x."), 1)
    shown.tick()
    shown.tick()
    shown.close()
    assert stream.getvalue().splitlines() == [
        "task abc123: 3rd in line, about 40 s",
        "task abc123: step 1 of 4",
        "No answer from x; trying again",
    ]
