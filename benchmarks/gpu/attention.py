"""Paged attention against the definition in float64 and SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.paged import BLOCK_SIZE, make_batch
from benchmarks.common.shapes import causal_flops
from benchmarks.common.timing import Timer
from benchmarks.gpu.kernels import relative_error
from benchmarks.gpu.report import Budget, Report, failure_of, speed
from flashserve_kernels import AttentionBatch
from flashserve_kernels.gpu.attention import paged_attention
from flashserve_kernels.kv_cache import KVCacheSpec, KVLayer, allocate_kv_cache

ROUNDINGS = 4.0  # machine epsilons that a result may be off: probabilities are rounded, too
CHECKED_QUERIES = 16  # float64 scores of all would take hundreds of GB


@dataclass(frozen=True)
class AttentionCase:
    """Equal rows."""

    name: str
    rows: int
    queries: int
    """The last ones of each row."""
    context: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    softcap: float | None = None
    fp8: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether memory bounds it."""
        return self.queries <= 8

    @property
    def seen(self) -> int:
        """Keys that a decode reads."""
        return self.context if self.window is None else min(self.context, self.window + self.queries - 1)


CASES = [
    AttentionCase("decode 64 x 4096", 64, 1, 4096),
    AttentionCase("prefill 8192", 1, 8192, 8192),
    AttentionCase("decode 1 x 4096", 1, 1, 4096),
    AttentionCase("decode 1 x 32768", 1, 1, 32768),
    AttentionCase("decode 16 x 1024", 16, 1, 1024),
    AttentionCase("decode 256 x 1024", 256, 1, 1024),
    AttentionCase("decode 64 x 4096 fp8", 64, 1, 4096, fp8=True),
    AttentionCase("decode 64 x 4096 window 1024", 64, 1, 4096, window=1024),
    AttentionCase("decode 64 x 4096 head 64", 64, 1, 4096, head_dim=64),
    AttentionCase("decode 64 x 4096 group 3", 64, 1, 4096, 9, 3, 64),
    AttentionCase("verify 64 x 4 of 4096", 64, 4, 4096),
    AttentionCase("verify 64 x 8 of 4096", 64, 8, 4096),
    AttentionCase("prefill 8 x 1024", 8, 1024, 1024),
    AttentionCase("prefill 2048 of 8192", 1, 2048, 8192),
    AttentionCase("prefill 8192 head 64", 1, 8192, 8192, head_dim=64),
    AttentionCase("prefill 8192 window 1024", 1, 8192, 8192, window=1024),
    AttentionCase("prefill 4096 softcap", 1, 4096, 4096, softcap=50.0),
    AttentionCase("prefill 4096 head 256", 1, 4096, 4096, 8, 4, 256),
]
TINY_CASES = [
    AttentionCase("decode 2 x 40", 2, 1, 40, 4, 2, 16),
    AttentionCase("prefill 32", 1, 32, 32, 4, 2, 16, window=20),
    AttentionCase("verify 2 x 3 of 40", 2, 3, 40, 4, 2, 16, softcap=20.0),
]


@dataclass(frozen=True)
class _Problem:
    case: AttentionCase
    q: Tensor
    cache: KVLayer
    batch: AttentionBatch

    def ours(self) -> Tensor:
        case = self.case
        return paged_attention(self.q, self.cache, self.batch, case.head_dim**-0.5, case.window, case.softcap)

    def keys_and_values(self, row: int) -> tuple[Tensor, Tensor]:
        """[context, KV heads, D] each, in the queries' dtype."""
        blocks = self.batch.block_tables[row].long()
        k, v = (x[blocks].flatten(0, 1)[: self.case.context].to(self.q.dtype) for x in self.cache[:2])
        return k, v


def measure_attention(
    report: Report, budget: Budget, timer: Timer, dtype: torch.dtype, cases: list[AttentionCase]
) -> None:
    """The section "attention"."""
    for case in cases:
        budget.require(3, case.name)
        report.attempt("attention", case.name, partial(_figures, report, case, timer, dtype))


