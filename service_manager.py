"""What systemd is informed of, as sd_notify(3) describes it. Elsewhere it does nothing."""

import logging
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

READY, STOPPING = "READY=1", "STOPPING=1"


def notify(state: str, environ: Mapping[str, str]) -> None:
    """Sends a state to the socket that the variable NOTIFY_SOCKET names, if there is one."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux' abstract names
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("the service manager could not be informed of %s: %s", state, error)
