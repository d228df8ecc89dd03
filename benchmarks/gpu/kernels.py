"""The kernels of a GPU at the sizes of the 8B shape, or at sizes that Triton's interpreter can bear."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.common.op_cases import Case, attention_case, linear_cases, row_cases, sample_cases
from benchmarks.common.ops import measure
from benchmarks.common.shapes import SHAPES, TINY_SHAPE
from benchmarks.common.timing import Timer
from benchmarks.gpu.report import Budget, Report
from flashserve_kernels.gpu.ops import TritonOps

FP8 = torch.float8_e4m3fn
TOKENS, ROWS = 4096, 256


def attention_cases(tiny: bool) -> list[Case]:
    """The most telling first."""
    if tiny:
        return [
            attention_case("decode 2 x 40 of 3 layers", 2, 1, 40, 4, 2, 16, num_layers=3),
            attention_case("prefill 32", 1, 32, 32, 4, 2, 16, window=20),
            attention_case("verify 2 x 3 of 40", 2, 3, 40, 4, 2, 16, softcap=20.0),
        ]
    return [
        # Blocks as far from each other as in the 8B shape's cache: 64 KiB of every 2.25 MiB, which the TLB must reach.
        attention_case("decode 64 x 4096 of 36 layers", 64, 1, 4096, num_layers=36),
        attention_case("prefill 8192", 1, 8192, 8192),
        attention_case("decode 64 x 4096", 64, 1, 4096),
        attention_case("decode 1 x 4096", 1, 1, 4096),
        attention_case("decode 1 x 32768", 1, 1, 32768),
        attention_case("decode 16 x 1024", 16, 1, 1024),
        attention_case("decode 256 x 1024", 256, 1, 1024),
        attention_case("decode 64 x 4096 fp8", 64, 1, 4096, cache_dtype=FP8, item=1),
        attention_case("decode 64 x 4096 window 1024", 64, 1, 4096, window=1024),
        attention_case("decode 64 x 4096 head 64", 64, 1, 4096, dim=64),
        attention_case("decode 64 x 4096 group 3", 64, 1, 4096, 9, 3, 64),
        attention_case("verify 64 x 4 of 4096", 64, 4, 4096),
        attention_case("verify 64 x 8 of 4096", 64, 8, 4096),
        attention_case("prefill 8 x 1024", 8, 1024, 1024),
        attention_case("prefill 2048 of 8192", 1, 2048, 8192),
        attention_case("prefill 8192 head 64", 1, 8192, 8192, dim=64),
        attention_case("prefill 8192 window 1024", 1, 8192, 8192, window=1024),
        attention_case("prefill 4096 softcap", 1, 4096, 4096, softcap=50.0),
        attention_case("prefill 4096 head 256", 1, 4096, 4096, 8, 4, 256),
    ]


def kernel_cases(tiny: bool, item: int) -> list[Case]:
    """All but attention; of the products those that are not cuBLAS alone. item: bytes of a number of the dtype."""
    config, tokens, rows = (TINY_SHAPE, 32, 4) if tiny else (SHAPES["qwen3-8b"], TOKENS, ROWS)
    gated = [case for case in linear_cases(config, (tokens,), item, None) if case.name.startswith("gate_up")]
    return [*row_cases(config, tokens, item), *sample_cases(config["vocab_size"], rows, item), *gated]


def product_cases(tiny: bool, item: int) -> list[Case]:
    """cuBLAS where steps have few rows: what is far below the copy's bandwidth wants a kernel of ours."""
    config = TINY_SHAPE if tiny else SHAPES["qwen3-8b"]
    return linear_cases(config, (1, 2) if tiny else (1, 2, 4, 8), item, None)


def measure_section(section: str, tiny: bool, dtype: torch.dtype, report: Report, budget: Budget, timer: Timer) -> None:
    """The section "attention", "kernels" or "products"."""
    ops = TritonOps(timer.device)
    cases = {
        "attention": partial(attention_cases, tiny),
        "kernels": partial(kernel_cases, tiny, dtype.itemsize),
        "products": partial(product_cases, tiny, dtype.itemsize),
    }
    with torch.inference_mode():
        for case in cases[section]():
            budget.require(3, case.name)
            report.attempt(section, case.name, partial(measure, case, ops, dtype, timer, report.ceilings))
