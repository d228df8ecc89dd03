"""Whatever the launchers can start compiles for GPUs that are not here, fits them, and was foreseen."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import ahead_of_time
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.gpu import (
    activation,
    attention,
    block_copy,
    embedding,
    grouped,
    invariant_linear,
    logprobs,
    norm,
    penalties,
    rope_cache,
    sampling,
    token_mask,
)
from flashserve_kernels.gpu.device import PRESETS, GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, observe, record
from flashserve_kernels.kv_cache import KVLayer
from flashserve_kernels.token_mask import num_words

SHARED_MEMORY = {properties.arch: properties.shared_memory_bytes for properties in PRESETS}
CASES_AND_GPUS = [(case, properties) for case in ahead_of_time.CASES for properties in case.gpus]
IDS = [f"{case.name}-{properties.arch}" for case, properties in CASES_AND_GPUS]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """The results of a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, ahead_of_time.__file__], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestCompiled:
    """Minutes with an empty cache of Triton's, seconds with a full one."""

    def test_every_variant_compiles(self, compiled):
        failed = [f"{entry['arch']} {entry['variant']}: {entry['error']}" for entry in compiled if entry["error"]]
        assert not failed, "\n".join(failed)
        assert {entry["arch"] for entry in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        assert all(entry["binary"] > 1000 for entry in compiled)

    def test_shared_memory_suffices(self, compiled):
        for entry in compiled:
            assert entry["shared"] <= SHARED_MEMORY[entry["arch"]], entry

    def test_attention_with_heads_of_128_does_not_spill(self, compiled):
        found = [entry for entry in compiled if "attention" in entry["variant"] and "Qwen3-8B" in entry["model"]]
        on_nvidia = [entry for entry in found if entry["spilled"] is not None]
        assert len(on_nvidia) >= 3 * 4
        assert not [entry for entry in on_nvidia if entry["spilled"] != 0]

    def test_no_other_kernel_spills(self, compiled):
        others = [entry for entry in compiled if "attention" not in entry["variant"]]
        assert not [entry for entry in others if entry["spilled"]]

    def test_loops_over_the_vocabulary_are_pipelined(self, compiled):
        """A tile of 16 bits lies in shared memory while the one before it is at work; else all loads wait."""
        found = [entry for entry in compiled if entry["arch"] in ("sm_80", "sm_90", "sm_100")]
        found = [entry for entry in found if "argmax_kernel" in entry["variant"] or "threshold" in entry["variant"]]
        assert found and all(entry["shared"] >= 2 * 4096 for entry in found)

    def test_all_of_the_plan_was_compiled(self, compiled):
        planned = {(properties.arch, repr(variant)) for _, properties, variant in ahead_of_time.plan()}
        assert planned == {(entry["arch"], entry["variant"]) for entry in compiled}


def calls(case: ahead_of_time.Case, device: str, num_blocks: int, tokens: list[int]) -> list[Callable[[], object]]:
    """Every op as a model of this shape calls it, with as many tokens and rows."""
    shape = case.shape
    cache_shape = num_blocks, 3, 2, shape.block_size, shape.num_kv_heads, shape.head_dim
    blocks = torch.zeros(cache_shape, device=device, dtype=torch.uint8).to(shape.cache_dtype)
    cache = KVLayer(blocks[:, 1, 0], blocks[:, 1, 1])
    found: list[Callable[[], object]] = []
    for count in tokens:
        found += token_calls(shape, cache, count, device)
        found += row_calls(shape, count, device)
    pairs = torch.zeros((2, 2), dtype=torch.int64, device=device) - 1
    whole = torch.zeros((2, shape.num_layers, *cache_shape[2:]), device=device, dtype=shape.cache_dtype)
    return [*found, lambda: block_copy.copy_blocks(whole, whole, pairs)]


def token_calls(shape: ModelShape, cache: KVLayer, count: int, device: str) -> list[Callable[[], object]]:
    def zeros(*sizes: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    hidden, ids = zeros(count, shape.hidden_size), zeros(count, dtype=torch.int64)
    weight = zeros(shape.hidden_size, dtype=shape.norm_dtype or shape.dtype)
    qkv = zeros(count, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    _, k, v = qkv.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), 1)
    head_weight = weight[: shape.head_dim]
    cos_sin = zeros(count, shape.head_dim, dtype=torch.float32)
    inner = zeros(count, (1 + shape.gated) * shape.intermediate_size)
    table = zeros(shape.vocab_size, shape.hidden_size)
    sizes = ((shape.hidden_size, shape.intermediate_size), (shape.vocab_size, shape.hidden_size))
    in_groups = [
        (grouped._allocate(n, k, format, torch.device(device)),) for format in shape.weight_formats for n, k in sizes
    ]
    found: list[Callable[[], object]] = [
        lambda weight=weight: grouped.linear(zeros(count, weight[0].k), weight) for weight in in_groups
    ]
    found += [lambda weight=weight: grouped.embedding(weight, ids, shape.dtype) for weight in in_groups[1::2]]
    return [
        *found,
        lambda: embedding.embedding(table, ids, shape.embedding_scale),
        lambda: embedding.add_embedding_(hidden, table, ids),
        lambda: embedding.gather_tokens(ids, ids, ids),
        lambda: embedding.scatter_tokens_(ids, ids, ids),
        lambda: invariant_linear.linear(hidden, table),
        lambda: norm.rms_norm(hidden, weight, 1e-6),
        lambda: norm.add_rms_norm(hidden, hidden.clone(), weight, 1e-5),
        lambda: norm.layer_norm(hidden, weight, weight, 1e-5),
        lambda: norm.add_layer_norm(hidden, hidden.clone(), weight, weight, 1e-5),
        lambda: rope_cache.rope_and_cache(qkv, shape.num_heads, cos_sin, cache, ids),
        lambda: rope_cache.norm_rope_and_cache(
            qkv, shape.num_heads, head_weight, head_weight, 1e-6, cos_sin, cache, ids
        ),
        lambda: rope_cache.write_kv(k, v, cache, ids),
        lambda: (activation.activate_and_mul if shape.gated else activation.activate)(inner, shape.activation),
    ]


def row_calls(shape: ModelShape, count: int, device: str) -> list[Callable[[], object]]:
    ids = torch.zeros(count, dtype=torch.int64, device=device)
    numbers = torch.ones(count, device=device)
    counts = torch.zeros((count, shape.vocab_size), dtype=torch.int32, device=device)
    bits = torch.zeros((count, num_words(shape.vocab_size)), dtype=torch.int32, device=device)
    found: list[Callable[[], object]] = [lambda: penalties.count_tokens_(counts, ids, ids)]
    for dtype in (shape.dtype, torch.float32):
        logits = torch.zeros((count, shape.vocab_size), dtype=dtype, device=device)
        if shape.caps_logits and dtype == shape.dtype:
            found.append(lambda logits=logits: activation.soft_cap_(logits, 30.0))
        found += [
            lambda logits=logits: sampling.greedy(logits),
            lambda logits=logits: sampling.sample(logits, numbers, None, None, None, ids, ids),
            lambda logits=logits: sampling.sample(logits, numbers, None, ids, None, ids, ids),
            lambda logits=logits: sampling.sample(logits, numbers, numbers, ids, numbers, ids, ids),
            lambda logits=logits: logprobs.log_probabilities(logits, ids, 0),
            lambda logits=logits: logprobs.log_probabilities(logits, ids, 7),
            lambda logits=logits: token_mask.mask_logits_(logits, bits, ids),
            lambda logits=logits: penalties.apply_penalties_(
                logits, ids, counts, counts.bool(), numbers, numbers, numbers
            ),
        ]
    return found


@pytest.mark.parametrize("case, properties", CASES_AND_GPUS, ids=IDS)
def test_what_is_launched_was_foreseen(case: ahead_of_time.Case, properties: GPUProperties):
    """Over numbers of tokens and rows of every kind: odd, round, one, many."""
    foreseen = set(case.variants(properties))
    for call in calls(case, "meta", 4, [1, 2, 3, 16, 17, 250, 256, 1000, 8192]):
        launched = record(properties, call)
        assert launched
        assert set(launched) <= foreseen, set(launched) - foreseen


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("case, properties", CASES_AND_GPUS, ids=IDS)
def test_attention_that_is_launched_was_foreseen(
    case: ahead_of_time.Case, properties: GPUProperties, batch_invariant: bool
):
    shape = case.shape
    foreseen = set(attention.variants(properties, shape, case.windows, case.softcap, batch_invariant))
    assert len(foreseen) == len(case.windows) or not batch_invariant
    blocks = torch.empty((4, shape.num_layers, 2, shape.block_size, shape.num_kv_heads, shape.head_dim), device="meta")
    blocks = blocks.to(shape.cache_dtype)
    cache = KVLayer(blocks[:, 0, 0], blocks[:, 0, 1])
    drawn = random.Random(0)

    def integers(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    arrivals = integers(5)
    for _ in range(60):
        rows = drawn.choice([1, 2, 7, 16, 64, 255, 256])
        longest = drawn.choice([1, 1, 2, 5, 8, 9, 16, 100, 512, 8192])
        num_tokens = drawn.randint(longest, rows * longest)
        batch = AttentionBatch(
            query_start_loc=integers(rows + 1),
            seq_lens=integers(rows),
            block_tables=integers(rows, drawn.choice([1, 3, 16, 100, 2048, 8192])),
            slot_mapping=integers(num_tokens, dtype=torch.int64),
            block_size=shape.block_size,
            max_query_len=longest,
        )
        qkv = torch.empty(
            (num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device="meta"
        )
        q = qkv[:, : shape.num_heads]
        for window in case.windows:
            launched = record(
                properties,
                lambda q=q, batch=batch, window=window: attention.paged_attention(
                    q, cache, batch, 0.1, window, case.softcap, arrivals=arrivals, batch_invariant=batch_invariant
                ),
            )
            assert launched
            assert set(launched) <= foreseen, (rows, longest, batch.block_tables.shape, set(launched) - foreseen)


def test_real_tensors_launch_what_meta_tensors_do(device):
    """The plan is made without memory; addresses and strides of real tensors must lead to the same variants."""
    shape = ModelShape(96, 3, 1, 32, 64, 700, 2, torch.float32, torch.float32)
    case = ahead_of_time.Case("tiny", shape)
    from flashserve_kernels.gpu.device import gpu_properties

    foreseen = set(case.variants(gpu_properties(device)))
    seen = []
    with observe(seen.append):
        for call in calls(case, device.type, 4, [3]):
            call()
    assert len(set(seen)) >= 20
    assert set(seen) <= foreseen, set(seen) - foreseen
