"""The kernel of paged attention, for mixed batches; of a decode's splits, the last to end sums up all.

A program takes one KV head, up to BLOCK_Q tokens of one row and the query heads that share the KV head: BLOCK_Q *
TILE_HEADS rows of a BLOCK_M tile, token-major. Keys and values are read once for all of them; a row of the tile costs
2 * D multiplications per key for 4 * D / BLOCK_M bytes of a 16-bit cache, so 128 rows keep a Hopper SM below 16 bytes
per clock at half its peak, where 64 rows need 32 and wait for L2. The causal mask spans only BLOCK_Q keys, not BLOCK_M.

Online softmax as in FlashAttention-2 (Dao, 2023): accumulators and statistics in float32, base-2 exponentials with
log2(e) folded into the scale. Masked scores are a large negative number, not -inf: a row that sees nothing of a tile
collects garbage of weight 1, which its first real key multiplies by exp2(-1e30 - m) = 0, so no tile needs a guard
against inf - inf. A split in which a row sees nothing leaves a log-sum of about -1e30: weight 0 in the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashserve_kernels.gpu.dependent import wait_for_inputs
from flashserve_kernels.gpu.dot import dot

MASKED = tl.constexpr(-1e30)
NEUTRAL = tl.constexpr(-1e29)  # log-sums below it belong to splits in which the row saw nothing


@triton.jit
def _row_of_tile(query_start_ptr, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The last row r with query_start[r] // BLOCK_Q + r <= tile: each row owns at least as many tiles as it fills."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _decode_e4m3(bits, dtype: tl.constexpr):
    """E4M3 bytes to float: the bits of 2^-8 times the value in float16, subnormals included (for sm_80 and older)."""
    bits = bits.to(tl.uint16)
    value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return (value * 256.0).to(dtype)


@triton.jit
def _load_cached(ptrs, mask, dtype: tl.constexpr, USE_MASK: tl.constexpr, E4M3_BYTES: tl.constexpr):
    """A tile of keys or values, in the type of the queries."""
    x = tl.load(ptrs, mask=mask, other=0.0) if USE_MASK else tl.load(ptrs)
    if E4M3_BYTES:
        return _decode_e4m3(x, dtype)
    return x.to(dtype)


@triton.jit
def _block_ids(table_ptr, start, end, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The block of each key of a tile, or one for all where a tile lies in a block; 0 from ``end`` on."""
    if BLOCK_N <= BLOCK_SIZE:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:  # noqa: RET505 - Triton compiles both without it
        offs_n = tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + start // BLOCK_SIZE + offs_n // BLOCK_SIZE, mask=start + offs_n < end, other=0)


@triton.jit
def _attend(
    acc,
    total,
    highest,
    q,
    positions,
    begin,
    end,
    first_key,
    end_key,
    k_ptr,
    v_ptr,
    table_ptr,
    stride_block,
    stride_slot,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    USE_MASK: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    E4M3_BYTES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys begin .. end - 1 in tiles of BLOCK_N (begin is a multiple of it); with USE_MASK those a query may see."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    # Block ids are loaded a tile ahead by hand: keys that depend on a load of their own iteration would cost the
    # pipeline two of its stages (with 3 stages it then has one buffer, and no load overlaps any arithmetic).
    blocks = _block_ids(table_ptr, begin, end, BLOCK_N, BLOCK_SIZE)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + offs_n
        loaded = (keys >= first_key) & (keys < end_key)
        # Block ids and offsets in 64 bits: a cache of 100 GB has more than 2^31 elements.
        if BLOCK_N <= BLOCK_SIZE:
            offsets = (blocks.to(tl.int64) * stride_block + (start % BLOCK_SIZE) * stride_slot) + offs_n * stride_slot
        else:
            offsets = blocks.to(tl.int64) * stride_block + (offs_n % BLOCK_SIZE) * stride_slot
        blocks = _block_ids(table_ptr, start + BLOCK_N, end, BLOCK_N, BLOCK_SIZE)
        offsets = offsets[:, None] + offs_d[None, :]
        # Stale entries may hold NaN, and 0 * NaN is NaN: what no query sees is not read.
        mask = loaded[:, None]
        if HEAD_DIM != BLOCK_D:
            in_head = (offs_d < HEAD_DIM)[None, :]
            mask = mask & in_head if USE_MASK else in_head
        k = _load_cached(k_ptr + offsets, mask, q.dtype, USE_MASK or HEAD_DIM != BLOCK_D, E4M3_BYTES)
        scores = dot(q, tl.trans(k), None)
        if USE_SOFTCAP:
            # cap * tanh(x / cap) = cap - 2 * cap / (1 + exp(2 x / cap)); 2 * log2(e) / cap is in the scale.
            scores = softcap - (2.0 * softcap) / (1.0 + tl.exp2(scores * scale))
        elif USE_MASK:
            scores = scores * scale
        if USE_MASK:
            visible = keys[None, :] <= positions[:, None]
            if USE_WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, MASKED)
        if USE_SOFTCAP or USE_MASK:
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - new_highest[:, None])
        else:
            # The scale joins the subtraction: one fused multiply-add per score.
            new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_highest[:, None])
        correction = tl.exp2(highest - new_highest)
        total = total * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        v = _load_cached(v_ptr + offsets, mask, q.dtype, USE_MASK or HEAD_DIM != BLOCK_D, E4M3_BYTES)
        acc = dot(p.to(q.dtype), v, acc)
        highest = new_highest
    return acc, total, highest


