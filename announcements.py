"""What the operator reads when the server starts."""

import errno
import logging
import socket
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import errors
from allowed import Allowed
from api.api_docs import PAGE_ROUTE
from api.identity import Identity
from api.origin_check import LOOPBACK
from api.pairing import link_to
from configuration import LAN_OPERATOR, LAN_PHONE
from lan import Announcement, lan_address, qr_code
from models.hub_cache import login_command
from models.mflux_registry import find_model
from models.model_catalog import DEFAULT_MODEL, Model
from settings import Settings

log = logging.getLogger("mflux-server")

EVERY_ADDRESS = ("", "*", "0.0.0.0", "::")
"""Hosts of a server that listens on all addresses of its machine."""
SIGNS_IN = "For an hour, this signs every browser that opens it in as"


def announce(settings: Settings, allowed: Allowed, port: int) -> None:
    """Log where the server can be reached."""
    host = _in_url("localhost" if settings.host in ("", "*") else settings.host)
    log.info("serving %s on http://%s:%d", allowed.default.name, host, port)
    log.info("documentation: http://%s:%d%s", host, port, PAGE_ROUTE)


def base_url(settings: Settings, port: int) -> str:
    """Under which browsers reach the server: also those of others, if it listens for them."""
    host = lan_address() if settings.host in EVERY_ADDRESS else settings.host
    return settings.public_url or f"http://{_in_url(host)}:{port}"


def show_links(
    settings: Settings, identity: Identity, port: int, terminal: TextIO = sys.stdout
) -> None:
    """With --lan: show where the server is, and how browsers sign in. No-op without a terminal: the
    links are as good as keys, and a log may be read by others."""
    if not settings.lan:
        return
    url = base_url(settings, port)
    local = f"http://localhost:{port}" if settings.host in EVERY_ADDRESS else url
    if not terminal.isatty():
        log.info("on the local network: %s; --lan --pair NAME prints a link to sign in", url)
        return
    for name, base in ((LAN_OPERATOR, local), (LAN_PHONE, url)):
        if client := identity.named(name):
            link = link_to(identity, base, client, time.time())
            print(f"{SIGNS_IN} {name}: {link}", file=terminal)
            if name == LAN_PHONE:
                print(qr_code(link), file=terminal)


def bonjour(settings: Settings, port: int) -> Announcement | None:
    """The announcement of --bonjour. Raises: BadOption."""
    if not settings.bonjour:
        return None
    if settings.host in LOOPBACK:
        raise errors.BadOption("--bonjour announces a server that others can reach: add --lan.")
    return Announcement(socket.gethostname().partition(".")[0], [lan_address()], port)


def warn(settings: Settings, allowed: Allowed) -> None:
    """Log what the operator should know about these settings."""
    if not (settings.model or settings.models) and allowed.default.tiny:
        choices = [model for model in allowed.models if not model.tiny]
        if choices:
            for line in _first_words(choices):
                log.warning("%s", line)
        else:
            log.warning(
                "MLX has no GPU here: serving the built-in %s model, which draws simple scenes. "
                "Name a model with --model to load it all the same.",
                allowed.default.name,
            )
    if settings.host not in LOOPBACK and settings.keys is None:
        log.warning(
            "listening on %s without --keys: everyone who reaches this address may submit tasks, "
            "and sees only their own",
            settings.host or "every address",
        )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _first_words(choices: Sequence[Model]) -> list[str]:
    """What an operator reads who has named no model and has no weights."""
    usual = find_model(DEFAULT_MODEL)
    assert usual
    return [
        "no weights are on this machine yet: serving the built-in tiny model, which draws simple "
        "scenes. For other pictures, choose a model on the page, which downloads it while the "
        "server runs, or start with one of these:",
        *(f"  --model {model.name:16} {_gigabytes(model)}" for model in choices),
        f"  --model {usual.name:16} {_gigabytes(usual)}, after: {login_command()}",
    ]


def _gigabytes(model: Model) -> str:
    return f"{model.download_bytes / 1e9:.0f} GB"


def cannot_listen(settings: Settings, error: OSError) -> str:
    why = error.strerror or str(error)
    why = why.partition(" (while")[0]  # Python adds the address, which the message already has
    if error.errno == errno.EADDRINUSE:
        why = "it is in use. Choose another one with --port, or stop what listens there"
    return f"cannot listen on {settings.host}, port {settings.port}: {why}."
