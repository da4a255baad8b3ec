"""The log of what operators do."""

import logging

from flask import request

from api.identity import client

log = logging.getLogger("mflux-server.audit")


def audit(action: str) -> None:
    """Log who does this, and from which address."""
    log.info("operator %s (%s) %s", client().name or "everyone", request.remote_addr, action)