@triton.jit
def _sum_splits(
    partial_ptr,
    log_sums_ptr,
    rows,
    is_query,
    mask,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The splits' outputs, weighted by their share of the softmax's sum; in order, whichever of them ended last.

    One program reads all of a tile's splits (8B model, batch 1, 49 splits: 100 KB), so what counts is that its loads
    do not wait for each other: no address or mask depends on a load, and the loop says how many are under way.
    """
    STAGES: tl.constexpr = 4 if BLOCK_M * BLOCK_D <= 2048 else 2 if BLOCK_M * BLOCK_D <= 4096 else 1
    offs_s = tl.arange(0, 16)
    offs_d = tl.arange(0, BLOCK_D)
    highest = tl.full([BLOCK_M], MASKED, tl.float32)
    for first in range(0, num_splits, 16):
        found = is_query[:, None] & (first + offs_s < num_splits)[None, :]
        log_sums = tl.load(log_sums_ptr + rows[:, None] + (first + offs_s)[None, :], mask=found, other=MASKED)
        highest = tl.maximum(highest, tl.max(log_sums, 1))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in tl.range(0, num_splits, num_stages=STAGES):
        log_sums = tl.load(log_sums_ptr + rows + split, mask=is_query, other=MASKED)
        partial = tl.load(partial_ptr + ((rows + split) * HEAD_DIM)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        has_keys = log_sums > NEUTRAL
        weights = tl.where(has_keys, tl.exp2(log_sums - highest), 0.0)
        total += weights
        acc += tl.where(has_keys[:, None], partial * weights[:, None], 0.0)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(
    do_not_specialize=[
        "query_start_ptr",
        "seq_lens_ptr",
        "block_tables_ptr",
        "num_rows",
        "first_tile",
        "tiles_per_row",
        "min_queries",
        "max_queries",
        "window",
        "stride_table",
    ]
)
def attention_kernel(
    out_ptr,  # [T, H, D]
    partial_ptr,  # with SPLITS [T, H, splits, D] float32
    log_sums_ptr,  # with SPLITS [T, H, splits] float32, base 2
    arrivals_ptr,  # with SPLITS [rows * tiles_per_row * head tiles] int32, zero between launches
    q_ptr,  # [T, H, D]
    k_ptr,  # [blocks, BLOCK_SIZE, KV heads, D]; values have the same strides
    v_ptr,
    query_start_ptr,  # [R + 1] int32
    seq_lens_ptr,  # [R] int32
    block_tables_ptr,  # [R, B] int32
    num_rows,
    first_tile,  # without FIXED_TILES: that of the first row
    tiles_per_row,  # with FIXED_TILES
    min_queries,  # rows of fewer or more tokens belong to another launch
    max_queries,
    scale,  # with log2(e) and the keys' scale; with USE_SOFTCAP times 2 / cap
    softcap,  # times log2(e)
    value_scale,
    window,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_slot,
    stride_kv_head,
    stride_table,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    TILE_HEADS: tl.constexpr,  # of which a program takes so many
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIXED_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    E4M3_BYTES: tl.constexpr,
    MASK_ALL: tl.constexpr,  # without FIXED_TILES: as with them
    EDGE_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (tiles, head tiles, 1), or with FIXED_TILES (head tiles, rows * tiles_per_row, splits)."""
    wait_for_inputs(DEPENDENT)
    BLOCK_Q: tl.constexpr = BLOCK_M // TILE_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    if FIXED_TILES:
        # Decode: no search, which is a chain of dependent loads. Heads first: their keys lie side by side in a block.
        head_tile = tl.program_id(0)
        row = tl.program_id(1) // tiles_per_row
        query_start = tl.load(query_start_ptr + row)
        first_query = tl.program_id(1) % tiles_per_row * BLOCK_Q
    else:
        # Prefill: from the last tile on, because the last tiles of a row see the most keys and would end it late.
        tile = first_tile + tl.num_programs(0) - 1 - tl.program_id(0)
        head_tile = tl.program_id(1)
        row = _row_of_tile(query_start_ptr, tile, num_rows, BLOCK_Q)
        query_start = tl.load(query_start_ptr + row)
        first_query = (tile - (query_start // BLOCK_Q + row)) * BLOCK_Q
    num_queries = tl.load(query_start_ptr + row + 1) - query_start
    if (first_query >= num_queries) | (num_queries < min_queries) | (num_queries > max_queries):
        return
    seq_len = tl.load(seq_lens_ptr + row)
    kv_head = head_tile // HEAD_TILES
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    query = offs_m // TILE_HEADS
    first_head = head_tile % HEAD_TILES * TILE_HEADS
    is_query = (query < tl.minimum(BLOCK_Q, num_queries - first_query)) & (first_head + offs_m % TILE_HEADS < GROUP)
    mask = is_query[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    # The tile's place in 64 bits, the rows' from there in 32: they live through the loops, in half the registers.
    first_token = (query_start + first_query).to(tl.int64)
    first_head += kv_head * GROUP
    q_ptr += first_token * stride_q_token + first_head * stride_q_head
    q_offsets = query * stride_q_token + offs_m % TILE_HEADS * stride_q_head
    q = tl.load(q_ptr + q_offsets[:, None] + offs_d[None, :], mask=mask, other=0.0)

    # Rows of the tile without a query stand where the last query stands: they see what it sees.
    first_position = seq_len - num_queries + first_query
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
    positions = tl.minimum(first_position + query, last_position)
    end_key = last_position + 1
    first_key = 0
    begin = 0
    if USE_WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0)
        begin = first_key // BLOCK_N * BLOCK_N
    end = end_key
    if SPLITS:
        tiles_per_split = tl.cdiv(tl.cdiv(tl.maximum(end_key - begin, 0), BLOCK_N), tl.num_programs(2))
        begin = begin + tl.program_id(2) * tiles_per_split * BLOCK_N
        end = tl.minimum(begin + tiles_per_split * BLOCK_N, end_key)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], MASKED, tl.float32)
    table_ptr = block_tables_ptr + row.to(tl.int64) * stride_table
    k_ptr += kv_head * stride_kv_head
    v_ptr += kv_head * stride_kv_head
    # fmt: off
    if not FIXED_TILES and not MASK_ALL:
        # Keys that all queries of the tile see need no mask, which would cost a tenth of the time of a 128 x 128 tile.
        # (A decode waits for memory: it masks everything and keeps one loop, whose loads never drain in between.)
        if USE_WINDOW:
            all_see = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
            all_see = tl.minimum(all_see, end)
            acc, total, highest = _attend(
                acc, total, highest, q, positions, begin, all_see, first_key, end_key, k_ptr, v_ptr, table_ptr,
                stride_block, stride_slot, scale, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE,
                True, USE_WINDOW, USE_SOFTCAP, E4M3_BYTES, EDGE_STAGES)
            begin = tl.cdiv(all_see, BLOCK_N) * BLOCK_N
        unmasked_end = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, begin)
        acc, total, highest = _attend(
            acc, total, highest, q, positions, begin, unmasked_end, first_key, end_key, k_ptr, v_ptr, table_ptr,
            stride_block, stride_slot, scale, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE,
            False, USE_WINDOW, USE_SOFTCAP, E4M3_BYTES, None)
        begin = unmasked_end
    acc, total, highest = _attend(
        acc, total, highest, q, positions, begin, end, first_key, end_key, k_ptr, v_ptr, table_ptr,
        stride_block, stride_slot, scale, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE,
        True, USE_WINDOW, USE_SOFTCAP, E4M3_BYTES, EDGE_STAGES)
    # fmt: on

    nothing = total == 0.0  # a row of length 0 or a split without keys
    out = acc * (value_scale / tl.where(nothing, 1.0, total))[:, None]
    index = first_token * NUM_HEADS + first_head
    rows = query * NUM_HEADS + offs_m % TILE_HEADS
    if SPLITS:
        num_splits = tl.num_programs(2)
        partial_ptr += index * num_splits * HEAD_DIM
        log_sums_ptr += index * num_splits
        split_rows = rows * num_splits + tl.program_id(2)
        log_sum = tl.where(nothing, MASKED, highest + tl.log2(tl.where(nothing, 1.0, total)))
        tl.store(log_sums_ptr + split_rows, log_sum, mask=is_query)
        tl.store(partial_ptr + (split_rows * HEAD_DIM)[:, None] + offs_d[None, :], out, mask=mask)
        # All threads' stores, then the count, which releases them to whoever acquires the last one.
        tl.debug_barrier()
        arrivals_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") != num_splits - 1:
            return
        tl.store(arrivals_ptr, 0)  # as the next launch, or the next replay of a graph, wants it
        rows_of_splits = rows * num_splits
        out = _sum_splits(
            partial_ptr, log_sums_ptr, rows_of_splits, is_query, mask, num_splits, HEAD_DIM, BLOCK_D, BLOCK_M
        )
    out_ptr += index * HEAD_DIM
    tl.store(out_ptr + (rows * HEAD_DIM)[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
