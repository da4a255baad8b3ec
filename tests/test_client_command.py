"""`python3 -m client`, as people and scripts run it: in a process, on a pseudo terminal."""

import base64
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVE_UP_S, ROOT, ServerProcess, clean_environment
from far_ends import Asked, FakeTask, FarEnd, Terminal, command
from PIL import Image as pillow

from client.mflux_client import Client, Fields, Image, MfluxError, Status
from client.options import FIELDS, parser
from client.terminal import Waiting, duration, in_words, ordinal, picture_escape, picture_protocol

SMALL = ("--width", "64", "--height", "64", "--steps", "2")
LONG = ("--width", "2048", "--height", "2048", "--steps", "100")


def png(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    pillow.effect_noise((side, side), 50).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def fake() -> Iterator[tuple[FakeTask, str]]:
    """A task that is the third in line until the test moves it on, and where it is."""
    task = FakeTask(pos=2, wait_remaining=40)
    task.picture = png(1024)
    with FarEnd(task.answer) as far_end:
        yield task, far_end.url


def at(url: str) -> dict[str, str]:
    return {"MFLUX_SERVER_URL": url}


# -- files --------------------------------------------------------------------------------------


def test_the_command_writes_the_picture_and_prints_its_path(
    server: ServerProcess, tmp_path: Path
) -> None:
    done = command(
        "a lighthouse", "-o", "out.png", *SMALL, environment=at(server.url), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"out.png\n"
    with pillow.open(tmp_path / "out.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    done = command("a lighthouse", *SMALL, "--url", server.url, cwd=tmp_path)
    path = tmp_path / done.stdout.decode().strip()
    assert re.fullmatch(r"[0-9a-f]{16}\.jpg", path.name)
    with pillow.open(path) as picture:
        assert picture.format == "JPEG"


def test_several_images_get_numbers_and_a_zip_takes_all(
    server: ServerProcess, tmp_path: Path
) -> None:
    arguments = ("x", "--count", "2", *SMALL)
    done = command(*arguments, "-o", "a.webp", environment=at(server.url), cwd=tmp_path)
    assert done.stdout == b"a-0.webp\na-1.webp\n", done.stderr
    for name in ("a-0.webp", "a-1.webp"):
        with pillow.open(tmp_path / name) as picture:
            assert picture.format == "WEBP"
    command(*arguments, "-o", "a.zip", environment=at(server.url), cwd=tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == 2


def test_a_dash_writes_the_bytes_to_stdout(server: ServerProcess) -> None:
    done = command("x", "-o", "-", *SMALL, environment=at(server.url))
    assert done.returncode == 0, done.stderr
    with pillow.open(io.BytesIO(done.stdout)) as picture:
        assert picture.format == "JPEG"


def test_the_options_reach_the_server(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(png())
    options = ["--seed", "7", "--init-image", "in.png", "--strength", "0.25", "--quality", "50"]
    options += ["--model", "tiny", "--priority", "--json", "--remove", "-o", "out.jpeg"]
    options += ["--scheduler", "linear"]
    done = command("x", *options, *SMALL, environment=at(server.url), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["status"] == "done"
    answer = {"seed": "7", "image_strength": 0.25, "quality": 50, "priority": True, "steps": 2}
    assert answer.items() <= status["params"].items()
    assert status["params"]["init_image"]["width"] == 64
    assert b"out.jpeg" in done.stderr
    with Client(server.url) as client, pytest.raises(MfluxError, match="deleted"):
        client.status(status["task_id"])


def test_there_are_options_for_the_usual_fields_and_one_for_all_others(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    assert set(FIELDS) <= set(Fields.__annotations__)
    task.set(status="done")
    others = {"auto_mask": "the sky", "step_cache": 0.2, "tags": ["a", "b"], "metadata": False}
    options = ["--field", "auto_mask=the sky", "--field", "step_cache=0.2"]
    options += ["--field", 'tags=["a", "b"]', "--field", "metadata=false"]
    done = command("x", *options, "-o", "o.png", "--url", url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(task.submitted) == {"prompt": "x", "format": "PNG", **others}


def test_adapters_have_a_scale(tmp_path: Path, fake: tuple[FakeTask, str]) -> None:
    task, url = fake
    task.set(status="done")
    done = command("x", "--lora", "a", "--lora", "b:0.5", "-o", "o.png", "--url", url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(task.submitted) == {
        "prompt": "x",
        "loras": ["a", {"name": "b", "scale": 0.5}],
        "format": "PNG",
    }


def test_the_options_of_mfluxs_own_commands_mean_the_same(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(status="done")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())

    def fields(*options: str) -> dict[str, Any]:
        done = command(*options, "--format", "png", "--url", url, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(task.submitted)
        return found

    options = ["--prompt", "x", "-m", "tiny", "-q", "8", "--lora-paths", "a/b", "c/d.safetensors"]
    assert fields(*options, "--lora-scales", "0.5", "1") == {
        "prompt": "x",
        "model": "tiny",
        "quantize": 8,
        "loras": [{"name": "a/b", "scale": 0.5}, {"name": "d", "scale": 1.0}],
        "format": "PNG",
    }
    assert fields("x", "--lora-paths", "a", "--controlnet-strength", "0.5")["loras"] == ["a"]
    for ours, mfluxs in (
        ("--init-image", "--image-path"),
        ("--strength", "--image-strength"),
        ("--mask", "--masked-image-path"),
        ("--control-image", "--controlnet-image-path"),
        ("--control-image", "--depth-image-path"),
        ("--image", "--image-paths"),
    ):
        value = "0.5" if "strength" in ours else "a.png"
        same = [parser().parse_args(["x", option, value]) for option in (ours, mfluxs)]
        for options_of in same:
            options_of.image_paths = None
        assert same[0] == same[1]
        assert same[0] != parser().parse_args(["x"])
    several = parser().parse_args(["x", "--image-paths", "a.png", "b.png"])
    assert several.images == ["a.png", "b.png"]


def test_the_prompt_comes_from_a_file_or_from_stdin(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(status="done")
    (tmp_path / "prompt.txt").write_text("from a file\n")
    for options, prompt in (
        (["--prompt-file", "prompt.txt"], "from a file"),
        (["-"], "from stdin"),
        (["--prompt-file", "-"], "from stdin"),
    ):
        done = command(*options, "--url", url, cwd=tmp_path, input=b"from stdin\n")
        assert done.returncode == 0, done.stderr
        assert json.loads(task.submitted)["prompt"] == prompt


def test_an_estimate_submits_nothing(server: ServerProcess, tmp_path: Path) -> None:
    done = command("x", "--estimate", *SMALL, environment=at(server.url), cwd=tmp_path)
    assert re.fullmatch(rb"about \S+ \w+, in 9 of 10 cases at most \S+ \w+\n", done.stdout)
    done = command("x", "--estimate", "--json", *SMALL, environment=at(server.url), cwd=tmp_path)
    forecast = json.loads(done.stdout)
    assert forecast["params"]["steps"] == 2
    assert "task_id" not in forecast
    assert list(tmp_path.iterdir()) == []
    assert server.get("/queue").json()["length"] == 0


def test_each_seed_is_a_picture_of_its_own(server: ServerProcess, tmp_path: Path) -> None:
    options = ["--seeds", "3", "5", "-o", "a.png"]
    done = command("x", *options, *SMALL, environment=at(server.url), cwd=tmp_path)
    assert done.stdout == b"a-3.png\na-5.png\n", done.stderr
    ends = re.findall(r"^mflux: seed (\d+), \d+\.\d s$", done.stderr.decode(), re.MULTILINE)
    assert ends == ["3", "5"]
    assert (tmp_path / "a-3.png").read_bytes() != (tmp_path / "a-5.png").read_bytes()


def test_a_file_is_not_overwritten_unless_the_user_wants_it(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(status="done")
    (tmp_path / "o.png").write_bytes(b"mine")
    for number in (1, 2):
        done = command("x", "-o", "o.png", "--url", url, cwd=tmp_path)
        assert done.stdout.decode() == f"o-{number}.png\n"
    assert (tmp_path / "o.png").read_bytes() == b"mine"
    done = command("x", "-o", "o.png", "--overwrite", "--url", url, cwd=tmp_path)
    assert done.stdout == b"o.png\n"
    assert (tmp_path / "o.png").read_bytes() == task.picture
    assert len(list(tmp_path.iterdir())) == 3


# -- the one file ---------------------------------------------------------------------------------


def test_the_one_file_is_a_command_too(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "mflux_client.py").write_text((ROOT / "client" / "mflux_client.py").read_text())
    (tmp_path / "in.png").write_bytes(png())

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "mflux_client.py", *arguments, "--url", server.url],
            cwd=tmp_path,
            env=clean_environment(),
            input="from stdin",
            capture_output=True,
            text=True,
            timeout=GIVE_UP_S,
            check=False,
        )

    small = ("width=64", "height=64", "steps=2")
    done = run("a lighthouse", *small, "init_image=in.png", "-o", "in.png", "seed=5")
    assert (done.returncode, done.stdout) == (0, "in-1.png\n"), done.stderr
    assert re.search(r"^done, seed 5, \d+\.\d s", done.stderr, re.MULTILINE)
    with pillow.open(tmp_path / "in-1.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    done = run("-", *small)
    assert re.fullmatch(r"[0-9a-f]{16}\.jpg\n", done.stdout), done.stderr
    refused = run("x", "steps=0")
    assert refused.returncode == 1
    assert "steps" in refused.stderr
    assert run("x", "steps").returncode == 2


def test_a_server_cannot_choose_the_folder_of_a_picture(tmp_path: Path) -> None:
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    hostile = FakeTask(task_id="../../named by the server", status="done", images_done=1)
    hostile.picture = png()
    with FarEnd(hostile.answer) as far_end:
        done = command("x", "--no-show", environment=at(far_end.url), cwd=inner)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent for path in files] == [inner], files
    for task_id in ("../x", "/x", "..", "a\\b", ".bashrc", "a\0b"):
        name = Image(b"", "image/png", task_id, 0).file_name
        assert re.fullmatch(r"[\w-][\w.-]*\.png|png", name), task_id


def test_prompts_of_others_do_not_change_the_terminal() -> None:
    params = {"prompt": "a \x1b]52;c;eA==\x07 fox \x9b2J"}
    task = {"status": "waiting", "pos": 0, "wait_remaining": 1, "created_at": 0, "params": params}

    def answer(asked: Asked) -> None:
        asked.answer(200, {"length": 1, "tasks": [task]})

    with FarEnd(answer) as far_end:
        done = command("--queue", environment=at(far_end.url))
    shown = done.stdout.decode().strip()
    assert shown.endswith("a \ufffd]52;c;eA==\ufffd fox \ufffd2J")


# -- exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "a prompt is needed"),
        (["x", "--steps", "many"], "--steps"),
        (["x", "--queue"], "--queue stands alone"),
        (["--task", "1", "--cancel", "1"], "--task stands alone"),
        (["x", "--field", "tags"], "'tags' must be NAME=VALUE"),
        (["--queue", "--field", "tags=1"], "--queue stands alone"),
        (["x", "-o", "out.gif"], "the ending must be one of .jpg, .jpeg, .png, .webp, .zip"),
        (["x", "-o", "no/where.png"], "no such folder"),
        (["x", "-o", "x" * 300 + ".png"], "File name too long"),
        (["x", "-o", ".png/"], "the ending"),
        (["x", "-o", "-", "--count", "2"], "several images"),
        (["x", "-o", "-", "--json"], "both want stdout"),
        (["x", "--init-image", "missing.png"], "cannot read missing.png: No such file"),
        (["x", "--url", "http://["], "cannot be asked"),
        (["x", "--prompt", "y"], "name one prompt"),
        (["--prompt-file", "missing.txt"], "the prompt cannot be read from missing.txt"),
        (["x", "--lora-paths", "a", "b", "--lora-scales", "1"], "as many numbers"),
        (["x", "--seeds", "1", "2", "--seed", "3"], "--seeds stands in place of --seed"),
        (["x", "--seeds", "1", "2", "-o", "-"], "several images"),
        (["x", "-o", "a.png", "--format", "jpg"], "a.png is no name of a JPEG"),
    ],
)
def test_bad_usage_is_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr.decode()
    assert done.stdout == b""


def test_a_server_that_is_not_there_is_3(fake: tuple[FakeTask, str]) -> None:
    done = command("x", "--url", "http://127.0.0.1:9", "--retry-s", "0")
    assert done.returncode == 3
    assert done.stderr.decode() == (
        "mflux: No answer from http://127.0.0.1:9: connection refused. Is the server running? "
        "--url or MFLUX_SERVER_URL says where it is.\n"
    )


def test_a_refusal_is_4_and_a_failed_task_is_1(
    server: ServerProcess, fake: tuple[FakeTask, str]
) -> None:
    done = command("x", "--steps", "0", environment=at(server.url))
    assert done.returncode == 4
    assert b"steps must be a whole number" in done.stderr
    assert command("--status", "nobody", environment=at(server.url)).returncode == 4
    task, url = fake
    task.set(status="failed", error={"code": "out_of_memory", "message": "No memory."})
    done = command("x", "--json", "--url", url)
    assert done.returncode == 1
    assert done.stderr.decode() == "mflux: task abc123 failed. No memory.\n"
    assert json.loads(done.stdout)["status"] == "failed"
    task.set(status="cancelled", error=None)
    assert b"task abc123 was cancelled" in command("x", "--url", url).stderr


def test_a_picture_that_cannot_be_written_is_1_and_not_lost(
    fake: tuple[FakeTask, str], tmp_path: Path
) -> None:
    task, url = fake
    task.set(status="done")
    (tmp_path / "folder").mkdir()
    task.before_image = (tmp_path / "folder").rmdir
    done = command("x", "-o", "folder/o.png", "--remove", environment=at(url), cwd=tmp_path)
    assert done.returncode == 1
    where = b"It stays on the server. Fetch its picture: python3 -m client --task abc123"
    assert where in done.stderr
    assert not task.deleted.is_set()


def test_without_requests_it_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "client", "x"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("The client needs requests: pip install requests")


# -- other actions ------------------------------------------------------------------------------


def test_queue_status_cancel_models_and_fetching_later(
    server: ServerProcess, tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        done = command(*arguments, environment=at(server.url), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return str(done.stdout.decode())

    with Client(server.url) as client:
        task_id = client.submit("a\nlighthouse", width=2048, height=2048, steps=100).task_id
        assert re.fullmatch(rf"{task_id}  \w+ +about .* s +a lighthouse\n", run("--queue"))
        assert json.loads(run("--queue", "--json"))["length"] == 1
        assert json.loads(run("--status", task_id, "--json"))["task_id"] == task_id
        assert "was" in run("--cancel", task_id)
        assert run("--status", task_id) == "cancelled\n"
        assert run("--queue") == ""
        assert "* tiny " in run("--models")
        assert json.loads(run("--models", "--json"))["default"] == "tiny"
        task_id = client.submit("x", width=64, height=64, steps=2).task_id
    assert run("--task", task_id) == f"{task_id}.jpg\n"
    assert run("--task", task_id, "-o", "again.jpg") == "again.jpg\n"


# -- on a terminal ------------------------------------------------------------------------------


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


# -- words --------------------------------------------------------------------------------------


def status(**fields: Any) -> Status:
    answer = {k: v for k, v in {**FakeTask().fields, **fields}.items() if k != "download"}
    return Status(**answer, raw=fields)


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


# -- documents ----------------------------------------------------------------------------------


def test_the_clients_readme_and_help_name_every_option_and_exit_code() -> None:
    shown = command("--help").stdout.decode()
    readme = (ROOT / "client" / "README.md").read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help", "--output"}
    assert len(options) > 25
    for option in options:
        assert f"`{option}" in readme, option
    for code in ("0", "1", "2", "3", "4", "130"):
        assert re.search(rf"^  {code} ", shown, re.MULTILINE)
        assert f"| {code} |" in readme
    for variable in ("MFLUX_SERVER_URL", "MFLUX_SERVER_KEY"):
        assert variable in shown
        assert variable in readme


def test_the_example_of_the_clients_readme_runs(server: ServerProcess, tmp_path: Path) -> None:
    readme = (ROOT / "client" / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    (tmp_path / "mflux_client.py").write_text((ROOT / "client" / "mflux_client.py").read_text())
    (tmp_path / "photo.jpg").write_bytes(png())
    (tmp_path / "example.py").write_text(code)
    subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=clean_environment() | at(server.url),
        check=True,
        timeout=120,
    )
    assert (tmp_path / "lighthouse.jpg").exists()
