"""Reads the values of options: text from the command line or the environment.

Each function that reads one raises argparse.ArgumentTypeError with what the value must be.
"""

import argparse
import re
from base64 import b64decode
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

Network = IPv4Network | IPv6Network

QUANTIZE = (3, 4, 5, 6, 8)
"""Bits that mflux can quantize to."""
COMPUTE_PRECISIONS = ("float16",)
"""Precisions that mflux can compute attention and feed-forward layers in, besides a model's own."""


def whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if not minimum <= number <= maximum:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {minimum} to {maximum}, not {text!r}"
            )
        return number

    return parse


def bytes_or_off(text: str) -> int:
    """Returns 0 for off."""
    if text.lower() == "off":
        return 0
    try:
        return whole_number(0, 2**50)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or off") from error


def directory(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder, and is empty")
    return Path(text).expanduser()


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def hosts(text: str) -> tuple[str, ...]:
    found = names(text)
    if any("/" in name for name in found):
        raise argparse.ArgumentTypeError(f"must be names of hosts, without http://, not {text!r}")
    return found


def bits(text: str) -> tuple[int, ...]:
    found = tuple(int(part) if part.isdigit() else 0 for part in names(text))
    if not set(found) <= set(QUANTIZE):
        raise argparse.ArgumentTypeError(f"must be some of {QUANTIZE}, not {text!r}")
    return found


def webhook_secret(text: str) -> str:
    """Checks a webhook secret. The error does not contain the text, because it is a secret."""
    encoded = text.removeprefix("whsec_")
    try:
        secret = b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        secret = b""
    if text and not (text.startswith("whsec_") and 24 <= len(secret) <= 64):
        raise argparse.ArgumentTypeError(
            "must be whsec_ and 24 to 64 bytes in base64: make one with "
            'echo "whsec_$(openssl rand -base64 32)"'
        )
    return text


def switch(text: str) -> bool:
    if text.lower() not in ("on", "off", "true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be on or off, not {text!r}")
    return text.lower() in ("on", "true", "1")


def tile_size(text: str) -> int | str:
    """Raises: ArgumentTypeError"""
    if text in ("auto", "off"):
        return text
    if not text.isdigit() or not 128 <= int(text) <= 4096 or int(text) % 16:
        raise argparse.ArgumentTypeError(
            f"must be auto, off, or a multiple of 16 from 128 to 4096, not {text!r}"
        )
    return int(text)


def url(text: str) -> str:
    if text and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text):
        raise argparse.ArgumentTypeError(f"must be like https://pictures.example, not {text!r}")
    return text.rstrip("/")


def broker_url(text: str) -> str:
    """Checks the URL of a broker. The error does not contain it, because it has a password."""
    if text and not re.fullmatch(r"rediss?://\S+", text):
        raise argparse.ArgumentTypeError(
            "must be like redis://:PASSWORD@HOST:6379, or rediss:// for TLS"
        )
    return text


def networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(name) for name in names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be addresses like 127.0.0.1 or networks like 10.0.0.0/8: {error}"
        ) from error


def origins(text: str) -> tuple[str, ...]:
    found = names(text)
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+/?", origin.lower()):
            raise argparse.ArgumentTypeError(
                f"must be * or origins like https://app.example, not {origin!r}"
            )
    return found
