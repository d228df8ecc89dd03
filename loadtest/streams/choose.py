"""Which protocol a target speaks: its URL says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from .base import Stream

FORMS = "grpc://HOST:8001, http://HOST:8000 (Triton) or http://HOST:PORT/v1 (OpenAI)"
_DEFAULT_PORTS = {"grpc": 8001, "grpcs": 8001}


@dataclass(frozen=True)
class Target:
    """Where requests go, and which share of them."""

    url: str
    protocol: str
    weight: float = 1.0

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


def parse_target(text: str) -> Target:
    """``URL`` or ``URL*WEIGHT``. Raises ValueError with what is wrong."""
    url, star, weight_text = text.partition("*")
    try:
        weight = float(weight_text) if star else 1.0
        parts = urlsplit(url)
        port = parts.port  # raises ValueError beyond 65535
    except ValueError:
        raise ValueError(f"{text!r}: not URL or URL*WEIGHT") from None
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{text!r}: the weight must be a positive number")
    if parts.scheme not in ("grpc", "grpcs", "http", "https") or not parts.hostname:
        raise ValueError(f"{text!r}: must be {FORMS}")
    if parts.scheme in _DEFAULT_PORTS:
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return Target(f"{parts.scheme}://{host}:{port or _DEFAULT_PORTS[parts.scheme]}", "triton-grpc", weight)
    return Target(url.rstrip("/"), "openai" if parts.path.strip("/") else "triton-http", weight)


def stream_for(target: Target, model: str) -> Stream:
    """The stream of a target; a protocol's libraries are loaded when the first asks for it."""
    return _STREAMS[target.protocol]()(target.url, model)


def _grpc() -> type[Stream]:
    from .triton_grpc import TritonGrpcStream

    return TritonGrpcStream


def _http() -> type[Stream]:
    from .triton_http import TritonHttpStream

    return TritonHttpStream


def _openai() -> type[Stream]:
    from .openai_sse import OpenAIStream

    return OpenAIStream


_STREAMS: dict[str, Callable[[], type[Stream]]] = {"triton-grpc": _grpc, "triton-http": _http, "openai": _openai}
