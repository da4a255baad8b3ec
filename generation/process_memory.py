"""Memory that this process has in use, and that the machine has left.

On Linux these are the pages that were touched (RSS): there MLX counts buffers that are never
filled. On a Mac MLX's own count is used, which contains what the GPU uses.

Depends on mlx.
"""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PROCESS_BYTES = 500_000_000
"""Of the interpreter, mflux and the queue, without models."""
SHARE_OF_MEMORY = 0.9
"""Of the machine's memory: the rest is for the system."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
RESET_PEAK = "5"
"""To clear_refs: sets the peak of the RSS to its present value (proc(5))."""
VM_STAT = "/usr/bin/vm_stat"
RECLAIMABLE = ("free", "inactive", "speculative", "purgeable")


class PeakMeter:
    """The most memory that this process uses during the phases of a picture."""

    def __init__(self) -> None:
        self._touched = _resets_peak()
        self._phases: list[int] = []
        self._counted = 0

    def begin(self) -> None:
        """A picture begins."""
        self._phases, self._counted = [], 0
        self._reset()

    def next_phase(self) -> None:
        self._counted = self.counted_bytes()
        self._phases.append(self._peak_bytes())
        self._reset()

    def phases(self) -> list[int]:
        """Bytes beside PROCESS_BYTES, of each phase so far."""
        return [*self._phases, self._peak_bytes()]

    def counted_bytes(self) -> int:
        """The peak of the picture as MLX counts it."""
        import mlx.core as mx

        return max(self._counted, mx.get_peak_memory())

    def _reset(self) -> None:
        import mlx.core as mx

        mx.reset_peak_memory()
        if self._touched:
            CLEAR.write_text(RESET_PEAK)

    def _peak_bytes(self) -> int:
        import mlx.core as mx

        if self._touched and (touched := _field(STATUS, "VmHWM")):
            return max(touched - PROCESS_BYTES, 0)
        return int(mx.get_peak_memory())


def _resets_peak() -> bool:
    with suppress(OSError):
        CLEAR.write_text(RESET_PEAK)
        return True
    return False


def used_bytes() -> int:
    """Bytes that this process uses, with PROCESS_BYTES."""
    import mlx.core as mx

    return _field(STATUS, "VmRSS") or int(mx.get_active_memory()) + PROCESS_BYTES


def machine_bytes(gpu: bool) -> int:
    """Memory that this process may use in all.

    Args:
        gpu: whether MLX has a GPU. A Mac's may use about three quarters of the memory.
    """
    import mlx.core as mx

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit := _number(CGROUP / "memory.max"):
        total = min(total, limit)
    if gpu and (most := mx.device_info().get("max_recommended_working_set_size")):
        return int(most)
    return int(SHARE_OF_MEMORY * total)


def available_bytes() -> int | None:
    """Memory that the machine could give this process now without swapping; None: unknown."""
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            pages = subprocess.run([VM_STAT], capture_output=True, text=True, timeout=5, check=True)
            return free_of_vm_stat(pages.stdout)
        return None
    available = _field(MEMINFO, "MemAvailable")
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if available and limit and used:
        return min(available, limit - used)
    return available


def free_of_vm_stat(text: str) -> int | None:
    """Reads the output of macOS' vm_stat: bytes of pages that can be had without swapping."""
    page = re.search(r"page size of (\d+) bytes", text)
    counts = [re.search(rf"Pages {name}:\s+(\d+)", text) for name in RECLAIMABLE]
    found = [int(count[1]) for count in counts if count]
    return int(page[1]) * sum(found) if page and found else None


def _field(path: Path, name: str) -> int | None:
    """A value of /proc/self/status or /proc/meminfo in bytes."""
    with suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
