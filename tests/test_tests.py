"""What every test must do: assert something whatever happens, and wait for events, not sleep."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from conftest import ROOT
from ordering import LONGEST

FAILS = ("fail", "raises", "warns")
"""Functions of pytest that can fail a test."""
CHECKS = ("expect", "run_state_machine_as_test")
"""Functions of playwright and hypothesis that can fail a test."""
WRAPS = ("enumerate", "sorted", "list", "tuple", "set", "reversed", "zip")
"""Functions whose result has elements if their first argument has."""
Defined = dict[str, ast.FunctionDef]


@cache
def trees() -> dict[str, ast.Module]:
    """By file name."""
    return {
        path.name: ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(Path(__file__).parent.glob("*.py"))
    }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


class Module:
    """The names of one file of tests: its functions, its literals and what it imports."""

    def __init__(self, tree: ast.Module) -> None:
        self.functions: Defined = {function.name: function for function in functions(tree)}
        self.full = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        self.imported = {
            alias.asname or alias.name: (f"{node.module}.py", alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def sources_of(self, name: str) -> set[tuple[str, str]]:
        """Files and names that this one may be of: where it is imported from; a method, those of
        the imported classes."""
        if name in self.imported:
            return {self.imported[name]}
        is_method = name.startswith("assert_")
        return {(file, name) for file, _ in self.imported.values()} if is_method else set()

    def has_elements(self, node: ast.expr | None, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a loop over this runs at least once: a literal, or a name that stands for one."""
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(
                not isinstance(part, ast.Starred) or self.has_elements(part.value, seen)
                for part in node.elts
            )
        if isinstance(node, ast.Dict):
            return bool(node.keys)
        if isinstance(node, ast.Constant):
            return isinstance(node.value, str | bytes) and bool(node.value)
        if isinstance(node, ast.Name) and node.id not in seen:
            return self.has_elements(self.full.get(node.id), seen | {node.id})
        if isinstance(node, ast.Call):
            return self._call_has_elements(node, seen)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp):
            return all(
                not part.ifs and self.has_elements(part.iter, seen) for part in node.generators
            )
        return False

    def _call_has_elements(self, node: ast.Call, seen: frozenset[str]) -> bool:
        called = node.func
        if isinstance(called, ast.Attribute):
            return called.attr in ("items", "values", "keys") and self.has_elements(
                called.value, seen
            )
        if not isinstance(called, ast.Name):
            return False
        if called.id == "range":
            bounds = [part.value for part in node.args if isinstance(part, ast.Constant)]
            whole = [bound for bound in bounds if isinstance(bound, int)]
            return len(whole) == len(node.args) and bool(range(*whole))
        strict = any(keyword.arg == "strict" for keyword in node.keywords)
        parts = node.args if called.id == "zip" and not strict else node.args[:1]
        return (
            called.id in WRAPS
            and bool(parts)
            and all(self.has_elements(part, seen) for part in parts)
        )


