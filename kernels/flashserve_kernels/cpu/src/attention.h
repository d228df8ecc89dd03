// The operation's arguments, and the ways through the cache that both kinds of attention share.
#pragma once
#include "activation.h"
#include "attention_dot.h"

constexpr float MASKED = -3e38f;

// FS_ATTENTION. p: q, cache, query_start_loc (int32 [R + 1]), seq_lens (int32 [R]), block_tables (int32), out, workspace
// (attention.py says how large; zero). i: query heads, KV heads, D, elements from row to row and from head to head of q,
// from row to row of out, block size, dtype of the cache, elements from row to row of the block tables, their columns,
// window (0: none), threads. f: scale, soft cap (0: none).
struct Attention {
    const char *q, *cache;
    const int32_t *query_start_loc, *seq_lens, *tables;
    char *out, *workspace;
    int64_t heads, kv_heads, heads_per_kv, dim, q_row, q_head, out_row, block_size;
    int32_t dtype, kv_dtype;
    int64_t table_row, table_columns, window, threads;
    float scale, softcap;
    CacheLayout layout;

    explicit Attention(const fs_op& op)
        : q((const char*)op.p[0]), cache((const char*)op.p[1]), query_start_loc((const int32_t*)op.p[2]),
          seq_lens((const int32_t*)op.p[3]), tables((const int32_t*)op.p[4]), out((char*)op.p[5]),
          workspace((char*)op.p[6]), heads(op.i[0]), kv_heads(op.i[1]), heads_per_kv(op.i[0] / op.i[1]), dim(op.i[2]),
          q_row(op.i[3]), q_head(op.i[4]), out_row(op.i[5]), block_size(op.i[6]), dtype(op.dtype),
          kv_dtype((int32_t)op.i[7]), table_row(op.i[8]), table_columns(op.i[9]), window(op.i[10]), threads(op.i[11]),
          scale((float)op.f[0]), softcap((float)op.f[1]), layout(op.i[1], op.i[2], op.i[6], (int32_t)op.i[7]) {}

    int64_t first_visible(int64_t position) const { return window && position >= window ? position + 1 - window : 0; }
    // Groups of 16 are numbered through a sequence's blocks, padding included.
    int64_t group_of(int64_t position) const {
        return position / block_size * layout.groups + position % block_size / GROUP;
    }
    const int32_t* table(int64_t row) const { return tables + row * table_row; }
};

// A group of up to 16 keys of one sequence and KV head.
struct KeyGroup {
    const char *keys, *values;
    const float *key_scales, *value_scales;
    int64_t position;  // of its first key
    int64_t count;     // of its lanes that are tokens of the block, not padding

    KeyGroup() = default;
    KeyGroup(const Attention& a, const int32_t* table, int64_t kv_head, int64_t group) {
        const int64_t column = group / a.layout.groups, inside = group % a.layout.groups;
        const char* piece = a.cache + table[column] * a.layout.block_bytes + kv_head * a.layout.head_bytes;
        const int64_t group_bytes = GROUP * a.dim * size_of(a.kv_dtype);
        keys = piece + inside * group_bytes;
        values = keys + a.layout.values_at;
        key_scales = (const float*)(piece + a.layout.key_scales_at) + inside * GROUP;
        value_scales = (const float*)(piece + a.layout.value_scales_at) + inside * GROUP;
        position = column * a.block_size + inside * GROUP;
        count = std::min<int64_t>(GROUP, a.block_size - inside * GROUP);
    }
};

FS_INLINE vi lane_numbers() {
    vi lanes;
    for (int l = 0; l < VL; l++) lanes[l] = l;
    return lanes;
}
