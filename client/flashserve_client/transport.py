"""The seam between the client and the two protocols, and the choice by URL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from .request import InferRequest
from .results import ModelInfo

DEFAULT_URL = "grpc://localhost:8001"
_DEFAULT_PORTS = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 8000}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Chunk(NamedTuple):
    """One response of the server; None for an output that it did not send."""

    text: str
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    metrics: str | None = None


class Reader(Protocol):
    """The responses of one request; nothing is sent before the first `read`."""

    async def read(self) -> Chunk | None:
        """The next response, None after the last. Raises FlashserveError. Cancelling it ends the request."""

    async def aclose(self) -> None:
        """Ends the request and tells the server, if it still runs. May be called at any time, several times."""


class Transport(Protocol):
    """A connection (pool) to one server. Every method may raise FlashserveError."""

    def open(self, request: InferRequest) -> Reader:
        """Prepares a request."""

    async def server_live(self) -> bool:
        """Whether tritonserver answers."""

    async def model_ready(self, model: str) -> bool:
        """Whether Triton holds the model ready, which says nothing about its engine."""

    async def models(self) -> list[ModelInfo]:
        """The repository index."""

    async def load_model(self, model: str) -> None:
        """Loads (or reloads) a model and returns when it is ready."""

    async def unload_model(self, model: str) -> None:
        """Asks for a model to be unloaded; returns at once while its requests drain."""

    async def aclose(self) -> None:
        """Closes every connection."""


class Address(NamedTuple):
    """A parsed server URL."""

    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}"

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def secure(self) -> bool:
        return self.scheme in ("grpcs", "https")

    @property
    def loopback(self) -> bool:
        """A proxy from the environment must not see requests to this machine."""
        return self.host in _LOOPBACK


def parse_url(url: str) -> Address:
    """Splits `grpc://host:8001`, `http://host:8000` or their secure forms. ValueError says what is wrong."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is no server URL: give grpc://host:8001 or http://host:8000")
    if parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(f"{url!r}: a server URL has no path, query or user name")
    return Address(parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme])


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
