"""The protocol between the server and its decoder processes: frames over a socket pair.

A frame is the length of its header (4 bytes), the length of its payload (4 bytes), the header as
JSON, and the payload.
"""

import json
import socket
import struct
import time
from enum import StrEnum
from typing import Any

_LENGTHS = struct.Struct(">II")


class Meaning(StrEnum):
    """How the pixels of a picture are interpreted."""

    PICTURE = "picture"  # colours; transparent pixels are composited on white
    PICTURE_ALPHA = "picture_alpha"  # colours and alpha
    MASK = "mask"  # grey values; transparency is ignored, as in mflux
    MASK_CLEAR = "mask_clear"  # white where transparent; like MASK if nothing is
    MASK_OPAQUE = "mask_opaque"  # white where more than half opaque; like MASK if all is opaque


def send(
    channel: socket.socket, header: dict[str, Any], payload: bytes, deadline: float | None = None
) -> None:
    """Sends one frame.

    Args:
        deadline: time on the monotonic clock; None: no limit.

    Raises:
        TimeoutError: the deadline has passed.
        OSError: the other side has closed the socket.
    """
    text = json.dumps(header).encode()
    channel.settimeout(_seconds_until(deadline))
    channel.sendall(_LENGTHS.pack(len(text), len(payload)) + text)
    channel.settimeout(_seconds_until(deadline))
    channel.sendall(payload)


def receive(channel: socket.socket, deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
    """Receives one frame. Raises what send() raises, and EOFError if the other side has ended."""
    header_bytes, payload_bytes = _LENGTHS.unpack(_exactly(channel, _LENGTHS.size, deadline))
    header: dict[str, Any] = json.loads(_exactly(channel, header_bytes, deadline))
    return header, _exactly(channel, payload_bytes, deadline)


def _exactly(channel: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray(length)
    view, filled = memoryview(data), 0
    while filled < length:
        channel.settimeout(_seconds_until(deadline))
        received = channel.recv_into(view[filled:])
        if not received:
            raise EOFError
        filled += received
    return bytes(data)


def _seconds_until(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
