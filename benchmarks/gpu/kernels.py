"""Each kernel against float64 and against torch's own op: error, time, and rate as a share of the device's ceilings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.timing import Timer
from benchmarks.gpu.report import Report, speed
from flashserve_kernels import Stage, rotary, sampling
from flashserve_kernels.gpu import activation, block_copy, embedding, logprobs, norm, penalties, rope_cache
from flashserve_kernels.gpu import sampling as gpu_sampling
from flashserve_kernels.kv_cache import KVLayer

EPS = 1e-6
ROUNDINGS = 2.0  # machine epsilons that a result may be off
SAME_TOKENS = 0.98
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """What the kernels run on: a prefill step of the 8B shape, or numbers that the interpreter can bear."""

    tokens: int = 4096
    hidden: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 12288
    vocab: int = 151936
    rows: int = 256
    blocks: int = 512

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(32, 64, 4, 2, 16, 48, 512, 4, 4)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the larger of the value and the tensor's typical magnitude."""
    exact = exact.double()
    scale = exact.abs().clamp(min=float(exact.abs().mean()) or 1.0)
    return float(((actual.double() - exact) / scale).abs().max())


def check(case: Case) -> dict[str, Any]:
    """The error against the reference in float64; of tokens, how many are the reference's: float32 logarithms differ by
    a last place, so two tokens whose scores with noise are that close may change places."""
    doubles = (x.double() if x.dtype.is_floating_point else x for x in case.inputs())
    ours, exact = (x if isinstance(x, tuple) else (x,) for x in (case.ours(*case.inputs()), case.torchs(*doubles)))
    if not ours[0].is_floating_point():
        share = float((ours[0] == exact[0]).double().mean())
        return {"same_tokens": share, "correct": share >= SAME_TOKENS}
    error = max(relative_error(a, e) for a, e in zip(ours, exact, strict=True))
    return {"error": error, "correct": error <= (case.limit or ROUNDINGS * torch.finfo(ours[0].dtype).eps)}


@dataclass(frozen=True)
class Case:
    """One kernel. Its functions take the inputs, which are made anew for each check and used again for timing."""

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    """The reference; called with float64 inputs it is the definition."""
    num_bytes: float
    limit: float | None = None
    """Of the error; None: ROUNDINGS of the result's dtype."""
    timed: Callable[..., Any] | None = None
    """What torch would be asked for instead of the reference."""


def measure_kernels(report: Report, timer: Timer, sizes: Sizes, dtype: torch.dtype) -> None:
    """The section "kernels"."""
    make = _Maker(sizes, dtype, timer.device)
    bandwidth = report.get("ceilings", "copy_bytes_s")
    for case in [*_row_cases(make), _rope_case(make), _embedding_case(make), *_sample_cases(make), *_logit_cases(make)]:
        report.attempt("kernels", case.name, partial(_figures, case, timer, bandwidth))


def _figures(case: Case, timer: Timer, bandwidth: float | None) -> dict[str, Any]:
    found, inputs = check(case), case.inputs()
    found |= speed(timer.seconds(lambda: case.ours(*inputs)), bandwidth, bytes_=case.num_bytes)
    return found | {"torch_us": timer.seconds(lambda: (case.timed or case.torchs)(*inputs)) * 1e6}


