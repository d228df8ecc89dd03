"""Tile sizes and splits of paged attention: one pure function of the GPU, the model's heads and the batch's shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flashserve_kernels.gpu.device import GPUProperties

MAX_SPLIT_QUERIES = 8
"""Tokens per row up to which keys may be split among programs: decode and verification."""
MAX_DECODE_ROWS = 64
"""Rows of a tile (tokens times query heads) up to which a batch of short rows counts as a decode."""

_MAX_SPLITS = 128
_MAX_WAVES = 4
_MAX_PER_SM = 3


def max_split_tiles(properties: GPUProperties) -> int:
    """Tiles of queries of a batch whose keys are split, at most: two splits of each take all waves."""
    return _MAX_WAVES * _MAX_PER_SM * properties.num_sms // 2


@dataclass(frozen=True)
class AttentionShape:
    """The numbers of a model that the kernel's constants follow."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    block_size: int
    window: bool
    softcap: bool

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def block_d(self) -> int:
        """The head size as tensor cores take it: the next power of two, at least 16."""
        return max(16, 1 << (self.head_dim - 1).bit_length())


@dataclass(frozen=True)
class AttentionConfig:
    """How the kernel is started."""

    block_m: int
    """Rows of the tile: tokens times query heads."""
    block_n: int
    """Keys per tile."""
    tile_heads: int
    """Query heads per program, all of one KV head."""
    decode: bool
    """Tiles are fixed per row, not searched for."""
    splits: int
    """Programs that share the keys of a tile; of several the last one sums up all."""
    num_warps: int
    num_stages: int
    edge_stages: int | None
    """Stages of the loops over keys that some query does not see; None: as many."""
    mask_all: bool = False
    """One loop for all keys of a prefill's tile: where it has two, a score's rounding tells which keys its neighbours
    see."""

    @property
    def block_q(self) -> int:
        """Tokens per program."""
        return self.block_m // self.tile_heads


@dataclass(frozen=True)
class _Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_stages: int | None = None


# Without tensor cores (float32, Turing) both operands lie in registers whole: this is what 255 hold at head size 128.
_FMA_TILES = [_Tile(16, 16, 4, 2), _Tile(16, 16, 4, 1)]


