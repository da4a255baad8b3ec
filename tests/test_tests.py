"""What every test must do: assert something, and wait for events instead of sleeping."""

import ast
from collections.abc import Iterator
from pathlib import Path

TREES = {
    path.name: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.glob("*.py"))
}
FAILS = ("fail", "raises", "warns")
"""Functions of pytest that can fail a test."""
CHECKS = ("expect", "run_state_machine_as_test")
"""Functions of playwright and hypothesis that can fail a test."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def calls(function: ast.AST) -> set[str]:
    """The names of the functions that it calls; methods are left out."""
    return {
        node.func.id
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def asserts_itself(function: ast.AST) -> bool:
    return not calls(function).isdisjoint(CHECKS) or any(
        isinstance(node, ast.Assert)
        or (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr in FAILS) == ("pytest", True)
        )
        for node in ast.walk(function)
    )


def without_assertion(trees: dict[str, ast.Module]) -> list[str]:
    """Tests that neither assert nor call a function which asserts, directly or through others."""
    found = [(file, function) for file, tree in trees.items() for function in functions(tree)]
    asserting = {function.name for _, function in found if asserts_itself(function)}
    more = asserting
    while more:
        more = {f.name for _, f in found if calls(f) & asserting} - asserting
        asserting |= more
    return [
        f"{file}: {function.name}"
        for file, function in found
        if function.name.startswith("test_")
        and not (asserts_itself(function) or calls(function) & asserting)
    ]


def sleeps(trees: dict[str, ast.Module]) -> list[str]:
    """Calls of time.sleep()."""
    return [
        f"{file}:{node.lineno}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]


def test_every_test_asserts_something() -> None:
    assert without_assertion(TREES) == []


def test_no_test_sleeps() -> None:
    assert sleeps(TREES) == []


def test_a_test_without_an_assertion_and_a_sleep_are_found() -> None:
    source = """
def test_nothing(): run()
def test_something(): check()
def test_error():
    with pytest.raises(OSError): run()
def check(): inner()
def inner(): assert run()
def run(): time.sleep(1)
"""
    trees = {"x.py": ast.parse(source)}
    assert without_assertion(trees) == ["x.py: test_nothing"]
    assert sleeps(trees) == ["x.py:8"]