class _Maker:
    """Random inputs, the same for each call."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device

    def normal(self, *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(shape, generator=generator, device=self.device) * scale
        return x.to(dtype or self.dtype)

    def integers(self, high: int, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(high, shape, generator=generator, device=self.device)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=torch.Generator(self.device).manual_seed(3), device=self.device)


def _row_cases(make: _Maker) -> list[Case]:
    T, D, wide = make.sizes.tokens, make.sizes.hidden, make.sizes.intermediate
    rows, wide_rows = T * D * make.dtype.itemsize, T * wide * make.dtype.itemsize

    def norm_inputs() -> Inputs:
        return make.normal(T, D), make.normal(T, D, seed=1), make.normal(D, seed=2), make.normal(D, seed=3)

    def torch_rms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), weight, EPS)

    def torch_add_rms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Inputs:
        return F.rms_norm(total := x + residual, (D,), weight, EPS), total

    def torch_add_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Inputs:
        return F.layer_norm(total := x + residual, (D,), weight, bias, EPS), total

    def torch_swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def add_rms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Inputs:
        return norm.add_rms_norm(x, residual, weight, EPS)

    swiglu, gelu = (
        partial(activation.activate_and_mul, activation="silu"),
        partial(activation.activate, activation="gelu_tanh"),
    )
    torch_gelu = partial(F.gelu, approximate="tanh")
    return [
        Case("rms_norm", norm_inputs, lambda x, r, w, b: norm.rms_norm(x, w, EPS), torch_rms, 2 * rows),
        Case("add_rms_norm", norm_inputs, add_rms, torch_add_rms, 4 * rows),
        Case("add_layer_norm", norm_inputs, partial(norm.add_layer_norm, eps=EPS), torch_add_layer, 4 * rows),
        Case("silu_and_mul", lambda: (make.normal(T, 2 * wide),), swiglu, torch_swiglu, 3 * wide_rows),
        Case("gelu_tanh", lambda: (make.normal(T, wide),), gelu, torch_gelu, 2 * wide_rows),
    ]  # fmt: skip


def _embedding_case(make: _Maker) -> Case:
    sizes = make.sizes
    ids, table = make.integers(sizes.vocab, sizes.tokens), make.normal(sizes.vocab, sizes.hidden)
    num_bytes = 2 * sizes.tokens * sizes.hidden * make.dtype.itemsize
    return Case("embedding", lambda: (ids, table), lambda i, t: embedding.embedding(t, i), F.embedding, num_bytes)


def _rope_case(make: _Maker) -> Case:
    T, heads, kv_heads, D = make.sizes.tokens, make.sizes.num_heads, make.sizes.num_kv_heads, make.sizes.head_dim
    slots = make.permutation(T)  # every slot of the cache is written

    def inputs() -> Inputs:
        angles = make.normal(T, D // 2, seed=1, scale=10.0, dtype=torch.float32)
        return make.normal(T, heads + 2 * kv_heads, D), torch.cat((angles.cos(), angles.sin()), -1)

    def run(function: Callable[..., Any], qkv: Tensor, cos_sin: Tensor) -> Inputs:
        k, v = (qkv.new_empty((T // 16, 16, kv_heads, D)) for _ in range(2))
        cache = KVLayer(k, v)
        function(qkv, heads, cos_sin, cache, slots)
        return qkv, cache.k, cache.v

    num_bytes = T * D * ((2 * heads + 5 * kv_heads) * make.dtype.itemsize + 4)
    ours, torchs = partial(run, rope_cache.rope_and_cache), partial(run, rotary.rope_and_cache)
    return Case("rope_and_cache", inputs, ours, torchs, num_bytes)


def _as_inputs(*tensors: Tensor) -> Inputs:
    return tensors


def _sample_cases(make: _Maker) -> list[Case]:
    N, V = make.sizes.rows, make.sizes.vocab
    logits = make.normal(N, V, scale=3.0)
    seeds, positions = make.integers(1 << 40, N), make.integers(4096, N, seed=1)
    temperature = torch.full((N,), 0.8, device=make.device)
    off, on, zero = torch.zeros_like(temperature), torch.ones_like(temperature), torch.zeros_like(seeds)
    top_p, top_k = torch.full_like(temperature, 0.9), torch.full_like(seeds, 50)
    kinds = {
        "greedy": (off, off, zero, on),
        "temperature": (temperature, off, zero, on),
        "top-k top-p": (temperature, off, top_k, top_p),
        "top-p": (temperature, off, zero, top_p),
    }
    slots, names = torch.arange(N, device=make.device), ("temperature", "min_p", "top_k", "top_p", "seed")

    def by_row(function: Callable[..., Tensor], logits: Tensor, *columns: Tensor) -> Tensor:
        *own, positions = columns
        return function(logits, slots, positions, ~Stage(0), **dict(zip(names, own, strict=True)))

    ours, torchs = partial(by_row, gpu_sampling.sample_rows), partial(by_row, sampling.sample_rows)
    return [
        Case(f"sample {name}", partial(_as_inputs, logits, *params, seeds, positions), ours, torchs, logits.nbytes)
        for name, params in kinds.items()
    ]  # fmt: skip


def _logit_cases(make: _Maker) -> list[Case]:
    """Kernels whose torch reference is no op of torch's."""
    N, V = make.sizes.rows, make.sizes.vocab
    logits, tokens, slots = make.normal(N, V, scale=3.0), make.integers(V, N), torch.arange(N, device=make.device)
    counts, in_prompt = (make.integers(50, N, V, seed=1) == 0).int(), make.integers(50, N, V, seed=2) == 0
    numbers = [torch.full((N,), value, device=make.device) for value in (1.2, 0.3, 0.1)]
    blocks = make.normal(2 * make.sizes.blocks, 16, 2, 16, make.sizes.num_kv_heads, make.sizes.head_dim)
    order = make.permutation(make.sizes.blocks)
    pairs = torch.stack((order, order.flip(0) + make.sizes.blocks), 1)

    def logprobs_with(function: Callable[..., Any], logits: Tensor) -> Inputs:
        found = function(logits, tokens, 5)
        return found.chosen, found.top

    def copy_with(function: Callable[..., Any], blocks: Tensor) -> Tensor:
        function(blocks, blocks, pairs)
        return blocks

    def penalise_with(function: Callable[..., Any], logits: Tensor) -> Tensor:
        return function(logits, slots, counts, in_prompt, *numbers)

    changed = 2 * logits.nbytes + counts.nbytes + in_prompt.nbytes
    return [
        Case("logprobs top-5", lambda: (logits,), partial(logprobs_with, logprobs.logprobs),
             partial(logprobs_with, logprobs.logprobs_reference), logits.nbytes,
             1e-3, lambda x: x.float().log_softmax(-1).topk(5)),
        Case("penalties", lambda: (logits.clone(),), partial(penalise_with, penalties.apply_penalties_),
             partial(penalise_with, penalties.apply_penalties_reference_), changed),
        Case("block_copy", lambda: (blocks.clone(),), partial(copy_with, block_copy.copy_blocks),
             partial(copy_with, block_copy.copy_blocks_reference), blocks.nbytes),
    ]  # fmt: skip
