"""The KV cache's tensors. Block ids are the scheduler's, the layout is the kernels'."""

from __future__ import annotations

import torch

from flashserve.config import ResolvedConfig
from flashserve_kernels import KVLayer, allocate_kv_cache


class KVCache:
    """Blocks of all layers."""

    def __init__(self, resolved: ResolvedConfig, dtype: torch.dtype, device: torch.device) -> None:
        model = resolved.model
        self.layers: list[KVLayer] = allocate_kv_cache(
            model.num_layers,
            resolved.num_blocks,
            resolved.block_size,
            model.num_kv_heads,
            model.head_dim,
            dtype,
            device,
        )
