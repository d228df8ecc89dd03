"""The ops of a step at sizes of well-known models: how each is called, what it must move and compute at least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.shapes import causal_flops, head_size, linear_shapes
from flashserve.layers.weight_format import WEIGHT_FORMATS
from flashserve_kernels import AttentionBatch, Ops, Stage
from flashserve_kernels.kv_cache import KVCacheSpec, KVLayer, write_kv

BLOCK_SIZE = 16
EPS = 1e-6
CHECKED_QUERIES = 16  # of each sequence: float64 scores of all of a long prompt would take tens of GB
EIGHT_BIT_LIMIT = 0.3  # relative; that the kernels round rightly is their tests' business


@dataclass(frozen=True)
class Inputs:
    """Random numbers, the same for every implementation: rounded to the model's dtype, then given in ``given``."""

    device: torch.device
    dtype: torch.dtype
    given: torch.dtype

    def normal(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self._generator(seed), device=self.device) * scale
        return x.to(self.dtype).to(self.given)

    def integers(self, high: int, *shape: int, seed: int = 0) -> Tensor:
        return torch.randint(high, shape, generator=self._generator(seed), device=self.device)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator(0), device=self.device)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Bound:
    """An op on its inputs, which have a row for each token, sequence or row of logits of the step."""

    calls: Sequence[Callable[[], Any]]
    """One for each copy of what a step reads once: a weight, or a layer's keys and values."""
    tokens: tuple[Tensor, ...] = ()
    seqs: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """An op at one size."""

    name: str
    bind: Callable[[Ops, Inputs, int], Bound]
    """With inputs and so many copies, for an implementation."""
    num_bytes: float
    flops: float = 0.0
    rows: int = 1
    """Sequences, of which the reference may give the last tokens alone."""
    limit: float | None = None
    """Of the relative error; None: some roundings of the result's dtype."""


def linear_cases(config: dict[str, Any], tokens: Iterable[int], item: int, quantization: str | None) -> list[Case]:
    """Every product of a layer, and the head. item: bytes of a stored weight."""

    def case(name: str, inputs: int, outputs: int, count: int) -> Case:
        gated = name == "gate_up"

        def bind(ops: Ops, make: Inputs, copies: int) -> Bound:
            # Several weights, since torch's own ops may keep what they are given.
            weight = make.normal(outputs, inputs, seed=1, scale=inputs**-0.5)
            wanted = WEIGHT_FORMATS[quantization]
            pack = wanted.pack if wanted.needs in (None, *ops.weight_formats) else WEIGHT_FORMATS["dense"].pack
            packed = [pack(ops, weight.clone(), gated) for _ in range(copies)]
            swiglu = partial(ops.linear_gated, activation="silu")
            run = swiglu if gated else ops.logits if name == "head" else ops.linear
            x = make.normal(count, inputs)
            return Bound([partial(run, x, weight) for weight in packed], tokens=(x,))

        moved, flops = item * inputs * outputs, 2.0 * count * inputs * outputs
        return Case(f"{name} {count}", bind, moved, flops, limit=EIGHT_BIT_LIMIT if quantization else None)

    return [case(name, *sizes, count) for name, sizes in linear_shapes(config).items() for count in tokens]


