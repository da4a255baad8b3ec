"""What a hostile server, or other people, can do to the terminal of the command: nothing."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import at, png
from conftest import GIVE_UP_S, ROOT, clean_environment
from far_ends import Asked, FakeTask, FarEnd, Terminal, command

HOSTILE = "\x1b]52;c;eA==\x07 \x9b2J \x7f \r \ud800 end"
SHOWN = "\ufffd]52;c;eA==\ufffd \ufffd2J \ufffd \ufffd \ufffd end"
CHANGES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ERROR = {"error": {"code": HOSTILE, "message": HOSTILE}}
COMMANDS = ("x", "--queue", "--models", "--status 1", "--cancel 1", "--task 1", "x --estimate")


def one_file(url: str, folder: Path) -> "subprocess.CompletedProcess[bytes]":
    """`python3 mflux_client.py x`, run to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "client" / "mflux_client.py"), "x", "--url", url],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        timeout=GIVE_UP_S,
        check=False,
    )


def output_of(done: "subprocess.CompletedProcess[bytes]") -> str:
    """All that was printed, which changes no terminal."""
    text = done.stdout.decode() + done.stderr.decode()
    assert "Traceback" not in text, text
    assert not CHANGES.search(text), ascii(text)
    return text


def test_only_say_prints() -> None:
    calls = [
        (path.name, function.name)
        for path in sorted((ROOT / "client").glob("*.py"))
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert calls == [("mflux_client.py", "say")]


@pytest.mark.parametrize("what", [*COMMANDS, "the one file"])
def test_an_error_of_the_server_does_not_change_the_terminal(what: str, tmp_path: Path) -> None:
    with FarEnd(lambda asked: asked.answer(400, ERROR)) as far_end:
        if what == "the one file":
            done = one_file(far_end.url, tmp_path)
        else:
            done = command(*what.split(), environment=at(far_end.url), cwd=tmp_path)
    assert SHOWN in output_of(done)


def hostile_task() -> FakeTask:
    task = FakeTask(
        status="failed",
        error={"code": "task_failed", "message": HOSTILE},
        params={"prompt": HOSTILE, "model": HOSTILE, "seed": 1, "count": 1},
        warnings=[HOSTILE],
    )
    task.picture = png()
    return task


@pytest.mark.parametrize("what", ["x", "--task 1", "the one file"])
def test_what_a_task_says_does_not_change_the_terminal(what: str, tmp_path: Path) -> None:
    with FarEnd(hostile_task().answer) as far_end:
        if what == "the one file":
            done = one_file(far_end.url, tmp_path)
        else:
            done = command(*what.split(), environment=at(far_end.url), cwd=tmp_path)
    assert done.returncode == 1
    assert output_of(done).count(SHOWN) == (2 if what == "x" else 1)


LISTS: dict[str, dict[str, Any]] = {
    "--models": {
        "default": HOSTILE,
        "models": [
            {
                **{"name": HOSTILE, "title": HOSTILE, "allowed": True, "present": True},
                **{"default_steps": 4, "takes": [], "needs": [], "loaded": False},
            }
        ],
        "loras": [HOSTILE],
    },
    "--queue": {
        "length": 1,
        "tasks": [
            {
                "status": HOSTILE,
                "pos": 0,
                "wait_remaining": 1,
                "created_at": 0,
                "params": {"prompt": "a fox"},
            }
        ],
    },
    "--cancel 1": FakeTask(status=HOSTILE).fields,
    "--status 1": FakeTask(download={"model": HOSTILE}).fields,
}


@pytest.mark.parametrize("what", LISTS)
def test_what_the_server_lists_does_not_change_the_terminal(what: str) -> None:
    with FarEnd(lambda asked: asked.answer(200, LISTS[what])) as far_end:
        done = command(*what.split(), environment=at(far_end.url))
    assert done.returncode == 0
    assert SHOWN in output_of(done)


@pytest.mark.parametrize("what", ["--models", "--queue", "--status 1"])
def test_json_is_exact_and_does_not_change_the_terminal(what: str) -> None:
    with FarEnd(lambda asked: asked.answer(200, LISTS[what])) as far_end:
        done = command(*what.split(), "--json", environment=at(far_end.url))
    assert json.loads(output_of(done)) == LISTS[what]


def test_the_line_about_a_task_does_not_change_the_terminal(tmp_path: Path) -> None:
    task = FakeTask(pos=2, wait_remaining=40, download={"model": HOSTILE})
    with (
        FarEnd(task.answer) as far_end,
        Terminal("x", "-o", "o.png", environment=at(far_end.url), cwd=tmp_path) as terminal,
    ):
        terminal.expect(f"the server downloads {SHOWN[:12]}")
        task.set(status="failed", error={"code": "gone", "message": "It broke."})
        terminal.expect("It broke.")
        assert "\x1b]52" not in terminal.shown
        assert "\x9b" not in terminal.shown


def test_a_redirect_does_not_change_the_terminal(tmp_path: Path) -> None:
    def answer(asked: Asked) -> None:
        asked.answer(302, b"", {"Location": "/\x1bc"})

    with FarEnd(answer) as far_end:
        assert "It leads to /\ufffdc" in output_of(one_file(far_end.url, tmp_path))
