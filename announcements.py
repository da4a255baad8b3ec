"""What the operator reads when the server starts."""

import errno
import logging

from allowed import Allowed
from api.api_docs import PAGE_ROUTE
from api.origin_check import LOOPBACK
from settings import Settings

log = logging.getLogger("mflux-server")


def announce(settings: Settings, allowed: Allowed, port: int) -> None:
    """Log where the server can be reached."""
    host = "localhost" if settings.host in ("", "*") else settings.host
    host = f"[{host}]" if ":" in host else host
    log.info("serving %s on http://%s:%d", allowed.default.name, host, port)
    log.info("documentation: http://%s:%d%s", host, port, PAGE_ROUTE)


def warn(settings: Settings, allowed: Allowed) -> None:
    """Log what the operator should know about these settings."""
    if not (settings.model or settings.models) and allowed.default.tiny:
        log.warning(
            "MLX has no GPU here: serving the built-in %s model, which draws abstract noise. "
            "Name a model with --model to load it all the same.",
            allowed.default.name,
        )
    if settings.host not in LOOPBACK and settings.keys is None:
        log.warning(
            "listening on %s without --keys: everyone who reaches this address may submit tasks, "
            "and sees only their own",
            settings.host or "every address",
        )


def cannot_listen(settings: Settings, error: OSError) -> str:
    why = error.strerror or str(error)
    why = why.partition(" (while")[0]  # Python adds the address, which the message already has
    if error.errno == errno.EADDRINUSE:
        why = "it is in use. Choose another one with --port, or stop what listens there"
    return f"cannot listen on {settings.host}, port {settings.port}: {why}."
