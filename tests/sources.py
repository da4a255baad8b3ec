"""The modules and packages of the code."""

from pathlib import Path

from conftest import ROOT

MODULES = {path.stem for path in ROOT.glob("*.py")}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"client"}
PARTS = MODULES | PACKAGES


def sources_of(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) if part in PACKAGES else [ROOT / f"{part}.py"]