def row_cases(config: dict[str, Any], tokens: int, item: int) -> list[Case]:
    """What is done to each token between products. item: bytes of an element."""
    hidden, wide, vocab, size = (
        *(config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")),
        head_size(config),
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def norm(ops: Ops, make: Inputs, copies: int, name: str) -> Bound:
        x, residual = make.normal(tokens, hidden), make.normal(tokens, hidden, seed=1)
        weight, bias = make.normal(hidden, seed=2), make.normal(hidden, seed=3)
        arguments = (x, weight) if name == "rms_norm" else (x, residual, weight)
        function = getattr(ops, name)
        call = partial(function, *arguments, *((bias,) if "layer" in name else ()), EPS)
        return Bound([call], tokens=(x, residual))

    def gelu(ops: Ops, make: Inputs, copies: int) -> Bound:
        x = make.normal(tokens, wide)
        return Bound([partial(ops.activate, x, "gelu_tanh")], tokens=(x,))

    def embedding(ops: Ops, make: Inputs, copies: int) -> Bound:
        ids = make.integers(vocab, tokens)
        return Bound([partial(ops.embedding, make.normal(vocab, hidden), ids)], tokens=(ids,))

    def rope(ops: Ops, make: Inputs, copies: int) -> Bound:
        """The queries are the result; what is stored, attention reads."""
        spec = KVCacheSpec(copies, BLOCK_SIZE, kv_heads, size, make.given, make.given)
        [cache, *_] = ops.allocate_kv_cache(spec, -(-tokens // BLOCK_SIZE))
        qkv, slots = make.normal(tokens, heads + 2 * kv_heads, size), make.permutation(tokens)
        angles = make.normal(tokens, size // 2, seed=1, scale=10.0).double()
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        cos_sin = cos_sin if make.given == torch.float64 else cos_sin.float()
        return Bound([partial(ops.rope_and_cache, qkv, heads, cos_sin, cache, slots)], tokens=(qkv, cos_sin, slots))

    row = tokens * hidden * item
    return [
        Case("rms_norm", partial(norm, name="rms_norm"), 2 * row),
        Case("add_rms_norm", partial(norm, name="add_rms_norm"), 4 * row),
        Case("add_layer_norm", partial(norm, name="add_layer_norm"), 4 * row),
        Case("gelu_tanh", gelu, 2 * tokens * wide * item),
        Case("embedding", embedding, 2 * row),
        Case("rope_and_cache", rope, tokens * size * ((2 * heads + 4 * kv_heads) * item + 4)),
    ]


def sample_cases(vocab: int, rows: int, item: int) -> list[Case]:
    """item: bytes of a logit."""

    def bind(ops: Ops, make: Inputs, copies: int, temperature: float, top_k: int, top_p: float) -> Bound:
        logits, slots = make.normal(rows, vocab, scale=3.0), torch.arange(rows, device=make.device)
        positions = make.integers(4096, rows, seed=1)
        numbers = {"temperature": temperature, "min_p": 0.0, "top_p": top_p, "top_k": top_k}
        state = {name: torch.full((rows,), value, device=make.device) for name, value in numbers.items()}
        state["seed"] = make.integers(1 << 40, rows)
        needed = {Stage.RANDOM: temperature > 0, Stage.TOP_K: top_k > 0, Stage.TOP_P: top_p < 1}
        stages = reduce(or_, (stage for stage, used in needed.items() if used), Stage(0))
        call = partial(ops.sample, logits, slots, positions, state, stages)
        return Bound([call], logits=(logits, slots, positions))

    kinds = {
        "greedy": (0.0, 0, 1.0),
        "temperature": (0.8, 0, 1.0),
        "top-p": (0.8, 0, 0.9),
        "top-k top-p": (0.8, 50, 0.9),
    }
    return [
        Case(f"sample {name}", partial(bind, temperature=temperature, top_k=top_k, top_p=top_p), rows * vocab * item)
        for name, (temperature, top_k, top_p) in kinds.items()
    ]  # fmt: skip


def make_batch(rows: int, queries: int, context: int, make: Inputs) -> AttentionBatch:
    """Equal rows, of whose context the last ``queries`` tokens are computed; shuffled blocks, and nothing is stored."""
    width = -(-context // BLOCK_SIZE)
    return AttentionBatch(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32, device=make.device) * queries,
        seq_lens=torch.full((rows,), context, dtype=torch.int32, device=make.device),
        block_tables=make.permutation(rows * width).to(torch.int32).view(rows, width),
        slot_mapping=torch.full((rows * queries,), -1, device=make.device),
        block_size=BLOCK_SIZE,
        max_query_len=queries,
        host_query_lens=[queries] * rows,
        host_seq_lens=[context] * rows,
    )


def attention_case(
    name: str,
    rows: int,
    queries: int,
    context: int,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    *,
    window: int | None = None,
    softcap: float | None = None,
    cache_dtype: torch.dtype | None = None,
    item: int = 2,
    num_layers: int = 1,
) -> Case:
    """The last ``queries`` tokens of equal rows. cache_dtype: None is the model's; item: bytes of a stored number;
    num_layers: as many layers' blocks lie between two of one layer (not for torch's ops, whose memory would not do)."""

    def bind(ops: Ops, make: Inputs, copies: int) -> Bound:
        exact = make.given == torch.float64
        stored = make.given if cache_dtype is None or type(ops) is Ops else cache_dtype
        batch = make_batch(rows, min(queries, CHECKED_QUERIES) if exact else queries, context, make)
        # One layer more: blocks lie apart, as in a model's cache.
        spread = 1 if exact or type(ops) is Ops else num_layers
        spec = KVCacheSpec(max(copies + 1, spread), BLOCK_SIZE, kv_heads, dim, make.given, stored)
        layers = ops.allocate_kv_cache(spec, batch.block_tables.numel())[:copies]
        offsets = torch.arange(BLOCK_SIZE, device=make.device)
        slots = (batch.block_tables.long()[:, :, None] * BLOCK_SIZE + offsets).flatten(1)[:, :context].flatten()
        k, v = (make.normal(rows * context, kv_heads, dim, seed=seed) for seed in (1, 2))
        for layer in layers:
            # torch's own writes where it knows the layout: interpreted kernels take seconds.
            same = isinstance(layer, KVLayer) and stored == make.given
            (write_kv if same else ops.write_kv)(k, v, layer, slots)
        q = make.normal(rows, queries, heads, dim)[:, -batch.max_query_len :].flatten(0, 1)
        attend = ops.paged_attention
        calls = [partial(attend, q, layer, batch, dim**-0.5, window, softcap) for layer in layers]
        return Bound(calls, tokens=(q,), seqs=(batch.seq_lens, batch.query_start_loc, batch.block_tables))

    # Keys that are seen: of all queries together they are read once, each query computes with its own.
    read = context if window is None else min(context, window + queries - 1)
    pairs = (min(window or context, position + 1) for position in range(context - queries, context))
    flops = 4.0 * heads * dim * sum(pairs) if window else causal_flops(queries, context, heads, dim)
    moved = 2 * rows * (read * kv_heads * dim * item + 2 * queries * heads * dim)
    return Case(name, bind, moved, rows * flops, rows, EIGHT_BIT_LIMIT if cache_dtype else None)
