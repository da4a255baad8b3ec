"""The log of what operators do."""

import logging

from flask import request

from api.identity import client

log = logging.getLogger("mflux-server.audit")


def audit(action: str) -> None:
    """Log who does this, and from which address."""
    name, address = client().name, request.remote_addr
    log.info("%s %s", f"operator {name} ({address})" if name else f"somebody at {address}", action)
