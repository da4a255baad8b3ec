"""Servers for the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

from conftest import ServerProcess


def served(data_dir: Path, *arguments: str) -> Iterator[ServerProcess]:
    """For a fixture: a server that must end without errors when its tests have ended."""
    process = ServerProcess(data_dir, *arguments)
    yield process
    assert process.stop() == 0
    assert "Traceback" not in "".join(process.log)
