// A decode's products by AMX tiles: 2 to 8 heads are few rows for a tile, but a group of keys is one: with 8 heads the
// dot-product instructions read 10 GB/s per core, tiles are bound by memory. Included by attention_decode.h.
#pragma once
#include "gemm.h"

namespace {

#if defined(__AMX_BF16__)
constexpr bool HAS_TILES = true;

// Tiles 0-3 accumulate G heads; 4 and 5 hold 32 and 16 numbers of each head, 6 and 7 what they meet, 16 and 8 pairs of rows.
template <int G>
void configure_decode_tiles() {
    constexpr int ID = -G;  // gemm_amx.h counts upwards
    if (configured_rows == ID) return;
    TileConfig config;
    constexpr uint8_t rows[8] = {G, G, G, G, G, G, 16, 8}, bytes[8] = {64, 64, 64, 64, 64, 32, 64, 64};
    for (int t = 0; t < 8; t++) {
        config.rows[t] = rows[t];
        config.bytes_per_row[t] = bytes[t];
    }
    _tile_loadconfig(&config);
    configured_rows = ID;
}

FS_INLINE void prefetch_bytes(const char* at, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) prefetch_l2(at + line);
}

#define FS_EACH_TILE(N, DO) \
    do {                    \
        DO(0);              \
        if (N > 1) DO(1);   \
        if (N > 2) DO(2);   \
        if (N > 3) DO(3);   \
    } while (0)

// Scores of N groups of keys.
template <int N>
FS_INLINE void score_groups(const KeyGroup* groups, const bf16* q, int64_t dim, float* scores) {
    const int64_t q_stride = dim * sizeof(bf16), tile_bytes = 1024;
#define FS_ZERO(T) _tile_zero(T)
#define FS_SCORE(T)                              \
    _tile_loadd(6, groups[T].keys + offset, 64); \
    _tile_dpbf16ps(T, 4, 6)
#define FS_SCORE_REST(T)                         \
    _tile_loadd(7, groups[T].keys + offset, 64); \
    _tile_dpbf16ps(T, 5, 7)
#define FS_STORE(T) _tile_stored(T, scores + T * GROUP, SEGMENT * sizeof(float))
    FS_EACH_TILE(N, FS_ZERO);
    int64_t d = 0, offset = 0;
    for (; d + 32 <= dim; d += 32, offset += tile_bytes) {
        _tile_loadd(4, q + d, q_stride);
        FS_EACH_TILE(N, FS_SCORE);
    }
    if (d < dim) {
        _tile_loadd(5, q + d, q_stride);
        FS_EACH_TILE(N, FS_SCORE_REST);
    }
    FS_EACH_TILE(N, FS_STORE);
}

template <int G>
void score_by_tiles(DecodeScratch& s, int num_groups, const bf16* q, int64_t dim) {
    configure_decode_tiles<G>();
    const int64_t group_bytes = GROUP * dim * sizeof(bf16);
    for (int i = 0; i < num_groups; i += 4) {
        const int count = std::min(4, num_groups - i);
        for (int n = 0; n < count; n++) prefetch_bytes(s.groups[i + n].values, group_bytes);
        float* scores = s.scores[0] + i * GROUP;
        if (count == 4)
            score_groups<4>(s.groups + i, q, dim, scores);
        else if (count == 3)
            score_groups<3>(s.groups + i, q, dim, scores);
        else if (count == 2)
            score_groups<2>(s.groups + i, q, dim, scores);
        else
            score_groups<1>(s.groups + i, q, dim, scores);
    }
}

// out[.., column ..] for N times 16 dimensions.
template <int N>
FS_INLINE void weigh_columns(const DecodeScratch& s, int num_groups, const char* last_values, int64_t column, int64_t dim,
                             const KeysAhead* ahead, float* out) {
    const int64_t value_stride = 2 * dim * sizeof(bf16);
    FS_EACH_TILE(N, FS_ZERO);
    for (int i = 0; i < num_groups; i++) {
        if (ahead && i < ahead->count) prefetch_bytes(ahead->keys[i], GROUP * dim * sizeof(bf16));
        const char* values = (i == num_groups - 1 ? last_values : s.groups[i].values) + column * 2 * sizeof(bf16);
        _tile_loadd(5, (const bf16*)s.coefs + i * GROUP, SEGMENT * sizeof(bf16));
#define FS_WEIGH(T)                                 \
    _tile_loadd(7, values + T * 64, value_stride); \
    _tile_dpbf16ps(T, 5, 7)
        FS_EACH_TILE(N, FS_WEIGH);
    }
#define FS_STORE_SUM(T) _tile_stored(T, out + column + T * GROUP, dim * sizeof(float))
    FS_EACH_TILE(N, FS_STORE_SUM);
}
#undef FS_ZERO
#undef FS_SCORE
#undef FS_SCORE_REST
#undef FS_STORE
#undef FS_WEIGH
#undef FS_STORE_SUM
#undef FS_EACH_TILE

template <int G>
void weigh_by_tiles(DecodeScratch& s, int num_groups, int64_t end, int64_t dim, float* out) {
    // Of the last group the sequence may have a part; what lies beyond may be anything, and 0 times NaN is NaN.
    const KeyGroup& last = s.groups[num_groups - 1];
    const char* last_values = last.values;
    const int64_t count = std::min(last.count, end - last.position);
    if (count < GROUP) {
        memset(s.last_values, 0, GROUP * dim * sizeof(bf16));
        memcpy(s.last_values, last.values, (count + 1) / 2 * 2 * dim * sizeof(bf16));
        if (count % 2)
            for (int64_t d = 0; d < dim; d++) s.last_values[(count / 2 * dim + d) * 2 + 1] = bf16{};
        last_values = (const char*)s.last_values;
    }
    const KeysAhead* ahead = &s.ahead;
    for (int64_t column = 0; column < dim; ahead = nullptr) {
        const int64_t left = dim - column;
        if (left >= 64)
            weigh_columns<4>(s, num_groups, last_values, column, dim, ahead, out);
        else if (left >= 48)
            weigh_columns<3>(s, num_groups, last_values, column, dim, ahead, out);
        else if (left >= 32)
            weigh_columns<2>(s, num_groups, last_values, column, dim, ahead, out);
        else
            weigh_columns<1>(s, num_groups, last_values, column, dim, ahead, out);
        column += std::min<int64_t>(left, 64);
    }
}
#else
constexpr bool HAS_TILES = false;
#endif

}  // namespace
