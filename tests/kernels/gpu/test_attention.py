"""Paged attention on a GPU against the definition in float64, and against torch's own SDPA in the same dtype.

Whatever a kernel must not read is NaN: blocks of nobody, slots beyond a sequence's end, blocks that a window has left,
the output and the temporaries before they are written.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_problem import AttentionProblem
from flashserve_kernels.gpu.attention import new_arrivals, paged_attention, variants
from flashserve_kernels.gpu.attention_config import AttentionShape, choose_config, max_split_tiles
from flashserve_kernels.gpu.device import A100, B200, H200, MI300X, PRESETS, T4, stand_in
from flashserve_kernels.gpu.launch import ModelShape, Variant, observe
from flashserve_kernels.kv_cache import KVLayer

FP8 = torch.float8_e4m3fn
# (tokens computed in this step, tokens of the sequence so far)
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 40, 200)]
PREFILLS = [(5, 5), (33, 33), (16, 48), (40, 270), (2, 2)]
VERIFICATIONS = [(3, 70), (1, 5), (8, 8), (2, 129), (5, 200)]
MIXED = [row for pair in zip(DECODES, PREFILLS, strict=False) for row in pair] + DECODES[5:]
BATCHES = {"decodes": DECODES, "prefills": PREFILLS, "verifications": VERIFICATIONS, "mixed": MIXED}


class Problem(AttentionProblem):
    """In a cache that is NaN wherever no query may look."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        window: int | None = None,
        softcap: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__(rows, heads, kv_heads, dim, block_size, dtype, kv_dtype=cache_dtype, **more)
        self.dtype, self.window, self.softcap, self.scale = dtype, window, softcap, dim**-0.5
        cache_dtype = cache_dtype or dtype
        k_scale, v_scale = (0.37, 1.9) if cache_dtype == FP8 else (1.0, 1.0)
        # Two layers, of which the second is used: blocks do not follow each other without a gap.
        cache = torch.full((self.num_blocks, 2, 2, block_size, kv_heads, dim), float("nan"))
        for row, (query_len, seq_len) in enumerate(rows):
            first = 0 if window is None else max(0, seq_len - query_len - window + 1)
            slots = self.slots(row)[first:]
            for index, stored in enumerate((self.keys[row], self.values[row])):
                cache[slots // block_size, 1, index, slots % block_size] = stored[first:].float()
        self.keys = [keys.double() * k_scale for keys in self.keys]
        self.values = [values.double() * v_scale for values in self.values]
        layer = cache.to(cache_dtype).to(self.q.device).permute(1, 2, 0, 3, 4, 5)[1]
        self.cache = KVLayer(layer[0], layer[1], k_scale, v_scale)
        self.arrivals = new_arrivals(self.q.device)

    def run(self) -> Tensor:
        return paged_attention(
            self.q, self.cache, self.batch, self.scale, self.window, self.softcap, arrivals=self.arrivals
        )

    def check(self) -> None:
        """At most twice the error of SDPA in the same dtype, plus an eighth of a step of it."""
        out = self.run()
        assert not self.arrivals.any(), "the next launch counts from 0"
        assert out.dtype == self.dtype and out.shape == (self.q.shape[0], self.heads * self.dim)
        out = out.cpu().double().unflatten(1, (self.heads, self.dim))
        ours = torchs = 0.0
        for row, (query_len, seq_len) in enumerate(self.rows):
            if query_len == 0 or seq_len == 0:
                continue
            exact = self.definition(row, self.scale, self.window, self.softcap)
            ours = max(ours, _largest(out[self.starts[row] : self.starts[row + 1]] - exact))
            # SDPA knows no soft cap: its error without one.
            plain = self.definition(row, self.scale, self.window)
            torchs = max(torchs, _largest(self.sdpa(row, self.scale, self.window) - plain))
        assert ours <= 2 * torchs + torch.finfo(self.dtype).eps / 8


def _largest(difference: Tensor) -> float:
    return difference.abs().nan_to_num(nan=torch.inf).max().item()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs and temporaries start as NaN."""
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: _poisoned(new_empty(*a, **k)))


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() and x.dtype != FP8 else x


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("window", [None, 1, 13, 64])
def test_ragged_batches(name, window, device):
    Problem(BATCHES[name], dtype=torch.float16, window=window, device=device).check()


@pytest.mark.parametrize("name", ["verifications", "mixed"])
@pytest.mark.parametrize("dtype, cache_dtype", [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, FP8)])
def test_dtypes(name, dtype, cache_dtype, device):
    Problem(BATCHES[name], dtype=dtype, cache_dtype=cache_dtype, device=device).check()
    Problem(BATCHES[name], dtype=dtype, cache_dtype=cache_dtype, window=29, device=device).check()


def test_fp8_cache_on_a_gpu_that_cannot_convert_it(device):
    problem = Problem(VERIFICATIONS, dtype=torch.float16, cache_dtype=FP8, device=device)
    # Every number that E4M3 has: subnormals, both zeros, the largest.
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers = numbers[~numbers.float().isnan()]
    with stand_in(A100):
        problem.check()
        single = Problem([(1, 1)], dim=256, heads=1, kv_heads=1, dtype=torch.float16, cache_dtype=FP8, device=device)
        single.cache.v[single.batch.block_tables[0, 0], 0, 0, :254] = numbers.to(device)
        expected = numbers.double() * single.cache.v_scale
        torch.testing.assert_close(single.run()[0, :254].cpu().double(), expected, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("name", ["verifications", "mixed"])
@pytest.mark.parametrize("softcap, window", [(0.8, None), (50.0, 13)])
def test_soft_caps(name, softcap, window, device):
    Problem(BATCHES[name], dtype=torch.bfloat16, softcap=softcap, window=window, device=device).check()


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (7, 1), (8, 1), (71, 1)])
@pytest.mark.parametrize("rows", [[(1, 40), (1, 3)], [(40, 60), (1, 20)]], ids=["decode", "prefill"])
def test_query_heads_per_kv_head(rows, heads, kv_heads, device):
    Problem(rows, heads, kv_heads, dtype=torch.float16, device=device).check()


@pytest.mark.parametrize("dim", [40, 64, 80, 96, 112, 128, 256])
def test_head_sizes(dim, device):
    Problem([(1, 200), (3, 20)], dim=dim, dtype=torch.float16, device=device).check()
    Problem([(70, 150), (1, 20)], dim=dim, dtype=torch.float16, window=90, device=device).check()


@pytest.mark.parametrize("block_size", [1, 32, 64, 128, 256])
def test_block_sizes(block_size, device):
    """Smaller and larger than a tile of keys."""
    for rows in (VERIFICATIONS, [(1, 600)], [(1, 2), (150, 400)]):
        Problem(rows, block_size=block_size, dtype=torch.float16, window=300, device=device).check()


@pytest.mark.parametrize("properties", PRESETS, ids=lambda properties: properties.name)
def test_tiles_of_other_gpus(properties, device):
    with stand_in(properties):
        Problem(MIXED[:6], dim=64, dtype=torch.float16, device=device).check()
        Problem(VERIFICATIONS, dim=64, dtype=torch.float16, device=device).check()


def _shape_of(problem: Problem) -> AttentionShape:
    return AttentionShape(
        num_heads=problem.heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.dim,
        dtype=problem.dtype,
        cache_dtype=problem.cache.k.dtype,
        block_size=problem.block_size,
        window=problem.window is not None,
        softcap=problem.softcap is not None,
    )


@pytest.mark.parametrize("max_blocks, splits", [(8, 1), (40, 2), (100, 6), (2048, 40)])
@pytest.mark.parametrize("window", [None, 1200])
def test_splits(max_blocks, splits, window, device):
    """Splits with several tiles, with one, with less than one, and with nothing, next to rows of any length."""
    rows = [(1, 1), (2, 17), (4, 128), (3, 3)]
    problem = Problem(rows, window=window, dtype=torch.float16, unused_blocks=max_blocks - 8, device=device)
    config = choose_config(H200, _shape_of(problem), len(rows), 4, min(max_blocks * 16, (window or 1 << 20) + 4))
    assert config.splits >= (splits if window is None else min(splits, 2))
    problem.check()


def test_more_splits_than_the_sum_takes_at_once(device):
    problem = Problem([(1, 1100), (1, 3)], 4, 1, 256, dtype=torch.float16, unused_blocks=75, device=device)
    config = choose_config(H200, _shape_of(problem), 2, 1, 144 * 16)
    assert config.splits > 32 and 1100 // config.block_n > 32
    problem.check()


def test_splits_are_summed_by_the_kernel_that_made_them(device):
    """And by each later launch: the counters start anew."""
    problem = Problem([(1, 200), (2, 40)], dtype=torch.float16, unused_blocks=100, device=device)
    launched: list[Variant] = []
    with observe(launched.append):
        first, second = problem.run(), problem.run()
    assert [variant.name.rsplit(".", 1)[1] for variant in launched] == ["attention_kernel"] * 2
    assert dict(launched[0].constants)["SPLITS"] and torch.equal(first, second)


@pytest.mark.parametrize("properties", PRESETS, ids=lambda properties: properties.name)
def test_counters_suffice_for_every_batch_that_is_split(properties):
    for shape, rows, queries in itertools.product(SHAPES, (1, 7, 64, 200, 700), (1, 2, 8)):
        config = choose_config(properties, shape, rows, queries, 1 << 20)
        tiles = rows * -(-queries // config.block_q) * shape.num_kv_heads * -(-shape.group // config.tile_heads)
        assert config.splits == 1 or tiles <= max_split_tiles(properties)


@pytest.mark.parametrize("max_query_len", range(1, 9))
def test_splits_of_verifications(max_query_len, device):
    """Splits in which some of a row's tokens see nothing."""
    rows = [(max_query_len, max_query_len + n) for n in (0, 127, 600)]
    Problem(rows, heads=8, kv_heads=1, dtype=torch.bfloat16, unused_blocks=30, device=device).check()


@pytest.mark.parametrize("rows", [[(1, 30), (0, 0), (1, 0), (0, 0), (1, 5)], [(30, 50), (0, 0), (1, 0), (0, 0)]])
@pytest.mark.parametrize("unused_blocks", [0, 100])
def test_padding(rows, unused_blocks, device):
    """Rows without tokens, tokens without keys, tokens of nobody: the rest is as if they were not there."""
    problem = Problem(rows, dtype=torch.float16, unused_blocks=unused_blocks, padding_tokens=3, device=device)
    problem.check()
    without_keys = next(start for start, row in zip(problem.starts, rows, strict=False) if row == (1, 0))
    assert not problem.run()[without_keys].any()


def test_no_row_and_no_token(device):
    problem = Problem([(1, 5)], device=device)
    tokens = torch.tensor([0, 0], dtype=torch.int32, device=device)
    nothing = replace(problem.batch, query_start_loc=tokens, slot_mapping=problem.batch.slot_mapping[:0])
    assert paged_attention(problem.q[:0], problem.cache, nothing, 1.0, arrivals=problem.arrivals).shape == (0, 128)


def test_offsets_beyond_32_bits(device):
    """The second block is 2100 blocks of 2^20 elements further on; the pages between them are never touched."""
    problem = Problem([(1, 32)], kv_heads=1, dtype=torch.float16, cache_dtype=FP8, device=device)
    blocks = problem.batch.block_tables[0, :2].long()
    memory = torch.empty(2101 << 20, dtype=torch.uint8, device=device).view(FP8)
    views = []
    for index, stored in enumerate((problem.cache.k, problem.cache.v)):
        view = memory.as_strided((2101, *stored.shape[1:]), (1 << 20, 64, 64, 1), index * 32)
        view[0], view[2100] = stored[blocks]
        views.append(view)
    problem.cache = problem.cache._replace(k=views[0], v=views[1])
    problem.batch.block_tables[0, :2] = torch.tensor([0, 2100], dtype=torch.int32)
    problem.check()


def test_other_lengths_are_no_other_variants(device):
    """Whatever the batch, the launcher starts what `variants` lists."""
    model = ModelShape(64, 4, 2, 32, 128, 100, dtype=torch.float16, cache_dtype=torch.float16)
    announced = set(variants(H200, model, windows=(None, 13)))
    launched: set[Variant] = set()
    batches = [DECODES[:3], DECODES[2:5], PREFILLS[:3], VERIFICATIONS[:2], [(1, 1)], [(5, 8)], [(15, 16), (1, 7)]]
    with observe(launched.add):
        for rows, window, unused_blocks in itertools.product(batches, (None, 13), (0, 61)):
            Problem(rows, dtype=torch.float16, window=window, unused_blocks=unused_blocks, device=device).run()
    assert launched <= announced
    assert len(announced) < 20


SHAPES = [
    AttentionShape(8 * group, 8, dim, dtype, cache_dtype, 16, False, softcap)
    for group in (1, 3, 7, 8, 71)
    for dim in (32, 80, 128, 256)
    for dtype, cache_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, FP8))
    for softcap in (False, True)
]


