"""Who may use the server: clients, and the file in which the operator gives each a key.

The file of --keys is TOML with one table for each client:

    [alice]
    key = "sha256:c0ffee..."   # the hash that --new-key writes, or the key itself
    weight = 2                 # twice the GPU time of others while both wait
    max_waiting = 20
    max_wait_seconds = 1800
    max_requests_per_s = 5
    may_prioritize = true
    operator = false
"""

import hashlib
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from errors import BadOption

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HASHED = "sha256:"
SHORTEST_KEY = 16
"""Characters."""
REREAD_S = 1.0
MAX_FILE_BYTES = 1 << 20


class Client(BaseModel):
    """Who sends a request, and what it may do."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = ""
    """Owner of the tasks that it submits; empty: everybody, if clients are not identified."""
    weight: float = Field(1.0, gt=0, le=1000)
    """Share of the GPU time relative to other clients, while all of them have waiting tasks."""
    max_waiting: int | None = Field(None, ge=1)
    """Tasks that may wait at a time; None: as --client-max-waiting says."""
    max_wait_seconds: float | None = Field(None, gt=0)
    """Forecast seconds of work that may wait at a time; None: as --client-max-wait-s says."""
    max_requests_per_s: float | None = Field(None, gt=0)
    """None: as --client-max-requests-per-s says."""
    may_prioritize: bool = False
    """Whether it may send `priority: true`."""
    operator: bool = False
    """Whether it sees and manages the tasks of all clients, and the server."""
    key_hash: str = ""
    """SHA-256 of its key, hexadecimal; empty: it has none."""


class _Entry(Client):
    """A table of the file."""

    key: Annotated[str, StringConstraints(min_length=SHORTEST_KEY, max_length=512)]


EVERYBODY = Client(may_prioritize=True, operator=True)
"""The client of all requests where everyone is trusted."""
NOBODY = Client(name="?")
"""Who sends a request without a key to a route that needs none. It owns nothing: no client can have
this name."""


class KeyFile:
    """The clients of a file of keys; read again when the file changes. Any thread may call.

    Args:
        clock: monotonic seconds.

    Raises:
        BadOption: the file cannot be read or is not valid.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._lock = Lock()  # the time of the next look at the file
        self._version = _version(path)
        self._use(_read(path))
        self._look_at = clock() + REREAD_S

    def client(self, key: str) -> Client | None:
        """The client with this key.

        The time of the answer depends on the hash of what was sent, which says nothing about how
        much of a key is right.
        """
        self._reread()
        return self._by_key.get(_hash(key))

    def named(self, name: str) -> Client | None:
        """The client of this name, which owns tasks perhaps longer than it has a key."""
        self._reread()
        return self._by_name.get(name)

    @property
    def clients(self) -> list[Client]:
        """All clients, in the order of the file."""
        self._reread()
        return list(self._by_name.values())

    def _reread(self) -> None:
        with self._lock:
            if self._clock() < self._look_at:
                return
            self._look_at = self._clock() + REREAD_S
            version = _version(self.path)
            if version == self._version:
                return
            self._version = version
        try:
            self._use(_read(self.path))
            log.info("%s was read again: %d keys", self.path, len(self._by_key))
        except BadOption as error:
            log.error("%s The keys from before stay valid.", error)

    def _use(self, clients: list[tuple[bytes, Client]]) -> None:
        self._by_key = dict(clients)
        self._by_name = {client.name: client for _, client in clients}


def add_key(path: Path, name: str, *, operator: bool = False, option: str = "--new-key") -> str:
    """Add a client with a new key to the file, which is made if it is missing.

    Args:
        option: for messages.

    Returns:
        The key. Only its hash is written.

    Raises:
        BadOption: the name is not usable or taken, or the file cannot be changed.
    """
    if not NAME.fullmatch(name):
        raise BadOption(f"{option} {name!r}: a name has 1 to 64 letters, digits, dots, - and _.")
    if path.exists() and any(client.name == name for _, client in _read(path)):
        raise BadOption(f"{option} {name}: {path} has a client of this name already.")
    key = "mflux_" + secrets.token_urlsafe(32)
    table = f'["{name}"]\nkey = "{HASHED}{hashlib.sha256(key.encode()).hexdigest()}"\n'
    if operator:
        table += "operator = true\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a") as file:
            file.write(("\n" if file.tell() else "") + table)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadOption(f"{path} cannot be written: {error.strerror}.") from error
    return key


def _read(path: Path) -> list[tuple[bytes, Client]]:
    """Hash of its key, and client."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise BadOption(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
        tables = tomllib.loads(text.decode())
    except OSError as error:
        raise BadOption(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # also tomllib.TOMLDecodeError
        raise BadOption(f"{path} is not valid TOML: {error}.") from error
    clients = [_entry(path, name, table) for name, table in tables.items()]
    if len({key for key, _ in clients}) < len(clients):
        raise BadOption(f"{path}: two clients have the same key.")
    return clients


def _entry(path: Path, name: str, table: object) -> tuple[bytes, Client]:
    if not NAME.fullmatch(name):
        raise BadOption(f"{path}: {name!r} is not a name: letters, digits, dots, - and _.")
    if not isinstance(table, dict):
        raise BadOption(f"{path}: {name} must be a table, [{name}].")
    try:
        entry = _Entry.model_validate({**table, "name": name})
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # its input may be the key
        field = ".".join(map(str, first["loc"]))
        raise BadOption(f"{path}: {name}: {field}: {first['msg']}.") from None
    key = entry.key
    if key.startswith(HASHED):
        if not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(HASHED)):
            raise BadOption(f"{path}: {name}: key: {HASHED} must be followed by 64 hex digits.")
        hashed = bytes.fromhex(key.removeprefix(HASHED))
    else:
        hashed = _hash(key)
    rights = entry.model_dump(exclude={"key", "key_hash"})
    return hashed, Client(**rights, key_hash=hashed.hex())


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
