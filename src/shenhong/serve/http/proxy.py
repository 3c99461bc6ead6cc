"""What a proxy that speaks TLS says of the request it hands on; read only with --behind-proxy, and only from near by."""

from __future__ import annotations

import contextlib
import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope


def forwarded(scope: Scope) -> Scope:
    """The request as its caller made it: over https, unless the proxy says otherwise, and from the address it was seen at.

    Of a list of addresses only the last was written by the proxy itself. A peer with a public address is no proxy of ours.
    """
    client = scope.get("client")
    if client is None or not _is_private(client[0]):
        return scope
    headers = Headers(scope=scope)
    scheme = _last(headers.getlist("x-forwarded-proto")).lower()
    address = _last(headers.getlist("x-forwarded-for"))
    with contextlib.suppress(ValueError):  # the proxy does not say, or not as one does
        client = (str(ipaddress.ip_address(address)), 0)
    scheme = scheme if scheme in ("http", "https") else "https"
    return {**scope, "scheme": scheme, "client": client}


def _last(lists: list[str]) -> str:
    return ",".join(lists).rpartition(",")[2].strip()


def _is_private(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_private
    except ValueError:
        return False
