"""server.py --check: whether a server with these settings could start and draw, a line for each
part. Nothing is loaded, downloaded or changed."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import errors
from allowed import Allowed
from configuration import allow
from generation.process_memory import available_bytes, machine_bytes
from models.hub_cache import (
    absent_from_folder,
    bytes_on_disk,
    has_login,
    login_command,
    needs_download,
)
from models.mlx_setup import MlxMissing, prepare_mlx
from models.model_catalog import Model
from settings import Settings

GB = 1e9
OLDEST_PYTHON = (3, 11)
BROKER_S = 5.0


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"  # the server starts; something may fail later
    ERROR = "error"  # it does not start, or cannot draw


class Finding(NamedTuple):
    state: State
    part: str
    words: str


def report(settings: Settings) -> int:
    """Print a line for each part. Returns the exit code: 1 if there is an error, else 0."""
    worst = 0
    for state, part, words in findings(settings):
        print(f"{state:<8} {part}: {words}")
        worst = max(worst, state is State.ERROR)
    return worst


def findings(settings: Settings) -> Iterator[Finding]:
    yield _python()
    has_gpu = False
    try:
        has_gpu = prepare_mlx()
        yield _mlx(has_gpu)
    except MlxMissing as error:
        yield Finding(State.ERROR, "MLX", str(error))
        return
    yield _memory(has_gpu)
    try:
        allowed = allow(settings, has_gpu)
    except errors.BadOption as error:
        yield Finding(State.ERROR, "models", str(error))
    else:
        yield from _models(settings, allowed, machine_bytes(has_gpu))
    yield _disk(settings.data_dir)
    yield _port(settings.host, settings.port)
    if settings.broker:
        yield _broker(settings.broker)


def _python() -> Finding:
    fine = sys.version_info >= OLDEST_PYTHON
    words = f"{platform.python_version()} at {sys.executable}"
    return Finding(State.OK if fine else State.ERROR, "Python", words)


def _mlx(has_gpu: bool) -> Finding:
    try:
        versions = f"mlx {version('mlx')}, mflux {version('mflux')}"
    except PackageNotFoundError as error:
        return Finding(State.ERROR, "MLX", f"the package {error.name} is missing")
    if has_gpu:
        return Finding(State.OK, "MLX", f"{versions}, draws on the GPU")
    return Finding(State.WARNING, "MLX", f"{versions}, has no GPU here and draws on the CPU")


def _memory(has_gpu: bool) -> Finding:
    free = available_bytes()
    words = f"{machine_bytes(has_gpu) / GB:.1f} GB"
    return Finding(State.OK, "memory", f"{words}, {free / GB:.1f} GB free" if free else words)


def _models(settings: Settings, allowed: Allowed, memory_bytes: int) -> Iterator[Finding]:
    """A line for each model, and one about the login that gated ones need."""
    lacking = []
    for model in allowed.models:
        missing = needs_download(settings.data_dir, model)
        if missing and model.gated:
            lacking.append(model.name)
        yield _model(model, missing, memory_bytes)
    login = has_login()
    if lacking and not login:
        names = ", ".join(lacking)
        words = f"none, and {names} can only be downloaded with one: {login_command()}"
        state = State.ERROR if allowed.default.name in lacking else State.WARNING
        yield Finding(state, "Hugging Face login", words)
    else:
        words = "a token is there" if login else "none, and none of these models needs one"
        yield Finding(State.OK, "Hugging Face login", words)


def _model(model: Model, missing: bool, memory_bytes: int) -> Finding:
    part = f"model {model.name}"
    if model.tiny:
        return Finding(State.OK, part, "built in")
    if missing:
        size = f"{model.download_bytes / GB:.1f} GB" if model.download_bytes else "of unknown size"
        words = f"not on this machine: a download of {size}"
        return Finding(State.WARNING, part, words)
    if absent := absent_from_folder(model):
        words = f"not complete: {absent[0]} is missing"
        return Finding(State.ERROR, part, words)
    size_bytes = bytes_on_disk(model)
    words = f"{size_bytes / GB:.1f} GB on disk"
    if size_bytes > memory_bytes:
        return Finding(State.WARNING, part, f"{words}, more than the memory: use --quantize")
    return Finding(State.OK, part, words)


def _disk(data_dir: Path) -> Finding:
    there = data_dir
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(State.ERROR, "disk", f"{there} cannot be written to (--data-dir)")
    free = shutil.disk_usage(there).free
    state = State.OK if free > GB else State.WARNING
    return Finding(state, "disk", f"{free / GB:.1f} GB free for {data_dir}")


def _port(host: str, port: int) -> Finding:
    address = f"{host or '*'}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server(("" if host == "*" else host, port), family=family).close()
    except OSError as error:
        return Finding(State.ERROR, "port", f"{address}: {error.strerror or error}")
    return Finding(State.OK, "port", f"{address} is free")


def _broker(url: str) -> Finding:
    """Whether something listens there. Passwords are checked at the start."""
    parts = urlsplit(url)
    address = parts.hostname or "localhost", parts.port or 6379
    shown = f"{address[0]}:{address[1]}"
    try:
        socket.create_connection(address, BROKER_S).close()
    except OSError as error:
        return Finding(State.ERROR, "broker", f"{shown}: {error.strerror or error}")
    return Finding(State.OK, "broker", f"{shown} answers")
