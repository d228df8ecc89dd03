// The CPU's KV cache. Per block and KV head one contiguous piece: keys, then values, in groups of 16 tokens (the last group
// of a block is padded). Keys of a group are [D / E][16][E], values [16 / E][D][E], E = 2 elements of a contraction side by
// side for instructions that multiply and add pairs; E = 1 for float32. So a group's scores, and its share of the output,
// are sums over rows of vectors, without a shuffle. int8 brings a float32 scale per token and head: [keys' | values'].
#pragma once
#include "elementwise.h"
#include "simd.h"

constexpr int GROUP = 16;

struct CacheLayout {
    int64_t block_size, head_dim, groups, head_bytes, block_bytes, values_at, key_scales_at, value_scales_at;
    CacheLayout(int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int32_t dtype)
        : block_size(block_size), head_dim(head_dim), groups((block_size + GROUP - 1) / GROUP) {
        values_at = groups * GROUP * head_dim * size_of(dtype);
        key_scales_at = 2 * values_at;
        value_scales_at = key_scales_at + groups * GROUP * (int64_t)sizeof(float);
        head_bytes = key_scales_at + (dtype == FS_I8 ? 2 * groups * GROUP * (int64_t)sizeof(float) : 0);
        block_bytes = num_kv_heads * head_bytes;
    }
};
