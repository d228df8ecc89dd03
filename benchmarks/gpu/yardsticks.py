"""torch's own attention at the sizes of the 8B shape, over keys and values that lie in one piece: what ours, which
follows a block table, is to be held to."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common.op_cases import Case, attention_case
from benchmarks.common.ops import speed
from benchmarks.common.timing import Timer
from benchmarks.gpu.report import Budget, Report

HEADS, KV_HEADS, DIM = 32, 8, 128
# name: rows, queries, context
SIZES = {"decode 64 x 4096": (64, 1, 4096), "prefill 8192": (1, 8192, 8192)}
TINY_SIZES = {"decode 2 x 40": (2, 1, 40), "prefill 32": (1, 32, 32)}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def measure_yardsticks(tiny: bool, dtype: torch.dtype, report: Report, budget: Budget, timer: Timer) -> None:
    """The section "yardsticks". A backend that does not take a size leaves its error there."""
    backends = {"math": SDPBackend.MATH} if timer.device.type == "cpu" else BACKENDS
    with torch.inference_mode():
        for name, (rows, queries, context) in (TINY_SIZES if tiny else SIZES).items():
            case = attention_case(name, rows, queries, context, HEADS, KV_HEADS, DIM)
            for label, backend in backends.items():
                budget.require(3, f"{name} by {label}")
                sizes = rows, queries, context
                report.attempt(
                    "yardsticks", f"{name} {label}", partial(_measure, case, sizes, backend, dtype, report, timer)
                )


def _measure(
    case: Case, sizes: tuple[int, int, int], backend: SDPBackend, dtype: torch.dtype, report: Report, timer: Timer
) -> dict[str, Any]:
    rows, queries, context = sizes
    q = torch.randn(rows, HEADS, queries, DIM, dtype=dtype, device=timer.device)
    k, v = (torch.randn(rows, KV_HEADS, context, DIM, dtype=dtype, device=timer.device) for _ in range(2))
    # Of one query the last token's mask hides nothing; torch's causal mask of more starts at the first key.
    attend = partial(scaled_dot_product_attention, q, k, v, is_causal=queries > 1, enable_gqa=True)
    with sdpa_kernel(backend):
        [seconds] = timer.seconds(attend)
    return speed(case, seconds, report.ceilings)
