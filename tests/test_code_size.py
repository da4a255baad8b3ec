"""Files, functions and nesting stay small: every file of code, and styles; of tests, the files."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_NESTING = 4
ONE_FILE = {"client/mflux_client.py"}
"""People copy this one as a single file."""
NESTS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FILES = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "*/*.py", "models/*/*.py", "tests/*/*.py")
    for path in ROOT.glob(pattern)
}
TESTS = sorted(name for name in FILES if name.startswith("tests/"))
CODE = sorted(FILES - set(TESTS))


def nesting(node: ast.AST) -> int:
    """Levels of blocks inside a function; an `elif` counts as nested in its `if`."""
    inside = max((nesting(child) for child in ast.iter_child_nodes(node)), default=0)
    return inside + isinstance(node, NESTS)


def too_long(name: str) -> list[str]:
    """Says so if this file is too long."""
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    return [f"{lines} lines"] if lines > MOST_FILE_LINES and name not in ONE_FILE else []


def excesses(name: str) -> list[str]:
    """What is too large in this file."""
    found = too_long(name)
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                found.append(f"{node.name}: {lines} lines")
            if (levels := nesting(node)) > MOST_NESTING:
                found.append(f"{node.name}: {levels} levels of nesting")
    return found


def test_files_and_functions_are_small_and_hardly_nested() -> None:
    assert CODE
    assert {name: found for name in CODE if (found := excesses(name))} == {}


def test_files_of_tests_are_small() -> None:
    assert "tests/conftest.py" in TESTS
    assert {name: found for name in TESTS if (found := too_long(name))} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "web").glob("*.css")), ids=lambda path: path.name)
def test_each_style_sheet_is_small_and_loaded_by_a_page(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_FILE_LINES
    files = [*path.parent.glob("*.html"), *path.parent.glob("*.js")]
    loads = (f'href="web/{{{{version}}}}/{path.name}"', f'sheet("./{path.name}")')
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert any(load in text for load in loads for text in texts)


def test_the_check_sees_each_kind_of_excess(tmp_path: Path) -> None:
    deep = "def f():\n" + "".join(f"{' ' * n}if x:\n" for n in range(1, 6)) + " " * 6 + "pass\n"
    chain = "def f():\n if a: pass\n" + " elif b: pass\n" * 10
    long = "def f():\n" + " pass\n" * MOST_FUNCTION_LINES
    wanted = {deep: "5 levels", chain: "11 levels", long: "61 lines", "\n" * 401: "401 lines"}
    for number, (text, excess) in enumerate(wanted.items()):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        found = " ".join(excesses(str(path)))
        assert excess in found if excess else not found, (excess, found)
