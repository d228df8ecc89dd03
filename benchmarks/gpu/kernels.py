"""Each kernel against float64 and against torch's own op: error, time, and rate as a share of the device's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.timing import Timer
from benchmarks.gpu.report import Budget, Report, failure_of, speed
from flashserve_kernels import rotary, sampling
from flashserve_kernels.gpu import activation, block_copy, embedding, logprobs, norm, penalties, rope_cache
from flashserve_kernels.gpu import sampling as gpu_sampling
from flashserve_kernels.kv_cache import KVLayer

EPS = 1e-6
COMPILE_S = 40.0  # what torch.compile may take


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


@dataclass(frozen=True)
class Case:
    """One kernel. Its functions take the inputs, which are made anew for each check and used again for timing."""

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    """Called with float64 inputs it is the definition."""
    num_bytes: float
    compiled: bool = False
    """Also time what torch.compile makes of torch's."""


def measure_kernels(report: Report, timer: Timer, sizes: Sizes, dtype: torch.dtype) -> None:
    """The section "kernels"."""
    bandwidth = report.get("ceilings", "copy_bytes_s")
    maker = _Maker(sizes, dtype, timer.device)
    cases = [*_row_cases(maker, sizes), _rope_case(maker, sizes), _embedding_case(maker, sizes)]
    for case in cases:
        _measure(report, case.name, lambda case=case: _figures(case, timer, bandwidth))
    for name, ours, torchs, num_bytes in _token_cases(maker, sizes):
        _measure(report, name, lambda ours=ours, torchs=torchs, n=num_bytes: _same(ours, torchs, n, timer, bandwidth))
    for name, figures in _other_cases(maker, sizes, timer, bandwidth):
        _measure(report, name, figures)


def measure_compiled(report: Report, budget: Budget, timer: Timer, sizes: Sizes, dtype: torch.dtype) -> None:
    """What torch.compile makes of the same ops, for the section "torch-compile"."""
    for case in _row_cases(_Maker(sizes, dtype, timer.device), sizes):
        if case.compiled:
            budget.require(COMPILE_S, f"compiling torch's {case.name}")
            _measure(report, case.name, lambda case=case: _compiled(case, timer), "torch-compile")


def _measure(report: Report, name: str, figures: Callable[[], dict[str, Any]], section: str = "kernels") -> None:
    """One kernel's failure is its own."""
    try:
        found = figures()
    except Exception as error:
        found = failure_of(error)
    report.put(section, name, found)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the larger of the value and the tensor's typical magnitude."""
    exact = exact.double()
    scale = exact.abs().clamp(min=float(exact.abs().mean()) or 1.0)
    return float(((actual.double() - exact) / scale).abs().max())


def compare(ours: Any, torchs: Any, exact: Any) -> dict[str, Any]:
    """Errors of results (tensors, or equally many of them) against float64; whether ours is at most twice torch's."""
    ours, torchs, exact = (x if isinstance(x, tuple) else (x,) for x in (ours, torchs, exact))
    errors = [relative_error(a, e) for a, e in zip(ours, exact, strict=True)]
    torch_errors = [relative_error(t, e) for t, e in zip(torchs, exact, strict=True)]
    eps = torch.finfo(ours[0].dtype).eps
    return {
        "error": max(errors),
        "torch_error": max(torch_errors),
        "correct": all(mine <= max(2 * its, eps) for mine, its in zip(errors, torch_errors, strict=True)),
    }


def _figures(case: Case, timer: Timer, bandwidth: float | None) -> dict[str, Any]:
    doubles = tuple(x.double() if x.dtype.is_floating_point else x for x in case.inputs())
    found = compare(case.ours(*case.inputs()), case.torchs(*case.inputs()), case.torchs(*doubles))
    del doubles
    inputs = case.inputs()
    found |= speed(timer.seconds(lambda: case.ours(*inputs)), bandwidth, bytes_=case.num_bytes)
    found["torch_us"] = timer.seconds(lambda: case.torchs(*inputs)) * 1e6
    return found


