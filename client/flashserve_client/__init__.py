"""Client for flashserve: `Client` and `AsyncClient`, over gRPC or HTTP, with typed results and errors.

with Client("grpc://localhost:8001") as client:
    print(client.generate("def fibonacci(n):", max_tokens=48).text)
    for delta in client.stream("def fibonacci(n):", max_tokens=48):
        print(delta.text, end="", flush=True)
"""

from .async_client import AsyncClient
from .connect import DEFAULT_URL
from .errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    FlashserveError,
    InternalError,
    InvalidRequest,
    NotFound,
    Timeout,
    Unavailable,
)
from .logprobs import Candidate, TokenLogprobs
from .results import Completion, Delta, EmbedResult, GenerateResult, Health, ModelInfo, PromptProgress, Timings
from .stream import AsyncStream
from .sync_client import Client, Stream

__all__ = [
    "DEFAULT_URL",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Candidate",
    "Client",
    "Completion",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Delta",
    "EmbedResult",
    "FlashserveError",
    "GenerateResult",
    "Health",
    "InternalError",
    "InvalidRequest",
    "ModelInfo",
    "NotFound",
    "PromptProgress",
    "Stream",
    "Timeout",
    "Timings",
    "TokenLogprobs",
    "Unavailable",
]
