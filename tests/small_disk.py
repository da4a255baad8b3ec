"""A small disk, which a test fills."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small tmpfs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tool = shutil.which("mount") if sys.platform == "linux" else None

    def mount(options: str) -> Path:
        if tool is None:
            pytest.skip("this test mounts a tmpfs, which only Linux has")
        mounted = subprocess.run(
            [tool, "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"this test must be allowed to mount a tmpfs: {mounted.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_disk(disk: Path, spare_bytes: int = 0) -> Path:
    """Writes a file that fills the disk, except for some spare bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096) == 4096:
            pass
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - spare_bytes)
    return filler