def _compiled(case: Case, timer: Timer) -> dict[str, Any]:
    inputs = case.inputs()
    compiled = torch.compile(case.torchs, dynamic=False)
    seconds = timer.seconds(lambda: compiled(*inputs))
    return {"us": seconds * 1e6, "ours_us": timer.seconds(lambda: case.ours(*inputs)) * 1e6}


def _same(
    ours: Callable[[], Tensor], torchs: Callable[[], Tensor], num_bytes: float, timer: Timer, bandwidth: float | None
) -> dict[str, Any]:
    """Of kernels whose results are tokens: how many are the reference's. Float32 logarithms differ by a last place, so
    two tokens whose scores with noise are that close may change places."""
    share = float((ours() == torchs()).double().mean())
    found: dict[str, Any] = {"same_tokens": share, "correct": share >= 0.98}
    found |= speed(timer.seconds(ours), bandwidth, bytes_=num_bytes)
    found["torch_us"] = timer.seconds(torchs) * 1e6
    return found


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


def _row_cases(make: _Maker, sizes: Sizes) -> list[Case]:
    T, D, wide = sizes.tokens, sizes.hidden, sizes.intermediate
    rows = T * D * make.dtype.itemsize

    def norm_inputs() -> tuple[Tensor, ...]:
        return make.normal(T, D), make.normal(T, D, seed=1), make.normal(D, seed=2), make.normal(D, seed=3)

    def torch_add_rms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (D,), weight, EPS), total

    def torch_add_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (D,), weight, bias, EPS), total

    def torch_swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return [
        Case(
            "rms_norm",
            norm_inputs,
            lambda x, r, w, b: norm.rms_norm(x, w, EPS),
            lambda x, r, w, b: F.rms_norm(x, (D,), w, EPS),
            2 * rows,
            compiled=True,
        ),
        Case(
            "add_rms_norm",
            norm_inputs,
            lambda x, r, w, b: norm.add_rms_norm(x, r, w, EPS),
            torch_add_rms,
            4 * rows,
            compiled=True,
        ),
        Case(
            "add_layer_norm",
            norm_inputs,
            lambda x, r, w, b: norm.add_layer_norm(x, r, w, b, EPS),
            torch_add_layer,
            4 * rows,
        ),
        Case(
            "silu_and_mul",
            lambda: (make.normal(T, 2 * wide),),
            activation.silu_and_mul,
            torch_swiglu,
            3 * T * wide * make.dtype.itemsize,
            compiled=True,
        ),
        Case(
            "gelu_tanh",
            lambda: (make.normal(T, wide),),
            activation.gelu_tanh,
            lambda x: F.gelu(x, approximate="tanh"),
            2 * T * wide * make.dtype.itemsize,
        ),
    ]


def _embedding_case(make: _Maker, sizes: Sizes) -> Case:
    ids = make.integers(sizes.vocab, sizes.tokens)
    table = make.normal(sizes.vocab, sizes.hidden)
    return Case(
        "embedding",
        lambda: (table, ids),
        embedding.embedding,
        lambda table, ids: F.embedding(ids, table),
        2 * sizes.tokens * sizes.hidden * make.dtype.itemsize,
    )


