"""The source of mflux, parsed: its classes and their parameters.

Parsing takes 0.05 s, importing all of its families takes seconds.
"""

import ast
import importlib.util
import re
from pathlib import Path

CLASS = re.compile(r"^class (\w+)", re.MULTILINE)


class MfluxSource:
    """Finds the classes that draw, by name."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("mflux")
        assert spec
        assert spec.submodule_search_locations
        self._root = Path(spec.submodule_search_locations[0])
        self._files = {
            name: path
            for path in sorted(self._root.glob("models/*/variants/**/*.py"))
            for name in CLASS.findall(path.read_text(encoding="utf-8"))
        }
        self._parsed: dict[Path, dict[str, ast.ClassDef]] = {}
        self._saved_with = _dict_of_names(
            ast.parse((self._root / "models/common/cli/save.py").read_text(encoding="utf-8")),
            "MODEL_CLASSES",
        )

    def saved_with(self, key: str) -> tuple[str, ...]:
        name = self._saved_with.get(key)
        return (name,) if name and name in self._files else ()

    def module(self, name: str) -> str:
        """The one that defines this class."""
        parts = self._files[name].relative_to(self._root).with_suffix("").parts
        return ".".join(("mflux", *parts))

    def _class(self, name: str) -> ast.ClassDef:
        """Parses its file alone: two thirds of the files hold no class that draws."""
        path = self._files[name]
        if path not in self._parsed:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self._parsed[path] = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        return self._parsed[path][name]

    def _constructor(self, name: str) -> str | None:
        """What a class does when it is made, without defaults: it is always given a config."""
        method = self._method(self._class(name), "__init__")
        if method is None:
            return None
        return " ".join(map(ast.dump, (*method.args.args, *method.body)))

    def _undecided(self, node: ast.ClassDef) -> list[str]:
        """Parameters of generate_image whose default is None."""
        found = self._method(node, "generate_image")
        if found is None:
            return []
        positional = found.args.args[len(found.args.args) - len(found.args.defaults) :]
        pairs = [
            *zip(positional, found.args.defaults, strict=True),
            *zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True),
        ]
        return [a.arg for a, d in pairs if isinstance(d, ast.Constant) and d.value is None]

    def _parameters(self, node: ast.ClassDef, method: str) -> tuple[list[str], list[str]]:
        """Returns the parameters without and with a default."""
        found = self._method(node, method)
        if found is None:
            return [], []
        arguments = found.args
        positional = [a.arg for a in arguments.args[1:]]
        split = len(positional) - len(arguments.defaults)
        keywords = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
        return (
            positional[:split] + [a.arg for a, default in keywords if default is None],
            positional[split:] + [a.arg for a, default in keywords if default is not None],
        )

    def _method(self, node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
        """Returns a method of a class, own or inherited."""
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == name:
                return part
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self._files:
                return self._method(self._class(base.id), name)
        return None


def _dict_of_names(tree: ast.Module, variable: str) -> dict[str, str]:
    """A module's `variable: ... = {"key": Name, ...}`."""
    for node in tree.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == variable
            and isinstance(node.value, ast.Dict)
        ):
            return {
                key.value: value.id
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if isinstance(key, ast.Constant)
                and isinstance(key.value, str)
                and isinstance(value, ast.Name)
            }
    return {}