def what_runs(node: ast.AST, module: Module) -> Iterator[ast.AST]:
    """The nodes below that run whenever this one does, or stop the test where they do not: not the
    functions that are only defined here, no loop that may have nothing to do, and no condition
    without an alternative."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.For) and not module.has_elements(child.iter):
            continue
        if isinstance(child, ast.If) and not child.orelse:
            continue
        yield child
        yield from what_runs(child, module)


def asserts_itself(function: ast.AST, module: Module) -> bool:
    return any(
        (isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant))
        or (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr in FAILS) == ("pytest", True)
        )
        or (isinstance(node, ast.Name) and node.id in CHECKS)
        for node in what_runs(function, module)
    )


def asserts(name: str, file: str, modules: dict[str, Module], seen: frozenset[str]) -> bool:
    """Whether the function of this name, as this file knows it, asserts, by itself or through a
    function that it calls; of methods, those that say so in their names."""
    module = modules.get(file)
    if module is None or (key := f"{file}:{name}") in seen:
        return False
    if name not in module.functions:
        return any(
            asserts(original, source, modules, seen | {key})
            for source, original in module.sources_of(name)
        )
    function = module.functions[name]
    called = [node.func for node in what_runs(function, module) if isinstance(node, ast.Call)]
    names = [node.id for node in called if isinstance(node, ast.Name)]
    methods = [node.attr for node in called if isinstance(node, ast.Attribute)]
    names += [name for name in methods if name.startswith("assert_")]
    return asserts_itself(function, module) or any(
        asserts(name, file, modules, seen | {key}) for name in names
    )


def without_assertion(trees: dict[str, ast.Module]) -> list[str]:
    """Tests that may end without having asserted anything."""
    modules = {file: Module(tree) for file, tree in trees.items()}
    for module in modules.values():
        for name, (file, original) in module.imported.items():
            if file in modules and original in modules[file].full:
                module.full.setdefault(name, modules[file].full[original])
    return [
        f"{file}: {name}"
        for file, module in modules.items()
        for name in module.functions
        if name.startswith("test_") and not asserts(name, file, modules, frozenset())
    ]


def defined_twice(trees: dict[str, ast.Module]) -> list[str]:
    """Tests of which only the last one of that name runs."""
    return [
        f"{file}: {node.name}"
        for file, tree in trees.items()
        for number, node in enumerate(tree.body)
        if isinstance(node, ast.FunctionDef)
        and node.name
        in {one.name for one in tree.body[:number] if isinstance(one, ast.FunctionDef)}
    ]


def sleeps(trees: dict[str, ast.Module]) -> list[str]:
    """Calls of time.sleep()."""
    return [
        f"{file}:{node.lineno}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]


def short_waits(trees: dict[str, ast.Module]) -> list[str]:
    """Assertions that something happens within a number of seconds that is not GIVE_UP_S."""
    return [
        f"{file}:{node.lineno}"
        for file, tree in trees.items()
        for asserted in ast.walk(tree)
        if isinstance(asserted, ast.Assert)
        for node in ast.walk(asserted.test)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("wait", "join", "stop", "result", "acquire")
        and any(
            isinstance(one, ast.Constant) and isinstance(one.value, int | float) and one.value > 0
            for one in (*node.args[:1], *(key.value for key in node.keywords))
        )
    ]


def test_every_test_asserts_something() -> None:
    assert without_assertion(trees()) == []


def test_no_test_hides_another_one_of_its_name() -> None:
    assert defined_twice(trees()) == []


def test_no_test_sleeps() -> None:
    assert sleeps(trees()) == []


def test_every_wait_has_the_time_of_a_slow_machine() -> None:
    assert short_waits(trees()) == []


def test_stores_without_a_data_dir_are_closed() -> None:
    """Those of memory_store() are."""
    opened = [
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node) == "TaskStore(None)"
    ]
    assert opened == ["memory_stores.py"]


def test_one_list_names_the_browsers() -> None:
    folders = ("tests", "docs", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    name = '"google-' + 'chrome"'
    found = [path.name for path in files if name in path.read_text(encoding="utf-8")]
    assert found == ["chromium.py"]


def test_the_files_that_start_first_exist() -> None:
    assert {f"test_{name}.py" for name in LONGEST.split()} <= set(trees())


def test_a_test_without_an_assertion_a_sleep_and_a_short_wait_are_found() -> None:
    source = """
NAMES = ("x", "y")
def test_nothing(): run()
def test_something(): check()
def test_error():
    with pytest.raises(OSError): run()
def check(): inner()
def inner(): assert run()
def run(): time.sleep(1)
def test_some_loop():
    for name in enumerate(NAMES): assert name
def test_perhaps_no_loop():
    for name in run(): assert name
def test_two_loops():
    for name in NAMES:
        for part in name.parts(): assert part
def test_perhaps():
    if run(): assert x
def test_until():
    while not run(): assert time.monotonic() < deadline
def test_method(): x.assert_well()
def assert_well(self): assert self
def test_defined_only():
    def inside(): assert run()
def test_called():
    def of_its_own(): assert run()
    of_its_own()
def test_true():
    assert True
def test_imported(): helper()
def test_imported_loop():
    for name in IMPORTED: assert name
def test_imported_method(): x.assert_imported()
def test_imported_nothing(): x.assert_nothing()
def test_of_another_file(): elsewhere()
def test_true(): assert run()
"""
    other = """
IMPORTED = ("x",)
def helper(): assert 1 > x
def elsewhere(): assert x
def assert_imported(self): assert self
def assert_nothing(self): run()
"""
    imports = "from y import IMPORTED, helper\n"
    trees = {"x.py": ast.parse(imports + source), "y.py": ast.parse(other)}
    without = (
        "nothing",
        "perhaps_no_loop",
        "two_loops",
        "perhaps",
        "defined_only",
        "imported_nothing",
        "of_another_file",
    )
    assert without_assertion(trees) == [f"x.py: test_{name}" for name in without]
    assert sleeps(trees) == ["x.py:10"]
    waits = "assert x.wait(60)\nassert x.stop(timeout=5.0)\nassert x.wait(GIVE_UP_S) or x.stop(0)"
    assert short_waits({"x.py": ast.parse(waits)}) == ["x.py:1", "x.py:2"]
    assert defined_twice(trees) == ["x.py: test_true"]