def _rope_case(make: _Maker, sizes: Sizes) -> Case:
    T, heads, kv_heads, D = sizes.tokens, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    slots = make.permutation(T)  # every slot of the cache is written

    def inputs() -> tuple[Tensor, ...]:
        angles = make.normal(T, D // 2, seed=1, scale=10.0, dtype=torch.float32)
        return make.normal(T, heads + 2 * kv_heads, D), torch.cat((angles.cos(), angles.sin()), -1)

    def new_cache(qkv: Tensor) -> KVLayer:
        return KVLayer(*(qkv.new_empty((T // 16, 16, kv_heads, D)) for _ in range(2)))

    def run(function: Callable[..., Any], qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, ...]:
        cache = new_cache(qkv)
        function(qkv, heads, cos_sin, cache, slots)
        return qkv, cache.k, cache.v

    return Case(
        "rope_and_cache",
        inputs,
        lambda qkv, cos_sin: run(rope_cache.rope_and_cache, qkv, cos_sin),
        lambda qkv, cos_sin: run(rotary.rope_and_cache, qkv, cos_sin),
        T * D * ((2 * heads + 3 * kv_heads + 2 * kv_heads) * make.dtype.itemsize + 4),
    )


def _token_cases(make: _Maker, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor], float]]:
    N, V = sizes.rows, sizes.vocab
    logits = make.normal(N, V, scale=3.0)
    seeds, positions = make.integers(1 << 40, N), make.integers(4096, N, seed=1)
    temperature = torch.full((N,), 0.8, device=make.device)
    off, on, zero = torch.zeros_like(temperature), torch.ones_like(temperature), torch.zeros_like(seeds)
    top_p, top_k = torch.full_like(temperature, 0.9), torch.full_like(seeds, 50)
    kinds = {
        "sample greedy": (off, off, zero, on),
        "sample temperature": (temperature, off, zero, on),
        "sample top-k top-p": (temperature, off, top_k, top_p),
        "sample top-p": (temperature, off, zero, top_p),
    }
    for name, params in kinds.items():
        yield (
            name,
            lambda params=params: gpu_sampling.sample_rows(logits, *params, seeds, positions),
            lambda params=params: sampling.sample_rows(logits, *params, seeds, positions),
            N * V * make.dtype.itemsize,
        )


def _other_cases(
    make: _Maker, sizes: Sizes, timer: Timer, bandwidth: float | None
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Kernels whose torch reference is no op of torch's: equal results, and the time of both."""
    N, V = sizes.rows, sizes.vocab
    logits, tokens = make.normal(N, V, scale=3.0), make.integers(V, N)

    def measure_logprobs() -> dict[str, Any]:
        ours, exact = logprobs.logprobs(logits, tokens, 5), logprobs.logprobs_reference(logits, tokens, 5)
        error = max(float((a - b).abs().max()) for a, b in ((ours.chosen, exact.chosen), (ours.top, exact.top)))
        found = {"error": error, "correct": error < 1e-3}
        found |= speed(timer.seconds(lambda: logprobs.logprobs(logits, tokens, 5)), bandwidth, bytes_=logits.nbytes)
        found["torch_us"] = timer.seconds(lambda: logits.float().log_softmax(-1).topk(5)) * 1e6
        return found

    def measure_penalties() -> dict[str, Any]:
        counts = (make.integers(50, N, V, seed=1) == 0).int()
        in_prompt = make.integers(50, N, V, seed=2) == 0
        slots = torch.arange(N, device=make.device)
        numbers = [torch.full((N,), value, device=make.device) for value in (1.2, 0.3, 0.1)]
        ours = penalties.apply_penalties_(logits.clone(), slots, counts, in_prompt, *numbers)
        exact = penalties.apply_penalties_reference_(logits.clone(), slots, counts, in_prompt, *numbers)
        error, scratch = relative_error(ours, exact), logits.clone()
        found = {"error": error, "correct": error <= torch.finfo(logits.dtype).eps}
        seconds = timer.seconds(lambda: penalties.apply_penalties_(scratch, slots, counts, in_prompt, *numbers))
        return found | speed(seconds, bandwidth, bytes_=2 * logits.nbytes + counts.nbytes + in_prompt.nbytes)

    def measure_copy() -> dict[str, Any]:
        blocks = make.normal(2 * sizes.blocks, 16, 2, 16, sizes.num_kv_heads, sizes.head_dim)
        order = make.permutation(sizes.blocks)
        pairs = torch.stack((order, order.flip(0) + sizes.blocks), 1)
        expected = blocks.clone()
        block_copy.copy_blocks_reference(expected, expected, pairs)
        block_copy.copy_blocks(blocks, blocks, pairs)
        found = {"correct": bool(torch.equal(blocks, expected))}
        seconds = timer.seconds(lambda: block_copy.copy_blocks(blocks, blocks, pairs))
        found |= speed(seconds, bandwidth, bytes_=blocks.nbytes)
        found["torch_us"] = timer.seconds(lambda: block_copy.copy_blocks_reference(blocks, blocks, pairs)) * 1e6
        return found

    yield "logprobs top-5", measure_logprobs
    yield "penalties", measure_penalties
    yield "block_copy", measure_copy
