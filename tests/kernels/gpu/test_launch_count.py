"""How many kernels a decode step starts: at one token they are what a GPU waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashserve.layers.attention import Attention, StepBatch
from flashserve.layers.rotary import RotaryEmbedding
from flashserve_kernels import Stage
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.gpu.device import H200
from flashserve_kernels.gpu.launch import record
from flashserve_kernels.gpu.ops import TritonOps
from flashserve_kernels.kv_cache import KVLayer

META = torch.device("meta")
HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 4096, 12288, 32, 8, 128, 151936, 36  # Qwen3-8B
MOST_KERNELS = 340


def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device=META)


class Norm:
    weight, eps = empty(DIM), 1e-6


class CountingOps(TritonOps):
    """Counts cuBLAS's products, of which the launcher knows nothing."""

    products = 0

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.products += 1
        return super().linear(x, weight, bias)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rows, blocks", [(1, 2048), (64, 256)])
def test_a_decode_step_of_36_layers(qk_norm, rows, blocks):
    """With splits of the keys and without; products by cuBLAS, one kernel each unless it splits their inputs."""
    ops = CountingOps(META)
    rotary: Any = object.__new__(RotaryEmbedding)
    norms: Any = {"q_norm": Norm(), "k_norm": Norm()} if qk_norm else {}
    attention = Attention(
        ops,
        qkv_proj=lambda x: ops.linear(x, empty((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)),  # type: ignore[arg-type]
        o_proj=lambda x: ops.linear(x, empty(HIDDEN, HEADS * DIM)),  # type: ignore[arg-type]
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        rotary=rotary,
        **norms,
    )
    keys = empty(blocks, 16, KV_HEADS, DIM)
    batch = AttentionBatch(
        query_start_loc=empty(rows + 1, dtype=torch.int32),
        seq_lens=empty(rows, dtype=torch.int32),
        block_tables=empty(rows, blocks, dtype=torch.int32),
        slot_mapping=empty(rows, dtype=torch.int64),
        block_size=16,
        max_query_len=1,
    )
    step = StepBatch(batch, {rotary: empty(rows, DIM, dtype=torch.float32)})
    ids, weight = empty(rows, dtype=torch.int64), empty(HIDDEN)

    def layer() -> None:
        x, residual = ops.add_rms_norm(empty(rows, HIDDEN), empty(rows, HIDDEN), weight, 1e-6)
        x, _ = ops.add_rms_norm(attention(x, KVLayer(keys, keys), step), residual, weight, 1e-6)
        ops.linear(ops.linear_gated(x, empty(2 * INNER, HIDDEN), "silu"), empty(HIDDEN, INNER))

    def ends() -> None:
        x = ops.embedding(empty(VOCAB, HIDDEN), ops.gather_tokens(ids, ids, ids))
        logits = ops.logits(ops.rms_norm(x, weight, 1e-6), empty(VOCAB, HIDDEN))
        ops.scatter_tokens_(ids, ids, ops.sample(logits, ids, ids, _state(), Stage(0)))

    per_layer = len(record(H200, layer)) + ops.products
    assert per_layer == 9
    ops.products = 0
    assert LAYERS * per_layer + len(record(H200, ends)) + ops.products <= MOST_KERNELS


def _state() -> dict[str, torch.Tensor]:
    numbers, ids = empty(1, dtype=torch.float32), empty(1, dtype=torch.int64)
    return {"temperature": numbers, "min_p": numbers, "top_p": numbers, "top_k": ids, "seed": ids}