def _figures(report: Report, case: AttentionCase, timer: Timer, dtype: torch.dtype) -> dict[str, Any]:
    problem = _make(case, timer.device, dtype)
    found = _check(problem)
    seconds = timer.seconds(problem.ours)
    if case.is_decode:
        cached = 2 * case.rows * case.seen * case.num_kv_heads * case.head_dim * problem.cache.k.itemsize
        queries = 2 * problem.q.nbytes
        found |= speed(seconds, report.get("ceilings", "copy_bytes_s"), bytes_=cached + queries)
    else:
        found |= speed(seconds, report.get("ceilings", "gemm_flop_s"), flops=_flops(case))
    try:
        sdpa = _sdpa(problem)
        found["sdpa_us"] = timer.seconds(sdpa) * 1e6 if sdpa is not None else None
    except Exception as error:
        found["sdpa_failure"] = failure_of(error)["error"]
    return found


def _flops(case: AttentionCase) -> float:
    """Of the keys that are seen, not of the tiles that are computed."""
    if case.window is None:
        return case.rows * causal_flops(case.queries, case.context, case.num_heads, case.head_dim)
    seen = sum(min(case.window, position + 1) for position in range(case.context - case.queries, case.context))
    return case.rows * 4.0 * case.num_heads * case.head_dim * seen


def _make(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> _Problem:
    torch.manual_seed(0)
    num_blocks = case.rows * -(-case.context // BLOCK_SIZE)
    # Two layers: blocks lie apart, as in the cache of a model.
    layers = allocate_kv_cache(
        KVCacheSpec(2, BLOCK_SIZE, case.num_kv_heads, case.head_dim, dtype, dtype), num_blocks, device
    )
    layer = layers[0]
    for stored in layer[:2]:
        stored.normal_()
    if case.fp8:
        layer = KVLayer(layer.k.to(torch.float8_e4m3fn), layer.v.to(torch.float8_e4m3fn), 1.0, 1.0)
    tokens = case.rows * case.queries
    heads = case.num_heads + 2 * case.num_kv_heads
    qkv = torch.randn(tokens, heads, case.head_dim, device=device).to(dtype)
    batch = make_batch(case.rows, case.queries, case.context, device)
    return _Problem(case, qkv[:, : case.num_heads], layer, batch)


def _check(problem: _Problem) -> dict[str, Any]:
    """Some queries of some rows against float64."""
    case = problem.case
    out = problem.ours().view(-1, case.num_heads, case.head_dim)
    queries = torch.linspace(0, case.queries - 1, min(case.queries, CHECKED_QUERIES)).long().to(out.device)
    positions = queries + case.context - case.queries
    keys = torch.arange(case.context, device=out.device)
    mask = keys <= positions[:, None]
    if case.window is not None:
        mask &= keys > positions[:, None] - case.window
    mine, exact = [], []
    for row in {0, case.rows // 2, case.rows - 1}:
        rows = queries + row * case.queries
        q, (k, v) = problem.q[rows], problem.keys_and_values(row)
        mine.append(out[rows])
        exact.append(_definition(q.double(), k.double(), v.double(), mask, case.softcap))
    error = relative_error(torch.cat(mine), torch.cat(exact))
    return {"error": error, "correct": error <= ROUNDINGS * torch.finfo(out.dtype).eps}


def _definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """q: [n, H, D]; k, v: [S, KV, D]; mask: [n, S]. Returns [n, H, D]."""
    n, heads, head_dim = q.shape
    q = q.view(n, k.shape[1], -1, head_dim)
    scores = torch.einsum("nkgd,skd->nkgs", q, k) * head_dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return torch.einsum("nkgs,skd->nkgd", scores.softmax(-1), v).reshape(n, heads, head_dim)


def _sdpa(problem: _Problem) -> Callable[[], Tensor] | None:
    """torch's own on keys and values that lie densely already; None where it has no fast way to say the same."""
    case = problem.case
    if case.softcap is not None or case.window is not None or case.fp8 or case.queries not in (1, case.context):
        return None
    pairs = [problem.keys_and_values(row) for row in range(case.rows)]
    k, v = (torch.stack(x).transpose(1, 2).contiguous() for x in zip(*pairs, strict=True))
    q = problem.q.reshape(case.rows, case.queries, case.num_heads, case.head_dim).transpose(1, 2).contiguous()
    causal = case.queries > 1
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
