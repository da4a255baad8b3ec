"""The command of the client: files, options, exit codes, documents."""

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, at, png
from conftest import GIVE_UP_S, ROOT, ServerProcess, clean_environment
from far_ends import Asked, FakeTask, FarEnd, command
from PIL import Image as pillow

from client.command import main
from client.mflux_client import Client, Fields, Image, MfluxError
from client.options import FIELDS, parser


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
    options += ["--model", "noise-flux1", "--priority", "--json", "--remove", "-o", "out.jpeg"]
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

    options = [
        "--prompt",
        "x",
        "-m",
        "noise-flux1",
        "-q",
        "8",
        "--lora-paths",
        "a/b",
        "c/d.safetensors",
    ]
    assert fields(*options, "--lora-scales", "0.5", "1") == {
        "prompt": "x",
        "model": "noise-flux1",
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
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
def test_bad_usage_is_2_and_a_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(arguments)
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert code == 2
    assert says in shown.err
    assert shown.out == ""


def test_the_process_ends_with_2_after_bad_usage() -> None:
    done = command()
    assert (done.returncode, done.stdout) == (2, b"")
    assert "a prompt is needed" in done.stderr.decode()


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
        assert "* noise-flux1 " in run("--models")
        assert json.loads(run("--models", "--json"))["default"] == "noise-flux1"
        task_id = client.submit("x", width=64, height=64, steps=2).task_id
    assert run("--task", task_id) == f"{task_id}.jpg\n"
    assert run("--task", task_id, "-o", "again.jpg") == "again.jpg\n"
