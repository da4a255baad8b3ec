"""Reads the X-Forwarded-* headers of proxies that the operator trusts, and of nobody else.

Such a proxy must set or remove all of X-Forwarded-For, -Proto, -Host and -Prefix itself: what a
client has sent in them would count otherwise.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from werkzeug.middleware.proxy_fix import ProxyFix

Network = IPv4Network | IPv6Network


def trusting(inner: WSGIApplication, proxies: Sequence[Network]) -> WSGIApplication:
    """Returns an application to which a request of one of these proxies looks as the client has
    sent it: address, scheme, host and path prefix."""
    if not proxies:
        return inner
    behind_proxy = ProxyFix(inner, x_for=1, x_proto=1, x_host=1, x_prefix=1)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        address = ip_address(environ["REMOTE_ADDR"])
        from_proxy = any(address in network for network in proxies)
        return (behind_proxy if from_proxy else inner)(environ, start_response)

    return application
