"""Where the tests keep their temporary files: in memory, if there is room.

A data dir is synced at each change of a task, which takes milliseconds on a disk and no time in
memory. What is tested is the same: each of these calls is made.
"""

import os
from pathlib import Path

LEAST_FREE_BYTES = 4_000_000_000
"""Of the RAM disk: containers often have a small one."""


def _ram_disk() -> Path | None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return None
    status = os.statvfs(folder)
    has_room = status.f_bavail * status.f_frsize >= LEAST_FREE_BYTES
    return folder if has_room and not status.f_flag & os.ST_NOEXEC else None


RAM_DISK = _ram_disk()


def use_ram_disk() -> None:
    """pytest makes its temporary folders there, in this process and in those that it starts."""
    if RAM_DISK:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(RAM_DISK))
