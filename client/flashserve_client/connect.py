"""Which transport a URL means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit

from .transport import Address, Transport

DEFAULT_URL = "grpc://localhost:8001"
_DEFAULT_PORTS = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 8000}


def parse_url(url: str) -> Address:
    """Splits `grpc://host:8001`, `http://host:8000` or their secure forms. ValueError says what is wrong."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is no server URL: {error}") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is no server URL: give grpc://host:8001 or http://host:8000")
    if parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(f"{url!r}: a server URL has no path, query or user name")
    return Address(parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme])


class TransportFactory(Protocol):
    """Makes a transport; must be called on the event loop that will use it."""

    def __call__(self, address: Address, headers: Mapping[str, str], connect_timeout_s: float) -> Transport: ...


def transport_class(scheme: str) -> TransportFactory:
    """The transport of a URL's scheme."""
    # Imported here: grpc and tritonclient take 250 ms and httpx 165 ms, and only one of them is needed.
    if scheme.startswith("grpc"):
        from .grpc_transport import GrpcTransport

        return GrpcTransport
    from .http_transport import HttpTransport

    return HttpTransport
