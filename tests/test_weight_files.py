"""Weight files that are broken: reported with their kind, without reading further."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from models.weight_files import BadWeightFile, read_header


def safetensors(header: Any, data: bytes = bytes(8), *, header_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data


def described(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


GOOD = safetensors(described())

TWICE = json.dumps(described()).encode()[:-1] + b"," + json.dumps(described()).encode()[1:]

BROKEN: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "empty"),
    "seven bytes": (b"1234567", "not a safetensors file"),
    "a web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "a web page behind a byte order mark": (b"\xef\xbb\xbf\n<html></html>", "web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
    "a zip file": (b"PK\x03\x04" + bytes(40), "zip"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "pickle"),
    "a header longer than the file": (GOOD[:20], "truncated"),
    "arrays that end behind the file": (GOOD[:-1], "truncated"),
    "a header that claims 2^60 bytes": (
        safetensors(described(), header_bytes=1 << 60),
        "not a safetensors file",
    ),
    "a header that claims a megabyte": (
        safetensors(described(), header_bytes=1 << 20),
        "truncated",
    ),
    "a header that is not JSON": (safetensors(b"{not json, truly"), "not JSON"),
    "a header of deep lists": (safetensors(b"[" * 100_000), "not JSON"),
    "a header that is a list": (safetensors([1]), "not a JSON object"),
    "a header without arrays": (safetensors({"__metadata__": {"a": "b"}}), "no arrays"),
    "a name that comes twice": (safetensors(TWICE), "twice"),
    "a type that nobody knows": (safetensors(described(dtype="F99")), "'F99'"),
    "a type that MLX cannot read": (
        safetensors(described(dtype="F64", data_offsets=[0, 16]), bytes(16)),
        "'F64'",
    ),
    "a shape of text": (safetensors(described(shape="ab")), "describe"),
    "a negative shape": (safetensors(described(shape=[-2])), "describe"),
    "a shape that does not match": (safetensors(described(shape=[3])), "match its shape"),
    "offsets in reverse": (safetensors(described(data_offsets=[8, 0])), "match its shape"),
    "offsets of floats": (safetensors(described(data_offsets=[0.0, 8.0])), "describe"),
    "an array that is null": (safetensors({"a": None}), "describe"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_weight_file_is_reported_with_its_kind_and_not_read_further(
    tmp_path: Path, kind: str
) -> None:
    content, reason = BROKEN[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BadWeightFile, match=reason):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_path_that_is_not_a_regular_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    link, folder, pipe = (tmp_path / name for name in ("link", "folder", "pipe"))
    link.symlink_to(tmp_path / "nothing")
    folder.mkdir()
    os.mkfifo(pipe)  # opening it would wait for ever
    found = {}
    for path in (link, folder, pipe, tmp_path / "missing"):
        with pytest.raises(BadWeightFile) as caught:
            read_header(path)
        found[path.name] = str(caught.value)
    assert found == {
        "link": "it is a link to nothing",
        "folder": "it is a folder",
        "pipe": "it is not a regular file",
        "missing": "No such file or directory",
    }


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    assert {name: tuple(array) for name, array in read_header(path).items()} == {"a": ("F32", (2,))}
