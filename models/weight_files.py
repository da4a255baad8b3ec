"""Reads and checks the headers of .safetensors files, which are not trusted.

A file starts with the length of its header (8 bytes, little endian) and the header (JSON: name ->
dtype, shape and place of each array). The arrays follow.
"""

import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

MOST_HEADER_BYTES = 25_000_000
"""Headers of models with thousands of arrays take about one megabyte."""
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "C64"), 8),
}
"""Bytes per value of the types that MLX can read."""
FLOATS = ("F16", "BF16", "F32")
BITS = (3, 4, 5, 6, 8)
GROUP = 64
"""So many quantized values share a scale and a bias."""
OTHER_KINDS = (
    (b"<", "it is a web page (HTML)"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself"),
    (b"PK\x03\x04", "it is a zip or PyTorch file"),
    (b"\x80\x02", "it is a Python pickle"),
    (b"\x80\x03", "it is a Python pickle"),
    (b"\x80\x04", "it is a Python pickle"),
    (b"\x80\x05", "it is a Python pickle"),
    (b"GGUF", "it is a GGUF file"),
)


class BadWeightFile(Exception):
    """A weight file cannot be used. The message is the reason, without the name of the file."""


class ArrayInfo(NamedTuple):
    """One array, as described in the header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, ArrayInfo]:
    """Returns the arrays of a .safetensors file by name. Checks that all of them are in the file.

    Reads only the header.

    Raises:
        BadWeightFile
    """
    return _contents(path)[0]


def header_bytes(path: Path) -> bytes:
    """Returns the header of a .safetensors file as it is stored.

    Raises:
        BadWeightFile, OSError
    """
    return _read(path)[0]


def stored_bits(paths: Iterable[Path]) -> int | None:
    """Returns the bits to which mflux has quantized the weights in these files, if it says so."""
    for path in paths:
        try:
            return int(_metadata_in(_parsed(path)[0])["quantization_level"])
        except (OSError, BadWeightFile, ValueError, KeyError, TypeError):
            continue  # "None", or not mflux's; what is broken is reported when it is loaded
    return None


def loaded_shares(paths: Iterable[Path], dense: Iterable[str]) -> dict[int | None, float]:
    """Returns the memory that these weights take, divided by the size of their arrays, by the bits
    that mflux quantizes them to when it loads them; None: it does not.

    mflux quantizes matrices whose rows are a multiple of GROUP long. It gives weights 16 bits,
    unless it has saved them itself. A file that cannot be read counts as 16 bits, not quantized.

    Args:
        dense: parts of the names of folders and arrays that are never quantized.
    """
    dense = tuple(dense)
    total = 0
    loaded = dict.fromkeys((None, *BITS), 0.0)
    for path in paths:
        try:
            arrays, metadata = _contents(path)
        except BadWeightFile:
            continue  # who loads it reports it
        saved = "quantization_level" in metadata
        for name, array in arrays.items():
            values = prod(array.shape)
            size = ITEM_BYTES[array.dtype]
            total += values * size
            kept = size if saved or array.dtype not in FLOATS else min(size, 2)
            where = f"{path.parent.name}/{name}"
            can_be = len(array.shape) == 2 and array.shape[1] % GROUP == 0
            can_be = can_be and array.dtype in FLOATS and not any(one in where for one in dense)
            loaded[None] += values * kept
            for bits in BITS:
                in_bits = bits / 8 + 2 * kept / GROUP
                loaded[bits] += values * (in_bits if can_be else kept)
    return {bits: size / total for bits, size in loaded.items()} if total else {}


def are_float32(paths: Iterable[Path]) -> bool:
    """Whether most of these weights have 32 bits when they are loaded: mflux keeps the types of
    files that it has saved itself."""
    values = dict.fromkeys(ITEM_BYTES, 0)
    for path in paths:
        with suppress(BadWeightFile):
            arrays, metadata = _contents(path)
            if "quantization_level" in metadata:
                for array in arrays.values():
                    values[array.dtype] += prod(array.shape)
    return 2 * values["F32"] > sum(values.values())


def _contents(path: Path) -> tuple[dict[str, ArrayInfo], dict[str, Any]]:
    """Returns the arrays of a .safetensors file by name, and its metadata.

    Raises:
        BadWeightFile
    """
    try:
        header, data_bytes = _parsed(path)
    except OSError as error:
        broken_link = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = "it is a link to nothing" if broken_link else error.strerror or str(error)
        raise BadWeightFile(reason) from error
    metadata = _metadata_in(header)
    header.pop("__metadata__", None)
    if not header:
        raise BadWeightFile("it holds no arrays")
    return {name: _array(name, said, data_bytes) for name, said in header.items()}, metadata


def _metadata_in(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def first_bad_file(paths: Iterable[Path]) -> tuple[Path, str] | None:
    """Returns the first of these .safetensors files that cannot be used, and the reason."""
    for path in paths:
        try:
            read_header(path)
        except BadWeightFile as error:
            return path, str(error)
    return None


def _read(path: Path) -> tuple[bytes, int]:
    """Returns the header as text, and the number of bytes after it."""
    kind = path.stat().st_mode
    if stat.S_ISDIR(kind):
        raise BadWeightFile("it is a folder")
    if not stat.S_ISREG(kind):
        raise BadWeightFile("it is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise BadWeightFile("it is empty")
        start = file.read(32)
        has_header = start[8:9] == b"{"  # its length may look like the beginning of another kind
        for beginning, reason in () if has_header else OTHER_KINDS:
            if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(beginning):
                raise BadWeightFile(reason)
        header_bytes = int.from_bytes(start[:8], "little")
        if size < 8 or header_bytes > MOST_HEADER_BYTES:
            raise BadWeightFile("it is not a safetensors file")
        if header_bytes > size - 8:
            raise BadWeightFile(f"it is truncated: {header_bytes} bytes of header in {size} bytes")
        file.seek(8)
        return file.read(header_bytes), size - 8 - header_bytes


def _parsed(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header, and the number of bytes after it.

    Raises:
        BadWeightFile, OSError
    """
    text, data_bytes = _read(path)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadWeightFile("its header is not JSON") from error
    if not isinstance(header, dict):
        raise BadWeightFile("its header is not a JSON object")
    return header, data_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadWeightFile("its header names an array twice")
    return found


def _array(name: str, said: Any, data_bytes: int) -> ArrayInfo:
    try:
        dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]
        usable = isinstance(dtype, str) and all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        usable = False
    shown = name[:100]
    if not usable:
        raise BadWeightFile(f"its header does not describe the array {shown!r}")
    if dtype not in ITEM_BYTES:
        raise BadWeightFile(f"MLX cannot read values of the type {dtype[:20]!r} ({shown})")
    if end > data_bytes:
        raise BadWeightFile(f"it is truncated: the array {shown} ends {end - data_bytes} bytes on")
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise BadWeightFile(f"the size of the array {shown} does not match its shape")
    return ArrayInfo(dtype, tuple(shape))
