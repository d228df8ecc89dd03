"""What the scheduler counts since the engine began."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct):
    """The names, and what they mean, are those of :class:`flashserve.protocol.Stats`."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    prefill_chunks: int = 0