@functools.lru_cache(maxsize=4096)
def choose_config(
    properties: GPUProperties, shape: AttentionShape, num_rows: int, max_query_len: int, max_keys: int
) -> AttentionConfig:
    """The configuration of a batch of ``num_rows`` rows, each of up to ``max_query_len`` tokens and ``max_keys`` keys.

    Depends on nothing else, so that all variants are known before the first batch, and a CUDA graph's stay the same.
    """
    decode = max_query_len <= MAX_SPLIT_QUERIES or max_query_len * shape.group <= MAX_DECODE_ROWS
    candidates = _decode_tiles(properties, shape, max_query_len) if decode else _prefill_tiles(properties, shape)
    tile = _first_that_fits(properties, shape, candidates)
    head_tiles = -(-shape.group // tile.block_m)
    tile_heads = -(-shape.group // head_tiles)
    splits = 1
    if max_query_len <= MAX_SPLIT_QUERIES:
        tiles_per_row = -(-max_query_len // (tile.block_m // tile_heads))
        programs = num_rows * tiles_per_row * shape.num_kv_heads * head_tiles
        splits = _num_splits(properties, shape, tile, programs, max_keys)
    return AttentionConfig(
        tile.block_m, tile.block_n, tile_heads, decode, splits, tile.num_warps, tile.num_stages, tile.edge_stages
    )


def invariant_config(properties: GPUProperties, shape: AttentionShape) -> AttentionConfig:
    """The one configuration of every batch: between a decode's 16 rows and a prompt's 128."""
    tiles = [tile for tile in _prefill_tiles(properties, shape) if tile.block_m <= MAX_DECODE_ROWS]
    tile = _first_that_fits(properties, shape, tiles)
    head_tiles = -(-shape.group // tile.block_m)
    tile_heads = -(-shape.group // head_tiles)
    stages = tile.num_warps, tile.num_stages, tile.edge_stages
    return AttentionConfig(tile.block_m, tile.block_n, tile_heads, False, 1, *stages, mask_all=True)


def _first_that_fits(properties: GPUProperties, shape: AttentionShape, tiles: list[_Tile]) -> _Tile:
    fitting = (tile for tile in tiles if _shared_bytes(properties, shape, tile) <= properties.shared_memory_bytes)
    return next(fitting, tiles[-1])


def _prefill_tiles(properties: GPUProperties, shape: AttentionShape) -> list[_Tile]:
    """From the fastest to the smallest."""
    if shape.dtype == torch.float32 or _has_no_mma(properties):
        return _FMA_TILES
    wide = shape.block_d > 128
    if properties.is_amd:
        block_n = 32 if shape.cache_dtype.itemsize == 1 else 64
        return [_Tile(64, 32, 4, 2) if wide else _Tile(128, block_n, 4, 2), _Tile(32, 32, 4, 1), _Tile(16, 16, 4, 1)]
    smaller = [_Tile(64, 32, 4, 2), _Tile(32, 32, 4, 2), _Tile(16, 16, 4, 1)]
    if _has_large_mma(properties):
        # 128 x 128 with 8 warps: two warpgroups of 64 rows read each tile of keys once from shared memory, which is
        # 48 of every 64 clocks of QK^T there; with 64 keys it is 32 of 32. 32 KB of queries + 2 x 64 KB = 160 KB.
        # The loops at the causal edge are short and take one stage, or their prologues' registers spill.
        # Converting FP8 needs registers too: half the keys.
        block_n = 64 if wide or shape.cache_dtype.itemsize == 1 else 128
        return [_Tile(128, block_n, 8, 2 if wide or block_n == 128 else 3, 1), _Tile(128, 64, 8, 2, 1), *smaller]
    if shape.softcap or shape.cache_dtype.itemsize == 1:
        return [_Tile(128, 32, 8, 3), _Tile(128, 32, 8, 2), *smaller]
    return [_Tile(128, 32 if wide else 64, 8, stages) for stages in (3, 2)] + smaller


def _decode_tiles(properties: GPUProperties, shape: AttentionShape, max_query_len: int) -> list[_Tile]:
    """From the fastest to the smallest.

    A decode waits for memory. By Little's law 4.3 TB/s at 1 µs are 32 KB under way on each of 132 SMs at least, and
    several times that to ride out bursts. 16 KB of keys and 16 KB of values per tile, two tiles ahead of the
    arithmetic, are 64 KB per program, of which three share an SM of Hopper.
    """
    rows = min(MAX_DECODE_ROWS, max_query_len * min(shape.group, MAX_DECODE_ROWS))
    block_m = max(16, 1 << (rows - 1).bit_length())
    if shape.dtype == torch.float32 or _has_no_mma(properties):
        return _FMA_TILES
    key_bytes = shape.block_d * shape.cache_dtype.itemsize
    block_n = min(128, max(16, 16384 // key_bytes))
    # What registers hold at head size 128: FP8 is converted there, and before Hopper both operands lie there.
    if shape.cache_dtype.itemsize == 1:
        block_n = min(block_n, 32 if shape.softcap else 64 if block_m > 16 or not properties.has_fp8 else 128)
    if block_m > 16 and not _has_large_mma(properties):
        block_n = max(16, block_n // 2)
    if properties.is_amd:
        return [_Tile(block_m, min(block_n, 64), 4, 2), _Tile(block_m, 16, 4, 1), _Tile(16, 16, 4, 1)]
    return [
        _Tile(block_m, block_n, 4, 3),
        _Tile(block_m, block_n, 4, 2),
        _Tile(block_m, max(16, block_n // 2), 4, 2),
        _Tile(16, 16, 4, 1),
    ]


def _has_large_mma(properties: GPUProperties) -> bool:
    """Whether tensor cores read their operands from shared memory: Hopper and data-centre Blackwell."""
    return properties.arch in ("sm_90", "sm_100", "sm_103")


def _has_no_mma(properties: GPUProperties) -> bool:
    """Triton has no tensor cores before Ampere: it multiplies with fused multiply-adds there."""
    return not properties.is_amd and int(properties.arch.removeprefix("sm_")) < 80


def _shared_bytes(properties: GPUProperties, shape: AttentionShape, tile: _Tile) -> int:
    """What the compiler takes at most, from the buffers that its pipeline was seen to allocate."""
    queries = tile.block_m * shape.block_d * shape.dtype.itemsize
    buffers = tile.num_stages
    if properties.is_amd:
        # Queries stay in registers; the probabilities pass through shared memory.
        queries = tile.block_m * tile.block_n * shape.dtype.itemsize
        buffers = max(1, tile.num_stages - 1)
    keys = tile.block_n * shape.block_d
    bytes_ = queries + 2 * buffers * keys * shape.cache_dtype.itemsize
    if shape.cache_dtype != shape.dtype:
        bytes_ += keys * shape.dtype.itemsize
    # The accumulator changes its layout on the way out, in place of all that; reductions across warps are small.
    return max(bytes_ + 2048, tile.block_m * shape.block_d * 4)


def _num_splits(properties: GPUProperties, shape: AttentionShape, tile: _Tile, programs: int, max_keys: int) -> int:
    """Programs per tile of queries, from the time of a batch whose rows all have ``max_keys`` keys.

    In units of a key tile's time: waves x (tiles of a split + 2 to fill and to drain the pipeline), and for several
    splits 2 + 1 per 16 splits for their sum. Among counts within 5% of the best the largest: rows are of
    different length, and smaller pieces even that out. But no more than _MAX_WAVES waves, since a split of a short row
    with nothing to do still costs its start.
    """
    per_sm = max(1, min(_MAX_PER_SM, properties.shared_memory_bytes // _shared_bytes(properties, shape, tile)))
    slots = properties.num_sms * per_sm
    tiles = -(-max_keys // tile.block_n)
    limit = min(_MAX_SPLITS, max(1, tiles // 2), max(1, _MAX_WAVES * slots // programs))

    def time(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (-(-tiles // splits) + 2) + (2 + splits / 16 if splits > 1 else 0)

    times = {splits: time(splits) for splits in range(1, limit + 1)}
    best = min(times.values())
    return max(splits for splits, cost in times.items() if cost <= 1.05 * best)