@pytest.mark.parametrize("properties", PRESETS, ids=lambda properties: properties.name)
def test_every_shape_has_a_configuration(properties):
    for shape, rows, queries, keys in itertools.product(SHAPES, (1, 64, 700), (1, 2, 8, 9, 4096), (16, 4096, 1 << 20)):
        config = choose_config(properties, shape, rows, queries, keys)
        assert config.tile_heads * config.block_q <= config.block_m and config.block_q >= 1
        assert 1 <= config.splits <= 128
        assert config.splits == 1 or (queries <= 8 and config.splits * config.block_n <= keys)


QWEN3_8B = AttentionShape(32, 8, 128, torch.bfloat16, torch.bfloat16, 16, False, False)


@pytest.mark.parametrize("properties", [H200, A100, B200, MI300X, T4], ids=lambda properties: properties.name)
def test_small_batches_of_long_sequences_fill_the_gpu(properties):
    config = choose_config(properties, QWEN3_8B, 1, 1, 32768)
    assert 8 * config.splits >= 0.9 * properties.num_sms
    assert choose_config(properties, QWEN3_8B, 4096, 1, 32768).splits == 1


def test_prefill_tiles_are_large():
    config = choose_config(H200, QWEN3_8B, 1, 8192, 8192)
    assert (config.block_m, config.block_n, config.block_q, config.num_warps) == (128, 128, 32, 8)
    assert choose_config(H200, QWEN3_8B, 64, 1, 4096).block_m == 16


