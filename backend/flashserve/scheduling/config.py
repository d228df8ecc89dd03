"""What a scheduler must keep to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's limits, all resolved."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_waiting_requests: int = 1024
    max_waiting_tokens: int = 4_194_304
    watermark_blocks: int = 1
    seed: int = 0
    cache_root: str = ""
    """Fingerprint of model, dtype and layout: KV is only shared under the same one."""
