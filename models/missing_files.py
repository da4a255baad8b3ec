"""Which files of weights a folder lacks, from names, sizes and indexes: no weights are read.

Large weights are stored in several files (shards). Their index, NAME.safetensors.index.json, names
in its `weight_map` the file of each array. Where there is no index, their own names say how many
there are: model-00001-of-00003.safetensors.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
OF_INDEX = ".index.json"
INDEX = f".safetensors{OF_INDEX}"
NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors)")
MOST_INDEX_BYTES = 25_000_000
MOST_INDEXES = 1000
"""That are kept in memory."""
MOST_SHARDS = 1000
"""Of which a name is believed that it is one."""


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the files in a folder and the folders in it: name from here -> bytes. A link to
    nothing has 0 bytes."""
    found: dict[str, int] = {}
    for at, folders, names in os.walk(folder):
        folders[:] = (name for name in folders if not name.startswith("."))
        within = Path(at).relative_to(folder).as_posix()
        for name in names:
            if name.startswith("."):  # macOS puts "._" files beside those on other disks
                continue
            try:
                size = os.stat(os.path.join(at, name)).st_size  # follows links
            except OSError:
                size = 0
            found[name if within == "." else f"{within}/{name}"] = size
    return found


def unusable_files(
    folder: Path, sizes: Mapping[str, int], patterns: tuple[str, ...] = ()
) -> list[str]:
    """Returns the files that a download has left out, left empty, or that are links to nothing.

    Args:
        sizes: file_sizes() of the folder.
        patterns: of the files that are loaded; empty: all weights. If there are weights in folders,
            a file beside these folders is not loaded, unless it is one of several shards.
    """

    there = [name for name in sizes if name.endswith((*WEIGHTS, INDEX))]
    in_folders = [name for name in there if "/" in name]
    alone = in_folders if in_folders and not patterns else there
    named = {name for shards in _checkpoints(folder, sizes) for name in shards}
    return sorted(n for n in named.union(alone) if not sizes.get(n) and _is_loaded(n, patterns))


def absent_shards(folder: Path, patterns: tuple[str, ...] = ()) -> list[str]:
    """Returns the shards that are not in a folder, of weights of which others are.

    Args:
        patterns: as above.
    """
    sizes = file_sizes(folder)
    begun = [shards for shards in _checkpoints(folder, sizes) if not shards.isdisjoint(sizes)]
    absent = {name for shards in begun for name in shards if name not in sizes}
    return sorted(name for name in absent if _is_loaded(name, patterns))


def _is_loaded(name: str, patterns: tuple[str, ...]) -> bool:
    weights = name.removesuffix(OF_INDEX)
    return not patterns or any(fnmatch(weights, pattern) for pattern in patterns)


def _checkpoints(folder: Path, sizes: Mapping[str, int]) -> Iterator[frozenset[str]]:
    """Yields the names of the shards of each checkpoint in a folder."""
    indexed = set()
    for name in sizes:
        if not name.endswith(INDEX):
            continue
        if shards := _shards(str(folder / name), *_version(folder / name)):
            within = name.rpartition("/")[0]
            indexed.add(within)
            yield frozenset(f"{within}/{shard}" if within else shard for shard in shards)
    for beginning, total, kind in {
        found.groups()
        for name in sizes
        if name.rpartition("/")[0] not in indexed and (found := NUMBERED.fullmatch(name))
    }:
        numbers = range(1, min(int(total), MOST_SHARDS) + 1)
        yield frozenset(f"{beginning}-{number:05}-of-{total}{kind}" for number in numbers)


def _version(path: Path) -> tuple[int, int]:
    """Time of change in ns, and bytes: they differ when a file was replaced."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(MOST_INDEXES)
def _shards(path: str, changed_ns: int, size: int) -> frozenset[str]:
    """Returns the files that an index names; none if it cannot be read: mflux then loads what is
    there."""
    if not 0 < size <= MOST_INDEX_BYTES:
        return frozenset()
    try:
        index = json.loads(Path(path).read_bytes())
        shards = frozenset(index["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return frozenset()
    are_files = all(isinstance(one, str) and Path(one).name == one for one in shards)
    return shards if are_files else frozenset()
