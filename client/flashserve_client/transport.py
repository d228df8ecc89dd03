"""The seam between the client and whatever carries its requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from .request import InferRequest
from .results import ModelInfo

NO_FILES: Mapping[str, bytes] = MappingProxyType({})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Chunk(NamedTuple):
    """One response of the server; None for an output that it did not send."""

    text: str
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    metrics: str | None = None
    logprobs: str | None = None
    cumulative_logprob: float | None = None
    prompt_logprobs: str | None = None
    progress: str | None = None
    others: tuple[Chunk, ...] = ()
    """Of a request for `n` samples: text, finish reason and output tokens of all but the first."""


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
        """The repository index, and the ready models beside it."""

    async def load_model(self, model: str, config: str = "", files: Mapping[str, bytes] = NO_FILES) -> None:
        """Loads (or reloads) a model and returns when it is ready. ``config`` (JSON) and ``files`` (by their path
        below the model's folder), if given, take the place of the repository's."""

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


def with_unlisted(index: list[ModelInfo], ready: Iterable[tuple[str, str]]) -> list[ModelInfo]:
    """Triton's index holds what its repositories do, and so not a model all of whose files a client gave. Such a one
    is among those of which Triton has statistics (name and version), which are the ready ones."""
    listed = {row.name for row in index}
    return index + [ModelInfo(name, version, "READY", "") for name, version in ready if name not in listed]