def test_what_the_kernel_cannot_do_is_refused(device):
    problem = Problem([(1, 5)], device=device)
    k, v = problem.cache.k, problem.cache.v
    for cache in (
        KVLayer(k, v.contiguous()),
        KVLayer(k[..., ::2], v[..., ::2]),
        KVLayer(k[:, :12], v[:, :12]),
        KVLayer(k[:, :, [0, 1, 1]], v[:, :, [0, 1, 1]]),
    ):
        with pytest.raises(ValueError):
            paged_attention(problem.q, cache, problem.batch, 1.0, arrivals=problem.arrivals)
    with pytest.raises(ValueError, match="window 0"):
        paged_attention(problem.q, problem.cache, problem.batch, 1.0, window=0, arrivals=problem.arrivals)


SINGLES_FIRST = [(1, 300), (1, 1), (1, 40), (40, 270), (33, 33), (2, 2)]


@pytest.mark.parametrize("bounds", [(3, 3), (0, 6), (1, 4), (0, 50)], ids=str)
@pytest.mark.parametrize("window, unused_blocks", [(None, 0), (None, 300), (29, 0)])
def test_single_tokens_beside_prompts_are_computed_as_decodes(bounds, window, unused_blocks, device):
    """Known by their number, or, as in a captured step, by bounds alone; behind them a row of no token."""
    rows = [*SINGLES_FIRST, (0, 0)]
    problem = Problem(rows, dtype=torch.float16, window=window, unused_blocks=unused_blocks, device=device)
    problem.batch = replace(problem.batch, min_singles=bounds[0], max_singles=bounds[1])
    launched: list[Variant] = []
    with observe(launched.append):
        problem.check()
    constants = [dict(variant.constants) for variant in launched]
    assert [each["FIXED_TILES"] for each in constants] == [True, False]
    assert [each["SPLITS"] for each in constants] == [unused_blocks > 0, False]  # with many keys a decode is split


def test_bounds_of_a_batch_without_prompts_or_without_single_tokens(device):
    for rows, singles in ((SINGLES_FIRST[:3], 3), (SINGLES_FIRST[3:], 0)):
        problem = Problem(rows, dtype=torch.float16, device=device)
        for bounds in ((singles, singles), (0, len(rows))):
            problem.batch = replace(problem.batch, min_singles=bounds[0], max_singles=bounds[1], max_query_len=64)
            problem.check()
