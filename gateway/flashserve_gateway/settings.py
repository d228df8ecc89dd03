"""What a gateway was asked for: one frozen value, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PORT = 9000
DEFAULT_TRITON = "localhost:8001"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What one request may take. Sizes in bytes, times in seconds."""

    body_bytes: int = 4 << 20
    """A context of 128k tokens is half a megabyte; with its JSON escapes, less than two. Read, JSON takes up to 25
    times as much."""
    bodies_bytes: int = 64 << 20
    """Of all requests whose bodies are being received."""
    body_timeout_s: float = 30.0
    """From the headers' end to the body's."""
    header_bytes: int = 32 << 10
    header_timeout_s: float = 10.0
    """From the connection, or the request's first byte, to the headers' end."""
    first_token_timeout_s: float = 300.0
    """A streamed answer that has not begun by then is cancelled. Clients give up after 600."""
    stall_timeout_s: float = 300.0
    """A streamed answer is cancelled when its next token does not come within this."""
    whole_timeout_s: float = 600.0
    """An answer that is sent at once is cancelled when it is not complete by then."""
    slow_reader_timeout_s: float = 60.0
    """A client that does not read for so long loses its connection: its tokens would wait in tritonserver."""
    queue_wait_s: float = 4.0
    """So long a request waits for an engine whose queue is full; 0: it is refused at once. Less than `keep_alive_s`, or
    a stream would be refused after its status was sent."""
    queued: int = 256
    """Requests that wait so for one model. Each may hold a body of the largest size."""
    prompts: int = 64
    """Of one request to /v1/completions."""
    embedding_inputs: int = 2048
    """Of one request to /v1/embeddings, as OpenAI allows."""
    embeddings_at_once: int = 16
    """Of these, given to the engines at the same time: they share steps, and leave room in the queue for others."""
    samples: int = 16
    """Of one prompt (`n`)."""
    file_bytes: int = 200 << 20
    """Of one file that is uploaded, as OpenAI allows; the same holds for `batch_lines`."""
    files: int = 1000
    """Of one key, at a time."""
    files_bytes: int = 4 << 30
    """Of all files of one key."""
    upload_timeout_s: float = 3600.0
    """From the headers' end to the file's. Its next piece must come within `body_timeout_s`."""
    uploads: int = 4
    """Files that are received at the same time: they lie in the system's folder for temporary files until they end."""
    batch_lines: int = 50_000
    batches: int = 16
    """Of one key, that are not finished."""
    batch_requests_at_once: int = 8
    """Of all batches, in the engines: they share steps, and leave room in the queues for others."""


@dataclass(frozen=True)
class Settings:
    """Of one gateway."""

    triton: tuple[str, ...] = (DEFAULT_TRITON,)
    """HOST:PORT of each server's gRPC endpoint."""
    triton_metrics: tuple[str, ...] = ()
    """HOST:PORT of each server's metrics, as many as servers and in their order: figures of the page, and what routing
    knows beside our own requests. Both are left out without."""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    keys_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    data_dir: Path | None = None
    """Where files and batches are kept. None: there are no /v1/files and /v1/batches."""
    redis: str | None = field(default=None, repr=False)
    """URL of the Redis that gateways share, with its password; None: responses and quotas are this gateway's own."""
    cache_answers_s: float | None = None
    """So long an answer is kept for identical requests with temperature 0 or a seed; None: none is kept."""
    keep_alive_s: float = 5.0
    """So long after the last byte a stream gets a comment: it finds dead peers, and proxies do not cut it off."""
    refresh_s: float = 1.0
    """How often the servers are asked for their models."""
    limits: Limits = field(default_factory=Limits)

    @property
    def is_private(self) -> bool:
        """Whether it serves whoever is on this machine, and nobody else."""
        return self.keys_file is None and self.host in LOOPBACK
